import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from aligngpt_playground import measures as ablation_measures
from aligngpt_playground.__main__ import main
from aligngpt_playground.ablation import rows as ablation_rows
from aligngpt_playground.ablation import table as ablation_table
from aligngpt_playground.ablation import variants as ablation_variants
from aligngpt_playground.ablation.variants import PRETRAINS, VARIANTS, PretrainVariant, Variant
from aligngpt_playground.captions import DESCRIBE, exact_caption
from aligngpt_playground.scenes import Scene


# run by `make proofs`
pytestmark = pytest.mark.proof


TINY = ["--pairs", "64", "--pretrain-steps", "2", "--conversations", "32", "--heldout", "6"]
CHOSEN = "gate + global, N = 8; no alignment; noisy: each row's level"


def command(output, parts, *more):
    return ["ablation", "--output", str(output), "--parts", str(parts), *TINY, *more]


@pytest.fixture(scope="module")
def run(random_parts, tmp_path_factory):
    """A folder with two seeds of three variants."""
    output = tmp_path_factory.mktemp("runs") / "ablation"
    assert main(command(output, random_parts, "--seeds", "2", "--variants", CHOSEN, "--keep-models")) == 0
    return output


def results(folder):
    """Finished runs without their times."""
    found = {}
    for path in sorted(folder.glob("seed-*/runs/*.json")):
        content = json.loads(path.read_text())
        content.pop("seconds")
        content["captions"].pop("seconds")
        found[path.relative_to(folder).as_posix()] = content
    return found


# ---- runs ----


def test_each_seed_and_variant_is_there_with_its_figures(run):
    found = results(run)
    assert len(found) == 6
    described = {"main object", "all objects", "background", "exact", "absent object", "words"}
    for content in found.values():
        gated, noisy = content["variant"].startswith("gate"), content["variant"].startswith("noisy")
        with_levels = gated or noisy
        assert set(content["captions"]) == described | ({"by_level", "judged"} if with_levels else set())
        assert len(content["gate"]) == (7 if gated else 0)
        if with_levels:
            aucs = content["captions"]["judged"]
            assert set(aucs) == {"judge", "likelihood", "CLIP"} and set(content["judged"]) == {"judge", "likelihood"}
            assert all(0 <= value <= 1 for each in aucs.values() for value in each.values())
        if noisy:
            assert set(content["descriptions"]) == described and len(content["by_level"]["levels"]) == 8
            assert all(-1 <= value <= 1 for value in content["by_level"]["steering"].values())
        else:
            assert 0 <= content["yes_share"] <= 1
            assert set(content["questions"]) >= {"overall", "what", "count"} and math.isfinite(content["loss"])
            assert (content["loss_by_level"] is not None and len(content["loss_by_level"]) == 8) == gated


def test_seeds_differ_and_variants_share_world_and_stage_1(run):
    found = results(run)
    losses = {content["loss"] for content in found.values() if "loss" in content}
    assert len(losses) == 4
    assert {path.name for path in (run / "seed-0" / "pretrain").iterdir()} == {"levels-8", "none"}
    captions = [
        [row["messages"] for row in _load(run / f"seed-{seed}" / "world" / "scored-pairs").remove_columns("images")]
        for seed in (0, 1)
    ]
    assert captions[0] != captions[1]
    heldout = [_load(run / f"seed-{seed}" / "world" / "heldout" / "pairs")["heldout"]["caption"][:] for seed in (0, 1)]
    assert heldout[0] == heldout[1]


def _load(path):
    from datasets import load_from_disk

    return load_from_disk(str(path))


def test_a_stopped_run_goes_on_and_gives_the_same(run, random_parts, tmp_path, capsys):
    import shutil

    copy = tmp_path / "ablation"
    shutil.copytree(run, copy)
    before = results(copy)
    # one run and its stage 1 are gone, as after a kill between the two
    (copy / "seed-1" / "runs" / "no-alignment.json").unlink()
    shutil.rmtree(copy / "seed-1" / "pretrain" / "none")
    # what a stage that was stopped half way leaves
    for half in (copy / "seed-1" / "pretrain" / "none", copy / "seed-1" / "world" / "unused"):
        (half / "checkpoint-1").mkdir(parents=True)
    stamp = (copy / "seed-0" / "runs" / "no-alignment.json").stat().st_mtime_ns
    assert main(command(copy, random_parts, "--seeds", "2", "--variants", CHOSEN)) == 0
    assert "1 runs done now" in capsys.readouterr().out
    assert results(copy) == before
    assert (copy / "seed-0" / "runs" / "no-alignment.json").stat().st_mtime_ns == stamp
    assert not (copy / "seed-1" / "pretrain").exists(), "models of finished seeds are not kept"


def test_two_processes_give_the_same(run, random_parts, tmp_path):
    only = "no alignment"
    words = command(tmp_path / "two", random_parts, "--seeds", "2", "--jobs", "2", "--variants", only)
    assert main(words) == 0
    expected = {name: content for name, content in results(run).items() if "no-alignment" in name}
    assert results(tmp_path / "two") == expected


def test_other_settings_and_folders_of_others_are_refused(run, random_parts, tmp_path, capsys):
    words = command(run, random_parts, "--seeds", "2")
    words[words.index("--pairs") + 1] = "65"
    assert main(words) == 2
    assert "holds runs with pairs 64" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("")
    assert main(command(tmp_path, random_parts)) == 2
    assert "holds no ablation" in capsys.readouterr().err
    assert main(command(tmp_path / "new", random_parts, "--seeds", "0")) == 2
    assert "--seeds is 0" in capsys.readouterr().err
    assert main(command(tmp_path / "new", random_parts, "--variants", "gate")) == 2
    assert "--variants: there is no 'gate'; there are gate + global" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_by_lora_only_adapters_and_small_parts_train(random_parts, tmp_path, capsys, monkeypatch):
    from aligngpt_playground.ablation.seed import SeedRuns
    from aligngpt_trainers import AlignGPTInstructTrainer

    trained, asked, steps = [], [], []
    before, loaded = AlignGPTInstructTrainer.train, SeedRuns._loaded

    def note_training(self, *args, **kwargs):
        trained.append({name for name, value in self.model.named_parameters() if value.requires_grad})
        steps.append((self.args.per_device_train_batch_size, self.args.max_steps))
        return before(self, *args, **kwargs)

    def note_asked(self, model, processor, without):
        asked.append(type(model).__name__)
        return loaded(self, model, processor, without)

    monkeypatch.setattr(AlignGPTInstructTrainer, "train", note_training)
    monkeypatch.setattr(SeedRuns, "_loaded", note_asked)
    words = command(tmp_path / "lora", random_parts, "--seeds", "1", "--variants", "gate + global, N = 8; no alignment")
    words += ["--batch-size", "8", "--instruct-batch-size", "16", "--instruct-epochs", "3"]
    words += ["--pretrain-learning-rate", "1e-3", "--instruct-learning-rate", "0.01"]
    assert main([*words, "--lora-r", "2"]) == 0
    assert len(trained) == 2 and all(
        ("lora_" in name) == ("language_model" in name) for names in trained for name in names
    )
    assert any("lora_" in name for name in trained[0])
    # 32 conversations, however many to a step, three times
    assert steps == [(16, 6)] * 2
    # what is measured is the merged model
    assert set(asked) == {"AlignGPTForConditionalGeneration"}
    settings = json.loads((tmp_path / "lora" / "settings.json").read_text())
    assert (settings["lora_r"], settings["batch_size"], settings["instruct_learning_rate"]) == (2, 8, 0.01)
    assert main(words) == 2
    assert "holds runs with lora_r 2" in capsys.readouterr().err
    assert main([*words, "--lora-r", "-1"]) == 2
    assert "--lora-r is -1" in capsys.readouterr().err


def test_a_folder_from_before_a_setting_goes_on(run, random_parts, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "old")
    path = tmp_path / "old" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["lora_r"], settings["bf16"], settings["instruct_batch_size"], settings["instruct_epochs"]
    path.write_text(json.dumps(settings))
    assert main(command(tmp_path / "old", random_parts, "--seeds", "1", "--variants", CHOSEN)) == 0


# ---- what a variant is ----


def test_the_papers_table_is_covered():
    rows = {(variant.align_mode, variant.pretrain) for variant in VARIANTS if variant.data == "clean"}
    eight = {(mode, "levels-8") for mode in ("gate", "local", "global", "mean", "random")}
    numbers = {("gate", f"levels-{number}") for number in (4, 6, 10)}
    assert eight | numbers <= rows
    assert [PRETRAINS[f"levels-{number}"].num_align_levels for number in (4, 6, 8, 10)] == [4, 6, 8, 10]
    slugs = {ablation_variants.run_path(Path(), 0, variant) for variant in VARIANTS}
    assert len({variant.name for variant in VARIANTS}) == len(slugs) == len(VARIANTS)


def scored_rows(number=200):
    scores = np.random.default_rng(0).normal(size=number).astype(np.float32)
    return Dataset.from_dict({"clip_score": scores, "align_level": [0] * number, "text": list(map(str, range(number)))})


def test_levels_are_cut_anew_shuffled_or_left_out():
    rows = scored_rows()
    scores = np.array(rows["clip_score"][:])
    for number in (4, 10):
        cut = ablation_rows.stage_one_rows(rows, PretrainVariant(number), 0)
        levels = np.array(cut["align_level"][:])
        assert levels.max() == number - 1 and cut["text"][:] == rows["text"][:]
        assert all(scores[levels == low].max() <= scores[levels == low + 1].min() for low in range(number - 1))
    cut = np.array(ablation_rows.stage_one_rows(rows, PretrainVariant(8), 0)["align_level"][:])
    shuffled = np.array(ablation_rows.stage_one_rows(rows, PretrainVariant(8, "shuffled"), 0)["align_level"][:])
    assert sorted(cut) == sorted(shuffled) and abs(np.corrcoef(shuffled, scores)[0, 1]) < 0.2
    best = ablation_rows.stage_one_rows(rows, PretrainVariant(8, "none", 0.5), 0)
    assert sorted(best["clip_score"][:]) == sorted(scores)[100:]


def test_quantile_levels_hold_equally_many_pairs():
    cut = ablation_rows.stage_one_rows(scored_rows(), PretrainVariant(8, binning="quantile"), 0)
    assert np.bincount(cut["align_level"][:]).tolist() == [25] * 8


def test_noisy_rows_are_cut_where_stage_1_cut_its_pairs():
    pairs = Dataset.from_dict({"clip_score": [0.0, 0.4, 0.8]})
    texts = ["a cat", "a dog", "a cup", "a pot"]
    scored = Dataset.from_dict(
        {
            "clip_score": [-1.0, 0.1, 0.5, 2.0],
            "align_level": [0, 0, 0, 0],
            "images": [[], [], [], []],
            "messages": [
                [
                    {"role": "user", "content": [{"type": "image", "text": None}]},
                    {"role": "assistant", "content": [{"type": "text", "text": text}]},
                ]
                for text in texts
            ],
        }
    )
    variant = Variant("x", "levels-8", "level", "scored", "noisy")
    rows = ablation_rows.noisy_rows(scored, variant, pairs, 8, "uniform")
    assert rows["align_level"][:] == [0, 1, 5, 7]
    messages = rows["messages"][2]
    assert [part.get("text") for part in messages[0]["content"]] == [None, DESCRIBE]
    assert [row[-1]["content"][0]["text"] for row in rows["messages"]] == texts
    half = ablation_rows.noisy_rows(scored, Variant("x", "levels-8", "level", "", "noisy", 0.5), pairs, 8, "uniform")
    assert half["align_level"][:] == [5, 7]


def test_measures_of_descriptions():
    scene = Scene("snow", (("cat", 0), ("dog", 3)))
    truth = exact_caption(scene)
    found = ablation_measures.describe_captions([truth, "a cat", "a cat and a car in the snow"], [scene] * 3)
    assert found["exact"] == pytest.approx(1 / 3) and found["absent object"] == pytest.approx(1 / 3)
    assert found["main object"] == 1 and found["all objects"] == pytest.approx(1 / 3)
    assert ablation_measures.rank_correlation([0.1, 0.2, 0.2, 0.9]) == pytest.approx(0.9487, abs=1e-4)
    assert ablation_measures.rank_correlation([3, 2, 1]) == pytest.approx(-1)
    assert ablation_measures.rank_correlation([1, 1, 1]) == 0
    assert ablation_measures.auc([2, 3], [1, 2]) == pytest.approx(3.5 / 4)


def test_a_batch_without_the_token_is_the_batch_but_for_it():
    ids = torch.tensor([[5, 9, 1, 2], [0, 5, 9, 3]])
    pixels = torch.ones(2, 3, 4, 4)
    kept = ablation_rows.without_token({"input_ids": ids, "attention_mask": ids > 0, "pixel_values": pixels}, 9)
    assert kept["input_ids"].tolist() == [[5, 1, 2], [0, 5, 3]]
    assert kept["attention_mask"].tolist() == [[True, True, True], [False, True, True]]
    assert kept["pixel_values"] is pixels
    with pytest.raises(ValueError, match="must hold the token 9 once"):
        ablation_rows.without_token({"input_ids": torch.tensor([[9, 9]])}, 9)


def test_a_share_of_the_rows_is_without_the_token():
    class Processor:
        align_token_id = 9
        tokenizer = type("Tokenizer", (), {"pad_token_id": 3})

    def collate(rows):
        ids = torch.tensor([[5, 9, 1, 2], [5, 9, 4, 3]]).repeat(rows, 1)
        labels = torch.where(ids == 2, 2, -100)
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (ids != 3).long(),
            "align_level": torch.arange(len(ids)),
        }

    sometimes = ablation_rows.SometimesWithout(collate, Processor(), 0.25, seed=0)
    batch, whole = sometimes(1000), collate(1000)
    without = (batch["input_ids"] != 9).all(1)
    assert 0.2 < without.float().mean() < 0.3
    for name, value in whole.items():
        assert torch.equal(batch[name][~without], value[~without])
    assert torch.equal(batch["align_level"], whole["align_level"])
    rows = {name: {tuple(row) for row in batch[name][without].tolist()} for name in ("input_ids", "attention_mask")}
    assert rows == {"input_ids": {(5, 1, 2, 3), (5, 4, 3, 3)}, "attention_mask": {(1, 1, 1, 0), (1, 1, 0, 0)}}
    assert {tuple(row) for row in batch["labels"][without].tolist()} == {(-100, -100, 2, -100), (-100,) * 4}
    assert not torch.equal(without, (sometimes(1000)["input_ids"] != 9).all(1)), "drawn anew for each batch"


def test_the_truth_scores_rows_by_their_kind(run):
    drawn = _load(run / "seed-0" / "world" / "data" / "pairs")
    by_clip = _load(run / "seed-0" / "world" / "scored-pairs")
    scored = ablation_rows.truly_scored(drawn, by_clip)
    assert scored["messages"][:] == by_clip["messages"][:]
    values = {"exact": 1, "partial": 0.75, "loose": 0.5, "wrong": 0.25, "unrelated": 0}
    assert scored["clip_score"][:] == [values[kind] for kind in drawn["train"]["kind"][:]]
    levels = ablation_rows.stage_one_rows(scored, PretrainVariant(8, scorer="truth"), 0)["align_level"][:]
    assert dict(zip(drawn["train"]["kind"][:], levels, strict=True)) == {
        "exact": 7,
        "partial": 6,
        "loose": 4,
        "wrong": 2,
        "unrelated": 0,
    }
    with pytest.raises(ValueError, match="not those that were drawn"):
        ablation_rows.truly_scored(drawn["train"].select(range(63, -1, -1)), by_clip)


def test_two_scores_are_added_as_the_pairs_are():
    def rows(*scores):
        messages = [[{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]] * len(scores)
        return Dataset.from_dict({"clip_score": scores, "align_level": [0] * len(scores), "messages": messages})

    pairs = rows(1.0, 3.0), rows(0.0, 0.5)
    both = ablation_rows.added_scores(*pairs)
    assert both["clip_score"][:] == [-1, 1] and both.column_names == ["align_level", "messages", "clip_score"]
    # means 2 and 0.25, standard deviations 1 and 0.25
    assert ablation_rows.added_scores(rows(2.0, 4.0), rows(0.25, 1.0), pairs)["clip_score"][:] == [0, 2.5]


def test_what_the_better_half_holds_by_each_scorer(run, tmp_path, monkeypatch, capsys):
    import shutil
    import sys

    world = tmp_path / "seed-0" / "world"
    shutil.copytree(run / "seed-0" / "world", world)
    for name in ("pairs", "noisy"):
        # a judge that knows the truth
        drawn, clip = _load(world / "data" / name), _load(world / f"scored-{name}")
        ablation_rows.truly_scored(drawn, clip).save_to_disk(str(world / f"levels-8-{name}"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import better_half

    monkeypatch.setattr(sys, "argv", ["better_half.py", "--ablation", str(tmp_path), "--seeds", "0"])
    better_half.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| pairs", "| noisy"))]
    rows = {
        tuple(cells[:2]): list(map(float, cells[2:])) for cells in (line.strip("| ").split(" | ") for line in lines)
    }
    assert len(rows) == 6
    for name in ("pairs", "noisy"):
        clip, judge, both = (rows[name, scorer] for scorer in ("CLIP", "the judge", "both"))
        assert judge[:3] == [1, 1, 0] and clip[0] < both[0] <= 1 and judge[3] >= both[3]


def test_without_alignment_the_level_table_has_no_say(run):
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    folder = run / "seed-0" / "pretrain" / "none"
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    heldout = _load(run / "seed-0" / "world" / "heldout" / "pairs")["heldout"]["image"][:]
    processor = ablation_rows.Without(AlignGPTProcessor.from_pretrained(folder), model.config.align_token_id)
    inputs = processor(images=heldout[:1], text=["<image>"], return_tensors="pt")
    assert (inputs["input_ids"] != model.config.align_token_id).all()
    before = model(**inputs).logits
    with torch.no_grad():
        model.model.align_embeddings.weight.add_(5)
    assert torch.equal(model(**inputs).logits, before)


# ---- the table ----


def fake_run(variant, seed, overall):
    return {
        "variant": variant,
        "seed": seed,
        "questions": {"overall": overall, "what": overall},
        "loss": 1 - overall,
        "captions": {"main object": 0.5, "all objects": 0.5, "absent object": 0.5},
        "gate": [{"mean": 0.25, "spread": 0.1 * seed}] if variant == "a" else [],
        "seconds": 1.0,
    }


def test_the_table_compares_pair_by_pair():
    values = {"a": [0.50, 0.60, 0.70, 0.40], "b": [0.52, 0.61, 0.73, 0.42], "c": [0.3, 0.9, 0.5, 0.6]}
    runs = [fake_run(name, seed, value) for name, each in values.items() for seed, value in enumerate(each)]
    variants = [{"name": name, "pretrain": "one" if name < "c" else "other"} for name in "abcd"]
    table = ablation_table.summarize(runs, variants)
    rows = {row["name"]: row["answers"] for row in table["rows"]}
    assert list(rows) == ["a", "b", "c"], "variants without runs are left out"
    assert rows["a"]["mean"] == pytest.approx(0.55) and rows["a"]["std"] == pytest.approx(statistics.stdev(values["a"]))
    differences = [b - a for a, b in zip(values["a"], values["b"], strict=True)]
    # Student's t with three degrees of freedom
    width = 3.182 * statistics.stdev(differences) / 2
    assert rows["b"]["difference"] == pytest.approx(0.02) and rows["b"]["interval"] == pytest.approx(width)
    assert rows["b"]["clear"] and not rows["c"]["clear"]
    assert "difference" not in rows["a"]
    assert table["rows"][0]["gate"] == [{"mean": 0.25, "spread": pytest.approx(0.15)}]
    text = ablation_table.describe(table)
    assert "| a | 4 | 0.550 ± 0.129 |" in text and "**+0.020 ± 0.013**" in text and "| c | +0.025 ±" in text
    # captions of b are those of a
    assert [line.count("0.500 ±") for line in text.splitlines()[2:5]] == [3, 0, 3]
    assert [line.count("+0.000 ± 0.000") for line in text.splitlines()[-2:]] == [0, 3]


def test_a_single_seed_has_no_interval():
    table = ablation_table.summarize([fake_run("a", 0, 0.5), fake_run("b", 0, 0.6)], [{"name": "a"}, {"name": "b"}])
    assert table["rows"][1]["answers"]["std"] is None and "difference" not in table["rows"][1]["answers"]
    assert "| b | 1 | 0.600 |" in ablation_table.describe(table)
    assert ablation_table.half_width([1.0]) == math.inf
    assert ablation_table.half_width([1.0, 2.0]) == pytest.approx(12.706 * 0.5, rel=1e-3)
