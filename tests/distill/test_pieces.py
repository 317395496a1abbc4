"""Text tokenised piece by piece: the same tokens as in one piece for every tokenizer, in bounded memory."""

import copy
import json
import logging
import lzma
import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill.recipe import TextSource
from distill.shipped import shipped_folder
from distill.text import pieces
from distill.text.preparation import prepare


@pytest.fixture(scope="module")
def texts():
    with lzma.open(shipped_folder() / "text" / "train.jsonl.xz", "rt") as file:
        prose = [json.loads(line)["text"][:9000] for _, line in zip(range(4), file, strict=False)]
    code = "".join(f"def f{n}(x):\n    return [x ** {n}, 'it''s']  # {n}\n\n" for n in range(120))
    chinese = "".join(chr(0x4E00 + n * 7919 % 5000) + "。" * (n % 37 == 0) for n in range(4000))
    return [*prose, code, chinese, "x1 y2 " * 900, "a\n\n\n  b\t\tc  d " * 500, "naïve é e\u0301 " * 400]


def trained(text_files, normalizer=None, pre_tokenizer=None, model=None, trainer=None):
    raw = Tokenizer(model or models.BPE(unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainer or trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    raw.train([str(text_files / "train.jsonl")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(text_files, tokenizer):
    """One of each kind: bytes; bytes with numbers apart and a beginning of text; words joined by ▁, with and without a split
    before them; words in pieces; a unigram model."""
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    opening = trained(text_files, normalizers.NFC(), digits)
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"], special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    prepended = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    unigram = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return {
        "bytes": tokenizer,
        "digits and an opening": opening,
        "metaspace": trained(text_files, None, pre_tokenizers.Metaspace()),
        "no split": trained(text_files, prepended),
        "word pieces": trained(text_files, None, pre_tokenizers.Whitespace(), models.WordPiece(unk_token="<unk>"), words),
        "unigram": trained(text_files, None, pre_tokenizers.Metaspace(), models.Unigram(), unigram),
    }


@pytest.mark.parametrize("kind", ["bytes", "digits and an opening", "metaspace", "no split", "word pieces", "unigram"])
def test_pieces_have_the_tokens_of_the_whole(tokenizers, texts, monkeypatch, kind, caplog):
    made = tokenizers[kind]
    if kind in ("word pieces", "unigram"):  # to which letters that they do not know are one token, however many
        texts = [text for text in texts if " " in text]
    right = [made(text)["input_ids"] for text in texts]
    monkeypatch.setattr(pieces, "PIECE", 1500)
    monkeypatch.setattr(pieces, "AT_ONCE", 4000)
    rows = [(str(index), text) for index, text in enumerate(texts)]
    found = list(pieces.tokenised(iter([("blank", " \n"), *rows]), made))
    assert [label for label, _ in found] == [label for label, _ in rows]
    for (label, ids), whole in zip(found, right, strict=True):
        assert list(ids) == whole, f"text {label}"
    assert sum(len(list(pieces.pieces(text, made))) for text in texts) > 30 and not caplog.records


def test_a_text_without_a_place_to_cut(tokenizer, monkeypatch, caplog):
    """Is cut all the same, which is said; every character is in a piece once."""
    monkeypatch.setattr(pieces, "PIECE", 1000)
    text = " " * 5500 + "a"
    assert "".join(piece.text for piece in pieces.pieces(text, tokenizer)) == text
    with caplog.at_level(logging.WARNING):
        ((_, ids),) = pieces.tokenised(iter([("x", text)]), tokenizer)
    assert tokenizer.decode(ids) == text
    assert "a text of 5,501 characters has stretches of 500 in which every cut that was tried changes tokens" in caplog.text


def test_batches_by_size(tokenizer, monkeypatch):
    """No more characters at a time than AT_ONCE, nor texts than ROWS, but a single text of its own."""
    seen, encode = [], pieces._ids
    monkeypatch.setattr(pieces, "_ids", lambda made, texts, **options: seen.append(texts) or encode(made, texts, **options))
    monkeypatch.setattr(pieces, "AT_ONCE", 1000)
    monkeypatch.setattr(pieces, "ROWS", 20)
    rows = [("x", "river " * (1 + n % 90)) for n in range(200)] + [("y", "a b")] * 50
    assert len(list(pieces.tokenised(iter(rows), tokenizer))) == 250
    assert all(len(texts) <= 20 and (len(texts) == 1 or sum(map(len, texts)) <= 1000) for texts in seen)
    assert [text for texts in seen for text in texts] == [text for _, text in rows] and len(seen) < 80


def test_a_document_in_pieces_is_cut_into_documents(tokenizer, tmp_path, monkeypatch):
    """Ends of text inside it count, wherever the pieces begin, and the prepared folder is that of the whole."""
    made, folders = copy.deepcopy(tokenizer), []
    made.add_tokens(["<end of it>"], special_tokens=True)
    (tmp_path / "x.txt").write_text("".join(f"the river number {n} runs<end of it>" for n in range(300)))
    for piece in (1 << 18, 700):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / f"cache {piece}"))
        monkeypatch.setattr(pieces, "PIECE", piece)
        options = {"separator": "<end of it>", "seed": 0, "limit": None, "where": "x"}
        folders.append(prepare([TextSource(path=str(tmp_path / "x.txt"))], made, **options))
    first, second = (np.load(folder / "00000" / "tokens.npy") for folder in folders)
    assert np.array_equal(first, second) and len(np.load(folders[1] / "00000" / "starts.npy")) == 300


MEASURED = """
import gzip, resource, sys
from transformers import AutoTokenizer
from distill.recipe import TextSource
from distill.text import pieces
from distill.text.preparation import prepare
folder, teacher, whole = sys.argv[1:]
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for name, text in (("small", "a river. " * 99), ("words", "the river runs. " * 40_000), ("none", "abcdefghij" * 64_000)):
    with gzip.open(f"{folder}/{name}.txt.gz", "wt") as file:
        file.write(text)
tokenizer = AutoTokenizer.from_pretrained(teacher)
pieces.PIECE, pieces.AT_ONCE = (1 << 30, 1 << 30) if whole == "whole" else (1 << 13, 1 << 15)
for name in ("small", "words", "none"):
    prepare([TextSource(path=f"{folder}/{name}.txt.gz")], tokenizer, separator=None, seed=0, limit=None, where="data.train")
    before = most() if name == "small" else before
print(most() - before)
"""


def test_memory(tmp_path, tiny_teacher):
    """Packed files of some kilobytes, each one document of 640 KB, one of them without a space: what tokenising them takes
    is bounded by AT_ONCE. Tokenised at once (`whole` for `pieces` here) they take 78 MB with SmolLM2's tokenizer."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tiny_teacher), "pieces"]
    environment = os.environ | {"DISTILL_CACHE": str(tmp_path / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    taken = int(done.stdout) / 1e6
    assert taken < 30, f"{taken:.0f} MB"
