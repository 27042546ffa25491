"""`push_to_hub` by hand, a model from the Hub published again, and LoRA adapters: code and card stay with them."""

import io
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from local_hub.client import run_command, run_python, run_script
from local_hub.server import HubServer
from modeling.test_loading import build
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.dynamic_module_utils import custom_object_save

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.configuration_aligngpt import AUTO_MAP


CODE = {"configuration_aligngpt.py", "modeling_aligngpt.py", "generation_aligngpt.py", "compat_v4.py"}
PROCESSOR_CODE = {"processing_aligngpt.py", "images_aligngpt.py"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return build("llama, clip", tmp_path_factory.mktemp("saved"))


PUSH = """
import sys
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
AlignGPTForConditionalGeneration.from_pretrained(sys.argv[1]).push_to_hub("user/by-hand")
AlignGPTProcessor.from_pretrained(sys.argv[1]).push_to_hub("user/by-hand")
"""

# someone with transformers alone takes it on: a copy on disk, and one of their own on the Hub
TAKE_ON = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("user/by-hand", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("user/by-hand", trust_remote_code=True)
for part in (model, processor):
    part.save_pretrained(sys.argv[1])
    part.push_to_hub("user/taken-on")
inputs = processor(images=Image.new("RGB", (8, 8), "red"), text="<image>", return_tensors="pt")
print(json.dumps(model(**inputs).logits[0, -1].tolist()))
"""


@pytest.fixture(scope="module")
def by_hand(hub, saved):
    result = run_python(hub, PUSH, [saved], token=hub.token)
    assert result.returncode == 0, result.stderr[-4000:]
    return hub.files("models", "user/by-hand")


@pytest.fixture(scope="module")
def taken_on(hub, by_hand, tmp_path_factory):
    """(the folder that was saved, logits)."""
    folder = tmp_path_factory.mktemp("taken on") / "copy"
    return folder, run_script(hub, TAKE_ON, [folder], token=hub.token)


ASK_THE_LLAVA = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
found = {"revision": "llava"}
model = AutoModelForImageTextToText.from_pretrained("user/both", **found)
processor = AutoProcessor.from_pretrained("user/both", **found)
image = {"type": "image", "image": Image.new("RGB", (8, 8), "red")}
message = {"role": "user", "content": [image, {"type": "text", "text": "what?"}]}
made = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([message], **made)
print(json.dumps([type(model).__name__, inputs["input_ids"][0].tolist(), model(**inputs).logits[0, -1].tolist()]))
"""


def test_a_plain_llava_stands_beside_it_for_those_who_run_no_code(hub, saved):
    result = run_command(hub, "publish", saved, "--repo-id", "user/both", "--with-llava", "3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "as a plain LLaVA, without code: revision='llava'" in result.stdout
    name, ids, logits = run_script(hub, ASK_THE_LLAVA, [], token=hub.token)
    assert name == "LlavaForConditionalGeneration"
    model = AlignGPTForConditionalGeneration.from_pretrained(saved).eval()
    processor = AlignGPTProcessor.from_pretrained(saved)
    content = [{"type": "image", "image": Image.new("RGB", (8, 8), "red")}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")  # fmt: skip
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        expected = model(**inputs, align_level=3).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
    # main is the AlignGPT with its code, the branch holds nothing of it
    assert "modeling_aligngpt.py" in hub.files("models", "user/both")
    there = hub.files("models", "user/both", "llava")
    assert "config.json" in there and not [file for file in there if file.endswith(".py")]
    assert b"LlavaForConditionalGeneration" in there["config.json"]


def test_a_card_leads_with_a_picture_and_the_models_answer(hub, saved, tmp_path):
    Image.linear_gradient("L").resize((900, 600)).save(tmp_path / "ramp.jpg")
    words = ["publish", saved, "--repo-id", "user/shown", "--example", tmp_path / "ramp.jpg", "what is it?"]
    result = run_command(hub, *words)
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.files("models", "user/shown")
    card = ModelCard(files["README.md"].decode()).content
    model = AlignGPTForConditionalGeneration.from_pretrained(saved).eval()
    processor = AlignGPTProcessor.from_pretrained(saved)
    content = [{"type": "image", "image": str(tmp_path / "ramp.jpg")}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    shown = " ".join(answer.split()) or "(no answer)"
    head = card[card.index("![what is it?](assets/example.png)") : card.index("AlignGPT ([arXiv")]
    assert f"> **{shown}**" in head
    assert Image.open(io.BytesIO(files["assets/example.png"])).size == (512, 341)


def test_what_cannot_be_a_llava_is_said_before_anything_is_sent(hub, saved):
    result = run_command(hub, "publish", saved, "--repo-id", "user/neither", "--with-llava", "99")
    assert result.returncode == 2 and "align level 99 is not in 0..7" in result.stderr
    with pytest.raises(KeyError):
        hub.files("models", "user/neither")


def same_files(one: dict[str, bytes], other: dict[str, bytes], names: set[str]) -> None:
    assert names <= one.keys() & other.keys()
    assert [name for name in names if one[name] != other[name]] == []


def test_push_to_hub_keeps_the_code(by_hand, saved, taken_on):
    same_files(by_hand, {path.name: path.read_bytes() for path in saved.iterdir()}, CODE | PROCESSOR_CODE)
    assert json.loads(by_hand["config.json"])["auto_map"] == AUTO_MAP
    here = red_logits(AlignGPTForConditionalGeneration.from_pretrained(saved), PROCESSOR(saved))
    assert (here - torch.tensor(taken_on[1])).abs().max() < 1e-5


def test_what_was_taken_on_stands_alone(hub, by_hand, taken_on):
    """Pushed again, it carries its own code and does not point back to where it came from."""
    files = hub.files("models", "user/taken-on")
    same_files(files, by_hand, CODE | PROCESSOR_CODE)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        auto_map = json.loads(files[name])["auto_map"]
        assert auto_map and all("--" not in target for target in auto_map.values()), name


def test_published_again_it_keeps_code_and_card(hub, by_hand, taken_on, tmp_path):
    """Someone wrote the card on the Hub; this folder has no records to write a better one from."""
    page = tmp_path / "page"
    for name, content in by_hand.items():
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        (page / name).write_bytes(content)
    card = b"---\nlibrary_name: transformers\ntags:\n- mine\n---\n\nWritten by hand.\n"
    (page / "README.md").write_bytes(card)
    (page / "model-00001-of-00002.safetensors").write_bytes(b"of an older version")
    hub.commit_folder("models", "user/by-hand", page)
    result = run_command(hub, "publish", taken_on[0], "--repo-id", "user/by-hand")
    assert result.returncode == 0, result.stderr
    assert "the card stays" in result.stdout
    files = hub.files("models", "user/by-hand")
    assert files["README.md"] == card
    same_files(files, by_hand, CODE | PROCESSOR_CODE | {"model.safetensors"})
    assert "model-00001-of-00002.safetensors" not in files, "weights that would mix with the new ones go"


ADAPTED = """
import json, sys
from PIL import Image
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
repo, revision = "user/adapter", sys.argv[1]
adapter = PeftConfig.from_pretrained(repo, revision=revision)
base = AutoModelForImageTextToText.from_pretrained(
    adapter.base_model_name_or_path,
    revision=adapter.revision,
    config=AutoConfig.from_pretrained(repo, revision=revision, trust_remote_code=True),
    trust_remote_code=True,
)
model = PeftModel.from_pretrained(base, repo, revision=revision).eval()
processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (8, 8), "red"), text="<image>", return_tensors="pt")
print(json.dumps([model.config.align_mode, adapter.revision, model(**inputs).logits[0, -1].tolist()]))
"""


@pytest.fixture(scope="module")
def adapter(saved, tmp_path_factory):
    """(folder of an adapter for the gate, on a base that is at stage 1; the base's folder; logits here)."""
    base = tmp_path_factory.mktemp("base")
    for part in (AlignGPTForConditionalGeneration.from_pretrained(saved, align_mode="level"), PROCESSOR(saved)):
        part.save_pretrained(base)
    model = AlignGPTForConditionalGeneration.from_pretrained(base, align_mode="gate")
    config = LoraConfig(
        target_modules=r".*language_model.*\.q_proj", r=2, modules_to_save=["multi_modal_projector", "align_gate"]
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    PROCESSOR(saved).save_pretrained(folder)
    # as training saves it: with the code and the config of what was trained
    custom_object_save(model, folder, config=model.config)
    model.config.auto_map = dict(AUTO_MAP)
    model.config.save_pretrained(folder)
    return folder, base, red_logits(adapted.eval(), PROCESSOR(saved))


PROCESSOR = AlignGPTProcessor.from_pretrained


@torch.no_grad()
def red_logits(model, processor) -> torch.Tensor:
    inputs = processor(images=Image.new("RGB", (8, 8), "red"), text="<image>", return_tensors="pt")
    return model(**inputs).logits[0, -1]


def test_an_adapter(hub, adapter):
    """Refused while only this machine has its base; published with one, it loads and answers as here."""
    folder, base, here = adapter
    hub.add_repo("models", "user/base", base)
    words = ["publish", folder, "--repo-id", "user/adapter", "--tag", "v1"]
    refused = run_command(hub, *words)
    assert refused.returncode == 2 and "--base-model USER/NAME" in refused.stderr and "aligngpt merge" in refused.stderr
    missing = run_command(hub, *words, "--base-model", "user/missing")
    assert missing.returncode == 2 and "user/missing does not exist" in missing.stderr
    assert ("models", "user/adapter") not in hub.repos
    result = run_command(hub, *words, "--base-model", "user/base")
    assert result.returncode == 0, result.stderr
    assert "an image answered" in result.stdout, "tried on the base that is here"
    files = hub.files("models", "user/adapter")
    assert CODE | PROCESSOR_CODE | {"adapter_model.safetensors", "config.json", "chat_template.jinja"} <= files.keys()
    sent, commit = json.loads(files["adapter_config.json"]), hub.commits("models", "user/base")[0].sha
    assert (sent["base_model_name_or_path"], sent["revision"]) == ("user/base", commit)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (["user/base"], "peft")
    assert card.data.base_model_relation == "adapter"
    assert "PeftModel.from_pretrained(base, repo" in card.content and commit in card.content
    hub.commit_folder("models", "user/base", folder, "another model")
    mode, revision, logits = run_script(hub, ADAPTED, ["v1"])
    assert (mode, revision) == ("gate", commit)
    assert (here - torch.tensor(logits)).abs().max() < 1e-5
