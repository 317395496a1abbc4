"""Uses of private names of torch, transformers and accelerate, and of names that differ between their versions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # these two: torch 2.11, 2.13
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd.graph import _engine_run_backward as run_backward  # noqa: F401  torch 2.11, 2.13
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # torch 2.11, 2.13
from torch.utils._pytree import tree_leaves as tree_leaves  # these two: torch 2.11, 2.13
from torch.utils._pytree import tree_map_only as tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer  # 5.17, 5.24
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # 5.17, 5.24: the table of implementations

# Operations of torch 2.11, 2.13: reading a number from a tensor, and choosing a kernel of fused attention.
NUMBER_READ = torch.ops.aten._local_scalar_dense.default
ATTENTION_CHOICE = torch.ops.aten._fused_sdp_choice.default


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage while it exists, even one without memory. `_cdata`, torch 2.11, 2.13."""
    return storage._cdata


def own_tensors(module: nn.Module) -> tuple[dict, dict]:
    """The dictionaries of a module's own parameters and buffers, which may be changed in place. torch 2.11, 2.13."""
    return module._parameters, module._buffers


def marked_rendering(tokenizer: Any, turns: list[dict], tools: list[dict] | None, options: dict) -> tuple[str, list]:
    """A chat's rendered text, and the [start, end) of each part between the template's generation markers.

    `transformers.utils.chat_template_utils.render_jinja_template`, 5.17 to 5.24. No public call returns places in the text.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)
    options = {**tokenizer.special_tokens_map, **options}
    rendered: Any = render_jinja_template
    texts, places = rendered([turns], tools, None, template, return_assistant_tokens_mask=True, **options)
    return texts[0], list(places[0])


def forget_precision() -> None:
    """Allow the next `Accelerator` of this process to have another precision than the last.

    `AcceleratorState._reset_state`, seen in accelerate 1.1 to 1.15.
    """
    AcceleratorState._reset_state(reset_partial_state=False)


def recompute_layers(model: nn.Module, options: dict) -> None:
    """Have transformers recompute each layer's activations in the backward pass, without dropout.

    `activation_checkpointing_enable` from transformers 5.24 on, `gradient_checkpointing_enable` in 5.17 to 5.23. A layer
    is recomputed if it is in training mode when it is called (5.17), or when its forward is called (5.24, and then only
    with gradients). The modules inside a layer are never in training mode, nor is the layer while its own forward runs:
    Falcon applies dropout there.

    Args:
        options: of torch.utils.checkpoint.checkpoint.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    for module in model.eval().modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            layer = cast(Any, module)
            layer._gradient_checkpointing_func = partial(_run_layer, module, layer._gradient_checkpointing_func)
            layer.recompute_hooks = (
                module.register_forward_pre_hook(_judged_without_gradients),
                module.register_forward_hook(_recomputed_again, always_call=True),
            )


def keep_layers(model: nn.Module) -> None:
    """Undo `recompute_layers`, by the names of the same versions."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    for module in model.eval().modules():
        for hook in vars(module).pop("recompute_hooks", ()):
            hook.remove()


def _run_layer(layer: nn.Module, checkpointed: Callable, forward: Callable, *arguments: Any) -> Any:
    """Run a layer's forward through torch's checkpointing, in evaluation mode both now and when it is recomputed."""

    def run(*given: Any) -> Any:
        layer.training = False
        try:
            return forward(*given)
        finally:
            layer.training = True

    return checkpointed(run, *arguments)


def _judged_without_gradients(layer: nn.Module, *unused: Any) -> None:
    if not torch.is_grad_enabled():  # 5.24 then runs the layer without recomputation
        layer.training = False


def _recomputed_again(layer: nn.Module, *unused: Any) -> None:
    layer.training = True


def kept_in_float32(model: nn.Module) -> set[str]:
    """Names, or parts of names, of the parameters that transformers keeps in float32 in a model of any type. 5.17, 5.24."""
    return set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def add_packed_attention(name: str, attend: Callable, mask: Callable) -> None:
    """Add an attention and its masks to transformers' tables, unless they are already there. 5.17, 5.24."""
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside the block, code that torch.compile cannot compile runs uncompiled, and a smaller last batch is compiled too."""
    import torch._dynamo

    with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=16):
        yield


def take_apart(module: nn.Module) -> None:
    """Undo `fully_shard` on a module whose parameters are ordinary again: remove its hooks, its class and its state.

    PyTorch has no call for this. Names seen in torch 2.13.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = cast(Any, module)._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    _module_state_mapping.pop(module, None)
    for name in (STATE_KEY, REGISTRY_KEY):
        vars(module).pop(name, None)
    for inner in module.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(inner).pop(name, None)
    module.__class__ = type(module).__mro__[2]
