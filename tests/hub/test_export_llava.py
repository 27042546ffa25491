"""`aligngpt export`: the same model as a plain LLaVA, at a level and at a mixture, and what cannot be one."""

import json
import re

import pytest
import torch
import zygote
from demo_model import save_demo_model
from engines.make_models import save_sentencepiece_model
from modeling.tiny import LLAMA, SIGLIP, randomize, tiny_model
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from aligngpt_hub.engines import llava_check
from aligngpt_hub.engines.llava import check_exportable, write_llava
from aligngpt_hub.engines.llava_check import check_equal, load_processor
from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.new_processor import processor_from_parts


QUESTION = "what is in the picture?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    save_demo_model(folder / "bpe")
    save_sentencepiece_model(folder / "sentencepiece")
    ramp = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    rows = []
    for index in range(4):
        ramp.rotate(40 * index).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "a whale"}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def asked(processor, image):
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=text, images=[image], add_special_tokens=False, return_tensors="pt")


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("level", ["0", "7"])
def test_the_export_answers_as_the_model_at_its_level(world, tmp_path, name, level):
    output = tmp_path / "llava"
    assert cli.main(["export", "--model", str(world / name), "--output", str(output), "--align-level", level]) == 0
    assert not list(output.glob("*.py")), "it needs no code"
    assert json.loads((output / "config.json").read_text())["model_type"] == "llava"
    model = AlignGPTForConditionalGeneration.from_pretrained(world / name).eval()
    plain = LlavaForConditionalGeneration.from_pretrained(output).eval()
    image = Image.open(world / "1.png")
    ours, theirs = asked(AlignGPTProcessor.from_pretrained(world / name), image), asked(load_processor(output), image)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    with torch.inference_mode():
        expected = model(**ours, align_level=int(level)).logits
        torch.testing.assert_close(plain(**theirs).logits, expected, atol=1e-5, rtol=1e-5)
        other = model(**ours, align_level=3).logits
        assert (other - expected).abs().max() > 1e-2, "the levels do not matter here"
        same = model.generate(**ours, align_level=int(level), max_new_tokens=8, do_sample=False)
        assert plain.generate(**theirs, max_new_tokens=8, do_sample=False).tolist() == same.tolist()


def test_of_a_large_model_two_layers_are_checked(world, tmp_path, monkeypatch):
    source = tmp_path / "deep"
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "bpe")
    values = {**model.config.to_dict(), "text_config": {**model.config.text_config.to_dict(), "num_hidden_layers": 4}}
    randomize(AlignGPTForConditionalGeneration(AlignGPTConfig(**values))).save_pretrained(source)
    AlignGPTProcessor.from_pretrained(world / "bpe").save_pretrained(source)
    tmp_path.joinpath("out").mkdir()
    weights = [0.0] * 7 + [1.0]
    write_llava(source, tmp_path / "out", weights)
    whole = check_equal(source, tmp_path / "out", weights)
    monkeypatch.setattr(llava_check, "LARGEST_WHOLE", 1000)
    ran = []
    monkeypatch.setattr(llava_check, "_load", lambda *args, load=llava_check._load: ran.append(load(*args)) or ran[-1])
    part = check_equal(source, tmp_path / "out", weights)
    assert [len(model.model.language_model.layers) for model in ran] == [2, 2]
    assert part["largest_difference"] < 1e-4 and part["largest_logit"] != whole["largest_logit"]
    # what was written wrongly is found there as well
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        plain.lm_head.weight[3] += 1
    plain.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="it is not the same"):
        check_equal(source, tmp_path / "out", weights)


def test_names_are_those_of_llava_hf(world, tmp_path):
    tmp_path.joinpath("out").mkdir()
    write_llava(world / "bpe", tmp_path / "out", [0.0] * 7 + [1.0])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.lm_head.weight" in names, "the head is apart from the embeddings"
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert {"<image>", "<align>"} <= set(added)


def test_a_mixture_is_the_gates_mean_and_its_cost_is_measured(world, tmp_path, capsys):
    output = tmp_path / "llava"
    words = f"export --model {world / 'bpe'} --output {output} --align-level calibrated --data {world / 'rows.json'}"
    assert cli.main(words.split()) == 0
    record = json.loads((output / "export.json").read_text())
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "bpe").eval()
    processor = AlignGPTProcessor.from_pretrained(world / "bpe")
    with torch.inference_mode():
        shares = [model(**asked(processor, Image.open(world / f"{index}.png"))).align_weights[0] for index in range(4)]
    assert record["level_weights"] == pytest.approx(torch.stack(shares).mean(0).tolist(), abs=1e-4)
    assert record["cost"]["rows"] == 4 and 0 <= record["cost"]["same_answers"] <= 1
    assert record["check"]["largest_difference"] < 1e-4
    said = capsys.readouterr().out
    assert f"{record['cost']['same_answers']:.1%} of the first answers equal the gate's" in said
    card = (output / "README.md").read_text()
    assert "on 4 conversations of rows.json" in card and f"{record['cost']['loss']:.4f}" in card
    assert not re.search(r"/tmp|/home|/work", card)


def test_the_loss_is_that_of_the_supervised_tokens(world, tmp_path):
    """At the level that the model itself takes, gate and export have one loss."""
    source = tmp_path / "fixed"
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "bpe")
    model.config.align_mode = "global"
    model.save_pretrained(source)
    AlignGPTProcessor.from_pretrained(world / "bpe").save_pretrained(source)
    output = tmp_path / "llava"
    assert cli.main(f"export --model {source} --output {output} --data {world / 'rows.json'}".split()) == 0
    cost = json.loads((output / "export.json").read_text())["cost"]
    assert cost["same_answers"] == 1 and cost["loss"] == pytest.approx(cost["loss_of_the_gate"], abs=1e-5)


def test_transformers_alone_loads_it(world, tmp_path):
    assert cli.main(["export", "--model", str(world / "bpe"), "--output", str(tmp_path / "llava")]) == 0
    program = (
        "import sys\nfrom transformers import pipeline\n"
        "ask = pipeline('image-text-to-text', model=sys.argv[1])\n"
        "content = [{'type': 'image', 'url': sys.argv[2]}, {'type': 'text', 'text': 'what is it?'}]\n"
        "print(ask(text=[{'role': 'user', 'content': content}], max_new_tokens=8)[0]['generated_text'][-1]['role'])\n"
        "assert not [name for name in sys.modules if name.startswith(('aligngpt', 'modeling_aligngpt'))]\n"
    )
    words = [str(tmp_path / "llava"), str(world / "1.png")]
    done = zygote.run(program, words, folder=tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("assistant"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_scales": [1, 2]}, r"vision_scales=\[1, 2\]"),
        ({"lm_head_bias": True}, "a head with a bias"),
        ({"text_config": {"model_type": "cohere", "logit_scale": 0.5}}, "logits scaled by 0.5"),
        ({"text_config": {"model_type": "gemma2", "final_logit_softcapping": 30.0}}, "soft-capped logits"),
    ],
)
def test_what_llava_lacks_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_exportable(tiny_model(**settings).config)


def test_a_siglip_tower_is_the_same_in_the_export(world, tmp_path):
    """All its tokens are kept; names and logits as with CLIP's."""
    processor = AlignGPTProcessor.from_pretrained(world / "sentencepiece")
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "align")}
    text = {**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    config = AlignGPTConfig(vision_config=SIGLIP, text_config=text, gate_hidden_size=8, **ids)
    assert config.num_prefix_tokens == 0 and config.vision_feature_select_strategy == "full"
    randomize(AlignGPTForConditionalGeneration(config)).save_pretrained(tmp_path / "siglip")
    template = processor.chat_template
    processor_from_parts(tokenizer, config, chat_template=template).save_pretrained(tmp_path / "siglip")
    assert cli.main(["export", "--model", str(tmp_path / "siglip"), "--output", str(tmp_path / "llava")]) == 0
    check = json.loads((tmp_path / "llava" / "export.json").read_text())["check"]
    assert check["largest_difference"] < 1e-5 < check["largest_logit"]
