"""Rows that are read on the way: the same rows as from `load_rows` without `streaming`, shared out and counted."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from stage_parts import NUM_LEVELS, conversation_rows, draw_image, losses, pair_rows, settings, to_dataset
from torch.utils.data import DataLoader

from aligngpt_trainers import (
    AlignGPTDataCollator,
    AlignGPTInstructConfig,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.data.conversations import caption_of
from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.data.sources import open_source
from aligngpt_trainers.rows import prepare_rows, stream_totals


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    # `datasets` waits that long for the threads of a shuffled parquet stream
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def captions(rows) -> list[str]:
    return [caption_of(row["messages"]) for row in rows]


def llava(folder, number: int, start: int = 0, **more) -> list[dict]:
    """Records as in LLaVA's files, their images in `folder`; every third has none, every fourth two."""
    records = []
    for i in range(start, start + number):
        images = [] if i % 3 == 2 else ["a.png", "b.png"] if i % 4 == 3 else "a.png"
        question = "<image>\n" * (len(images) if isinstance(images, list) else 1) + "What?"
        record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"Thing {i}."}]}
        records.append(record | ({"image": images} if images else {}) | more)
    return records


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"a.png": "red", "b.png": "blue"}.items():
        draw_image(colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def table():
    return Dataset.from_dict(
        {"image": [draw_image("red", seed=i) for i in range(12)], "caption": [f"number {i}" for i in range(12)]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )


def same_rows(streamed, mapped) -> None:
    streamed = list(streamed)
    assert len(streamed) == len(mapped) > 0
    for one, two in zip(streamed, mapped, strict=True):
        plain = [
            {**m, "content": [{"type": block["type"], "text": block.get("text")} for block in m["content"]]}
            for m in one["messages"]
        ]
        assert plain == two["messages"]
        assert [i.tobytes() for i in one["images"]] == [i.tobytes() for i in two["images"]]
        for column in ("align_level", "clip_score"):
            assert one.get(column) == two.get(column)


class TestSources:
    @pytest.mark.parametrize("kind", ["json", "jsonl"])
    def test_llavas_records(self, folder, kind):
        records = llava(folder, 12)
        for i, record in enumerate(records):
            record["similarity"] = i % 8
        text = json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records))
        (folder / f"data.{kind}").write_text(text)
        source = folder / f"data.{kind}"
        same_rows(load_rows(source, streaming=True, shuffle_buffer=0), load_rows(source))

    def test_parquet_and_save_to_disk_and_memory(self, table, tmp_path):
        table.to_parquet(tmp_path / "one.parquet")
        table.save_to_disk(tmp_path / "saved")
        for source in (tmp_path / "one.parquet", tmp_path / "saved", table, list(table)):
            same_rows(load_rows(source, streaming=True, shuffle_buffer=0), load_rows(source))

    def test_several_files_by_a_pattern_and_a_folder(self, table, tmp_path):
        (tmp_path / "parts").mkdir()
        for i in range(3):
            table.select(range(4 * i, 4 * i + 4)).to_parquet(tmp_path / "parts" / f"{i}.parquet")
        for source in (tmp_path / "parts" / "*.parquet", tmp_path / "parts"):
            stream = load_rows(source, streaming=True, shuffle_buffer=0)
            assert stream.num_shards == 3
            same_rows(stream, load_rows(source))
            assert captions(stream) == [f"number {i}" for i in range(12)]

    def test_as_load_dataset_streams_it(self, table, tmp_path):
        table.to_parquet(tmp_path / "one.parquet")
        stream = load_dataset("parquet", data_files=str(tmp_path / "one.parquet"), split="train", streaming=True)
        same_rows(load_rows(stream, shuffle_buffer=0), load_rows(table))
        with pytest.raises(ValueError, match="no split 'test'; there are train"):
            load_rows(str(tmp_path), split="test", streaming=True)

    def test_a_parquet_files_row_groups_are_shards(self, table, tmp_path):
        table.to_parquet(tmp_path / "one.parquet", batch_size=3)
        opened, _ = open_source(tmp_path / "one.parquet", None, None, None, streaming=True)
        assert opened.num_shards == 4

    def test_images_stay_undecoded(self, folder):
        (folder / "broken.png").write_bytes(b"no image")
        (folder / "data.json").write_text(json.dumps(llava(folder, 1, image="broken.png")))
        stream = load_rows(folder / "data.json", streaming=True)
        assert next(iter(stream.decode(False)))["images"] == [{"path": str(folder / "broken.png"), "bytes": None}]


class TestShuffling:
    def test_order_changes_and_is_repeatable(self, table):
        plain, one, two, other = (
            captions(load_rows(table, streaming=True, shuffle_buffer=buffer, seed=seed))
            for buffer, seed in ((0, 0), (8, 0), (8, 0), (8, 1))
        )
        assert one == two and len({tuple(plain), tuple(one), tuple(other)}) == 3
        assert sorted(plain) == sorted(one) == sorted(other)

    def test_each_epoch_has_its_order(self, table):
        stream = load_rows(table, streaming=True, shuffle_buffer=8)
        first = captions(stream)
        stream.set_epoch(1)
        assert captions(stream) != first and sorted(captions(stream)) == sorted(first)


class TestBadRows:
    def source(self, folder):
        records = llava(folder, 8)
        records[3]["image"] = "gone.png"
        records[5]["conversations"].pop()
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        return folder / "data.jsonl"

    def test_stop_the_stream_when_their_turn_comes(self, folder):
        rows = iter(load_rows(self.source(folder), streaming=True, shuffle_buffer=0))
        assert captions(next(rows) for _ in range(3)) == ["Thing 0.", "Thing 1.", "Thing 2."]
        with pytest.raises(ValueError, match=r"data\.jsonl: row 3: no such image file '.*gone\.png'.*on_bad_row"):
            next(rows)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_left_out_and_counted(self, folder, workers, caplog):
        rows = load_rows(self.source(folder), streaming=True, shuffle_buffer=0, on_bad_row="skip")
        kept = list(DataLoader(rows.decode(False), batch_size=None, num_workers=workers))
        assert captions(kept) == [f"Thing {i}." for i in (0, 1, 2, 4, 6, 7)]
        assert rows.stream_counts.totals() == {"rows_left_out": 2}
        if not workers:  # a worker's log goes to its own stderr
            assert "1 row left out so far; the last: row 3: no such image file" in caplog.text

    def test_of_a_stream_of_datasets(self, table, tmp_path):
        table.add_column("id", [f"x{i}" for i in range(12)]).map(
            lambda row: {"caption": "" if row["id"] == "x7" else row["caption"]}
        ).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a\.parquet: row with id 'x7': message 1: empty answer"):
            list(load_rows(tmp_path / "a.parquet", streaming=True))
        assert len(list(load_rows(tmp_path / "a.parquet", streaming=True, on_bad_row="skip"))) == 11

    def test_columns_and_levels(self, folder, table):
        (folder / "wrong.jsonl").write_text('{"first": "a", "answer": "b"}\n')
        (folder / "gap.jsonl").write_text(
            "\n".join(map(json.dumps, [*llava(folder, 1, similarity=3), *llava(folder, 1)]))
        )
        (folder / "none.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="found the columns answer, first; accepted are"):
            load_rows(folder / "wrong.jsonl", streaming=True)
        with pytest.raises(ValueError, match="found the columns caption; accepted are"):
            load_rows(table.remove_columns("image"), streaming=True)
        with pytest.raises(ValueError, match=r"row 1: no align_level, which other rows have"):
            list(load_rows(folder / "gap.jsonl", streaming=True, shuffle_buffer=0))
        with pytest.raises(ValueError, match="no rows"):
            load_rows(folder / "none.jsonl", streaming=True)


class TestPreparedStreams:
    def prepared(self, processor, rows, tmp_path, **changes):
        args = settings(AlignGPTInstructConfig, tmp_path, **changes)
        collator = AlignGPTDataCollator(
            processor, "instruct", max_length=args.max_length, on_overlong=args.on_overlong, emit_row_index=True
        )
        return prepare_rows(rows, collator, args, "train")[0], collator, args

    def test_rows_carry_what_the_map_style_ones_carry(self, assembled, tmp_path):
        rows = to_dataset(conversation_rows(8))
        mapped, _, _ = self.prepared(assembled[1], rows, tmp_path)
        streamed, _, args = self.prepared(assembled[1], rows.to_iterable_dataset(), tmp_path)
        assert args.accelerator_config.dispatch_batches is False
        for one, two in zip(streamed, mapped, strict=True):
            for column in ("row_index", "token_ids", "supervised", "length", "num_images"):
                assert np.array_equal(one[column], two[column]), column
        assert stream_totals(streamed, "train") == {"train_rows_read": 8}
        assert stream_totals(mapped, "train") == {}

    @pytest.mark.parametrize("workers", [0, 3])
    @pytest.mark.parametrize(("on_overlong", "kind"), [("drop", "left_out"), ("truncate", "cut")])
    def test_overlong_rows_are_counted(self, assembled, tmp_path, workers, on_overlong, kind):
        rows = conversation_rows(12)
        for i in (2, 5, 9):
            rows[i]["messages"][-1]["content"][0]["text"] = "a long answer " * 30
        stream = load_rows(to_dataset(rows), streaming=True, shuffle_buffer=0)
        limit = max(self.prepared(assembled[1], to_dataset(conversation_rows(12)), tmp_path)[0]["length"])
        stream, collator, _ = self.prepared(assembled[1], stream, tmp_path, max_length=limit, on_overlong=on_overlong)
        batches = list(DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=collator))
        assert stream_totals(stream, "train") == {"train_rows_read": 12, f"train_rows_{kind}": 3}
        assert sum(len(batch["input_ids"]) for batch in batches) == (9 if kind == "left_out" else 12)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= limit

    def test_overlong_rows_stop_the_run_by_default(self, assembled, tmp_path):
        stream, _, _ = self.prepared(
            assembled[1], to_dataset(conversation_rows(4)).to_iterable_dataset(), tmp_path, max_length=40
        )
        with pytest.raises(ValueError, match=r"Row 0 has \d+ tokens, more than max_length=40"):
            list(stream)

    def test_rows_without_images_column(self, assembled, tmp_path):
        rows = to_dataset([row for row in conversation_rows(8) if not row["images"]]).remove_columns("images")
        stream, collator, _ = self.prepared(assembled[1], rows.to_iterable_dataset(), tmp_path)
        batch = collator(list(stream))
        assert "pixel_values" not in batch and batch["row_index"].tolist() == [0, 1]


class TestTraining:
    def train(self, assembled, tmp_path, source, **changes):
        stream = load_rows(source, streaming=True)
        config = settings(AlignGPTPretrainConfig, tmp_path / "out", **changes)
        trainer = AlignGPTPretrainTrainer(assembled[0], config, stream, processing_class=assembled[1])
        trainer.train()
        return trainer

    @pytest.mark.parametrize("workers", [0, 2])
    def test_with_max_steps_and_workers(self, assembled, tmp_path, workers):
        for part in range(2):
            to_dataset(pair_rows(16)).select(range(part * 8, part * 8 + 8)).to_parquet(tmp_path / f"{part}.parquet")
        trainer = self.train(assembled, tmp_path, tmp_path / "*.parquet", max_steps=6, dataloader_num_workers=workers)
        assert len(losses(trainer)) == 6 and losses(trainer)[-1] < losses(trainer)[0]
        assert stream_totals(trainer.train_dataset, "train")["train_rows_read"] >= 24

    def test_needs_max_steps(self, assembled, tmp_path):
        to_dataset(pair_rows(8)).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="max_steps"):
            self.train(assembled, tmp_path, tmp_path / "a.parquet", max_steps=-1)


PROGRAM = """
import json, sys
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from aligngpt_trainers.data.load import load_rows
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
def collate(rows):
    return {"numbers": torch.tensor([int(row["messages"][1]["content"][0]["text"].split()[1]) for row in rows])}
seen = []
for source in ("one.parquet", "part-*.parquet"):
    rows = load_rows(f"{sys.argv[1]}/{source}", streaming=True, shuffle_buffer=0).decode(False)
    loader = accelerator.prepare(DataLoader(rows, batch_size=2, collate_fn=collate))
    seen.append([number for batch in loader for number in batch["numbers"].tolist()])
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(seen, file)
"""


def test_two_processes_share_the_rows(table, tmp_path):
    """By files where there are enough, else by batches: no row twice, none left out."""
    table.to_parquet(tmp_path / "one.parquet")
    for part in range(2):
        table.select(range(6 * part, 6 * part + 6)).to_parquet(tmp_path / f"part-{part}.parquet")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*words, str(tmp_path / "program.py"), str(tmp_path)], check=True, timeout=120)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for one, two in zip(*seen, strict=True):
        assert len(one) == len(two) == 6 and sorted(one + two) == list(range(12))


def test_levels_of_a_stream_are_checked(assembled):
    collator = AlignGPTDataCollator(assembled[1], "pretrain", num_align_levels=NUM_LEVELS)
    row = {**pair_rows(1)[0], "row_index": 4, "align_level": torch.tensor(1)}
    with pytest.raises(ValueError, match="Row 4 has align_level"):
        collator([row])
