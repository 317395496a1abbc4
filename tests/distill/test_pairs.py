"""Rows of pairs: every form becomes the same tokens, and other rows are refused with file, row and fix."""

import json

import numpy as np
import pytest

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text.pair_tokens import SECOND
from distill.text.pair_windows import PairWindows
from distill.text.preparation import prepare
from distill.text.prepared import load
from tests.distill.chat_templates import CHATML, QWEN3, tokenizer_with

pytestmark = pytest.mark.usefixtures("own_cache")

ASKED = [{"role": "user", "content": "what is it?"}]
GOOD, BAD = ([{"role": "assistant", "content": said}] for said in ("the sea", "over stones"))
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}


def prepared(tmp_path, rows, template=CHATML, train_on="pairs", kind="jsonl", hub=False):
    """The folder of a file of rows."""
    file = tmp_path / f"pairs.{kind}"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {"hub": str(tmp_path)} if hub else {"path": str(file)}
    source = TextSource(**place).model_copy(update={"train_on": train_on})
    options = {"separator": None, "seed": 0, "limit": None, "where": "stages.1.data"}
    return prepare([source], tokenizer_with(template), **options)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "what is it?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "what is it?", "chosen": GOOD, "rejected": BAD},
        {**PAIR, "messages": ASKED + GOOD, "score": 3},
    ],
    ids=["explicit", "implicit", "prompt beside", "prompt in text", "messages beside"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_forms_are_the_same_tokens(tmp_path, row, kind):
    shard = load(prepared(tmp_path, [row], kind=kind)).shards[0]
    tokens, marks, decode = np.asarray(shard.tokens), np.asarray(shard.trained), tokenizer_with(CHATML).decode
    assert decode(tokens[marks == 1]) == "the sea<|im_end|>" and decode(tokens[marks == SECOND]) == "over stones<|im_end|>"
    assert shard.counts.documents == 1 and shard.counts.trained == np.count_nonzero(marks) and shard.rows.tolist() == [1]
    middle = int(np.flatnonzero(marks == 1)[-1]) + 1
    first, second = int((marks == 1).argmax()), int((marks == SECOND).argmax()) - middle
    assert first == second and np.array_equal(tokens[:first], tokens[middle : middle + second])


def test_data_sets(tmp_path):
    """Of a folder that `datasets` reads; a row that is no pair is named by its number."""
    (folder := tmp_path / "set").mkdir()
    rows = [{"chosen": ASKED + GOOD, "rejected": ASKED + BAD, "score": 1}]
    shard = load(prepared(folder, rows, hub=True)).shards[0]
    marks = np.asarray(shard.trained)
    assert tokenizer_with(CHATML).decode(np.asarray(shard.tokens)[marks == SECOND]) == "over stones<|im_end|>"
    with pytest.raises(UserError, match="set, row 2: chosen and rejected are equal"):
        prepared(folder, [*rows, {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD, "score": 1}], hub=True)


def test_text_is_ended_and_shares_its_beginning(tmp_path):
    shard = load(prepared(tmp_path, [{"chosen": "it is the sea", "rejected": "it is the end of it"}])).shards[0]
    tokens, marks, decode = np.asarray(shard.tokens), np.asarray(shard.trained), tokenizer_with(CHATML).decode
    end = tokenizer_with(CHATML).eos_token
    assert decode(tokens[marks == 1]) == f" sea{end}" and decode(tokens[marks == SECOND]) == f" end of it{end}"


BAD_ROWS = {
    "equal": (PAIR | {"rejected": GOOD}, "chosen and rejected are equal.*leave the row out"),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "share no prompt.*write prompt, chosen and rejected"),
    "empty prompt": (PAIR | {"prompt": []}, "share no prompt"),
    "other questions": (
        {"chosen": [*ASKED, *GOOD], "rejected": [ASKED[0], {"role": "user", "content": "and?"}, *BAD]},
        "rejected continues the shared prompt with a turn of 'user'.*give both the same turns",
    ),
    "text without a prompt": ({"chosen": "yes", "rejected": "no"}, "share no prompt"),
    "empty": (PAIR | {"rejected": []}, "rejected is empty; leave the row out"),
    "empty text": ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty; leave the row out"),
    "empty answer": (PAIR | {"chosen": [{"role": "assistant", "content": ""}]}, "message 1 of chosen is .*empty"),
    "nothing behind": ({"chosen": ASKED + GOOD, "rejected": ASKED}, "rejected is empty after the prompt"),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": BAD}, "all text or all messages"),
    "no pair": ({"messages": ASKED + GOOD}, "this is not a pair: it has messages; write prompt, chosen and rejected"),
    "text": ({"text": "a b"}, "this is not a pair: it has text"),
    "no role": (PAIR | {"chosen": [{"content": "x"}]}, "message 1 of chosen has no role"),
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_what_is_no_pair_is_refused(tmp_path, row, said):
    with pytest.raises(UserError, match=rf"^stages\.1\.data.0: .*pairs.jsonl, line 2: {'.*' + said}"):
        prepared(tmp_path, [PAIR | ({"text": "-"} if "text" in row else {}), row])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_where_none_are_read(tmp_path, kind):
    with pytest.raises(
        UserError, match=rf"pairs.{kind}, (line|row) 1: this is a pair \(chosen, rejected\).*of a stage that"
    ):
        prepared(tmp_path, [PAIR], train_on=None, kind=kind)


def test_templates(tmp_path):
    """None at all; one that changes earlier turns of an answer."""
    with pytest.raises(UserError, match=r"line 1, chosen: the teacher's tokenizer has no chat template.*; name a teacher"):
        prepared(tmp_path, [PAIR], template=None)
    more = [{"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}, *ASKED, *GOOD]
    with pytest.raises(UserError, match=r"line 1.* changes earlier turns .* once others follow; write answers of one turn"):
        prepared(tmp_path, [PAIR | {"chosen": more}], template=QWEN3)


def test_windows_cut_both_and_leave_out(tmp_path):
    """Answers that are too long are cut at the window's end; prompts that leave no room are counted, the first one named."""
    long = [{"role": "assistant", "content": "the river runs on " * 30}]
    asked = [{"role": "user", "content": "over and over " * 60}]
    rows = [PAIR, PAIR | {"chosen": long}, PAIR | {"prompt": asked}, PAIR | {"rejected": long}]
    folder = prepared(tmp_path, rows)
    windows = PairWindows(folder, 80, 0, where="stages.1.data")
    assert (windows.count, len(windows.held), windows.cut, windows.left_out) == (4, 2, 2, 1)
    assert (
        "3 pairs are longer than 80 tokens: 2 cut at the end of the window, 1 not read; the first that is" in windows.fitted
    )
    assert "row 3 (" in windows.fitted and "its prompt leaves no room" in windows.fitted
    for batch in [windows.batch(0, 4), *windows.held_batches(2)]:
        assert (batch.trained.sum(1) > 0).all() and batch.ids.shape[1] <= 80
    with pytest.raises(UserError, match=r"data.seq_len is 8, and no pair in stages.1.data has room for both answers in it"):
        PairWindows(folder, 8, 0, where="stages.1.data")
    with pytest.raises(UserError, match="there is only one pair, and another one is needed"):
        PairWindows(prepared(tmp_path / "..", [PAIR]), 80, 0, where="stages.1.data")
