"""The FLOP of a training step that every implementation needs: products with weights, 2 FLOP for each weight and token.

Attention, scans, norms and recomputation are left out, so a share of the ceiling computed from these is a lower bound of the
hardware's use. Only the experts that a token is routed to count; a block that several layers share counts once.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.stages.stage import Stage


def flops_per_token(stage: Stage, teacher: PreTrainedModel | None) -> float:
    """FLOP a token of training text: the teacher's forward pass, and forward and backward of what trains.

    Args:
        stage: a prepared stage. teacher: the model that it learns from; None where it learns from a cache.
    """
    student = stage.student
    if not stage.whole_student:  # layer by layer, on what the teacher's body sees
        ours = {id(parameter) for _, parameter in stage.trained().values()}
        mixers = sum(3 * _matrices(mixer) for mixer in student.mixers.values() if _has(mixer, ours))
        return 2.0 * (mixers + (0 if teacher is None else _body(teacher)))
    trained = sum(parameter.numel() for _, parameter in stage.trained().values() if parameter.dim() > 1)
    embeddings = _weight(student.get_input_embeddings())
    if any(parameter is embeddings for _, parameter in stage.trained().values()) and not _tied(student):
        trained -= embeddings.numel()
    forward = _body(student) + _head(student)
    return 2.0 * (2 * forward + trained + (0 if teacher is None else _body(teacher) + _head(teacher)))


def _weight(layer: Any) -> Tensor:
    return layer.weight


def _has(module: nn.Module, trained: set[int]) -> bool:
    return any(id(parameter) in trained for parameter in module.parameters())


def _matrices(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _body(model: PreTrainedModel) -> float:
    """The weights between embeddings and head that a token is multiplied with."""
    embeddings, config = model.get_input_embeddings(), model.config
    every: float = sum(parameter.numel() for parameter in model.base_model.parameters() if parameter.dim() > 1)
    every -= _weight(embeddings).numel()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        inside = sum(p.numel() for name, p in model.base_model.named_parameters() if ".experts." in name)
        every -= inside * (1 - config.num_experts_per_tok / experts)
    return every


def _head(model: PreTrainedModel) -> int:
    return _weight(model.get_output_embeddings()).numel()


def _tied(model: PreTrainedModel) -> bool:
    return _weight(model.get_output_embeddings()) is _weight(model.get_input_embeddings())
