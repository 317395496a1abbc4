"""On-policy distillation: windows in which the student writes the answers (GKD, arXiv 2306.13649, algorithm 1).

The first answer of a chat and everything after it are replaced by an answer that the student samples at temperature 1 after
the same prompt, with at most as many tokens as were replaced. No gradient goes through the sampling. The teacher then
scores the window like any other text.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from distill.errors import UserError
from distill.sampling import Draws, numbers, own_settings
from distill.text.packing import NO_DOCUMENT
from distill.text.windows import Batch
from students.generation import replayed
from students.skeleton import Student
from students.static_cache import GraphError

SEEDS = 2**62


class Place(NamedTuple):
    """An answer to write: its window, the document's [start, stop) in it, the answer's first column, its end token."""

    window: int
    start: int
    begin: int
    stop: int
    end: int


@torch.no_grad()
def written(batch: Batch, student: Student, share: float) -> Batch:
    """A batch in which the student wrote the answers of some windows, chosen and sampled by the CPU's random state.

    Args:
        share: the probability that a window is chosen.

    Raises:
        UserError: the text has no completions.
    """
    if batch.trained is None:
        raise UserError(
            "on_policy is given, but the stage's text has no completions for the student to write; use chats, or prompts "
            "with completions, or leave on_policy out"
        )
    chosen = torch.rand(len(batch.ids)) < share
    seed = int(torch.randint(SEEDS, ()))
    places = _places(batch, chosen)
    return _put(batch, places, _answers(batch, student, places, seed)) if places else batch


def _places(batch: Batch, chosen: Tensor) -> list[Place]:
    """Every document with a completion in the chosen windows."""
    found = []
    documents, trained, targets = (cast(Tensor, tensor).cpu() for tensor in (batch.documents, batch.trained, batch.targets))
    for window in chosen.nonzero()[:, 0].tolist():
        for document in documents[window].unique().tolist():
            columns = (documents[window] == document).nonzero()[:, 0]
            start, stop = int(columns[0]), int(columns[-1]) + 1
            marks = trained[window, start:stop] > 0
            asked = marks.nonzero()[:, 0].tolist()
            if not asked or start + asked[0] + 1 >= stop:
                continue
            last = next((k for k in range(asked[0], stop - start) if not marks[k]), stop - start) - 1
            found.append(Place(window, start, start + asked[0] + 1, stop, int(targets[window, start + last])))
    return found


def _answers(batch: Batch, student: Student, places: list[Place], seed: int) -> list[list[int]]:
    """The student's answer after each prompt, with its end token, cut to the room in the window."""
    prompts = [batch.ids[place.window, place.start : place.begin] for place in places]
    width, ends = max(map(len, prompts)), sorted({place.end for place in places})
    ids = torch.full((len(prompts), width), ends[0], device=batch.ids.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    count = max(place.stop - place.begin for place in places)
    drawn = numbers(seed, range(len(places)), count)
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    training = student.training
    student.eval()  # in training mode, recomputed layers keep no cache
    try:
        with own_settings(student, config):
            try:
                options: dict[str, Any] = {
                    "custom_generate": replayed,
                    "logits_processor": LogitsProcessorList([Draws(drawn, 1.0)]),
                }
                made = student.generate(ids, attention_mask=mask, **options)
            except GraphError:  # a family whose attention the CUDA-graph decoder does not support
                options = {"logits_processor": LogitsProcessorList([Draws(drawn, 1.0)])}
                made = student.generate(ids, attention_mask=mask, **options)
    finally:
        student.train(training)
    found = []
    for place, tokens in zip(places, made[:, width:].tolist(), strict=True):
        tokens = tokens[: place.stop - place.begin]
        end = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokens[:end])
    return found


def _put(batch: Batch, places: list[Place], answers: list[list[int]]) -> Batch:
    """The batch with these answers; columns that they leave free have weight 0."""
    parts = {name: getattr(batch, name).clone() for name in ("ids", "targets", "weights", "trained", "labels", "positions")}
    documents, room = batch.documents.clone(), int(batch.documents.max()) + 1
    for number, (place, answer) in enumerate(zip(places, answers, strict=True)):
        window, begin, stop = place.window, place.begin, place.stop
        said = torch.tensor(answer, device=documents.device)
        over = begin + len(answer)
        parts["ids"][window, begin:over] = parts["targets"][window, begin - 1 : over - 1] = said
        parts["ids"][window, over:stop] = parts["targets"][window, over - 1 : stop] = said[-1]
        for name in ("weights", "trained"):
            parts[name][window, begin - 1 : over - 1], parts[name][window, over - 1 : stop] = 1.0, 0.0
        parts["labels"][window, over:stop] = NO_DOCUMENT
        parts["positions"][window, over:stop] = torch.arange(stop - over, device=documents.device)
        documents[window, over:stop] = room + number
    begins = torch.zeros_like(documents)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return replace(batch, **parts, documents=begins.cumsum(1), windows=None)
