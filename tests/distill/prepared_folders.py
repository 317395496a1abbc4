"""Prepared folders with made-up tokens for tests, and a function that reads one back."""

import numpy as np

from distill.text.prepared import load
from distill.text.shards import SIZE, Writer


def write(folder, tokens, starts, labels, names, size=SIZE):
    """A folder of documents that begin at `starts`, each named by its label, in shards of so many tokens."""
    writer = Writer(folder, tokens.dtype, size)
    for ids, label in zip(np.split(tokens, starts[1:]), labels, strict=True):
        writer.add(names[int(label)], ids)
        if writer.full:
            writer.close()
    return writer.finish()


def documents(folder):
    """The tokens of each document, in their order."""
    text = load(folder)
    return np.split(text.read(0, text.tokens), text.starts[1:])
