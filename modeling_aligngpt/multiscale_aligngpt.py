"""
S2, images at several resolutions through a tower made for one (arXiv 2403.13043; the paper's resolution variant).

The image is resized to each scale, cut into tiles of the tower's own size, and the tiles' features are put together
again, averaged down to the grid of the first scale and concatenated on channels: more to see, no more positions.
Shape suffixes: I images, S positions, V hidden size of the tower, K scales.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


def multiscale_features(
    pixel_values: torch.Tensor,
    scales: Sequence[int],
    tile_size: int,
    features_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Args:
        pixel_values (`(I, 3, height, width)`): images at the largest scale, `tile_size * scales[-1]` square.
        scales (K ints): factors of `tile_size`, rising, the first 1.
        tile_size: height and width of the images that the tower was made for.
        features_of: the tower, from `(images, 3, tile_size, tile_size)` to `(images, S, V)`.

    Returns:
        `(I, S, K * V)`.

    Raises:
        ValueError: images of another size.
    """
    largest = tile_size * scales[-1]
    if pixel_values.shape[-2:] != (largest, largest):
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"vision_scales={list(scales)} needs images of {largest}x{largest}, got {height}x{width}: set size and "
            "crop_size of the image processor to it (AlignGPTProcessor.from_parts does)."
        )
    features = []
    for scale in scales:
        images = pixel_values
        if scale != scales[-1]:
            size = (tile_size * scale, tile_size * scale)
            images = nn.functional.interpolate(pixel_values.float(), size=size, mode="bicubic").to(pixel_values.dtype)
        grid = _from_tiles(features_of(_to_tiles(images, scale)), scale)
        if scale > 1:
            grid = nn.functional.avg_pool2d(grid.float(), scale).to(grid.dtype)
        features.append(grid.flatten(2).transpose(1, 2))
    return torch.cat(features, dim=-1)


def _to_tiles(images: torch.Tensor, scale: int) -> torch.Tensor:
    """`(I, 3, scale * t, scale * t)` to `(I * scale * scale, 3, t, t)`, row by row of each image."""
    num_images, channels, height, width = images.shape
    tiles = images.reshape(num_images, channels, scale, height // scale, scale, width // scale)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // scale, width // scale)


def _from_tiles(features: torch.Tensor, scale: int) -> torch.Tensor:
    """`(I * scale * scale, S, V)` to the grid of whole images, `(I, V, scale * g, scale * g)` with `g * g = S`."""
    tiles, length, channels = features.shape
    side = round(length**0.5)
    grid = features.reshape(tiles // scale**2, scale, scale, side, side, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, scale * side, scale * side)
