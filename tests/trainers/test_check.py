"""`aligngpt check`: what it measures, what it refuses, and that nothing is trained or written by it."""

import json
import shutil

import datasets
import pytest
import torch
import yaml
from datasets import load_from_disk
from stage_parts import NUM_LEVELS, conversation_rows, pair_rows, settings, snapshot, to_dataset

from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from aligngpt_trainers.commands.check import check_stage, recognise_stage
from aligngpt_trainers.commands.check_measures import step_facts
from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.commands.train import build_stage
from aligngpt_trainers.first_batch import check_batch, log_first_batch, mark_supervised
from modeling_aligngpt.assembly import assemble


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    to_dataset(pair_rows(16)).save_to_disk(folder / "pairs")
    to_dataset(conversation_rows(16)).save_to_disk(folder / "conversations")
    return folder


@pytest.fixture
def recipe(parts, data, stage1_folder, tmp_path):
    """Writes a YAML file of a stage's settings, changed by `changes`; None leaves a key out."""

    def write(stage="pretrain", **changes) -> str:
        values = {
            "dataset": str(data / ("pairs" if stage == "pretrain" else "conversations")),
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        if stage == "pretrain":
            values |= {"language_model": str(parts[0]), "vision_tower": str(parts[1])}
            values |= {"num_align_levels": NUM_LEVELS, "config_overrides": {"gate_hidden_size": 16}}
        else:
            values["model"] = str(stage1_folder)
        values |= changes
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def check(*words, **options) -> dict:
    return check_stage(recognise_stage(["--config", *words]), ["--config", *words], **options)


class TestReports:
    @pytest.mark.parametrize(("settings", "stops"), [({"temperature": 0.9}, False), ({"output_scores": True}, True)])
    def test_what_could_not_be_saved(self, recipe, stage1_folder, tmp_path, settings, stops):
        folder = shutil.copytree(stage1_folder, tmp_path / "model")
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        report = check(recipe("instruct", model=str(folder)))
        said = report["problems" if stops else "warnings"]
        wanted = "could not be saved after training" if stops else "generation_config: temperature=0.9 left out"
        assert any(wanted in line for line in said) and bool(report["problems"]) == stops

    def test_stage_1(self, recipe, tmp_path, capsys):
        assert main(["check", "--config", recipe(), "--json", str(tmp_path / "report.json")]) == 0
        shown, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
        assert "Nothing found that stops training." in shown and report["problems"] == []
        assert report["stage"] == "pretrain" and report["levels"] == [4, 4, 4, 4]
        assert "\nlayout     images + messages + " in shown and "align_level" in report["layout"]
        assert report["tokens"]["rows"] == 16 and report["tokens"]["image_tokens"] == 16 * 16
        assert report["tokens"]["p50"] <= report["tokens"]["p99"] <= report["tokens"]["longest"]
        assert report["images"]["decoded"] == 16 and report["images"]["unreadable"] == 0
        trained = {name for name, part in report["parameters"].items() if part["trained"]}
        assert trained == {"multi_modal_projector", "align_embeddings"}
        # an image of 16 tokens, then the caption and its newline, which alone are learned
        assert "<s><align><image>x16[[a " in report["example"]["text"].replace("[[ a", "[[a")
        assert report["example"]["text"].endswith("\n]]") and "square number" in shown
        assert 0 < report["first_loss"] < 12
        assert "levels " in shown and "multi_modal_projector" in shown and "memory " in shown
        assert not (tmp_path / "out").exists()

    def test_stage_2(self, recipe, capsys):
        assert main(["check", "--config", recipe("instruct")]) == 0
        shown = capsys.readouterr().out
        assert "aligngpt check: instruct of" in shown and "levels " not in shown
        assert "4 without an image, at most 2 in a row" in shown
        assert shown.count("[[") >= 1 and "</s>]]" in shown and "USER" in shown

    def test_values_are_those_of_training(self, recipe, tmp_path):
        """Steps, lengths and the first loss, against the trainer that the command builds."""
        words = ["--config", recipe("instruct")]
        report = check_stage("instruct", words)
        run = build_stage("instruct", words)
        assert report["tokens"]["tokens"] == sum(run.trainer.train_dataset["length"])
        first = next(iter(run.trainer.get_train_dataloader()))
        assert report["batches"][0]["supervised"] == int((first["labels"] != -100).sum())
        assert report["batches"][0]["length"] == first["input_ids"].shape[1]
        assert report["batches"][0]["padding"] == int((first["attention_mask"] == 0).sum())
        inputs = {name: value for name, value in first.items() if name != "row_index"}
        with torch.no_grad():
            loss = run.trainer.model.eval()(**inputs).loss
        assert report["first_loss"] == pytest.approx(float(loss), rel=1e-5)
        run.trainer.train()
        assert report["steps"]["steps"] == run.trainer.state.max_steps == 2
        weights = [*run.trainer.model.parameters(), *run.trainer.model.buffers()]
        assert report["memory"]["weights"] == sum(tensor.numel() * tensor.element_size() for tensor in weights)
        assert report["memory"]["rows"] == 4 and report["memory"]["length"] == report["tokens"]["longest"]

    @pytest.mark.parametrize("stage", ["pretrain", "instruct"])
    def test_without_weights(self, recipe, stage):
        """The same report, but for the loss, the time and the activations, from the configs alone."""
        light, full = (check(recipe(stage), light=light) for light in (True, False))
        assert "first_loss" not in light and light["problems"] == []
        full.pop("first_loss"), full.pop("step_seconds")
        assert full["memory"].pop("activations") > 0 and light["memory"].pop("activations") is None
        assert light == full

    def test_lora(self, recipe):
        for light in (False, True):
            report = check(recipe("instruct", use_peft=True, lora_r=2, lora_alpha=4), light=light)
            assert report["stage"] == "instruct" and report["problems"] == []
            parts = report["parameters"]
            assert 0 < parts["language_model"]["trained"] < parts["language_model"]["all"] / 4
            assert parts["lm_head"]["trained"] == 0 < parts["align_gate"]["trained"]

    def test_a_stream(self, recipe, data, tmp_path, monkeypatch):
        # `datasets` waits that long for the threads of a shuffled parquet stream
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
        load_from_disk(data / "pairs").to_parquet(tmp_path / "pairs.parquet")
        report = check(recipe(dataset=str(tmp_path / "pairs.parquet"), streaming=True, max_steps=7))
        assert report["problems"] == [] and len(report["batches"]) == 3 and "tokens" not in report
        assert report["steps"]["steps"] == 7 and any("streamed" in warning for warning in report["warnings"])

    def test_several_devices(self, recipe):
        report = check(recipe("instruct", num_train_epochs=3), num_devices=2)
        # 16 rows, 4 on each of 2 devices, every second batch an update
        assert report["steps"] == {"rows_per_update": 16, "num_devices": 2, "steps": 3, "epochs": 3}


class TestProblems:
    def status(self, capsys, *words) -> str:
        assert main(["check", *words]) == 1
        shown = capsys.readouterr().out
        assert "would stop training." in shown
        return shown

    def test_overlong_rows_are_all_counted(self, recipe, tmp_path, capsys):
        rows = conversation_rows(16)
        for i in (3, 8, 9):
            rows[i]["messages"][-1]["content"][0]["text"] = "a very long answer " * 30
        to_dataset(rows).save_to_disk(tmp_path / "long")
        limit = max(check(recipe("instruct"))["tokens"]["longest"] + 5, 100)
        path = recipe("instruct", dataset=str(tmp_path / "long"), max_length=limit)
        shown = self.status(capsys, "--config", path)
        assert f"3 of 16 rows are longer than max_length={limit}" in shown
        report = check(recipe("instruct", dataset=str(tmp_path / "long"), max_length=limit, on_overlong="drop"))
        assert report["problems"] == [] and report["rows"] == {"kept": 13, "cut": 0, "left_out": 3}
        assert any("3 of 16 rows left out" in warning for warning in report["warnings"])
        report = check(recipe("instruct", dataset=str(tmp_path / "long"), max_length=limit, on_overlong="truncate"))
        assert report["rows"] == {"kept": 16, "cut": 3, "left_out": 0}

    @pytest.mark.parametrize("number", ["all", "3"])
    def test_unreadable_images_are_named(self, recipe, tmp_path, capsys, number):
        records = []
        for i in range(12):
            (tmp_path / f"{i}.png").write_bytes(b"not an image")
            if i != 11:
                pair_rows(1)[0]["images"][0].save(tmp_path / f"{i}.png")
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"thing {i}"}]
            records.append({"id": f"x{i}", "image": f"{i}.png", "similarity": i % 4, "conversations": turns})
        (tmp_path / "data.json").write_text(json.dumps(records))
        shown = self.status(capsys, "--config", recipe(dataset=str(tmp_path / "data.json")), "--images", number)
        assert f"1 of {12 if number == 'all' else 3} images cannot be read" in shown
        assert "row x11: image cannot be read" in shown and "11.png" in shown
        assert "tokens " in shown  # what could be measured is there

    def test_bad_rows(self, recipe, tmp_path, capsys):
        rows = pair_rows(8)
        rows[5]["align_level"] = NUM_LEVELS
        to_dataset(rows).save_to_disk(tmp_path / "levels")
        shown = self.status(capsys, "--config", recipe(dataset=str(tmp_path / "levels")))
        assert f"PROBLEM: Row 5 has align_level={NUM_LEVELS}" in shown
        (tmp_path / "data.json").write_text('[{"image": "gone.png", "caption": "a"}]')
        shown = self.status(capsys, "--config", recipe(dataset=str(tmp_path / "data.json")))
        assert "PROBLEM: " in shown and "no such image file" in shown

    def test_an_unaligned_model(self, recipe, assembled, tmp_path, capsys):
        for part in assembled:
            part.save_pretrained(tmp_path / "fresh")
        path = recipe("instruct", model=str(tmp_path / "fresh"))
        shown = self.status(capsys, "--config", path, "--stage", "instruct")
        assert "has not been through stage 1" in shown

    def test_an_earlier_run(self, recipe, tmp_path, capsys):
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
        shown = self.status(capsys, "--config", recipe())
        assert "holds checkpoints of an earlier run" in shown and (tmp_path / "out").exists()

    def test_a_loss_that_is_no_number(self, recipe, stage1_folder, tmp_path, capsys):
        from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

        model = AlignGPTForConditionalGeneration.from_pretrained(stage1_folder)
        model.model.multi_modal_projector.linear_1.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "broken")
        AlignGPTProcessor.from_pretrained(stage1_folder).save_pretrained(tmp_path / "broken")
        shown = self.status(capsys, "--config", recipe("instruct", model=str(tmp_path / "broken")))
        assert "PROBLEM: The loss of the first batch is nan" in shown

    def test_levels_without_rows_are_a_warning(self, recipe, tmp_path):
        rows = [{**row, "align_level": 1 + index % 2} for index, row in enumerate(pair_rows(8))]
        to_dataset(rows).save_to_disk(tmp_path / "levels")
        report = check(recipe(dataset=str(tmp_path / "levels")))
        assert report["levels"] == [0, 4, 4, 0] and report["problems"] == []
        assert "No row has level 0, 3: nothing will be learned for it." in report["warnings"]


class TestSettings:
    def test_stages_are_recognised(self, recipe, stage1_folder, tmp_path):
        assert recognise_stage(["--config", recipe()]) == "pretrain"
        assert recognise_stage([f"--config={recipe('instruct')}"]) == "instruct"
        assert recognise_stage(["--model", str(stage1_folder), "--align-mode", "mean"]) == "instruct"
        assert recognise_stage(["--vision_tower=x"]) == "pretrain"
        with pytest.raises(ValueError, match="what is to be trained"):
            recognise_stage(["--dataset", "a"])
        with pytest.raises(ValueError, match="its config cannot be read"):
            recognise_stage(["--model", str(tmp_path / "nowhere")])
        trained = json.loads((stage1_folder / "config.json").read_text())
        (tmp_path / "both").mkdir()
        for stage, meant in ((None, "pretrain"), ("instruct", None)):
            (tmp_path / "both" / "config.json").write_text(json.dumps({**trained, "training_stage": stage}))
            if meant:
                assert recognise_stage(["--model", str(tmp_path / "both")]) == meant
            else:
                with pytest.raises(ValueError, match="been through both stages: say which is meant with --stage"):
                    recognise_stage(["--model", str(tmp_path / "both")])

    def test_typos_are_errors_of_the_command(self, recipe, capsys):
        for words, message in (
            (["--images", "some"], "--images some: a number of rows, or `all`"),
            (["--batches", "0"], "--batches 0: at least 1"),
            (["--lerning_rate", "1"], "unknown setting --lerning_rate; did you mean '--learning_rate'"),
            (["--stage", "third"], "invalid choice: 'third'"),
        ):
            assert main(["check", "--config", recipe(), *words]) == 2
            assert message in capsys.readouterr().err

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["check", "--help"])
        assert stop.value.code == 0 and "--images" in capsys.readouterr().out


class TestFirstBatch:
    def trainer(self, assembled, tmp_path, rows=None, **changes):
        config = settings(AlignGPTInstructConfig, tmp_path, allow_unaligned=True, **changes)
        rows = to_dataset(conversation_rows(8)) if rows is None else rows
        return AlignGPTInstructTrainer(assembled[0], config, rows, processing_class=assembled[1])

    def test_is_said_in_a_few_lines(self, assembled, tmp_path, capsys):
        trainer = self.trainer(assembled, tmp_path)
        before, state = snapshot(trainer.model), torch.get_rng_state()
        capsys.readouterr()
        log_first_batch(trainer)
        lines = capsys.readouterr().out.strip().split("\n")
        assert len(lines) == 4 and lines[0].startswith("instruct: 8 rows, the longest of ")
        assert "4 images" in lines[1] and "language_model" in lines[2]
        assert lines[3].startswith("  Row 0: <s><align>") and "<image>x16" in lines[3] and "[[" in lines[3]
        # neither model nor random numbers have moved
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())

    def test_of_a_stream_counts_nothing(self, assembled, tmp_path, capsys):
        trainer = self.trainer(assembled, tmp_path, to_dataset(conversation_rows(8)).to_iterable_dataset())
        log_first_batch(trainer)
        assert "a stream of rows" in capsys.readouterr().out
        assert trainer.train_dataset.stream_counts.totals() == {}

    def test_training_says_it(self, assembled, tmp_path, capsys):
        self.trainer(assembled, tmp_path, max_steps=1).train()
        assert "instruct: 8 rows" in capsys.readouterr().out

    def test_refuses_what_cannot_be_learned(self, assembled):
        from aligngpt_trainers import AlignGPTDataCollator

        collator = AlignGPTDataCollator(assembled[1], "instruct")
        batch = collator(conversation_rows(4))
        names = ["Row a", "Row b", "Row c", "Row d"]
        check_batch(batch, names, collator)
        silent = {**batch, "labels": batch["labels"].clone()}
        silent["labels"][2] = -100
        with pytest.raises(ValueError, match="Row c has no supervised token"):
            check_batch(silent, names, collator)
        with pytest.raises(ValueError, match=r"Row a and those after it\) has 3 images and 64 image tokens, not 16"):
            check_batch({**batch, "pixel_values": batch["pixel_values"][1:]}, names, collator)


def test_marks_stand_where_the_labels_are(assembled):
    from aligngpt_trainers import AlignGPTDataCollator

    collator = AlignGPTDataCollator(assembled[1], "instruct")
    batch = collator(conversation_rows(4))
    for row, answers in enumerate((1, 2, 1, 1)):
        text = mark_supervised(*(batch[name][row] for name in ("input_ids", "labels", "attention_mask")), collator)
        assert text.count("[[") == text.count("]]") == answers
        assert text.count("<image>x16") == (1, 1, 2, 0)[row]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        plain = collator.processor.tokenizer.decode(ids[ids != collator.processor.image_token_id])
        assert text.replace("[[", "").replace("]]", "").replace("<image>x16", "") == plain


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "drop_last"),
    [(16, 4, 2, 1, False), (17, 4, 2, 1, False), (17, 4, 3, 2.5, False), (19, 4, 1, 1, True), (3, 4, 4, 2, False)],
)
def test_steps_are_those_of_the_trainer(assembled, tmp_path, rows, batch, accumulation, epochs, drop_last):
    config = settings(
        AlignGPTInstructConfig,
        tmp_path,
        allow_unaligned=True,
        max_steps=-1,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    trainer = AlignGPTInstructTrainer(
        assembled[0], config, to_dataset(conversation_rows(rows)), processing_class=assembled[1]
    )
    values = trainer.set_initial_training_values(config, trainer.get_train_dataloader())
    assert step_facts(config, rows, 1)["steps"] == values[-1]


def test_selected_rows_with_ids_are_named(parts, recipe, tmp_path):
    """The example's name is the row's own, also after rows have been left out."""
    rows = to_dataset(conversation_rows(6)).add_column("id", list("abcdef"))
    rows.save_to_disk(tmp_path / "rows")
    report = check(recipe("instruct", dataset=str(tmp_path / "rows")))
    name = report["example"]["name"]
    assert name.startswith("Row with id '") and name[-2] in "abcdef"
    number = "abcdef".index(name[-2])
    text = " ".join(part["text"] or "" for m in rows[number]["messages"] for part in m["content"])
    assert all(word in report["example"]["text"] for word in text.split())


def test_nothing_is_left_of_a_meta_model(parts):
    """The light way really holds no weights."""
    from aligngpt_trainers.commands.arguments import PretrainModelArguments
    from aligngpt_trainers.commands.check_light import _assemble

    args = PretrainModelArguments(language_model=str(parts[0]), vision_tower=str(parts[1]), num_align_levels=NUM_LEVELS)
    model, processor = _assemble(args)
    full, full_processor = assemble(*parts, num_align_levels=NUM_LEVELS)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert processor.tokenizer.get_vocab() == full_processor.tokenizer.get_vocab()
    assert processor.chat_template == full_processor.chat_template
