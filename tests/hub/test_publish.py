"""Publishing to a local Hub by the real client, and loading from it where nothing of ours is installed."""

import json
import shutil
from pathlib import Path

import documents
import pytest
import torch
import yaml
from datasets import Dataset, Image, List
from huggingface_hub import ModelCard, parse_eval_result_entries
from local_hub.client import run_command, run_script
from local_hub.pairs import features, rows, save
from local_hub.server import HubServer
from modeling import fresh_process
from modeling.test_loading import build, transformers_4  # noqa: F401  (a fixture)

from aligngpt_hub.publishing.model import publish
from aligngpt_trainers.commands.train import instruct_command, pretrain_command
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


REPO = "user/tiny"
QUESTION = "What is it?"

SUMMARY = {
    "stage": "instruct",
    "align_mode": "gate",
    "num_align_levels": 8,
    "train_rows": 665298,
    "steps": 5197,
    "epochs": 1.0,
    "batch_size": 128,
    "learning_rate": 2e-5,
    "hyperparameters": {"optimizer": "adamw_torch_fused", "warmup_steps": 0.03},
    "loss_curve": [[1, 2.5], [2, 1.9], [3, 1.4]],
    "sources": {"model": "pretrain", "dataset": "liuhaotian/LLaVA-Instruct-150K", "dataset_revision": "9d451dc"},
    "pretrain": {
        "stage": "pretrain",
        "train_rows": 558128,
        "steps": 2180,
        "loss_curve": [[1, 6.5], [2, 4.0]],
        "sources": {
            "dataset": "scored",
            "language_model": "lmsys/vicuna-7b-v1.5",
            "vision_tower": "openai/clip-vit-large-patch14-336",
        },
        "alignment": {
            "method": "uniform",
            "num_align_levels": 2,
            "edges": [0.1, 0.2, 0.4],
            "counts": [58128, 500000],
            "mean_scores": [0.17, 0.31],
            "scorer": "openai/clip-vit-large-patch14-336",
            "revision": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
            "rows": {"read": 558130, "scored": 558128, "unreadable_images": 2, "captions_cut": 11},
        },
    },
}
POPE = {"task": "pope", "dataset": "lmms-lab/POPE", "split": "test", "metric": "accuracy", "value": 86.0}
EVALUATION = {
    "date": "2024-05-29",
    "seed": 0,
    "results": [{**POPE, "task_version": 1, "num_samples": 9000, "paper_7b": 86.0, "paper_13b": 86.2}],
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model as training leaves it: records, checkpoints and what else lies about."""
    folder = build("llama, clip", tmp_path_factory.mktemp("saved"))
    (folder / "training_summary.json").write_text(json.dumps(SUMMARY))
    (folder / "evaluation_results.json").write_text(json.dumps(EVALUATION))
    (folder / "checkpoint-3").mkdir()
    torch.save({"step": 3}, folder / "checkpoint-3" / "optimizer.pt")
    torch.save({"output_dir": str(folder)}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder)}))
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def published(hub, saved, tmp_path_factory):
    """(what the command said, commit) of a first publication with a tag."""
    page = tmp_path_factory.mktemp("page")
    (page / "README.md").write_text("---\nlicense: llama2\n---\n")
    hub.add_repo("models", "lmsys/vicuna-7b-v1.5", page)
    result = run_command(hub, "publish", saved, "--repo-id", REPO, "--tag", "v1")
    assert result.returncode == 0, result.stderr
    return result.stdout, hub.commits("models", REPO)[0].sha


@pytest.fixture(scope="module")
def here(saved):
    """Greedy ids of the folder in this process."""
    return answer(AlignGPTForConditionalGeneration.from_pretrained(saved), AlignGPTProcessor.from_pretrained(saved))


def answer(model, processor) -> list[int]:
    inputs = processor(images=fresh_process.draw_image(0), text=f"<image>\n{QUESTION}", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


# ---- what is published ----


def test_one_commit_with_everything(hub, published, saved):
    said, commit = published
    assert commit in said and f"{hub.url}/{REPO}/commit/" in said and "an image answered" in said
    commits = hub.commits("models", REPO)
    assert [c.title for c in commits] == ["AlignGPT after stage 2 (5,197 steps)", "initial commit"]
    files = hub.files("models", REPO)
    sent = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    stays = {"checkpoint-3/optimizer.pt", "training_args.bin", "trainer_state.json"}
    written = {"README.md", "loss_curve.png", ".eval_results/pope.yaml", ".gitattributes"}
    assert files.keys() == (sent - stays) | written
    assert all(files[name] == (saved / name).read_bytes() for name in sent - stays)
    assert commits[0].tree["model.safetensors"].lfs
    assert not any(path.name in written for path in saved.rglob("*")), "the folder itself is not touched"


def test_the_card(hub, published):
    files = hub.files("models", REPO)
    card = ModelCard(files["README.md"].decode())
    data = card.data
    assert (data.pipeline_tag, data.library_name, data.language) == ("image-text-to-text", "transformers", ["en"])
    assert data.base_model == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert {"aligngpt", "arxiv:2405.14129"} <= set(data.tags)
    # the parts' licences are not known here, so the whole has no simple one
    assert (data.license, data.license_name) == ("other", "licences-of-its-parts")
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("lmms-lab/POPE", "accuracy", 86.0)
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/pope.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lmms-lab/POPE", "pope", 86.0)
    assert files["loss_curve.png"].startswith(b"\x89PNG")
    for line in (
        "| 1 | 0.2000 | 0.4000 | 500,000 | 89.6% | 0.3100 |",
        "| rows | 558,128 | 665,298 |",
        "| optimizer | - | adamw_torch_fused |",
        "| learning rate | - | 2e-05 |",
        "![The training loss by step, stage by stage](loss_curve.png)",
        "at `ce19dc912ca5`",
        "Of 558,130 rows read, 2 were left out (2 unreadable images).",
        'revision="v1"',
        "AutoModelForVision2Seq",
        "| language model | [lmsys/vicuna-7b-v1.5](https://huggingface.co/lmsys/vicuna-7b-v1.5) | `llama2` |",
        "(https://huggingface.co/openai/clip-vit-large-patch14-336) | see its page |",
        "@article{zhao2024aligngpt",
    ):
        assert line in card.content, line
    table = [line for line in card.content.splitlines() if line.startswith("| pope |")]
    page = "[lmms-lab/POPE](https://huggingface.co/datasets/lmms-lab/POPE)"
    assert table == [f"| pope | {page} | test | accuracy | 86.0 | 9,000 | 86.0 | 86.2 |"]


def test_the_cards_blocks_run_as_they_stand(hub, published):
    """Pasted one behind the other by somebody who has transformers alone and an image of their own."""
    card = hub.files("models", REPO)["README.md"].decode()
    for text in documents.mentioned(card):
        documents.check_mention(text)
    on_5, in_hand, on_4 = documents.blocks(card, "python")
    compile(on_4, "the card's block for 4.57", "exec")
    image = "from PIL import Image\nImage.new('RGB', (40, 30), (200, 30, 30)).save('image.jpg')\n"
    last = "\nimport json; print(json.dumps({'new': answer.shape[1] - inputs['input_ids'].shape[1]}))"
    assert run_script(hub, image + on_5 + in_hand + last)["new"] > 0


LOAD = """
import json, sys
import transformers
from PIL import Image
spec = json.loads(sys.argv[1])
ramp = Image.linear_gradient("L").resize((40, 30))
image = Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)])
Auto = getattr(transformers, spec["auto"])
report = {"version": transformers.__version__, "answers": {}, "marks": {}}
for revision in spec["revisions"]:
    options = {"revision": revision, "trust_remote_code": True}
    model = Auto.from_pretrained(spec["repo"], **options)
    processor = transformers.AutoProcessor.from_pretrained(spec["repo"], **options)
    inputs = processor(images=image, text="<image>\\nWhat is it?", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    report["answers"][revision] = ids.tolist()
    report["marks"][revision] = getattr(sys.modules[type(model).__module__], "MARK", None)
if spec.get("pipeline"):
    pipe = transformers.pipeline("image-text-to-text", model=spec["repo"], trust_remote_code=True)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    settings = {"max_new_tokens": 6, "do_sample": False}
    said = pipe(text=messages, return_full_text=False, generate_kwargs=settings)
    report["pipeline"] = said[0]["generated_text"]
report["ours"] = [name for name in sys.modules if name == "modeling_aligngpt"]
print(json.dumps(report))
"""


@pytest.mark.parametrize("generation", ["5", "4"])
def test_load_by_repo_id(hub, published, here, generation, request):
    """At main, a tag and a commit, and by the pipeline, where only transformers is installed."""
    revisions = ["main", "v1", published[1]]
    auto = {"5": "AutoModelForImageTextToText", "4": "AutoModelForVision2Seq"}[generation]
    path = request.getfixturevalue("transformers_4") if generation == "4" else None
    spec = {"repo": REPO, "revisions": revisions, "auto": auto, "pipeline": True}
    report = run_script(hub, LOAD, [json.dumps(spec)], path=path)
    assert report["version"].startswith(generation) and report["ours"] == []
    assert report["answers"] == dict.fromkeys(revisions, here)
    assert isinstance(report["pipeline"], str)


def test_pinned_revision_keeps_its_code(hub, saved, here, tmp_path):
    repo = "user/pinned"
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    stored = hub.add_repo("models", repo, folder)
    first = hub.commits("models", repo)[0].sha
    stored.refs["refs/tags/v1"] = first
    code = folder / "modeling_aligngpt.py"
    code.write_text(code.read_text() + '\nMARK = "newer"\n')
    (folder / "images_aligngpt.py").rename(folder / "reading_images.py")
    processing = folder / "processing_aligngpt.py"
    processing.write_text(processing.read_text().replace("from .images_aligngpt import", "from .reading_images import"))
    hub.commit_folder("models", repo, folder)
    revisions = [first, "main", "v1"]
    spec = {"repo": repo, "revisions": revisions, "auto": "AutoModelForImageTextToText"}
    report = run_script(hub, LOAD, [json.dumps(spec)])
    assert report["marks"] == {first: None, "main": "newer", "v1": None}
    assert report["answers"] == dict.fromkeys(revisions, here)


# ---- the records of a real run ----


def test_the_card_of_a_run_from_end_to_end(tmp_path, capsys):
    """Both stages by their commands, two steps each: what they record is what the card shows."""
    golden = Path(__file__).parents[1] / "fixtures" / "golden"
    scored = save(tmp_path / "scored", Dataset.from_dict(rows(8), features=features(List(Image()))))
    common = ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "true"]
    common += ["--gradient_accumulation_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    first, second = str(tmp_path / "stage1"), str(tmp_path / "stage2")
    parts = ["--language_model", str(golden / "base_llm"), "--vision_tower", str(golden / "clip-vit-tiny")]
    pretrain_command([*parts, "--dataset", str(scored), "--output_dir", first, *common])
    instruct_command(["--model", first, "--dataset", str(scored), "--output_dir", second, *common])
    capsys.readouterr()
    assert publish(second, "user/run", dry_run=True, base_models=["someone/llm"], license="apache-2.0") is None
    said = capsys.readouterr().out
    for line in (
        "license: apache-2.0",
        "- someone/llm",
        "| language model | `base_llm` (a local folder) |",
        "| stage 1 data | `scored` (a local folder) |",
        "| | stage 1: pre-training | stage 2: instruction tuning |",
        "| steps | 2 | 2 |",
        "| learning rate | 0.001 | 2e-05 |",
        "| 1 | 0.3000 | 0.5000 | 8 | 66.7% | 0.4000 |",
        "![The training loss by step, stage by stage](loss_curve.png)",
    ):
        assert line in said, line
    assert str(tmp_path) not in said.replace(f"checked: {second}", "")
