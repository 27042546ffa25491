"""Rows made ready for the trainers: lengths, images counted, positions kept; images of whole data sets never copied."""

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from stage_parts import conversation_rows, settings, to_dataset

from aligngpt_trainers import AlignGPTDataCollator, AlignGPTInstructConfig
from aligngpt_trainers.rows import prepare_rows


@pytest.fixture
def prepare(assembled, tmp_path):
    def run(rows, **changes):
        args = settings(AlignGPTInstructConfig, tmp_path, **changes)
        collator = AlignGPTDataCollator(
            assembled[1], "instruct", max_length=args.max_length, on_overlong=args.on_overlong, emit_row_index=True
        )
        return *prepare_rows(rows, collator, args, "train"), collator

    return run


def mapped_blocks(rows: Dataset) -> int:
    blocks = getattr(rows.data, "blocks", [[rows.data]])
    return sum(type(block).__name__ == "MemoryMappedTable" for line in blocks for block in line)


def test_lengths_and_images_stand_beside_the_rows(prepare):
    rows, counts, collator = prepare(to_dataset(conversation_rows(8)))
    assert rows["num_images"][:] == [1, 1, 2, 0] * 2 and rows["row_index"][:] == list(range(8))
    assert {rows.features[name].dtype for name in ("length", "num_images")} == {"int32"}
    for row in rows:
        batch = collator([row])
        assert batch["input_ids"].shape[1] == row["length"]
        assert batch["row_index"].tolist() == [row["row_index"]]
    assert counts == {"train_rows": 8, "train_longest_row": max(rows["length"])}


def test_row_index_stands_beside_an_id_too(prepare):
    rows, _, collator = prepare(to_dataset(conversation_rows(4)).add_column("id", list("abcd")))
    assert collator([rows[3], rows[1]])["row_index"].tolist() == [3, 1]


def test_row_index_is_given_only_on_request(assembled):
    row = {**conversation_rows(1)[0], "row_index": 7}
    assert "row_index" not in AlignGPTDataCollator(assembled[1], "instruct")([row])
    assert "row_index" not in AlignGPTDataCollator(assembled[1], "instruct", emit_row_index=True)(conversation_rows(1))


def test_without_check_rows_only_what_costs_nothing(prepare):
    rows, counts, _ = prepare(to_dataset(conversation_rows(8)).select([5, 2]), check_rows=False)
    assert rows["num_images"][:] == [1, 2] and rows["row_index"][:] == [0, 1] and counts == {"train_rows": 2}
    assert "length" not in rows.column_names


@pytest.mark.parametrize("selection", [[6, 1, 1, 3], list(range(2, 6)), [7, 6, 5, 4, 3, 2, 1, 0]])
def test_selections_are_encoded_once_and_keep_their_order(prepare, selection):
    whole, _, _ = prepare(to_dataset(conversation_rows(8)))
    rows, _, collator = prepare(to_dataset(conversation_rows(8)).select(selection))
    assert len(rows) == len(selection)
    for column in ("token_ids", "supervised", "length", "num_images"):
        for position, number in enumerate(selection):
            assert np.array_equal(rows[position][column], whole[number][column])
    assert rows["row_index"][:] == list(range(len(selection)))
    assert (collator([rows[0]])["input_ids"] == collator([whole[selection[0]]])["input_ids"]).all()


def test_a_bad_row_outside_the_selection_does_not_matter(prepare):
    rows = conversation_rows(6)
    rows[4]["messages"] = rows[4]["messages"][:1]
    prepare(to_dataset(rows).select([5, 0]))
    with pytest.raises(ValueError, match="Row 1 has no assistant message"):
        prepare(to_dataset(rows).select([5, 4]))


def test_overlong_rows_of_a_selection_are_dropped(prepare):
    rows = conversation_rows(8)
    rows[6]["messages"][-1]["content"][0]["text"] = "a long answer " * 40
    limit = max(prepare(to_dataset(conversation_rows(8)))[0]["length"])
    kept, counts, _ = prepare(to_dataset(rows).select([7, 6, 0]), on_overlong="drop", max_length=limit)
    assert kept["row_index"][:] == [0, 2]
    assert counts["train_rows"] == 2 and counts["train_rows_left_out"] == 1
    with pytest.raises(ValueError, match=r"Row 1 has \d+ tokens"):
        prepare(to_dataset(rows).select([7, 6, 0]), max_length=limit)


def test_saved_images_are_never_copied(prepare, tmp_path):
    to_dataset(conversation_rows(8)).save_to_disk(tmp_path / "rows")
    prepared, _, _ = prepare(load_from_disk(tmp_path / "rows"))
    # the very bytes of the saved file
    images, source = prepared.data.column("images"), load_from_disk(tmp_path / "rows").data.column("images")
    assert mapped_blocks(prepared) >= 1 and images.nbytes == source.nbytes


def test_single_images_under_the_name_of_lists(prepare):
    rows = Dataset.from_dict({"images": ["a.png"], "messages": [conversation_rows(1)[0]["messages"]]})
    with pytest.raises(ValueError, match=r"must hold lists of images.*load_rows"):
        prepare(rows)
