"""Greedy tokens per second of a recipe's teacher and student with random weights, eagerly and as a replayed CUDA graph.

Needs: one GPU; weights are random, so no checkpoint and no text. On a CPU `Decoder` runs the same function without a graph.
The entry "a token as one CUDA graph" of LOG.md was measured with the same steps, typed in an interpreter at commit b639c1d.
Modules have moved since. This file itself was run on a CPU only. `distill bench generation` measures more.
Usage: python docs/runs/decode_graph.py RECIPE [PROMPT_TOKENS]
"""

import sys

import torch

from distill.benchmarks.steps import random_teacher
from distill.build import build, layout_of
from distill.evaluation.speed import eager_rate, graph_rate, in_bfloat16, prompted, random_text
from distill.loading import teacher_config
from distill.recipe_file import load
from students.prompts import new_cache

TOKENS = 64


@torch.no_grad()
def main(name: str, behind: int = 1024) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load(name)
    teacher = random_teacher(teacher_config(recipe), device)
    layout = layout_of(recipe.pattern, recipe.mixers, teacher.config.num_hidden_layers, name)
    for who, model in (("teacher", teacher.model), ("student", build(teacher, layout)[0])):
        model = in_bfloat16(model) if device.type == "cuda" else model
        cache = new_cache(model)
        token, _ = prompted(model, random_text(model, 1, behind), cache)
        token, eager = eager_rate(model, cache, token, TOKENS)
        found = graph_rate(model, cache, token, TOKENS)
        print(f"{who}: {eager:.1f} tokens/s eagerly, {found} after {behind} tokens")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/runs/decode_graph.py RECIPE [PROMPT_TOKENS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
