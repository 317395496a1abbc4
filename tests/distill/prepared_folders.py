"""Prepared folders of tokens that a test makes up."""

import numpy as np

from distill.text.prepared import Writer


def write(folder, tokens, starts, labels, names):
    """A folder of documents that begin at `starts`, each named by its label."""
    writer = Writer(folder, tokens.dtype)
    for ids, label in zip(np.split(tokens, starts[1:]), labels, strict=True):
        writer.add(names[int(label)], ids)
    return writer.finish()
