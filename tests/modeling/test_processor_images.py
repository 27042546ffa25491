"""Images in the processor: fractions and other arrays, transparency and its setting, base64."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from modeling.test_processor import draw_image, make_small, shown, user
from PIL import Image

from modeling_aligngpt import AlignGPTProcessor
from modeling_aligngpt.images_aligngpt import to_rgb


@pytest.fixture(scope="module")
def small():
    return make_small()


def pixels(processor, images, **kwargs):
    return processor(images=images, return_tensors="pt", **kwargs)["pixel_values"]


def test_arrays_are_the_pixels_that_they_stand_for(small):
    """Whatever an image is held in, the model sees the image; torchvision's `ToTensor` gives fractions."""
    image = draw_image()
    array = np.asarray(image)
    fractions = array / np.float32(255)
    chw = torch.from_numpy(fractions.transpose(2, 0, 1).copy())
    wanted = pixels(small, image)
    ways = [array, fractions, fractions.astype(np.float64), array.astype(np.float32), array.astype(np.int64), chw]
    ways += [fractions[None], chw[None], [chw], [[chw]], (fractions.astype(np.float16),), array.astype(np.uint16) * 257]
    ways += [chw.double().requires_grad_()]
    for given in ways:
        torch.testing.assert_close(pixels(small, given), wanted)
    torch.testing.assert_close(pixels(small, torch.stack([chw, chw])), torch.cat([wanted, wanted]))
    chat = [user(shown(chw), "What is it?")]
    asked = small.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    torch.testing.assert_close(asked["pixel_values"], wanted)
    for layout, given in (("channels_first", chw), ("channels_last", fractions)):
        torch.testing.assert_close(pixels(small, given, input_data_format=layout), wanted)
    mask = array[..., 0] > 100
    torch.testing.assert_close(pixels(small, mask), pixels(small, Image.fromarray(mask)))
    rgba = np.asarray(draw_image(mode="RGBA"))
    for given in (rgba, rgba / 255, rgba.transpose(2, 0, 1)):
        torch.testing.assert_close(pixels(small, given), pixels(small, Image.fromarray(rgba)))


def test_what_cannot_be_told_is_refused(small):
    image = np.asarray(draw_image()) / 255
    for values, low, high in ((image * 2 - 1, r"-1", r"0\.\d+"), (image * 300, r"0", r"\d+\.?\d*")):
        with pytest.raises(ValueError, match=rf"image 0: .* values run from {low} to {high}: scale them to 0 to 255"):
            small(images=values)
    for wrong, said in (
        (np.full((4, 4, 3), np.nan), "run from nan to nan"),
        (np.zeros((6, 4, 5)), r"shape \(6, 4, 5\) is no image"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\) is no image"),
        (np.zeros(4), r"shape \(4,\) is no image"),
        (np.array([["a", "b"]]), "holds no pixels"),
    ):
        with pytest.raises(ValueError, match=f"image 0: the image cannot be read .*{said}"):
            small(images=wrong)


def test_a_caller_may_scale_himself(small):
    """As transformers documents it: pixels of 0 to 1 with `do_rescale=False`, normalised ones besides."""
    image = draw_image(size=(8, 8))
    fractions = np.asarray(image).transpose(2, 0, 1) / np.float32(255)
    settings = {"do_rescale": False, "do_resize": False, "do_convert_rgb": False}
    torch.testing.assert_close(pixels(small, fractions, **settings), pixels(small, image, do_resize=False))
    normalised = fractions * 4 - 2
    for given in (settings | {"do_normalize": False}, {"images_kwargs": settings | {"do_normalize": False}}):
        torch.testing.assert_close(pixels(small, normalised, **given), torch.from_numpy(normalised)[None])


def half_clear() -> Image.Image:
    """Left half opaque, right half transparent with hidden colours, one pixel half transparent."""
    image = draw_image(mode="RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 10 + [0] * 10]), 12, axis=0)))
    image.putpixel((0, 0), (10, 20, 30, 128))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparency_is_white_or_dropped(mode):
    image = half_clear().convert(mode)
    flat, dropped = np.asarray(to_rgb(image)), np.asarray(to_rgb(image, "dropped"))
    assert (flat[:, 10:] == 255).all() and np.array_equal(flat[1:, :10], dropped[1:, :10])
    first = dropped[0, 0].astype(int)
    assert np.abs(flat[0, 0] - (first * 128 + 255 * 127) / 255).max() <= 1
    if mode == "RGBA":
        assert np.array_equal(dropped, np.asarray(image.convert("RGB"))) and (dropped[:, 10:] != 255).any()
    again = Image.fromarray(flat)
    assert to_rgb(again) is again


def test_the_setting_is_saved_with_the_processor(small, tmp_path):
    """New processors show white; what an earlier version saved names no setting, and reads as it did."""
    image = half_clear()
    flat, dropped = (pixels(small, to_rgb(image, way)) for way in ("white", "dropped"))
    torch.testing.assert_close(pixels(small, image), flat)
    small.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    assert saved["transparency"] == "white"
    torch.testing.assert_close(pixels(AlignGPTProcessor.from_pretrained(tmp_path), image), flat)
    del saved["transparency"]
    file.write_text(json.dumps(saved))
    earlier = AlignGPTProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(pixels(earlier, image), dropped)
    assert earlier.read_image(image).tobytes() == image.convert("RGB").tobytes()
    with pytest.raises(ValueError, match="transparency='black' is not one of white, dropped"):
        make_small(transparency="black")


def test_base64_as_transformers_reads_it(small):
    buffer = io.BytesIO()
    draw_image().save(buffer, "PNG")
    raw = base64.b64encode(buffer.getvalue()).decode()
    lines = base64.encodebytes(buffer.getvalue()).decode()
    wanted = pixels(small, draw_image())
    for given in (raw, lines, f"data:image/png;base64,{lines}"):
        torch.testing.assert_close(pixels(small, given), wanted)
        chat = [user({"type": "image", "base64": given}, "What is it?")]
        asked = small.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        torch.testing.assert_close(asked["pixel_values"], wanted)
    broken = base64.b64encode(buffer.getvalue()[20:]).decode()
    for given, said in (
        (broken, "as base64 it is damaged or of a format that is not accepted"),
        (broken[:-1], "there is no file"),
        (f"data:image/png;base64,{broken}", "damaged or of a format"),
        ("https://nowhere.invalid/" + broken, "cannot be fetched"),
    ):
        with pytest.raises(ValueError, match=f"image 0 .*{said}") as caught:
            small(images=given)
        assert len(str(caught.value)) < 400
        assert not any(given[i : i + 61] in str(caught.value) for i in range(len(given) - 60))
