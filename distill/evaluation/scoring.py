"""Scoring of marked tokens: forward passes in batches of similar length, and log-probabilities of the marked tokens.

Sequences are padded on the right, which a causal model cannot see, so no mask is needed. Logits are computed for the marked
tokens only. Recall families and tasks are both scored here, for teachers and students.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.division import divided
from distill.evaluation.nonfinite import NotFinite, blame
from distill.output_head import wide_head, wide_logits
from students.kernels.linear_kl import Head
from students.prompts import hidden_states, new_cache, widest_row
from students.skeleton import Student
from students.slot import MixerSlot
from teachers.teacher import Teacher

BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}  # of a forward pass, padding included
CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Marked:
    """A sequence of tokens, and the spans [start, end) of it that are answers."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.spans or any(not 0 < start < end <= len(self.ids) for start, end in self.spans):
            raise ValueError(f"the spans {self.spans} do not lie after the first of {len(self.ids)} tokens")


@dataclass(frozen=True)
class Answer:
    """A model's score of a span, given everything before it.

    logprob: of the whole span, in nats; in a forced choice, among the tokens to choose from. greedy: whether each token of
    the span is the most likely one in the whole vocabulary, so that greedy decoding would generate it.
    """

    logprob: float
    greedy: bool


@torch.no_grad()
def score(
    teacher: Teacher, model: nn.Module | None, texts: Sequence[Marked], among: Sequence[int] | None = None
) -> list[list[Answer]]:
    """Score every span, with one forward pass a sequence. model: None scores the teacher.

    If several processes share the work, each makes its share of the passes.

    Args:
        among: the tokens to choose from, for `logprob`; None for the whole vocabulary.

    Raises:
        NotFinite: an output is not finite, naming the layer.
    """
    head = wide_head(teacher.model if model is None else model)

    def answers(indexes: list[int]) -> list[list[tuple[float, bool]]]:
        chosen = [texts[index] for index in indexes]
        ids = padded(chosen).to(teacher.device)
        hidden = last_hidden(teacher, model, ids)
        if not hidden.isfinite().all():
            raise NotFinite(blame(teacher, model, lambda: last_hidden(teacher, model, ids)))
        return [[(one.logprob, one.greedy) for one in text] for text in _answers(hidden, head, chosen, among)]

    passes = list(batches([len(text.ids) - 1 for text in texts], BATCH_TOKENS.get(teacher.device.type, 4096)))
    found: list[list[Answer]] = [[] for _ in texts]
    for indexes, said in zip(passes, divided(passes, answers), strict=True):
        for index, spans in zip(indexes, said, strict=True):
            found[index] = [Answer(*span) for span in spans]
    return found


def last_hidden(teacher: Teacher, model: nn.Module | None, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """Return the last hidden states of the teacher, or of a student of it, with one document a row.

    Without gradients, rows longer than a chunk of one text go through a cache in chunks, as prompts do. Otherwise the
    activations of 131k tokens would take more memory than the model.
    """
    which = teacher.model if model is None else model
    if not torch.is_grad_enabled() and _caches(which) and ids.shape[1] > widest_row(cast(PreTrainedModel, which)):
        whole = cast(PreTrainedModel, which)
        return hidden_states(whole, ids, new_cache(whole))
    if model is not None:
        return cast(Student, model).hidden(ids, None)
    return teacher.hidden(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))


def _caches(model: nn.Module) -> bool:
    """Whether a model can use a cache: not a student with other modules in its slots than mixers, such as switches."""
    if not hasattr(model, "new_cache"):
        return isinstance(model, PreTrainedModel)
    student = cast(Student, model)
    layers, name = cast(nn.ModuleList, student.get_submodule(student.place.layers)), student.place.name
    return all(isinstance(getattr(layers[index], name), MixerSlot) for index in student.layout.converted)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield indexes in groups of similar length, the longest first, with at most `tokens` tokens a group of several."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def split(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of contexts and of their continuations, with each pair tokenized as one text.

    Spaces at the end of a context, and a token across the border, belong to the continuation, as in lm-evaluation-harness.
    """
    kept = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    encoded = tokenizer(wholes + kept, add_special_tokens=False)["input_ids"]
    found = zip(encoded[: len(pairs)], encoded[len(pairs) :], strict=True)
    return [(whole[: len(alone)], whole[len(alone) :]) for whole, alone in found]


def padded(texts: Sequence[Marked]) -> Int[Tensor, "b t"]:
    """Return all but the last token of each text, padded: no prediction after the last token is needed."""
    width = max(len(text.ids) for text in texts) - 1
    return torch.tensor([text.ids[:-1] + [0] * (width + 1 - len(text.ids)) for text in texts])


def _answers(
    hidden: Float[Tensor, "b t d"], head: Head, texts: Sequence[Marked], among: Sequence[int] | None
) -> list[list[Answer]]:
    places = [(row, place) for row, text in enumerate(texts) for start, end in text.spans for place in range(start, end)]
    rows, columns = torch.tensor(places, device=hidden.device).unbind(1)
    targets = torch.tensor([texts[row].ids[place] for row, place in places], device=hidden.device)
    logprobs, greedy = [], []
    for piece, wanted in zip(hidden[rows, columns - 1].split(CHUNK), targets.split(CHUNK), strict=True):
        logits = wide_logits(piece, head)
        rivals = logits if among is None else logits[:, list(among)]
        logprobs += (logits.gather(-1, wanted[:, None])[:, 0] - rivals.logsumexp(-1)).tolist()
        greedy += (logits.argmax(-1) == wanted).tolist()
    answers: list[list[Answer]] = []
    at = 0
    for text in texts:
        answers.append([])
        for start, end in text.spans:
            stop = at + end - start
            answers[-1].append(Answer(sum(logprobs[at:stop]), all(greedy[at:stop])))
            at = stop
    return answers
