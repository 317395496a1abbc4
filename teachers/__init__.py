"""Teachers: the Transformers that students learn from. Nothing here trains."""

from pathlib import Path

import torch

from teachers.families import FAMILIES, family_of
from teachers.quiet import no_bars_in_logs
from teachers.source import resolve
from teachers.teacher import Teacher

__all__ = ["FAMILIES", "Teacher", "load"]


def load(
    reference: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Teacher:
    """Load a teacher: "org/name" on the hub, a local folder, "file.gguf" or "package:NAME/FILE.gguf".

    Args:
        trust_remote_code: run modelling code that comes with the checkpoint.
        allow_pickle: read weights that are not safetensors; unpickling runs code.

    Raises:
        FileNotFoundError, ValueError: see `teachers.source.resolve` and `teachers.gguf.converted`; also a family without
            a row, and a tokenizer with more entries than the model has embeddings.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve(reference, allow_pickle)
    location = source.location
    if source.kind == "gguf":
        from teachers.gguf import converted

        location = str(converted(Path(location)))
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(location, **trust)
        family = family_of(config, reference)
        safetensors = {} if allow_pickle else {"use_safetensors": True}
        attention = {} if family.attention is None else {"attn_implementation": family.attention}
        with no_bars_in_logs():
            model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **attention, **safetensors, **trust)
        tokenizer = AutoTokenizer.from_pretrained(location, **trust)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"teacher {reference!r} could not be loaded: {error}") from error
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)  # not len(): ids of added tokens may leave gaps
    if entries > model.get_input_embeddings().num_embeddings:  # fewer are fine: rows that pad the embeddings
        raise ValueError(
            f"{reference}: the tokenizer has {entries} entries, but the model embeds only "
            f"{model.get_input_embeddings().num_embeddings}; they do not belong together"
        )
    model.requires_grad_(False).eval().to(device)
    return Teacher(reference, model, tokenizer, family)
