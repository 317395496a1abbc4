"""Runs of a recipe's entries, and the weights of their students."""

import torch
from safetensors.torch import load_file

from distill import run
from distill.recipe_file import check


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def go(entries, runs, **options):
    return run(check(entries, "tiny.yaml"), runs=runs, **options)
