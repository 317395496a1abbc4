"""Whether what was loaded is a whole teacher: what transformers raises or passes over in silence, as one message each."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIXES = {
    "GGUF file": "download it again",
    "config": "bring back its config.json",
    "weights": "bring back its files, or download the checkpoint again",
    "tokenizer": "save the tokenizer that the model was trained with beside it",
}
MERGE = "merge it (peft's merge_and_unload, then save_pretrained), or take it away"
SHOWN = 3  # tensors that a message names
ADAPTER = "adapter_config.json"  # beside a model: transformers puts the adapter on it
# Tensors that old checkpoints hold and no model reads: tables that are computed today, causal masks.
HARMLESS = ("*rotary_emb.inv_freq", "*.attn.bias", "*.attention.bias", "*.masked_bias", "*position_ids")


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


def check_files(reference: str, folder: str) -> None:
    """Refuse a model's folder that holds an adapter too: it would be the teacher's, and nobody asked for it.

    Raises:
        ValueError: naming the file.
    """
    file = Path(folder) / ADAPTER
    if file.is_file():
        raise ValueError(f"teacher {reference!r} has an adapter beside it: {file}; {MERGE}")


def check_weights(reference: str, model: PreTrainedModel, info: dict, ignore: Sequence[str] = ()) -> list[str]:
    """Refuse weights that are missing, without a place, of another shape than the config says, or not finite.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        ignore: patterns of names that may be left without a place.

    Returns:
        the tensors that were left out because `ignore` says so.

    Raises:
        ValueError: naming the first of the tensors.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(f"teacher {reference!r} was loaded with an adapter ({', '.join(model.peft_config)}); {MERGE}")
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
    left = [name for name in sorted(info["unexpected_keys"]) if not _matches(name, HARMLESS)]
    if homeless := [name for name in left if not _matches(name, ignore)]:
        raise ValueError(
            f"teacher {reference!r} could not be loaded: by config.json the model has no place for {_some(homeless)} of its "
            "files, so it would not be the model that was saved; mend config.json, or name what may be left out in "
            "teacher_ignore"
        )
    wrong = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"teacher {reference!r} has weights that are not finite (NaN or infinite) in {_some(wrong)}; nothing can be "
            f"learned from it: {FIXES['weights']}"
        )
    return left


def keep_own_head(model: PreTrainedModel) -> None:
    """Where the files hold an output head of another value than the embeddings, say in the config that they are two.

    transformers loads both whatever `tie_word_embeddings` says, and ties them again in whatever is made from the config.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.tie_word_embeddings or head.weight is embeddings.weight:
        return
    if torch.equal(head.weight, embeddings.weight):
        model.tie_weights()
    else:
        model.config.tie_word_embeddings = False


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


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
