"""Samples for a report: a student's mixer matrices next to attention matrices, and a text that it continues."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.disk import new_file
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.stages.observing import observed
from distill.text.encoding import prompt
from students.skeleton import Student
from teachers.teacher import Teacher
from teachers.weights import LogitRules

MATRICES, SAMPLES = "matrices.npz", "samples.json"  # in the run folder
PICTURE_TOKENS = 96
PICTURE_LAYERS, PICTURE_HEADS = 3, 2
PROMPT = "The most important difference between a river and a lake is"
NEW_TOKENS = 48


@torch.no_grad()
def collect(session: Session, student: Student, folder: RunDir) -> None:
    """Write matrices.npz and samples.json into a run folder."""
    found = matrices(session, student)
    with new_file(folder.path / MATRICES) as opened:
        np.savez_compressed(opened, **cast(dict[str, Any], found))
    folder.write(SAMPLES, continuations(session.teacher, student))


def matrices(session: Session, student: Student) -> dict[str, np.ndarray]:
    """Return attention and mixer matrices of a few heads of a few layers, named `layer L head H attention` or `... mixer`.

    A head's terms are scaled to fit its attention matrix best, because the scale of an output is not part of the matrix.
    """
    batch = session.heldout_windows.batch(0, 1).to(session.teacher.device)
    batch = batch.shortened(PICTURE_TOKENS)
    layers = spread(student.layout.converted, PICTURE_LAYERS)
    found = {}
    for seen, context in observed(session.teacher, student, batch, layers, qkv=True):
        mixer = student.mixers[seen.layer]
        terms = mixer.matrix(mixer.project(seen.input, context))[0].float()
        attention = attention_matrix(
            cast(Tensor, seen.q), cast(Tensor, seen.k), session.teacher.logit_rules(seen.layer), batch.documents
        )[0]
        for head in spread(range(attention.shape[0]), PICTURE_HEADS):
            name = f"layer {seen.layer} head {head}"
            found[f"{name} attention"] = attention[head].float().cpu().numpy()
            found[f"{name} mixer"] = fitted(attention[head], terms[mixer.head_terms()[head]]).float().cpu().numpy()
    return found


def attention_matrix(q: Tensor, k: Tensor, rules: LogitRules, documents: Tensor) -> Float[Tensor, "b h t t"]:
    """Return the whole softmax matrix of a layer's attention, for short texts."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bthp,bshp->bhts", q.float(), k.float()) * rules.scale
    if rules.softcap is not None:
        logits = rules.softcap * torch.tanh(logits / rules.softcap)
    every = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    hidden = every.triu(1) if rules.window is None else every.triu(1) | every.tril(-rules.window)
    hidden = hidden | (documents[:, :, None] != documents[:, None])[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def fitted(target: Float[Tensor, "t t"], terms: Float[Tensor, "k t t"]) -> Float[Tensor, "t t"]:
    """Return the weighted sum of some matrices that is nearest to a target."""
    flat = terms.flatten(1).double()
    gram = flat @ flat.T
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + ridge, flat @ target.flatten().double())
    return torch.einsum("k,kts->ts", weights.float(), terms)


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return up to `count` items, evenly spread."""
    items = list(items)
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in sorted(set(places.tolist()))]


def continuations(teacher: Teacher, student: Student, tokens: int = NEW_TOKENS) -> dict[str, str]:
    """Continue one prompt greedily with teacher and student, as far as the teacher has positions."""
    tokenizer, positions = cast(PreTrainedTokenizerBase, teacher.tokenizer), teacher.positions(student.layout.meta_tokens)
    ids = torch.tensor([prompt(tokenizer, PROMPT)], device=teacher.device)
    mask, length = torch.ones_like(ids), ids.shape[1]
    room = tokens if positions is None else max(0, min(tokens, positions - length))
    texts = {"prompt": PROMPT}
    models: dict[str, PreTrainedModel] = {"teacher": teacher.model, "student": student}
    for name, model in models.items():
        with greedy(model, tokenizer):
            out = cast(Any, model).generate(input_ids=ids, attention_mask=mask, max_new_tokens=room) if room else ids
        texts[name] = cast(str, tokenizer.decode(out[0, length:], skip_special_tokens=True))
    return texts


@contextmanager
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make a model decode greedily inside the block, without its own settings (beams, banned words, watermarks ...)."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own
