"""Runs that read the logits cached in the folder `logits`, its contents, and damage to it."""

import json

from rich.console import Console

import distill

QUIET = Console(quiet=True)
SEVERAL = 3 * 32 * (8 * 4 + 2)  # bytes of three windows of 32 tokens and 8 likeliest: 24 windows are 8 shards


def offline(recipe, *overrides, **rest):
    """A run of the recipe that imitates from `logits`."""
    return distill.run(recipe, overrides=["stages.imitate.offline_logits=logits", *overrides], console=QUIET, **rest)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _windows(folder):
    return [place for file in folder.glob("shard-*.json") for place in json.loads(file.read_text())["windows"]]


def flip(file):
    """Change the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
