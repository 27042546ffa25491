"""Images at several scales (S2): the plain formula, sizes, saving, other towers, and what is refused."""

import pytest
import torch
from modeling.test_assembly import save_language_model, save_tower
from modeling.tiny import CLIP, IMAGE_SIZE, MIXED_ROWS, SEQ_LENGTH, SIGLIP, make_batch, prompts, tiny_config, tiny_model
from PIL import Image

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble


SCALES = [1, 2, 3]
GRID = 2


def scaled_batch(scales=SCALES):
    batch = make_batch(MIXED_ROWS)
    size = IMAGE_SIZE * scales[-1]
    generator = torch.Generator().manual_seed(3)
    batch["pixel_values"] = torch.randn(len(batch["pixel_values"]), 3, size, size, generator=generator)
    return batch


def plain_features(model, image, scales, drops_class_token: bool) -> torch.Tensor:
    """The paper's recipe for one image, tile by tile and cell by cell: `(S, V * scales)`."""
    of_scales = []
    for scale in scales:
        size = IMAGE_SIZE * scale
        resized = torch.nn.functional.interpolate(image[None], (size, size), mode="bicubic", align_corners=False)[0]
        cells = torch.zeros(GRID * scale, GRID * scale, model.config.vision_config.hidden_size)
        for top in range(scale):
            for left in range(scale):
                rows, columns = (slice(i * IMAGE_SIZE, (i + 1) * IMAGE_SIZE) for i in (top, left))
                states = model.model.vision_tower(resized[:, rows, columns][None], output_hidden_states=True)
                tokens = states.hidden_states[-2][0, int(drops_class_token) :]
                for place, token in enumerate(tokens):
                    cells[top * GRID + place // GRID, left * GRID + place % GRID] = token
        pooled = [
            cells[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale].mean((0, 1))
            for i in range(GRID)
            for j in range(GRID)
        ]
        of_scales.append(torch.stack(pooled))
    return torch.cat(of_scales, dim=1)


@pytest.mark.parametrize("scales", [[1], [1, 2], SCALES, [1, 3]])
@pytest.mark.parametrize(("vision", "strategy"), [(CLIP, "default"), (SIGLIP, "full")], ids=["clip", "siglip"])
def test_features_are_the_plain_formula(scales, vision, strategy):
    model = tiny_model(vision_config=vision, vision_feature_select_strategy=strategy, vision_scales=scales)
    images = scaled_batch(scales)["pixel_values"]
    with torch.no_grad():
        plain = torch.stack([plain_features(model, image, scales, strategy == "default") for image in images])
        projected = torch.stack(model.get_image_features(images).pooler_output)
        torch.testing.assert_close(projected, model.model.multi_modal_projector(plain), rtol=1e-4, atol=1e-5)
        flipped = model.model.multi_modal_projector(plain.roll(16, dims=-1)) if len(scales) > 1 else projected + 1
    assert (projected - flipped).abs().max() > 1e-2


def test_one_scale_is_the_tower_alone():
    batch = make_batch(MIXED_ROWS)
    with torch.no_grad():
        assert torch.equal(tiny_model(vision_scales=[1])(**batch).logits, tiny_model()(**batch).logits)


@pytest.mark.parametrize(("vision", "strategy"), [(CLIP, "default"), (SIGLIP, "full")], ids=["clip", "siglip"])
def test_train_generate_save_and_load(tmp_path, vision, strategy):
    model = tiny_model(vision_config=vision, vision_feature_select_strategy=strategy, vision_scales=SCALES)
    model.model.vision_tower.requires_grad_(False)
    assert model.config.image_seq_length == SEQ_LENGTH
    assert model.model.multi_modal_projector.linear_1.in_features == 3 * vision["hidden_size"]
    batch = scaled_batch()
    outputs = model(**batch, labels=batch["input_ids"])
    outputs.loss.backward()
    assert (model.model.multi_modal_projector.linear_1.weight.grad.abs().sum(0) > 0).all()  # every scale is read
    inputs = {**prompts(MIXED_ROWS), "pixel_values": batch["pixel_values"]}
    answers = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.vision_scales == SCALES
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), answers)


def test_gradients_reach_images_and_a_tower_that_trains():
    model, batch = tiny_model(vision_scales=[1, 2]), scaled_batch([1, 2])
    batch["pixel_values"].requires_grad_()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert batch["pixel_values"].grad.abs().sum() > 0
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_bfloat16():
    model, batch = tiny_model(vision_scales=SCALES), scaled_batch()
    with torch.no_grad():
        exact = model.get_image_features(batch["pixel_values"]).pooler_output[0]
        rounded = model.bfloat16().get_image_features(batch["pixel_values"].bfloat16()).pooler_output[0]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"vision_scales": []}, "rising whole numbers"),
        ({"vision_scales": [2, 3]}, "from 1 on"),
        ({"vision_scales": [1, 3, 2]}, "rising"),
        ({"vision_scales": [1, 1]}, "rising"),
        ({"vision_scales": [1, 1.5]}, "whole"),
        ({"vision_scales": [1, 2], "vision_feature_select_strategy": "full"}, "class token"),
    ],
)
def test_scales_that_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=f"vision_scales.*{said}"):
        tiny_config(**kwargs)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"vision_scales=\[1, 2, 3\] needs images of 24x24, got 8x8"):
        tiny_model(vision_scales=SCALES)(**make_batch(MIXED_ROWS))


@pytest.mark.parametrize("tower", ["clip", "siglip tower"])
@pytest.mark.parametrize("do_pad", [True, False])
def test_assembled_with_its_processor(tmp_path, tower, do_pad):
    language_model, tower = save_language_model(tmp_path / "llm"), save_tower(tmp_path / "tower", tower)
    model, processor = assemble(language_model, tower, align_mode="gate", do_pad=do_pad, vision_scales=[1, 2])
    image = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    inputs = processor(images=[image], text=["<image>\nWhat is it?"], return_tensors="pt")
    size = 2 * model.config.vision_config.image_size
    assert inputs["pixel_values"].shape == (1, 3, size, size)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
    assert torch.isfinite(model(**inputs).logits).all()
    processor.save_pretrained(tmp_path / "saved")
    loaded = AlignGPTProcessor.from_pretrained(tmp_path / "saved")
    loaded.validate_with(model.config)
    again = loaded(images=[image], text=["<image>\nWhat is it?"], return_tensors="pt")["pixel_values"]
    assert torch.equal(again, inputs["pixel_values"])
    model.config.vision_scales = [1, 2, 3]
    with pytest.raises(ValueError, match="largest of vision_scales"):
        processor.validate_with(model.config)
