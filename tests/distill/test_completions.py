"""Text with chats in shards and windows: marks on tokens, whole turns, and the same bytes after interruptions."""

import csv
import itertools
import json
import random

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text import pieces, shards, tokenising
from distill.text.by_document import DocumentWindows
from distill.text.packing import Piece, kept, packed
from distill.text.preparation import Tokenising, prepare
from distill.text.prepared import load
from distill.text.windows import Windows
from tests.distill import chat_templates as templates
from tests.distill.chat_templates import assistant, tokenizer_with, user

WORDS = ["the", "river", "runs", "on", "and", "over", "stones", "to", "the", "sea"]


def chats(count, turns=2, seed=0):
    """Rows of chats, each its own, of up to so many answers."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        said = []
        for turn in range(1 + number % turns):
            said += [user(f"{number} {turn}?"), assistant(" ".join(draw.choices(WORDS, k=1 + draw.randrange(6))))]
        rows.append({"messages": said})
    return rows


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path))


@pytest.fixture
def chatml():
    return tokenizer_with(templates.CHATML, eos="<|im_end|>")


@pytest.fixture
def made(chatml, tmp_path, monkeypatch):
    """Prepare in a cache of this name."""

    def made(*sources, cache="cache", processes=1, tokenizer=chatml):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / cache))
        options = {"separator": None, "seed": 3, "limit": None, "where": "data.train", "how": Tokenising(processes)}
        return prepare(sources, tokenizer, **options)

    return made


def documents(folder):
    """Tokens and marks of each document."""
    text = load(folder)
    tokens, marks = text.read(0, text.tokens), text.marks(0, text.tokens)
    borders = [*text.starts.tolist(), text.tokens]
    return [(tokens[a:b].tolist(), marks[a:b].tolist()) for a, b in itertools.pairwise(borders)]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_kind_of_file_gives_the_same_chats(made, tmp_path):
    """JSON lines, an array, CSV, parquet, a data set's folder: of columns some with nulls that mean nothing."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = chats(6, 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "array.json").write_text(json.dumps(rows))
    with (tmp_path / "table.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "messages"], *([n, json.dumps(row["messages"])] for n, row in enumerate(rows))])
    padded = [{"messages": [{**one, "tool_calls": None} for one in row["messages"]], "tools": None} for row in rows]
    schema = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(pa.string())}))
    parquet.write_table(
        pa.Table.from_pylist(padded, pa.schema({"messages": schema, "tools": pa.string()})), tmp_path / "rows.parquet"
    )
    lines(tmp_path / "set" / "train.jsonl", rows)
    wanted = sorted(documents(made(lines(tmp_path / "a.jsonl", rows))))
    assert len(wanted) == 6 and all(0 < sum(marks) < len(marks) for _, marks in wanted)
    for name in ("array.json", "table.csv", "rows.parquet"):
        assert sorted(documents(made(TextSource(path=str(tmp_path / name))))) == wanted, name
    assert sorted(documents(made(TextSource(hub=str(tmp_path / "set"))))) == wanted
    mixed = made(TextSource(hub=str(tmp_path / "set")), lines(tmp_path / "text.jsonl", [{"text": "the sea " * 9}]))
    assert sum(all(marks) for _, marks in documents(mixed)) == 1 and len(documents(mixed)) == 7
    with pytest.raises(UserError, match=r"data.train.0: .*set, row 2: message 1 of messages has no role"):
        lines(tmp_path / "set" / "train.jsonl", [rows[0], {"messages": [{"role": None, "content": "x"}]}])
        made(TextSource(hub=str(tmp_path / "set")), cache="other")


def test_plain_text_is_prepared_as_before(made, tmp_path):
    """Neither its name, nor its files, nor what `meta.json` says; train_on says the same of a chat as of a text."""
    folder = made(lines(tmp_path / "text.jsonl", [{"text": f"{n} the sea " * 9} for n in range(9)]))
    assert sorted(path.name for path in (folder / "00000").iterdir()) == [
        *("hashes.npy", "labels.npy", "meta.json", "starts.npy", "tokens.npy")
    ]
    assert set(json.loads((folder / "meta.json").read_text())["shards"][0]) == {
        *("tokens", "documents", "sha256", "highest", "longest")
    }
    source = lines(tmp_path / "chats.jsonl", chats(5))
    marked, whole = made(source), made(source.model_copy(update={"train_on": "all"}))
    assert [ids for ids, _ in documents(marked)] == [ids for ids, _ in documents(whole)]
    assert load(marked).meta.sha256 != load(whole).meta.sha256 and not load(whole).marked
    assert load(marked).trained < load(marked).tokens == load(whole).trained


def test_what_ends_a_document(made, tmp_path):
    """An end that the template wrote is said; one that is put behind it is not, but behind a completion in plain text is."""
    source = lines(tmp_path / "chats.jsonl", chats(3))
    for template, eos, last in (("CHATML", "</s>", 0), ("MISTRAL", "</s>", 1), ("LLAMA3", "<|eot_id|>", 1)):
        folder = made(source, tokenizer=tokenizer_with(getattr(templates, template), eos=eos))
        assert all(marks[-1] == last for _, marks in documents(folder)), template
    pair = lines(tmp_path / "pairs.jsonl", [{"prompt": "a b", "completion": " the sea"}])
    (found,) = documents(made(pair))
    assert found[1][-1] == 1 and found[1][0] == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_the_same_bytes(made, tmp_path, monkeypatch, mixed):
    """By one process or two, and stopped between any two documents; shards with text alone before and behind chats."""
    monkeypatch.setattr(shards, "SIZE", 150)
    monkeypatch.setattr(pieces, "ROWS", 4)
    sources = [lines(tmp_path / "chats.jsonl", chats(9, 3))]
    if mixed:
        sources.append(lines(tmp_path / "text.jsonl", [{"text": f"{n} the sea runs"} for n in range(16)]))
    whole = content(made(*sources, cache="whole"))
    assert len([name for name in whole if name.endswith("trained.npy")]) > 1
    assert content(made(*sources, cache="two", processes=2)) == whole
    add = shards.Writer.add
    for after in (1, 7):
        calls = iter(range(10**6))

        def stopping(self, *arguments, after=after, calls=calls, **options):
            if next(calls) == after:
                raise KeyboardInterrupt
            return add(self, *arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards.Writer, "add", stopping)
            made(*sources, cache=f"stopped {after}")
        assert content(made(*sources, cache=f"stopped {after}")) == whole


@pytest.mark.parametrize("name", ["trained", "rows"])
def test_damaged_marks(made, tmp_path, name):
    folder = made(lines(tmp_path / "chats.jsonl", chats(3)))
    file = folder / "00000" / f"{name}.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{name}\.npy is not what was written there.*delete"):
        load(folder)
    file.unlink()
    with pytest.raises(UserError, match="is damaged"):
        load(folder)


def test_windows_hold_whole_chats(made, tmp_path):
    """Every chat in one window, each completion's first token predicted from what stands before it, and nothing else."""
    sources = lines(tmp_path / "chats.jsonl", chats(12, 2)), lines(tmp_path / "text.jsonl", [{"text": "the sea " * 60}])
    folder = made(*sources)
    wanted = documents(folder)
    windows = Windows(folder, 96, 5)
    batch = windows.batch(0, windows.count)
    found = []
    for row in range(windows.count):
        for number in batch.documents[row].unique().tolist():
            at = batch.documents[row] == number
            if batch.labels[row][at][0] < 0:
                assert not batch.weights[row][at].any() and not batch.trained[row][at].any()
                continue
            assert batch.positions[row][at].tolist() == list(range(int(at.sum())))
            ids, targets = batch.ids[row][at].tolist(), batch.targets[row][at].tolist()
            assert ids[1:] == targets[: len(ids) - 1]
            found.append((ids, batch.trained[row][at].int().tolist()))
    chats_found = sorted(one for one in found if 0 in one[1][:-1])
    assert chats_found == sorted((ids, [*marks[1:], 0]) for ids, marks in wanted if not all(marks))
    (text,) = (ids for ids, marks in wanted if all(marks))
    longer = sorted((one for one in found if 0 not in one[1][:-1]), key=lambda one: text.index(one[0][0]))
    assert (
        sum(len(ids) for ids, _ in longer) in (len(text), len(text) - 1) and sum(sum(m) for _, m in longer) == len(text) - 1
    )
    assert not (batch.trained > batch.weights).any() and torch.equal(batch.loss_weights, batch.trained)
    assert windows.count * 96 < 1.3 * load(folder).tokens
    places = windows.places(0, windows.count)
    assert torch.equal(windows.at(places).ids, batch.ids) and sorted(places.tolist()) == list(range(windows.count))
    again = Windows(folder, 96, 5).batch(windows.count, windows.count)  # the next epoch: the same windows, another order
    assert sorted(again.ids.tolist()) == sorted(batch.ids.tolist()) and again.ids.tolist() != batch.ids.tolist()
    assert torch.equal(batch.rows(slice(1, 3)).trained, batch.trained[1:3])
    assert torch.equal(batch.to("cpu").shortened(9).trained, batch.trained[:, :9])
    held = [one for one, _ in DocumentWindows(load(folder), 96).batches(10**4, 4)]
    assert sum(one.trained.sum() for one in held) == batch.trained.sum()


def test_packing_against_a_search():
    """No window overflows, no piece is lost, and no two windows fit into one."""
    draw = np.random.default_rng(0)
    for seq_len in (8, 33, 128):
        lengths = draw.integers(1, 2 * seq_len, 60)
        starts = np.cumsum(lengths) - lengths
        windows = packed(starts, starts + lengths, seq_len)
        sizes = [sum(piece.end - piece.start for piece in window) for window in windows]
        assert max(sizes) <= seq_len and all(a + b > seq_len for n, a in enumerate(sizes) for b in sizes[:n])
        tokens = sorted(token for window in windows for piece in window for token in range(piece.start, piece.end))
        lost = sorted(set(range(int(lengths.sum()))) - set(tokens))
        assert len(tokens) == len(set(tokens)) and all(token + 1 in {*(starts + lengths).tolist()} for token in lost)
    assert packed(np.array([0, 5]), np.array([5, 5]), 8) == [[Piece(0, 0, 5, 5)]]


def test_whole_turns_are_kept():
    """Of marks 1 1 0 1 0 0 1 1 in windows of any length, by hand."""
    marks = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], np.uint8)
    start, length = np.array([0]), np.array([9])
    ends = {1: 0, 2: 0, 3: 3, 4: 3, 5: 5, 6: 5, 8: 5, 9: 9}
    for seq_len, end in ends.items():
        found = kept(start, length, marks, seq_len)
        assert found.stops.tolist() == [end], seq_len
        assert (found.cut, found.left_out) == ([0] if 0 < end < 9 else [], [0] if not end else [])
    assert kept(start, length, np.ones(9), 4).stops.tolist() == [9] == kept(start, length, None, 4).stops.tolist()


def test_chats_longer_than_a_window(made, tmp_path, chatml):
    """Turns that fit are kept, and what is lost is counted and named; a text of nothing else is refused."""
    long = [part for turn in range(9) for part in (user(f"{turn} the sea"), assistant(f"it runs {turn}"))]
    rows = [*chats(3), {"messages": long}, {"messages": [user("the sea " * 80), assistant("no")]}]
    folder = made(lines(tmp_path / "chats.jsonl", rows))
    windows = Windows(folder, 96, None, where="data.train")
    assert (windows.cut, windows.left_out) == (1, 1)
    assert windows.fitted.startswith(
        "2 chats are longer than 96 tokens: 1 cut at the end of a turn, 1 not read; the first that"
    )
    assert "chats, row 5 (" in windows.fitted
    batch, (ids, _) = windows.batch(0, windows.count), max(documents(folder), key=lambda one: sum(one[1]))
    inside = [batch.ids[row][batch.documents[row] == one].tolist() for row in range(windows.count) for one in range(9)]
    (cut,) = (one for one in inside if one and one == ids[: len(one)] and len(one) > 60)
    assert tokenizer_with(templates.CHATML, eos="<|im_end|>").decode(cut).endswith("<|im_end|>") and len(cut) <= 96 < len(
        ids
    )
    alone = made(lines(tmp_path / "alone.jsonl", rows[-1:]))
    with pytest.raises(
        UserError, match=r"seq_len is 32, and no chat in data.train has a completion that ends in it: .*row 1"
    ):
        Windows(alone, 32, None, where="data.train")


def test_processes_name_the_row(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 1)
    rows = [*chats(5), {"messages": [{"role": "system", "content": "x"}, user("a"), assistant("b")]}]
    source = lines(tmp_path / "chats.jsonl", rows)
    for processes in (1, 2):
        with pytest.raises(
            UserError, match=r"data.train.0: .*chats.jsonl, line 6: .* refuses it: System role not supported"
        ):
            made(source, cache=str(processes), processes=processes, tokenizer=tokenizer_with(templates.GEMMA))
