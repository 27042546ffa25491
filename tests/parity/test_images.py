"""Pixel values of both image modes, from the image processor of the converted checkpoints."""

import numpy as np
import pytest
import torch
from parity.golden import GOLDEN, TENSOR_FILES, assert_close, draw_image, read, read_json
from PIL import Image


NAMES = read_json("preprocess_images")["files"]


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_preprocessed_images(mode, stage1_processor, stage2_processor):
    processor = stage2_processor if mode == "pad" else stage1_processor
    values = processor.image_processor([draw_image(name) for name in NAMES], return_tensors="pt")["pixel_values"]
    assert_close(values, read("preprocess_images")[mode], mode)
    # as files, one of them transparent: a converted checkpoint drops that, as their code does
    values = processor(images=[GOLDEN / "images" / name for name in NAMES], return_tensors="pt")["pixel_values"]
    assert_close(values, read("preprocess_images")[mode], mode)


def test_padding_to_a_square(stage2_processor):
    facts, tensors = read_json("preprocess_images"), read("preprocess_images")
    image_processor = stage2_processor.image_processor
    background = tuple(int(255 * mean) for mean in image_processor.image_mean)
    assert list(background) == facts["background"]
    for index, name in enumerate(NAMES):
        pixels = np.asarray(draw_image(name)).transpose(2, 0, 1)
        padded = image_processor.pad_to_square(pixels, background_color=background).transpose(1, 2, 0)
        assert [padded.shape[1], padded.shape[0]] == facts["padded_size"][index]
        theirs = tensors[f"padded_uint8_{index}"]
        small = Image.fromarray(padded).resize((theirs.shape[1], theirs.shape[0]), Image.Resampling.NEAREST)
        assert torch.equal(torch.from_numpy(np.array(small)), theirs), name


def _recorded_images():
    """(file, row, image) for every row of a recorded batch that has an image."""
    records = [("stage1_forward", read_json("stage1_records"))]
    records += [
        (name, read_json(name)["records"])
        for name in TENSOR_FILES
        if name.startswith("stage2_") and "after" not in name
    ]
    records += [(f"infer_{prompt['name']}", [prompt]) for prompt in read_json("inference")]
    return [
        (name, row, record["image"]) for name, rows in records for row, record in enumerate(rows) if record.get("image")
    ]


@pytest.mark.parametrize(("name", "row", "image"), _recorded_images())
def test_images_of_recorded_batches(name, row, image, stage1_processor, stage2_processor):
    processor = stage1_processor if name.startswith("stage1") else stage2_processor
    values = processor.image_processor([draw_image(image)], return_tensors="pt")["pixel_values"]
    assert_close(values[0], read(name)["pixel_values"][row], "pixel_values")
