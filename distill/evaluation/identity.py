"""Whether a student is its teacher where nothing is swapped, and stays it where plain attention is: asked before training.

What a checkpoint or a family's row gets wrong shows here as a number: a tensor that went elsewhere, a norm, a rotation or a
window that mixers do not know of.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.build import attention_shapes, build
from distill.errors import UserError
from distill.stages.stage import observed
from distill.text.windows import Batch
from students.config import Layout
from students.kernels import backend
from students.mixers import make_mixer
from students.mixers.transfer import Projections
from teachers.teacher import Teacher

TOKENS = 36  # two documents
TOLERANCE = {"float32": 2e-3, "tf32": 3e-2, "half": 1e-1}  # ||found - wanted|| / ||wanted||


@torch.no_grad()
def check_identity(teacher: Teacher, layout: Layout) -> dict:
    """Compare a student of this teacher with it, on a few dozen tokens.

    Memory: one layer's attention, and the activations.

    Returns:
        the relative error of the logits with nothing swapped ("logits"), the largest one of a layer's output with plain
        attention in its place ("attention"), and which layer that is ("layer").

    Raises:
        UserError: they differ, naming the first layer that does.
    """
    batch, allowed = _text(teacher), _tolerance(teacher)
    student, _ = build(teacher, Layout("A" * teacher.n_layers))
    logits = teacher.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    found = _error(student(batch.ids, document_ids=batch.documents, use_cache=False).logits, logits)
    if not found <= allowed:
        where = _first_difference(teacher, student, batch, allowed)
        raise UserError(
            f"a student of {teacher.reference} with nothing swapped is not its teacher: {where} differs (logits by "
            f"{found:.2g} of their size, {allowed:.0e} is allowed); this version reads the checkpoint in another way"
        )
    errors = _attention_errors(teacher, student, batch, layout)
    wrong = next((layer for layer, error in errors.items() if not error <= allowed), None)
    if wrong is not None:
        raise UserError(
            f"layer {wrong} of {teacher.reference} with plain attention in its place differs from the teacher's by "
            f"{errors[wrong]:.2g} of its output, {allowed:.0e} is allowed: mixers would start from another attention"
        )
    worst = max(errors, key=errors.get, default=None)
    return {"logits": found, "attention": errors.get(worst, 0.0), "layer": worst}


def _text(teacher: Teacher) -> Batch:
    """Random tokens, the same every time."""
    vocabulary = teacher.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(TOKENS) >= TOKENS // 3).long()[None]
    positions = torch.arange(TOKENS)[None] - documents * (TOKENS // 3)
    weights = torch.ones(1, TOKENS)
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents).to(teacher.device)


def _tolerance(teacher: Teacher) -> float:
    if teacher.model.dtype.itemsize < 4:
        return TOLERANCE["half"]
    tf32 = teacher.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return TOLERANCE["tf32" if tf32 else "float32"]


def _attention_errors(teacher: Teacher, student: nn.Module, batch: Batch, layout: Layout) -> dict[int, float]:
    """How far plain attention, made from each converted layer's projections, is from that layer's own, on its own input."""
    shapes, errors = attention_shapes(teacher), {}
    for seen, context in observed(teacher, student, batch, layout.converted):
        weights = teacher.attention_weights(seen.layer)
        with torch.device("meta"):
            mixer = make_mixer("attention", shapes.at(seen.layer), {})
        mixer = mixer.to(weights.q.dtype).to_empty(device=teacher.device)
        mixer.from_attention(Projections(**vars(weights)))
        with backend("reference"):
            errors[seen.layer] = _error(mixer(seen.input, context), seen.output)
    return errors


def _first_difference(teacher: Teacher, student: nn.Module, batch: Batch, allowed: float) -> str:
    """The first part of the two models whose outputs differ."""
    outputs = []
    for model, arguments in (
        (teacher.model, {"position_ids": batch.positions}),
        (student, {"document_ids": batch.documents}),
    ):
        seen, hooks = [], []
        for layer in model.get_submodule(teacher.family.layers):
            hooks.append(layer.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out)))
        try:
            model(input_ids=batch.ids, use_cache=False, **arguments)
        finally:
            for hook in hooks:
                hook.remove()
        outputs.append([out[0] if isinstance(out, tuple) else out for out in seen])
    for layer, (wanted, found) in enumerate(zip(*outputs, strict=True)):
        if not _error(found, wanted) <= allowed:
            return f"layer {layer}"
    return "the final norm or the output head"


def _error(found: Float[Tensor, "..."], wanted: Float[Tensor, "..."]) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-20)).item()
