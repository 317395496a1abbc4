"""Overlap of held-out and training text: whole documents by a hash of their tokens, near copies by a sample's 13-token runs.

GPT-3 (2005.14165, appendix C) looked for runs of 13 words. A token is at most a word, so runs of 13 tokens are found a
little more often. A document counts as near where half of its runs are found, because headers and licences repeat.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from distill.text.prepared import Prepared
from distill.text.windows import Windows

RUN = 13  # tokens
NEAR = 0.5  # of a document's runs
SAMPLE = 1 << 16  # the first held-out tokens, whose runs are searched for: evaluation reads tokens in this order
MOST = 1 << 27  # the first tokens of each training text, which are searched
CHUNK = 1 << 21  # tokens searched at a time
SIEVE = 24  # first bits of a hash, which are compared before the search


def overlap(train: Sequence[Windows], heldout: Windows) -> dict:
    """Measure how much of the held-out text is also training text. train: every text that is trained on, prepared with the
    same tokenizer.

    Returns:
        documents: held-out documents. exact: how many of them are in the training text token for token. exact_tokens: the
        share of the held-out tokens in these. sampled: documents whose runs were searched for. near: how many of these have
        half of their runs or more in the training text. runs: the share of all these runs that is in it. searched: the
        training tokens that were searched.
    """
    texts = [text.prepared for text in train]
    known = _exact(texts, heldout.prepared)
    lengths = heldout.prepared.lengths
    runs, document = _sample(heldout.prepared)
    found = _found(runs, chain.from_iterable(_chunks(text) for text in texts))
    count = int(document.max()) + 1 if len(document) else 0
    per_document = np.bincount(document, found, count) / np.maximum(np.bincount(document, minlength=count), 1)
    return {
        "documents": len(lengths),
        "exact": int(known.sum()),
        "exact_tokens": float(lengths[known].sum() / lengths.sum()),
        "sampled": len(np.unique(document)),
        "near": int((per_document >= NEAR).sum()),
        "runs": float(found.mean()) if len(found) else 0.0,
        "searched": sum(min(text.tokens, MOST) for text in texts),
    }


def sentence(found: dict) -> str:
    """The result as a sentence, without its consequence, see `verdict`."""
    share = f" ({found['exact_tokens']:.1%} of the tokens)" if found["exact"] else ""
    return (
        f"{found['exact']} of {found['documents']} held-out documents{share} are in the training text word for word, and "
        f"{found['near']} of the {found['sampled']} that were searched for copied passages have half or more of their text "
        f"there (of all their sequences of {RUN} tokens, {found['runs']:.1%} occur in the training text)"
    )


def verdict(found: dict) -> str:
    """What the result means for a reader of the evaluation."""
    if suspicious(found):
        return "results on these documents are not held-out results; remove them from data.train or data.heldout"
    return "no copied document was found, so the results count as held-out results"


def suspicious(found: dict) -> bool:
    """Whether any held-out document is in the training text, whole or nearly."""
    return bool(found["exact"] or found["near"])


def _exact(train: Sequence[Prepared], heldout: Prepared) -> np.ndarray:
    """For each held-out document, whether it is also a training document, by the hashes that are stored with both texts."""
    known = np.zeros(heldout.meta.documents, bool)
    for shard in (shard for text in train for shard in text.shards):
        known |= np.isin(heldout.hashes, shard.hashes)
    return known


def _sample(heldout: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs of the first held-out tokens, and the document of each. No run crosses the border of a document or
    holds the token that ends one."""
    runs = _runs(heldout.read(0, SAMPLE))
    place = np.arange(len(runs))
    document = np.searchsorted(heldout.starts, place, side="right") - 1
    inside = place + RUN < heldout.starts[document] + heldout.lengths[document]
    return runs[inside], document[inside]


def _chunks(train: Prepared) -> Iterator[np.ndarray]:
    """The training tokens to search, in chunks; every run that begins in a chunk's first CHUNK tokens ends in the chunk."""
    last = min(train.tokens, MOST)
    for start in range(0, last, CHUNK):
        yield train.read(start, min(start + CHUNK + RUN - 1, last))


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A hash of the 13 tokens from each place on, combined from hashes of 1, 2, 4 and 8 tokens."""
    one = _mixed(tokens.astype(np.uint64) + np.uint64(1), 1)
    if len(one) < RUN:
        return one[:0]
    two = _mixed(one[:-1], 2) + one[1:]
    four = _mixed(two[:-2], 3) + two[2:]
    eight = _mixed(four[:-4], 4) + four[4:]
    count = len(one) - RUN + 1
    return _mixed(_mixed(eight[:count], 5) + four[8 : 8 + count], 6) + one[12 : 12 + count]


def _mixed(values: np.ndarray, turn: int) -> np.ndarray:
    """A 64-bit hash of each value (the finaliser of SplitMix64)."""
    values = values + np.uint64(turn * 0x9E3779B97F4A7C15 % (1 << 64))
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _found(runs: np.ndarray, chunks: Iterator[np.ndarray]) -> np.ndarray:
    """For each run, whether it occurs in the tokens of any chunk."""
    if not len(runs):
        return np.zeros(0, bool)
    wanted, shift = np.unique(runs), np.uint64(64 - SIEVE)
    sieve, seen = np.zeros(1 << SIEVE, bool), np.zeros(len(wanted), bool)
    sieve[wanted >> shift] = True
    for tokens in chunks:
        hashes = _runs(tokens)
        hashes = hashes[sieve[hashes >> shift]]
        places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        seen[places[wanted[places] == hashes]] = True
    return seen[np.searchsorted(wanted, runs)]
