"""Sources of every kind become the same rows, and what cannot become one is named."""

import csv
import io
import json
import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image as PILImage

from aligngpt_trainers.data.conversations import BadRow, caption_of, to_messages
from aligngpt_trainers.data.load import load_rows, read_rows


RED, BLUE = (200, 10, 20), (20, 10, 200)
FEATURES = Features(
    {
        "images": List(datasets.Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


def draw_image(colour=RED, size=(6, 4), mode="RGB"):
    return PILImage.new("RGB", size, colour).convert(mode)


def encode(image, **options):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


def turn(speaker, value):
    return {"from": speaker, "value": value}


def block(text=None):
    return {"type": "image", "text": None} if text is None else {"type": "text", "text": text}


def said(role, *blocks):
    return {"role": role, "content": list(blocks)}


PAIR = [said("user", block(), block("What?")), said("assistant", block("A kite."))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"a.png": RED, "b.png": BLUE, "deep/c.png": RED}.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(colour).save(tmp_path / "pictures" / name)
    return tmp_path


def llava(**more):
    return {
        "id": "x1",
        "image": "a.png",
        "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A kite.")],
        **more,
    }


class TestLlavaJson:
    def test_pairs_levels_and_ids(self, folder):
        source = folder / "data.json"
        source.write_text(json.dumps([llava(similarity=3), llava(id=7, image="deep/c.png", similarity=0)]))
        rows = load_rows(source, image_folder=folder / "pictures")
        assert rows.features["images"] == FEATURES["images"] and rows.features["messages"] == FEATURES["messages"]
        assert rows["align_level"][:] == [3, 0] and rows["id"][:] == ["x1", "7"]
        assert rows[0]["messages"] == PAIR
        assert rows[0]["images"][0].getpixel((0, 0)) == RED

    def test_jsonl_and_paths_from_the_folder_of_the_file(self, folder):
        source = folder / "pictures" / "data.jsonl"
        source.write_text("\n".join(json.dumps(record) for record in [llava(), llava(image="b.png")]) + "\n\n")
        rows = load_rows(str(source))
        assert [row["images"][0].getpixel((0, 0)) for row in rows] == [RED, BLUE]
        assert "align_level" not in rows.column_names

    def test_images_stay_undecoded(self, folder):
        rows = load_rows([llava()], image_folder=folder / "pictures")
        assert rows.with_format("arrow")[0]["images"].to_pylist() == [
            [{"bytes": None, "path": str(folder / "pictures" / "a.png")}]
        ]

    def test_rows_without_and_with_several_images(self, folder):
        text = {"id": "t", "conversations": [turn("human", "Hi"), turn("gpt", "Hello")], "model": "m"}
        several = llava(image=["a.png", "b.png"])
        several["conversations"] = [
            turn("human", "First <image>, then\n<image> last"),
            turn("gpt", "Red."),
            turn("human", "And now?"),
            turn("gpt", "Blue."),
        ]
        rows = load_rows([llava(), text, several], image_folder=folder / "pictures")
        assert [len(images) for images in rows["images"]] == [1, 0, 2]
        assert rows[1]["messages"] == [said("user", block("Hi")), said("assistant", block("Hello"))]
        first = said("user", block("First "), block(), block(", then\n"), block(), block(" last"))
        assert rows[2]["messages"][0] == first
        assert [message["role"] for message in rows[2]["messages"]] == ["user", "assistant"] * 2

    @pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", " What?<image> ", "<image>What?"])
    def test_single_placeholder_goes_to_the_front(self, text):
        record = {"conversations": [turn("human", text), turn("gpt", "A kite.")]}
        plain = [{**m, "content": [{k: v for k, v in b.items() if v} for b in m["content"]]} for m in PAIR]
        assert to_messages(record, ("conversations",), 1) == plain

    def test_system_turn_is_kept(self):
        record = {"conversations": [turn("system", "Be kind."), turn("human", "Hi"), turn("gpt", "Hello")]}
        roles = [message["role"] for message in to_messages(record, ("conversations",), 0)]
        assert roles == ["system", "user", "assistant"]

    def test_several_files_and_kinds_of_the_same_column(self, folder):
        """Ids that are numbers and texts, one image and lists: what a table could not hold."""
        (folder / "pictures" / "0.json").write_text(json.dumps([llava(id=1), llava(id="x", image=["a.png"])]))
        text = {"id": 3, "conversations": [turn("human", "Hi"), turn("gpt", "Hello")]}
        (folder / "pictures" / "1.json").write_text(json.dumps([text]))
        rows = load_rows(folder / "pictures" / "*.json")
        assert rows["id"][:] == ["1", "x", "3"] and [len(images) for images in rows["images"]] == [1, 1, 0]

    @pytest.mark.parametrize("indent", [None, 1])
    def test_json_is_read_piece_by_piece(self, folder, monkeypatch, indent):
        monkeypatch.setattr("aligngpt_trainers.data.sources.READ", 7)
        records = [llava(id=f"é {i} ] }}, {{") for i in range(5)]
        (folder / "d.json").write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert load_rows(folder / "d.json", image_folder=folder / "pictures")["id"][:] == [r["id"] for r in records]

    def test_same_rows_have_the_same_fingerprint(self, folder):
        one, two = (load_rows([llava()], image_folder=folder / "pictures") for _ in range(2))
        other = load_rows([llava(image="b.png")], image_folder=folder / "pictures")
        assert one._fingerprint == two._fingerprint != other._fingerprint


class TestOtherLayouts:
    def test_messages_as_trl_writes_them(self):
        string = {
            "images": [draw_image()],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A kite."}],
        }
        blocks = {"images": [draw_image()], "messages": PAIR}
        for record in (string, blocks):
            assert load_rows([record])[0]["messages"] == PAIR

    def test_prompt_completion(self):
        as_text = {"images": [draw_image()], "prompt": "What?", "completion": "A kite."}
        as_messages = {
            "images": [draw_image()],
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "A kite."}],
        }
        for record in (as_text, as_messages):
            assert load_rows([record])[0]["messages"] == PAIR

    def test_prompt_completion_with_earlier_turns_and_several_images(self):
        record = {
            "images": [draw_image(), draw_image(BLUE)],
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [block(), block(), block("Compare.")]},
                {"role": "assistant", "content": "Red, blue."},
                {"role": "user", "content": "And?"},
            ],
            "completion": [{"role": "assistant", "content": [block("That is all.")]}],
        }
        text = {"prompt": "Say hello.", "completion": "Hello."}
        rows = load_rows([record, text])
        assert [len(row["images"]) for row in rows] == [2, 0]
        assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
        assert rows[0]["messages"][1]["content"] == [block(), block(), block("Compare.")]
        assert rows[1]["messages"] == [said("user", block("Say hello.")), said("assistant", block("Hello."))]

    def test_messages_with_images_in_several_turns_and_none(self):
        record = {
            "images": [draw_image(), draw_image(BLUE)],
            "messages": [
                {"role": "user", "content": [block("This"), block(), block("is?")]},
                {"role": "assistant", "content": [block("Red.")]},
                {"role": "user", "content": [block("And this?"), block()]},
                {"role": "assistant", "content": [block("Blue.")]},
            ],
        }
        text = {"images": None, "messages": [said("user", block("Hi")), said("assistant", block("Hello"))]}
        for source in ([record, text], Dataset.from_list([record, text])):
            rows = load_rows(source)
            assert [[i.getpixel((0, 0)) for i in row["images"]] for row in rows] == [[RED, BLUE], []]
            assert rows[0]["messages"] == record["messages"] and rows[1]["messages"] == text["messages"]

    @pytest.mark.parametrize("column", ["caption", "text"])
    def test_image_and_caption(self, column):
        row = load_rows([{"image": draw_image(), column: "a kite", "clip_score": 0.25}])[0]
        assert row["messages"] == [said("user", block()), said("assistant", block("a kite"))]
        assert row["clip_score"] == 0.25 and row["images"][0].getpixel((0, 0)) == RED
        assert caption_of(row["messages"]) == "a kite"

    def test_tables_with_paths(self, folder):
        for name, delimiter in {"t.csv": ",", "t.tsv": "\t"}.items():
            with (folder / "pictures" / name).open("w", newline="") as file:
                csv.writer(file, delimiter=delimiter).writerows([["image", "caption"], ["b.png", "blue, all of it"]])
            row = load_rows(folder / "pictures" / name)[0]
            assert row["images"][0].getpixel((0, 0)) == BLUE and caption_of(row["messages"]) == "blue, all of it"


class TestDataSets:
    def embedded(self, count=5):
        return Dataset.from_dict(
            {"image": [draw_image((i, 0, 0)) for i in range(count)], "caption": [f"number {i}" for i in range(count)]},
            features=Features({"image": datasets.Image(), "caption": Value("string")}),
        )

    def check(self, rows, order=range(5)):
        assert [caption_of(messages) for messages in rows["messages"]] == [f"number {i}" for i in order]
        assert [row["images"][0].getpixel((0, 0))[0] for row in rows] == list(order)

    def test_parquet_with_and_without_image_feature(self, tmp_path):
        self.embedded().to_parquet(tmp_path / "typed.parquet")
        raw = {
            "image": [{"bytes": encode(draw_image((i, 0, 0)))} for i in range(5)],
            "caption": [f"number {i}" for i in range(5)],
        }
        Dataset.from_dict(raw).to_parquet(tmp_path / "raw.parquet")
        binary = {"image": [encode(draw_image((i, 0, 0))) for i in range(5)], "text": [f"number {i}" for i in range(5)]}
        Dataset.from_dict(binary).to_parquet(tmp_path / "binary.parquet")
        for name in ("typed", "raw", "binary"):
            self.check(load_rows(tmp_path / f"{name}.parquet"))

    def test_many_files_by_a_pattern(self, tmp_path):
        for i in range(3):
            self.embedded().select(range(2 * i, min(2 * i + 2, 5))).to_parquet(tmp_path / f"part-{i}.parquet")
        self.check(load_rows(tmp_path / "part-*.parquet"))
        self.check(load_rows(f"{tmp_path}/**/*.parquet"))
        with pytest.raises(ValueError, match=r"part-\*\.jsonl: no file fits this pattern"):
            load_rows(tmp_path / "part-*.jsonl")
        (tmp_path / "part-3.csv").write_text("image,caption\n")
        with pytest.raises(ValueError, match=r"several kinds fit this pattern \(\.csv, \.parquet\)"):
            load_rows(tmp_path / "part-*")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
        with pytest.raises(ValueError, match=r"bad\.parquet: not readable as parquet"):
            load_rows(tmp_path / "bad.parquet")

    def test_arrow_files(self, tmp_path):
        self.embedded().save_to_disk(tmp_path / "saved")
        self.check(load_rows(next((tmp_path / "saved").glob("*.arrow"))))

    def test_parquet_of_conversations_with_lists_of_paths(self, folder):
        several = llava(image=["a.png", "b.png"])
        several["conversations"] = [turn("human", "<image> <image>\nWhat?"), turn("gpt", "Kites.")]
        text = {"id": "t", "image": None, "conversations": [turn("human", "Hi"), turn("gpt", "Hello")]}
        Dataset.from_list([llava(image=["a.png"]), several, text]).to_parquet(folder / "pictures" / "c.parquet")
        rows = load_rows(folder / "pictures" / "c.parquet")
        assert [[i.getpixel((0, 0)) for i in row["images"]] for row in rows] == [[RED], [RED, BLUE], []]
        assert rows[0]["messages"] == PAIR

    def test_an_empty_image_value_is_named(self):
        source = Dataset.from_dict({"images": [[draw_image()], [None]], "messages": [PAIR, PAIR]}, features=FEATURES)
        with pytest.raises(ValueError, match="row 1: an empty image value"):
            load_rows(source)

    def test_saved_folders_and_their_splits(self, tmp_path):
        self.embedded().save_to_disk(tmp_path / "single")
        DatasetDict({"train": self.embedded(), "val": self.embedded(2)}).save_to_disk(tmp_path / "several")
        self.check(load_rows(tmp_path / "single"))
        self.check(load_rows(tmp_path / "several"))
        self.check(load_rows(tmp_path / "several", split="val"), range(2))
        with pytest.raises(ValueError, match=r"no split 'test'; there are train, val"):
            load_rows(tmp_path / "several", split="test")

    def test_folder_as_load_dataset_reads_it(self, tmp_path):
        (tmp_path / "data").mkdir()
        self.embedded().to_parquet(tmp_path / "data" / "train-00000.parquet")
        self.check(load_rows(tmp_path / "data"))

    def test_selected_rows_stay_selected(self):
        self.check(load_rows(self.embedded().select([3, 1])), [3, 1])

    def test_own_rows_come_back_unchanged(self, tmp_path):
        first = load_rows(
            [
                {"image": draw_image(), "caption": "a kite", "align_level": 2},
                {"image": draw_image(BLUE), "caption": "sea", "align_level": 0},
            ]
        )
        first.save_to_disk(tmp_path / "rows")
        again = load_rows(tmp_path / "rows")
        assert again.features == first.features
        for before, after in zip(first, again, strict=True):
            assert before["messages"] == after["messages"] and before["align_level"] == after["align_level"]
            assert before["images"][0].tobytes() == after["images"][0].tobytes()
        # memory-mapped, not read: a data set of many gigabytes opens at once
        assert any(type(block).__name__ == "MemoryMappedTable" for column in again.data.blocks for block in column)

    def test_rows_without_image_in_a_column_of_images(self):
        source = Dataset.from_dict(
            {"image": [None, draw_image(BLUE), None], "prompt": ["a", "b", "c"], "completion": ["1", "2", "3"]},
            features=Features({"image": datasets.Image(), "prompt": Value("string"), "completion": Value("string")}),
        )
        rows = load_rows(source)
        assert [len(row["images"]) for row in rows] == [0, 1, 0]
        assert rows[1]["images"][0].getpixel((0, 0)) == BLUE

    def test_paths_in_a_data_set(self, folder):
        source = Dataset.from_dict({"image": ["a.png", "b.png"], "caption": ["red", "blue"]})
        rows = load_rows(source, image_folder=folder / "pictures")
        assert [row["images"][0].getpixel((0, 0)) for row in rows] == [RED, BLUE]
        with pytest.raises(ValueError, match=r"row 1: no such image file '.*nine\.png'"):
            load_rows(
                Dataset.from_dict({"image": ["a.png", "nine.png"], "caption": ["x", "y"]}),
                image_folder=folder / "pictures",
            )


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"image": "nine.png"}, r"no such image file '.*nine\.png'"),
            ({"image": ["a.png", "b.png"]}, r"2 image\(s\) but 1 <image> placeholder"),
            ({"image": None}, r"0 image\(s\) but 1 <image> placeholder"),
            ({"conversations": [turn("gpt", "A kite.")]}, "does not begin with human/user but with 'assistant'"),
            ({"conversations": [turn("human", "<image>"), turn("gpt", " ")]}, "message 1: empty answer"),
            ({"conversations": [turn("human", "<image>")]}, "ends without an answer"),
            ({"conversations": [turn("human", "<image>"), turn("human", "?"), turn("gpt", "a")]}, "do not alternate"),
            ({"conversations": [turn("human", "<image>"), turn("gpt", "an <image> tag")]}, "contains <image>"),
            ({"conversations": [turn("human", "<image> <align>"), turn("gpt", "a")]}, "contains <align>"),
            ({"conversations": [turn("human", "<image>"), turn("bot", "a")]}, "role 'bot'"),
            ({"conversations": [{"from": "human"}]}, "lacks 'from' or 'value'"),
            ({"conversations": []}, "`conversations` is empty"),
            ({"similarity": 0.31}, "similarity is 0.31, not a level"),
            ({"similarity": -1}, "similarity is -1, not a level"),
        ],
    )
    def test_row_id_and_reason_are_named(self, folder, change, reason):
        records = [llava(similarity=1), llava(**{"id": "bad", "similarity": 1, **change})]
        with pytest.raises(ValueError, match=rf"1 of 2 rows cannot be used:\n  row 1 \(id 'bad'\): .*{reason}"):
            load_rows(records, image_folder=folder / "pictures")

    def test_skipped_rows_are_counted_and_reported(self, folder, caplog):
        records = [llava(id=i, image="a.png" if i % 3 else "nine.png") for i in range(30)]
        with pytest.raises(ValueError, match=r"10 of 30 rows.*\n(  row \d+ .*\n){5}  \.\.\. and 5 more"):
            load_rows(records, image_folder=folder / "pictures")
        rows, report = read_rows(records, image_folder=folder / "pictures", on_bad_row="skip")
        assert rows["id"][:] == [str(i) for i in range(30) if i % 3]
        assert report.total == 30 and report.kept == [i for i in range(30) if i % 3]
        assert [number for number, _, _ in report.dropped] == list(range(0, 30, 3))
        assert "10 of 30 rows left out" in caplog.text
        with pytest.raises(ValueError, match=r"no rows\. All 1 were unusable"):
            load_rows(records[:1], image_folder=folder / "pictures", on_bad_row="skip")

    @pytest.mark.parametrize(
        ("column", "value", "nothing"),
        [
            ("videos", ["a.mp4"], []),
            ("audio", {"bytes": b"RIFF", "path": None}, None),
            ("tools", '[{"name": "look"}]', "[]"),
            ("objects", {"ref": ["a kite"], "bbox": [[1, 2, 3, 4]]}, {"ref": [], "bbox": []}),
            ("tool_calls", [{"name": "look"}], None),
        ],
    )
    @pytest.mark.parametrize("kind", ["list", "table", "stream"])
    def test_what_the_model_cannot_take(self, column, value, nothing, kind):
        def row(value, text):
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "A kite."}]
            if column == "tool_calls":
                turns[1][column], value = value, None
            return {"messages": turns, **({} if column == "tool_calls" else {column: value})}

        rows = [row(nothing, "What?"), row(value, "What is in <bbox>?"), row(nothing, "Where?")]
        source = rows
        if kind != "list":
            source = Dataset.from_list(rows)
            source = source.cast_column("audio", datasets.Audio()) if column == "audio" else source
        reason = f"holds `{column}`, but the model takes images and text alone"
        with pytest.raises(ValueError, match=f"row 1.*: {reason}(?s:.*)on_bad_row"):
            list(load_rows(source, streaming=kind == "stream", shuffle_buffer=0))
        kept = load_rows(source, streaming=kind == "stream", shuffle_buffer=0, on_bad_row="skip")
        texts = [row["messages"][0]["content"][0]["text"] for row in kept]
        assert texts == ["What?", "Where?"]

    def test_facts_about_objects_are_no_reason(self):
        row = {"image": draw_image(), "caption": "a kite", "objects": {"bbox": [[1, 2, 3, 4]]}}
        assert len(load_rows([row])) == 1

    def test_a_text_block_without_text(self):
        turns = [said("user", {"type": "text", "content": "Hi"}), said("assistant", block("a"))]
        with pytest.raises(BadRow, match="message 0: a text block has no `text`"):
            to_messages({"messages": turns}, ("messages",), 0)

    def test_a_level_that_only_some_rows_have(self, folder):
        with pytest.raises(ValueError, match="row 1: no align_level, which other rows have"):
            load_rows([llava(similarity=1), llava()], image_folder=folder / "pictures")

    def test_columns(self, caplog):
        with pytest.raises(ValueError, match=r"found the columns answer, first; accepted are `messages`"):
            load_rows([{"first": "a", "answer": "b"}])
        with pytest.raises(ValueError, match="found the columns caption; accepted"):
            load_rows(Dataset.from_dict({"caption": ["a"]}))
        load_rows([{"image": draw_image(), "caption": "a", "similarty": 3, "url": "u"}])
        assert "columns not used: similarty." in caplog.text
        with pytest.raises(ValueError, match=r"column 'image' .* does not hold images"):
            load_rows(Dataset.from_dict({"image": [1.5], "caption": ["a"]}))

    def test_sources(self, tmp_path):
        with pytest.raises(ValueError, match=r"nine\.json: no such file or folder"):
            load_rows(tmp_path / "nine.json")
        (tmp_path / "broken.jsonl").write_text('{"image": "a", "caption": "b"}\n{"image": \n')
        with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: not valid JSON"):
            load_rows(tmp_path / "broken.jsonl")
        (tmp_path / "broken.json").write_text('[{"image": "a"}, {"image": ]')
        with pytest.raises(ValueError, match=r"broken\.json, record 1: not valid JSON"):
            load_rows(tmp_path / "broken.json")
        (tmp_path / "cut.json").write_text('[{"image": "a"},')
        with pytest.raises(ValueError, match=r"cut\.json, record 1: not valid JSON \(Expecting value at the end"):
            load_rows(tmp_path / "cut.json")
        (tmp_path / "wide.csv").write_text("image,caption\na.png,a kite\n", encoding="utf-16")
        with pytest.raises(ValueError, match=r"wide\.csv: not UTF-8 text but UTF-16: save it as UTF-8"):
            load_rows(tmp_path / "wide.csv")
        (tmp_path / "twice.csv").write_text("image,caption,caption\na.png,a kite,a dog\n")
        with pytest.raises(ValueError, match=r"twice\.csv: the header names 'caption' twice"):
            load_rows(tmp_path / "twice.csv")
        (tmp_path / "object.json").write_text('{"data": []}')
        with pytest.raises(ValueError, match="expected a list of records"):
            load_rows(tmp_path / "object.json")
        (tmp_path / "t.xlsx").write_text("")
        with pytest.raises(ValueError, match=r"unknown kind of file; accepted are \.arrow, \.csv"):
            load_rows(tmp_path / "t.xlsx")
        (tmp_path / "empty.json").write_text("[]")
        with pytest.raises(ValueError, match="no rows"):
            load_rows(tmp_path / "empty.json")
        with pytest.raises(ValueError, match=r"image_folder '.*nowhere' does not exist"):
            load_rows(tmp_path / "empty.json", image_folder=tmp_path / "nowhere")
        with pytest.raises(ValueError, match='on_bad_row must be "raise" or "skip"'):
            load_rows(tmp_path / "empty.json", on_bad_row="ignore")

    def test_bad_block(self):
        with pytest.raises(BadRow, match="block of type 'video'"):
            to_messages(
                {"messages": [said("user", {"type": "video"}), said("assistant", block("a"))]}, ("messages",), 0
            )


def pair(number: int, caption: str = "a kite", **more) -> str:
    return json.dumps({"id": f"x{number}", "image": "a.png", "caption": caption, **more})


HALF = "a \ud83d"  # of a surrogate pair
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_PAIR = f'{{"id": "x1", "image": "a.png", "caption": "a kite", "more": {DEEP}}}'
TABLE = "id,image,caption\nx0,a.png,a kite\n{}\nx2,a.png,a dog\n"
# A file whose row 1 is damaged; the ids of the others, and how the row is named with what is wrong.
DAMAGED = {
    "fields.csv": (TABLE.format("x1,a.png,a kite, at sea"), ["x0", "x2"], r"'x1'.*line 3: 4 fields .* header has 3"),
    "fields.tsv": (TABLE.replace(",", "\t").format("x1\ta.png\ta\tb"), ["x0", "x2"], r"'x1'.*a tab stands in quotes"),
    # read leniently, the next quote would close it: two rows in one, without a word
    "quote.csv": (TABLE.format('x1,a.png,"a kite\nx3,a.png,"a ""big"" dog"'), ["x0", "x3", "x2"], "line 3: a quote is"),
    "open.csv": (TABLE.format('x1,a.png,"a kite'), ["x0", "x2"], "line 3: a quote is not closed"),
    "long.csv": (TABLE.format('x1,a.png,"a kite' + "\nx3,a.png,a dog" * 9_000), None, "larger than field limit"),
    "deep.json": (f"[{pair(0)}, {DEEP_PAIR}, {pair(2)}]", ["x0", "x2"], "record 1: lists or objects nested too deeply"),
    "deep.jsonl": (f"{pair(0)}\n{DEEP_PAIR}\n{pair(2)}", ["x0", "x2"], "line 2: lists or objects nested too deeply"),
    "half.json": (f"[{pair(0)}, {pair(1, HALF)}, {pair(2)}]", ["x0", "x2"], r"'x1'\): .*\\ud83d, half of a"),
    "half.jsonl": (f"{pair(0)}\n{pair(1, HALF)}\n{pair(2)}", ["x0", "x2"], r"'x1'\): message 1: not UTF-8"),
    "cut.jsonl": (f'{pair(0)}\n{{"id": "x1", "ima\n{pair(2)}', ["x0", "x2"], "line 2: not valid JSON"),
    "list.jsonl": (f"{pair(0)}\n[1]\n{pair(2)}", ["x0", "x2"], "line 2: expected .* a record a line"),
    "latin.jsonl": (f"{pair(0)}\n{pair(1, 'caf~')}\n{pair(2)}", ["x0", "x2"], r"'x1'.*not UTF-8 text \(byte 0xe9"),
    "latin.csv": (TABLE.format("x1,a.png,caf~"), ["x0", "x2"], r"'x1'.*not UTF-8 text \(byte 0xe9"),
    "level.json": (
        f"[{pair(0, align_level=1)}, {pair(1, align_level=10**400)}, {pair(2, align_level=2)}]",
        ["x0", "x2"],
        "'x1'.*too large",
    ),
    "kind.jsonl": (
        f'{pair(0)}\n{{"id": "x1", "image": "a.png", "prompt": [1], "completion": "a"}}\n{pair(2)}',
        ["x0", "x2"],
        "'x1'.*of another kind",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_row_is_named_and_costs_itself_alone(folder, name, streaming):
    text, ids, message = DAMAGED[name]
    source = folder / "pictures" / name
    source.write_bytes(text.encode().replace(b"~", b"\xe9"))
    options = {"streaming": True, "shuffle_buffer": 0} if streaming else {}
    with pytest.raises(ValueError, match=message) as refused:
        list(load_rows(source, **options))
    assert name in str(refused.value) and "on_bad_row" in str(refused.value) and len(str(refused.value)) < 2_000
    # a data loader's process passes on the last line alone
    assert not streaming or "\n" not in str(refused.value)
    rows = load_rows(source, on_bad_row="skip", **options)
    found = [row["id"] for row in rows]
    assert found == (ids or ["x0"] + ["x3"] * 9_000 + ["x2"])
    assert (rows.stream_counts.totals() == {"rows_left_out": 1}) if streaming else (rows.rows_left_out == 1)


def test_commas_at_the_end_of_lines_are_no_fields(folder):
    source = folder / "pictures" / "a.csv"
    source.write_text("\ufeffimage,caption,,\na.png,a kite,,,,\nb.png,a dog\n")
    assert [caption_of(row["messages"]) for row in load_rows(source)] == ["a kite", "a dog"]


class TestUnreadableImages:
    """An image that is there and cannot be decoded."""

    @pytest.fixture
    def source(self, folder):
        noise = PILImage.effect_noise((64, 64), 90).convert("RGB")
        (folder / "pictures" / "cut.jpg").write_bytes(encode(noise, format="JPEG")[:600])
        (folder / "pictures" / "page.png").write_text("<html>")
        images = ["a.png", "cut.jpg", "gone.png", "b.png", ["a.png", "page.png"]]
        records = [llava(id=f"x{i}", image=image) for i, image in enumerate(images)]
        records[4]["conversations"][0]["value"] = "<image> and <image>?"
        (folder / "pictures" / "data.json").write_text(json.dumps(records))
        return folder / "pictures" / "data.json"

    def test_are_left_out_counted_and_named(self, source, caplog):
        rows = load_rows(source, on_bad_row="skip")
        assert rows["id"][:] == ["x0", "x3"] and rows.rows_left_out == 3
        assert "3 of 5 rows left out" in caplog.text and "row 1 (id 'x1'): image cannot be read (file '" in caplog.text
        assert "row 4 (id 'x4'): image cannot be read" in caplog.text and "page.png" in caplog.text
        (source.parent / "clean.json").write_text(json.dumps([llava(id="x0"), llava(id="x3", image="b.png")]))
        assert rows[:] == load_rows(source.parent / "clean.json")[:]
        assert len(load_rows(source, on_bad_row="skip", check_images=False)) == 5

    def test_of_a_data_set(self, source):
        data = {"image": [encode(draw_image()), b"no image"], "caption": ["a kite", "a dog"]}
        rows = load_rows(Dataset.from_dict(data), on_bad_row="skip")
        assert [caption_of(row["messages"]) for row in rows] == ["a kite"] and rows.rows_left_out == 1

    def test_of_a_stream(self, source):
        rows = load_rows(source, streaming=True, shuffle_buffer=0, on_bad_row="skip")
        assert [row["id"] for row in rows] == ["x0", "x3"] and rows.stream_counts.totals() == {"rows_left_out": 3}

    def test_processes_share_the_decoding_and_agree(self, source):
        (source.parent / "program.py").write_text(
            "import json, sys\n"
            "from accelerate import PartialState\n"
            "from aligngpt_trainers.data.load import load_rows\n"
            "rank = PartialState(cpu=True).process_index\n"
            "rows = load_rows(sys.argv[1], on_bad_row='skip', shared=True)\n"
            "json.dump([rows['id'][:], rows.rows_left_out], open(f'{sys.argv[1]}.{rank}', 'w'))\n"
        )
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*words, str(source.parent / "program.py"), str(source)], check=True, timeout=300)
        for rank in range(2):
            assert json.loads(source.with_name(f"data.json.{rank}").read_text()) == [["x0", "x3"], 3]
