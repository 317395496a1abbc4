"""Teachers: the Transformers that students learn from. Nothing here trains."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teachers.checks import check_size, check_tokenizer, check_weights, keep_own_head, loading
from teachers.compat import forget_lengths
from teachers.families import FAMILIES, family_of
from teachers.files import folder_of
from teachers.folder import check_folder, teacher_config
from teachers.foreign import check_adapter_files, plain_config
from teachers.held_type import HeldType, held_type, loses_digits
from teachers.quiet import no_bars_in_logs, no_panics
from teachers.source import resolve
from teachers.teacher import Teacher
from teachers.weights import check_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FAMILIES", "Teacher", "load", "load_tokenizer"]


def load(
    reference: str,
    *,
    device: str | torch.device = "cpu",
    dtype: HeldType = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    ignore: Sequence[str] = (),
) -> Teacher:
    """Load a teacher: "org/name" on the hub, a local folder, "file.gguf" or "package:NAME/FILE.gguf".

    Every tensor is read directly into its final type and onto its device, so memory never holds a second copy of the model.

    Args:
        dtype: type of the weights in memory; "stored" for the checkpoint's own (see `teachers.held_type`). Modules that
            transformers keeps in float32 stay in float32.
        trust_remote_code: run modelling code that comes with the checkpoint.
        allow_pickle: read weights that are not safetensors; unpickling runs code.
        ignore: patterns ("model.layers.3.*") of tensors in the files that are left out when the model has no place for them.

    Raises:
        FileNotFoundError, ValueError: see `teachers.source.resolve` and `teachers.gguf.converted`. ValueError also for a
            family without a row in FAMILIES and for everything that `teachers.checks` refuses: damaged files, weights that
            are missing, of a wrong shape, not finite or unknown to the model, an adapter, quantised weights, and a tokenizer
            with more entries than the model has embeddings.
    """
    from transformers import AutoModelForCausalLM

    location, read_tokenizer, gguf_file = _located(reference, trust_remote_code, allow_pickle)
    check_adapter_files(reference, location)
    trust = {"trust_remote_code": trust_remote_code}
    config = teacher_config(reference, location, trust_remote_code)
    family = family_of(config, reference)
    plain_config(reference, config, location)
    check_folder(reference, location, allow_pickle)
    attention = {} if family.attention is None else {"attn_implementation": family.attention}
    safetensors = {} if allow_pickle else {"use_safetensors": True}
    place = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_weights checks them
    with loading(reference, "weights"), no_bars_in_logs():
        check_size(location, lambda: AutoModelForCausalLM.from_config(deepcopy(config), **attention, **trust))
        held = held_type(location, gguf_file) if isinstance(dtype, str) else dtype
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, config=config, dtype=held, **attention, **safetensors, **checked, **trust, **place
        )
    model, info = loaded
    check_row(model, family, reference)
    ignored = check_weights(reference, location, model, info, ignore)
    keep_own_head(model)
    with loading(reference, "tokenizer"), no_panics():
        tokenizer = read_tokenizer(location)
    check_tokenizer(reference, model, tokenizer)
    model.requires_grad_(False).eval().to(device)
    forget_lengths(model)
    rounded = loses_digits(location, held)
    return Teacher(reference, model, tokenizer, family, tuple(ignored), folder_of(location), rounded)


def load_tokenizer(
    reference: str, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a teacher's tokenizer without its weights; arguments and errors as in `load`."""
    location, read_tokenizer, _ = _located(reference, trust_remote_code, allow_pickle)
    config = teacher_config(reference, location, trust_remote_code)
    plain_config(reference, config, location)
    check_folder(reference, location, allow_pickle)
    with loading(reference, "tokenizer"), no_panics():
        return read_tokenizer(location)


def _located(
    reference: str, trust_remote_code: bool, allow_pickle: bool
) -> tuple[str, "Callable[[str], PreTrainedTokenizerBase]", Path | None]:
    """Returns the location of a teacher's files, the function that reads its tokenizer, and its GGUF file, if it has one."""
    from transformers import AutoTokenizer

    source = resolve(reference, allow_pickle)
    if source.kind != "gguf":
        return source.location, partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code), None
    from teachers import gguf, gguf_tokenizer

    file = Path(source.location)
    return str(gguf.converted(file)), gguf_tokenizer.load, file
