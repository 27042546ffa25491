"""Images of every kind, by themselves and through loading, collating and scoring."""

import base64
import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from stage_parts import IMAGE_SIZE

from aligngpt_trainers import AlignGPTDataCollator
from aligngpt_trainers.data.load import load_image, load_rows


RED, BLUE = (200, 10, 20), (20, 10, 200)


def draw_image(colour=RED, size=(6, 4), mode="RGB"):
    return PILImage.new("RGB", size, colour).convert(mode)


def encode(image, **options):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


class TestLoadImage:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I", "F"])
    def test_grey_survives_every_mode(self, mode):
        grey = 255 if mode == "1" else 153  # a colour of the palette
        image = load_image(draw_image((grey,) * 3, mode=mode))
        assert image.mode == "RGB" and image.size == (6, 4)
        assert np.abs(np.asarray(image).astype(int) - grey).max() <= 1

    def test_values_of_every_kind(self, tmp_path):
        path = tmp_path / "a.png"
        draw_image().save(path)
        values = [draw_image(), path, str(path), path.read_bytes(), {"path": str(path), "bytes": None}]
        values += [{"path": "gone.png", "bytes": path.read_bytes()}, np.asarray(draw_image())]
        for value in values:
            assert load_image(value).tobytes() == draw_image().tobytes()
        assert load_image(np.full((4, 6, 1), 9, np.uint8)).getpixel((0, 0)) == (9, 9, 9)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_keep_their_gradations(self, kind):
        deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        image = load_image(encode(PILImage.fromarray(deep), format=kind))
        assert np.abs(np.asarray(image)[..., 0].astype(int).ravel() - np.arange(256)).max() <= 1

    def test_the_authors_way_drops_transparency(self):
        clear = PILImage.new("RGBA", (6, 4), (200, 0, 0, 0))
        clear.putpixel((1, 1), (*BLUE, 255))
        for source in (clear, encode(clear)):
            assert load_image(source, transparency="dropped").tobytes() == clear.convert("RGB").tobytes()
        palette = draw_image(mode="P")
        gif = load_image(encode(palette, transparency=palette.getpixel((0, 0))), transparency="dropped")
        assert gif.tobytes() == palette.convert("RGB").tobytes()

    def test_32_bit_greyscale_of_any_values(self):
        """Constant images and those without a finite value are what they are: no row is lost to them."""
        deep = {"I": np.full((4, 6), 100_000, np.int32), "F": np.full((4, 6), -3, np.float32)}
        deep |= {"nothing": np.full((4, 6), np.nan, np.float32), "ramp": np.linspace(-7, 9, 24, dtype=np.float32)}
        deep["ramp"] = np.concatenate([deep["ramp"][:22], np.float32([np.nan, np.inf])]).reshape(4, 6)
        images = {name: PILImage.fromarray(values) for name, values in deep.items()}
        rows = load_rows([{"image": image, "caption": name} for name, image in images.items()])
        assert len(rows) == 4
        for row, name in zip(rows.cast_column("images", List(Image(decode=False))), deep, strict=True):
            read = [np.asarray(load_image(image)) for image in (images[name], row["images"][0])]
            assert np.array_equal(*read) and len(np.unique(read[0])) == (22 if name == "ramp" else 1)
            if name == "ramp":
                assert read[0].min() == 0 and read[0].max() == 255 == read[0][3, 5, 0]

    def test_arrays_in_rows(self):
        image = draw_image()
        array = np.asarray(image)
        given = [array, array.astype(np.float64) / 255, torch.from_numpy(array.transpose(2, 0, 1) / np.float32(255))]
        rows = load_rows([{"image": each, "caption": "a"} for each in given] + [{"images": [array], "caption": "a"}])
        assert [row["images"][0].tobytes() for row in rows] == [image.tobytes()] * 4
        bad = {"image": array / 255 - 1, "caption": "a"}
        with pytest.raises(ValueError, match=r"row 0: unusable image value .* run from -0.9\d+ to -0.2\d+: scale them"):
            load_rows([bad])
        assert len(load_rows([bad, {"image": image, "caption": "a"}], on_bad_row="skip")) == 1

    def test_no_error_prints_long_data(self, tmp_path):
        letters = "".join(chr(65 + (7 * i * i + i) % 26) for i in range(5000))
        long_path = str(tmp_path / letters[:150] / f"{letters[:200]}.png")
        for source in (long_path, letters, f"data:image/png;base64,{letters}", f"https://example.com/{letters}"):
            doors = [load_image, lambda source: load_rows([{"image": source, "caption": "a"}])]
            # a data URL is a row's image, decoded when the row is read
            for door in doors[: 1 if ":" in source else 2]:
                with pytest.raises(ValueError) as caught:
                    door(source)
                assert not any(source[i : i + 61] in str(caught.value) for i in range(len(source) - 60))
        with pytest.raises(ValueError, match=rf"no file '.*{letters[170:200]}\.png'"):
            load_image(long_path)

    def test_orientation_of_the_camera(self):
        image = draw_image()
        image.putpixel((0, 0), BLUE)
        exif = PILImage.Exif()
        exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
        upright = load_image(encode(image, exif=exif))
        assert upright.size == (4, 6) and upright.getpixel((3, 0)) == BLUE

    def test_first_frame_of_an_animation(self):
        frames = [draw_image(RED), draw_image(BLUE)]
        moving = encode(frames[0], format="GIF", save_all=True, append_images=frames[1:])
        assert PILImage.open(io.BytesIO(moving)).n_frames == 2
        assert np.abs(np.asarray(load_image(moving).getpixel((0, 0))) - RED).max() <= 2

    def test_errors_name_row_file_and_remedy(self, tmp_path):
        noisy = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (tmp_path / "cut.jpg").write_bytes(encode(noisy, format="JPEG")[:600])
        (tmp_path / "page.png").write_text("<html>")
        for name in ("cut.jpg", "page.png", "gone.png"):
            with pytest.raises(ValueError, match=rf"row 17: image cannot be read \(file '.*{name}'\): .*on_bad_row"):
                load_image({"path": str(tmp_path / name), "bytes": None}, 17)
        with pytest.raises(ValueError, match=r"row x: image cannot be read \(7 bytes of 'a\.png' stored"):
            load_image({"path": "a.png", "bytes": b"nothing"}, "x")
        with pytest.raises(ValueError, match="download the image first"):
            load_image("https://example.com/a.png")

    def test_16_bits_with_alpha_and_big_endian(self):
        deep = np.full((4, 6), 0x8000, np.uint16)
        for image in (PILImage.fromarray(deep), PILImage.frombytes("I;16B", (6, 4), deep.astype(">u2").tobytes())):
            assert set(np.asarray(load_image(image)).ravel()) == {128}

    def test_colour_of_cmyk_jpegs(self):
        image = load_image(encode(draw_image(mode="CMYK"), format="JPEG", quality=95))
        assert np.abs(np.asarray(image).astype(int) - RED).max() <= 8

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_first_frame_of_other_animations(self, kind):
        frames = [draw_image(RED), draw_image(BLUE)]
        moving = encode(frames[0], format=kind, save_all=True, append_images=frames[1:], duration=100)
        assert np.abs(np.asarray(load_image(moving).getpixel((0, 0)), dtype=int) - RED).max() <= 40


def kinds() -> dict[str, bytes]:
    """A red image in every shape that data sets bring, encoded; what of it must survive is that it is red."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    grey = PILImage.fromarray((np.arange(24).reshape(4, 6) * 2700).astype(np.uint16))
    frames = [draw_image(BLUE)]
    return {
        "jpeg": encode(draw_image(), format="JPEG", quality=95),
        "palette": encode(draw_image(mode="P")),
        "alpha": encode(draw_image(mode="RGBA")),
        "cmyk": encode(draw_image(mode="CMYK"), format="JPEG", quality=95),
        "turned": encode(draw_image(), format="JPEG", exif=exif, quality=95),
        "animated gif": encode(draw_image(), format="GIF", save_all=True, append_images=frames),
        "animated webp": encode(
            draw_image(), format="WEBP", save_all=True, append_images=frames, duration=9, quality=100
        ),
        "one pixel wide": encode(draw_image(size=(1, 40))),
        "one pixel high": encode(draw_image(size=(40, 1))),
        "one pixel": encode(draw_image(size=(1, 1))),
        "tiff": encode(draw_image(), format="TIFF"),
        "bmp": encode(draw_image(), format="BMP"),
        "greyscale": encode(draw_image((70, 70, 70), mode="L")),
        "black and white": encode(draw_image((255, 255, 255), mode="1")),
        "16-bit": encode(grey),
        **transparent_kinds(),
    }


def transparent_kinds() -> dict[str, bytes]:
    """Red (or grey) images whose right half is transparent and hides blue (or black)."""
    half = PILImage.new("RGBA", (6, 4), (*RED, 255))
    half.paste((*BLUE, 0), (3, 0, 6, 4))
    palette = half.convert("RGB").convert("P", palette=PILImage.Palette.ADAPTIVE, colors=2)
    deep = np.full((4, 6), 0x8000, np.uint16)
    deep[:, 3:] = 5
    clear = palette.getpixel((5, 0))
    alphas = bytes(255 * (entry != clear) for entry in range(2))
    return {
        "RGBA": encode(half),
        "RGBA in WebP": encode(half, format="WEBP", lossless=True, exact=True),
        "LA": encode(half.convert("LA")),
        "PA": encode(half.convert("PA"), format="TIFF"),
        "P with a transparent entry": encode(palette, transparency=clear),
        "P with an alpha for each entry": encode(palette, transparency=alphas),
        "RGB with a transparent colour": encode(half.convert("RGB"), transparency=BLUE),
        "transparent GIF": encode(palette, format="GIF", transparency=clear),
        "16-bit grey with a transparent value": encode(PILImage.fromarray(deep), transparency=5),
    }


def through_every_other_door(processor, data: bytes, path) -> dict[str, torch.Tensor]:
    """What a model that is asked sees: by the processor, in a chat, by the server's and the demo's reader."""
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = {"path": str(path), "Path": path, "bytes": data, "address": address}
    forms |= {"PIL": PILImage.open(io.BytesIO(data)), "datasets": {"path": None, "bytes": data}}
    seen = {
        f"processor, {name}": processor(images=form, text="<image>", return_tensors="pt")["pixel_values"]
        for name, form in forms.items()
    }
    for key, form in (("path", str(path)), ("url", address), ("image", forms["PIL"])):
        chat = [{"role": "user", "content": [{"type": "image", key: form}, {"type": "text", "text": "what?"}]}]
        asked = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        seen[f"chat, {key}"] = asked["pixel_values"]
    read = processor.read_image(address, allow_urls=False)
    seen["server and demo"] = processor.image_processor(read, return_tensors="pt")["pixel_values"]
    return seen


GREY = ("greyscale", "black and white", "16-bit")


@pytest.fixture(scope="module")
def assembled_once(parts):
    from modeling_aligngpt.assembly import assemble

    return assemble(*parts, num_align_levels=4, gate_hidden_size=16, seed=0)


class TestThroughTheCollator:
    """Every kind, as a path, as bytes and as a PIL image, gives the same pixels that the model sees."""

    @pytest.mark.parametrize("do_pad", [False, True])
    @pytest.mark.parametrize("kind", list(kinds()))
    def test_kind(self, assembled_once, tmp_path, kind, do_pad):
        processor = assembled_once[1]
        processor.image_processor.do_pad = do_pad
        data = kinds()[kind]
        (tmp_path / "image").write_bytes(data)
        caption = {"caption": ["a thing"]}
        sources = {
            "path": Dataset.from_dict({"image": [str(tmp_path / "image")], **caption}),
            "bytes": Dataset.from_dict({"image": [{"bytes": data, "path": None}], **caption}),
            "binary": Dataset.from_dict({"image": [data], **caption}),
            "typed": Dataset.from_dict(
                {"images": [[data]], **caption}, Features({"images": List(Image()), "caption": Value("string")})
            ),
            "record": [{"image": str(tmp_path / "image"), "caption": "a thing"}],
            "PIL": [{"image": PILImage.open(io.BytesIO(data)), "caption": "a thing"}],
        }
        collator = AlignGPTDataCollator(processor, "instruct")
        pixels = {}
        for name, source in sources.items():
            rows = load_rows(source).cast_column("images", List(Image(decode=False)))
            pixels[name] = collator([rows[0]])["pixel_values"]
        expected = processor.image_processor(load_image(data), return_tensors="pt")["pixel_values"]
        assert expected.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and torch.isfinite(expected).all()
        pixels |= through_every_other_door(processor, data, tmp_path / "image")
        for name, found in pixels.items():
            assert torch.equal(found, expected), name
        redness = (expected[0, 0] - expected[0, 2]).max()  # somewhere: the padding is grey
        assert redness < 0.6 if kind in GREY or kind == "LA" or "grey" in kind else redness > 1
        if kind in transparent_kinds():
            assert np.asarray(load_image(data))[0, 5].tolist() == [255, 255, 255]
            hidden = load_image(data, transparency="dropped")
            assert hidden.tobytes() != load_image(data).tobytes() and max(hidden.getpixel((5, 0))[:2]) < 50
            processor.transparency = "dropped"
            rows = load_rows(sources["bytes"]).cast_column("images", List(Image(decode=False)))
            found = collator([rows[0]])["pixel_values"]
            processor.transparency = "white"
            assert torch.equal(found, processor.image_processor(hidden, return_tensors="pt")["pixel_values"])


def test_an_orientation_that_cannot_be_read_is_left_alone():
    data = encode(draw_image(), format="JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f", quality=95)
    assert load_image(data).size == (6, 4)


def test_a_decompression_bomb_is_an_error_with_a_name(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"row big: image cannot be read.*pixels"):
        load_image(encode(draw_image()), "big")
