"""Passkey recall (arXiv 2305.16300): a five-digit number somewhere in filler text, asked for at the end.

Averages over text hide what a state forgets; this does not. A trial counts when every token of the number is the model's
first choice, which is what greedy decoding would answer, seen in one forward pass.
"""

import random
from collections.abc import Sequence

import torch
from torch import nn

from distill.data import Batch
from distill.stages.stage import head_of
from students.kernels.linear_kl.reference import logits_of
from teachers.teacher import Teacher

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
OPENING = "There is an important number hidden in this text. Find it and remember it. "
HIDING = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is "


@torch.no_grad()
def passkey(teacher: Teacher, model: nn.Module | None, lengths: Sequence[int], trials: int, seed: int = 0) -> list[dict]:
    """The share of numbers recalled at each length; `model` None asks the teacher.

    Returns:
        for each length {length, recalled, trials}, length being the tokens of the prompt at most.
    """
    rows = []
    for length in lengths:
        draw = random.Random(f"{seed} {length}")
        recalled = 0
        for trial in range(trials):
            prompt, answer = prompt_and_answer(teacher.tokenizer, length, (trial + 0.5) / trials, draw)
            recalled += _recalls(teacher, model, prompt, answer)
        rows.append({"length": length, "recalled": recalled, "trials": trials})
    return rows


def prompt_and_answer(tokenizer, length: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
    """A prompt of at most `length` tokens with the number at a relative depth, and the number's tokens."""
    key = str(draw.randint(10_000, 99_999))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    opening, hiding, question = ids(OPENING), ids(HIDING.format(key=key)), ids(QUESTION)
    answer = ids(QUESTION + key)[len(question) :]
    unit = ids(FILLER)
    room = max(0, (length - len(opening) - len(hiding) - len(question) - len(answer)) // len(unit))
    before = round(depth * room)
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id else []
    return start + opening + unit * before + hiding + unit * (room - before) + question, answer


def _recalls(teacher: Teacher, model: nn.Module | None, prompt: list[int], answer: list[int]) -> bool:
    ids = torch.tensor([prompt + answer[:-1]], device=teacher.device)
    batch = _one_document(ids)
    if model is None:
        hidden, head = teacher.hidden(batch.ids, batch.positions), head_of(teacher.model)
    else:
        hidden, head = model.hidden(batch.ids, batch.documents), head_of(model)
    chosen = logits_of(hidden[0, len(prompt) - 1 :], head).argmax(-1)
    return chosen.tolist() == answer


def _one_document(ids: torch.Tensor) -> Batch:
    zeros = torch.zeros_like(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Batch(ids, zeros, positions, ids, torch.ones_like(ids, dtype=torch.float32), zeros)


def row(teacher: Teacher, model: nn.Module | None, heldout, options) -> list[dict]:
    """`passkey` as the table of evaluations calls it."""
    return passkey(teacher, model, options.passkey, options.passkey_trials)
