"""Whether what was loaded is a whole teacher: what transformers raises or passes over in silence, as one message each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIXES = {
    "GGUF file": "download it again",
    "config": "bring back its config.json",
    "weights": "bring back its files, or download the checkpoint again",
    "tokenizer": "save the tokenizer that the model was trained with beside it",
}
SHOWN = 3  # tensors that a message names


@contextmanager
def loading(reference: str, part: str) -> Iterator[None]:
    """Turn what transformers raises on damaged or foreign files inside the block, which is of every type, into ValueError.

    Args:
        part: of the teacher, one of FIXES.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = re.sub(r"\s*\n\s*", " ", str(error).strip()).rstrip(".") or type(error).__name__
        if "trust_remote_code" in said:
            raise ValueError(
                f"teacher {reference!r} comes with modelling code of its own, which loading it would run: set "
                "teacher_trust_remote_code: true if you have read it and trust it, or choose a teacher without"
            ) from error
        fix = "" if "huggingface.co" in said else f"; {FIXES[part]}"  # the hub's own messages say what to do
        raise ValueError(f"teacher {reference!r} could not be loaded: its {part}: {said}{fix}") from error


def check_weights(reference: str, model: PreTrainedModel, info: dict) -> None:
    """Refuse weights that are missing, of another shape than the config says, or not finite.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        ValueError: naming the first of the tensors.
    """
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"teacher {reference!r} could not be loaded: there are no weights for {_some(missing)}; {FIXES['weights']}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"teacher {reference!r} could not be loaded: {name} has the shape {list(found)}, but by config.json it is "
            f"{list(wanted)}; config and weights do not belong together"
        )
    wrong = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"teacher {reference!r} has weights that are not finite (NaN or infinite) in {_some(wrong)}; nothing can be "
            f"learned from it: {FIXES['weights']}"
        )


def check_tokenizer(reference: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more entries than the model has embeddings.

    Raises:
        ValueError: giving both numbers.
    """
    embedded = model.get_input_embeddings().num_embeddings
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)  # not len(): ids of added tokens may leave gaps
    if entries > embedded:  # fewer are fine: rows that pad the embeddings
        raise ValueError(
            f"{reference}: the tokenizer has {entries} entries, but the model embeds only {embedded}; they do not "
            f"belong together: {FIXES['tokenizer']}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
