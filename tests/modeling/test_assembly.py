"""`assemble`: an untrained AlignGPT whose parts are those of two checkpoints."""

import math

import pytest
import torch
from modeling.tiny import CLIP, IMAGE_SIZE, LLAMA, PATCH_SIZE, SIGLIP, randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    CLIPImageProcessor,
    CLIPModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTModel,
)

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble, extend_rows, padded_vocabulary_size
from modeling_aligngpt.backbones import BackboneError


SAME_TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def chatml_tokenizer():
    """Byte-level, without placeholders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def save_language_model(folder, generation_config=None, **text):
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values = {**LLAMA, **ids, "vocab_size": len(tokenizer), **text}
    model = randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)))
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    return folder


def save_tower(folder, kind: str, mean=0.4):
    vision = CLIP if kind.startswith("clip") else SIGLIP
    if kind.endswith("tower"):
        model = AutoModel.from_config(AutoConfig.for_model(**vision))
    else:
        text, parts = dict(SAME_TEXT), {"clip": CLIPModel, "siglip": SiglipModel}
        model_class = parts[kind]
        parts = {"text_config": text, "vision_config": {k: v for k, v in vision.items() if k != "model_type"}}
        model = model_class(model_class.config_class(**parts, **({"projection_dim": 16} if kind == "clip" else {})))
    randomize(model).save_pretrained(folder)
    size = {"shortest_edge": IMAGE_SIZE} if kind.startswith("clip") else {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size=size, crop_size=IMAGE_SIZE, image_mean=[mean] * 3).save_pretrained(folder)
    return folder


def tower_config(model_type, **values):
    return AutoConfig.for_model(model_type, **{name: CLIP[name] for name in SIGLIP if name != "model_type"} | values)


def save_with_processor(folder, model, image_size=IMAGE_SIZE):
    randomize(model).save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def language_model(tmp_path):
    return save_language_model(tmp_path / "language model")


@pytest.fixture
def tower(tmp_path):
    return save_tower(tmp_path / "tower", "clip")


@pytest.mark.parametrize("kind", ["clip", "clip tower", "siglip", "siglip tower"])
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "phi", "partial_rotary_factor": 0.5},
        {"model_type": "qwen2"},
    ],
    ids=["llama", "llama tied", "phi with a head bias", "qwen2"],
)
def test_weights_are_the_parts(tmp_path, kind, text):
    language_model, tower = save_language_model(tmp_path / "lm", **text), save_tower(tmp_path / "tower", kind)
    model, processor = assemble(language_model, tower)
    causal_lm, vision = AutoModelForCausalLM.from_pretrained(language_model), AutoModel.from_pretrained(tower)
    old = causal_lm.config.vocab_size
    size = padded_vocabulary_size(len(processor.tokenizer))
    assert size % 64 == 0 and size >= old + 2
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == size

    ours, theirs = model.state_dict(), causal_lm.state_dict()
    heads = [name for name in theirs if name.startswith("lm_head.")]
    for name, weight in theirs.items():
        our_weight = ours[name if name in heads else name.replace("model.", "model.language_model.", 1)]
        assert torch.equal(our_weight[: len(weight)], weight), name
        if len(our_weight) > len(weight):
            assert name in (*heads, "model.embed_tokens.weight")
    assert ("lm_head.bias" in heads) == model.config.lm_head_bias == (text.get("model_type") == "phi")
    if "bias" in str(heads):
        torch.testing.assert_close(model.lm_head.bias[old:], theirs["lm_head.bias"].mean().expand(size - old))
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings == text.get("tie_word_embeddings", False)

    tower_weights = getattr(vision, "vision_model", vision).state_dict()
    assert tower_weights.keys() == model.model.vision_tower.state_dict().keys()
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, tower_weights[name]), name
    strategy = "default" if kind.startswith("clip") else "full"
    assert model.config.vision_feature_select_strategy == strategy
    assert model.config.image_seq_length == processor.image_seq_length == (IMAGE_SIZE // PATCH_SIZE) ** 2
    assert not model.training and all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("kind", ["tower", "classifier"])
def test_a_pooler_is_not_needed(tmp_path, language_model, kind):
    config = tower_config("vit")
    classifier = AutoModelForImageClassification.from_config(config)
    model = ViTModel(config, add_pooling_layer=False) if kind == "tower" else classifier
    folder = save_with_processor(tmp_path / "vit", model)
    tower = assemble(language_model, folder)[0].model.vision_tower
    stored = getattr(model, "vit", model).state_dict()
    poolers = tower.state_dict().keys() - stored.keys()
    assert poolers == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, stored.get(name, torch.zeros_like(weight))), name
    # any other weight is
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layernorm.bias"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vit lacks 1 weights of a vit \(layernorm.bias\)"):
        assemble(language_model, folder)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip_vision_model"])
def test_the_image_side_of_any_dual_encoder(tmp_path, language_model, family):
    text = BertConfig(**SAME_TEXT)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower_config(family), text, projection_dim=8)
    dual = VisionTextDualEncoderModel(config)
    model, _ = assemble(language_model, save_with_processor(tmp_path / "dual", dual))
    tower, stored = model.model.vision_tower.state_dict(), dual.vision_model.state_dict()
    assert tower.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(stored[name], tower[name])] == []


# ---- another image size than the tower's ----

OWN_SIZE = 20


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize(
    "family",
    ["clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa"],
)
def test_another_image_size_is_as_the_family_itself_interpolates(tmp_path, language_model, family, size):
    tower = AutoModel.from_config(tower_config(family, image_size=OWN_SIZE))
    folder = save_with_processor(tmp_path / "tower", tower, OWN_SIZE)
    model, processor = assemble(language_model, folder, image_size=size)
    assert model.config.image_seq_length == processor.image_seq_length == (size // PATCH_SIZE) ** 2
    inputs = processor(images=Image.linear_gradient("L").convert("RGB"), text="<image>what?", return_tensors="pt")
    images = inputs["pixel_values"]
    assert images.shape[-2:] == (size, size)
    # DINO's towers do it unasked
    asked = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = tower(images, **asked).last_hidden_state
        assert torch.equal(model.model.vision_tower(images).last_hidden_state, expected)
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path / "saved")
        loaded, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert torch.equal(loaded(**inputs).logits, logits)


def test_a_size_is_a_multiple_of_the_patches_and_two_sizes_are_said(tmp_path, language_model, caplog):
    tower = AutoModel.from_config(tower_config("dinov2", image_size=OWN_SIZE))
    folder = save_with_processor(tmp_path / "tower", tower, IMAGE_SIZE)
    assert assemble(language_model, folder)[0].config.image_seq_length == 25
    assert (
        "its config says images of 20 pixels, which is what the model takes (25 tokens an image); its image processor "
        "makes 8. For those: `aligngpt init --image-size 8`." in caplog.text
    )
    caplog.clear()
    assert assemble(language_model, folder, image_size=IMAGE_SIZE)[0].config.image_seq_length == 4
    assert assemble(language_model, folder, image_size=OWN_SIZE)[0].config.image_seq_length == 25
    assert "image processor makes" not in caplog.text
    with pytest.raises(ValueError, match="image_size=22 is no multiple of the tower's patch_size 4: take 20 or 24"):
        assemble(language_model, folder, image_size=22)
    with pytest.raises(ValueError, match="image_size=-3 is no multiple of the tower's patch_size 4: take 4 or 8"):
        assemble(language_model, folder, image_size=-3)


def test_a_size_that_is_no_multiple_stays_if_it_is_the_towers_own(tmp_path, language_model):
    """SigLIP's 384 pixels in patches of 14."""
    tower = AutoModel.from_config(tower_config("siglip_vision_model", image_size=11))
    model, _ = assemble(language_model, save_with_processor(tmp_path / "tower", tower, 11), image_size=11)
    assert model.config.image_seq_length == 4


def test_new_rows_are_at_the_mean_and_placeholders_differ(language_model, tower):
    model, processor = assemble(language_model, tower)
    old = AutoModelForCausalLM.from_pretrained(language_model)
    for ours, theirs in (
        (model.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (model.lm_head.weight, old.lm_head.weight),
    ):
        mean = theirs.mean(0)
        torch.testing.assert_close(ours[processor.image_token_id], mean)
        torch.testing.assert_close(ours[-1], mean)
        assert len(ours) > len(theirs)
    rows = model.get_input_embeddings().weight
    assert not torch.equal(rows[processor.image_token_id], rows[processor.align_token_id])
    torch.testing.assert_close(rows[processor.align_token_id], rows[processor.image_token_id], rtol=0.02, atol=1e-6)
    assert extend_rows(rows, 3) is rows


def test_a_vocabulary_that_is_padded_already_stays(tmp_path, tower):
    model, processor = assemble(save_language_model(tmp_path / "lm", vocab_size=512), tower)
    assert model.config.text_config.vocab_size == 512 > len(processor.tokenizer)


def test_generation_config(tmp_path, tower):
    settings = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=7)
    model, processor = assemble(save_language_model(tmp_path / "lm", settings), tower)
    ours, end = model.generation_config, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    size = model.config.text_config.vocab_size
    padded = range(len(processor.tokenizer), size)
    assert ours.suppress_tokens == sorted({processor.image_token_id, processor.align_token_id, *padded})
    assert (ours.temperature, ours.do_sample, ours.pad_token_id) == (0.3, True, processor.tokenizer.pad_token_id)
    assert ours.eos_token_id == [7, end]
    image = Image.new("RGB", (10, 6), "red")
    inputs = processor(images=image, text="<image> what?", return_tensors="pt")
    torch.manual_seed(0)
    answer = model.generate(**inputs, max_new_tokens=40, min_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    assert len(answer) == 40 and int(answer.max()) < len(processor.tokenizer)
    assert not set(answer.tolist()) & {processor.image_token_id, processor.align_token_id}


def test_the_seed_alone_draws_what_is_new(language_model, tower):
    def new(model):
        inner = model.model
        parts = (inner.multi_modal_projector, inner.align_gate, inner.align_embeddings)
        return [p for part in parts for p in part.parameters()]

    torch.manual_seed(1)
    first = assemble(language_model, tower)[0]
    state = torch.get_rng_state()
    second = assemble(language_model, tower)[0]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    other = assemble(language_model, tower, seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(new(first), new(second), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(new(first), new(other), strict=True) if a.ndim > 1)


def test_the_level_table_starts_as_the_authors_does(language_model, tower):
    assembled = assemble(language_model, tower)[0]
    for model in (assembled, AlignGPTForConditionalGeneration(assembled.config)):
        table = model.model.align_embeddings.weight.detach()
        bound = math.sqrt(6 / sum(table.shape))  # xavier_uniform over the whole table
        assert 0.9 * bound < float(table.abs().max()) <= bound
        assert float(table.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_processor_and_template(language_model, tower):
    _, processor = assemble(language_model, tower)
    assert isinstance(processor, AlignGPTProcessor)
    assert processor.chat_template == CHAT_TEMPLATES["chatml"]  # the tokenizer has its marks
    assert not processor.image_processor.do_pad
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    _, processor = assemble(language_model, tower, chat_template="plain", do_pad=True)
    assert processor.chat_template == CHAT_TEMPLATES["plain"] and processor.image_processor.do_pad


def test_fields_of_the_config_and_dtype(language_model, tower):
    model, _ = assemble(
        language_model, tower, dtype=torch.bfloat16, num_align_levels=5, gate_hidden_size=4, align_mode="gate"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.align_embeddings.weight.shape[0] == 5
    assert model.model.align_gate.linear_1.out_features == 4
    assert model.config.align_mode == "gate"
    assert assemble(language_model, tower)[0].config.align_mode == "level"


def test_saved_and_loaded_again(tmp_path, language_model, tower):
    model, processor = assemble(language_model, tower)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "saved")
    again = AlignGPTProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    image = Image.linear_gradient("L").convert("RGB")
    batches = [p(images=image, text="<image>what is it?", return_tensors="pt") for p in (processor, again)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, loaded(**batches[1]).logits)


def test_it_trains(language_model, tower):
    model, processor = assemble(language_model, tower)
    image = Image.linear_gradient("L").convert("RGB")
    batch = processor(images=image, text="<image>a grey ramp", return_tensors="pt")
    model.requires_grad_(False)
    for part in (model.model.multi_modal_projector, model.model.align_embeddings):
        part.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        losses.append(model(**batch, labels=batch["input_ids"], align_level=2).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_refused(tmp_path, language_model, tower):
    with pytest.raises(ValueError, match="chat_template='latin' is not one of vicuna_v1"):
        assemble(language_model, tower, chat_template="latin")
    with pytest.raises(BackboneError, match=r"no such folder.*config cannot be read"):
        assemble(tmp_path / "no such folder", tower)
    with pytest.raises(ValueError, match="yields 4 tokens"):
        assemble(language_model, tower, image_seq_length=9)
    with pytest.raises(BackboneError, match=r"vision_feature_layer=-9 is not one of its 3 layers"):
        assemble(language_model, tower, vision_feature_layer=-9)
