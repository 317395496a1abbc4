"""Int8 weights (torchao) for a teacher's linear layers; the original weights are kept on the CPU.

Each row of a weight has a scale; products are computed in the type of the activations. The output head, the embeddings and
every module that is not an `nn.Linear` (GPT-2's layers, stacked experts) are unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

MISSING = "int8 teachers need torchao, which is not installed: pip install 'distill-hybrids[int8]'"


def check_installed() -> None:
    """Check that torchao is installed.

    Raises:
        ImportError: with the command that installs it.
    """
    if find_spec("torchao") is None:
        raise ImportError(MISSING)


def quantise(model: nn.Module) -> dict[str, Tensor]:
    """Quantise the weights of every linear layer but the output head to int8, in place.

    Returns:
        the original weights by name, on the CPU.

    Raises:
        ImportError: torchao is not installed, or too old. ValueError: the model has no linear layer except its head.
    """
    check_installed()
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(f"{MISSING} (version 0.15 or newer; the one here says: {error})") from error
    head = cast(PreTrainedModel, model).get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}
    if not layers:
        raise ValueError("the model has no linear layer (nn.Linear) except its head, so int8 changes nothing: leave it out")
    kept = {f"{name}.weight": layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in layers)
    model.requires_grad_(False)
    return kept


@contextmanager
def put_back(model: nn.Module, kept: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block, a quantised model has its original weights, on its device. Nested blocks change nothing."""
    quantised = {name: model.get_parameter(name) for name in kept}
    if all(type(parameter) is nn.Parameter for parameter in quantised.values()):
        yield
        return
    for name, tensor in kept.items():
        _put(model, name, nn.Parameter(tensor.to(cast(PreTrainedModel, model).device), requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in quantised.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)
