"""Checks that a teacher was loaded completely, with one clear message for each error that transformers raises or ignores."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from teachers.files import stored_tensors
from teachers.fingerprint import PROBES
from teachers.foreign import MERGE, check_tensors
from teachers.quiet import no_panics

FIXES = {
    "GGUF file": "download it again",
    "config": "bring back its config.json",
    "generation settings": "bring back its generation_config.json, or remove it",
    "weights": "bring back its files, or download the checkpoint again",
    "tokenizer": "save the tokenizer that the model was trained with beside it",
}
# Long runs of one or two characters, on which the regular expressions of tokenizers may backtrack.
RUNS = tuple(500 * part for part in (" ", "a", "A", "1", "!", "\n", "\u00e9", "a ", "a1"))
SHOWN = 3  # tensors that a message names
SPARE = 2**26  # a model is not built if it has this many values more than twice those of its files
# Tensors that old checkpoints hold and no model reads: tables that are now computed, causal masks.
HARMLESS = ("*rotary_emb.inv_freq", "*.attn.bias", "*.attention.bias", "*.masked_bias", "*position_ids")


@contextmanager
def loading(reference: str, part: str) -> Iterator[None]:
    """Turn the errors of any type that transformers raises inside the block on damaged or foreign files into ValueError.

    Args:
        part: the part of the teacher that is loaded, a key of FIXES.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no subclass of Exception
        if not isinstance(error, Exception) and not panicked(error):
            raise
        said = plain(str(error)).rstrip(".")
        if not said or isinstance(error, TypeError | AttributeError | LookupError | AssertionError | RecursionError):
            said = f"its entries do not fit each other, or what transformers expects of them ({said[:200]!r})"
        if "trust_remote_code" in said:
            raise ValueError(
                f"teacher {reference!r} comes with modelling code of its own, which loading it would run: set "
                "teacher_trust_remote_code: true if you have read it and trust it, or choose a teacher without"
            ) from error
        fix = "" if "huggingface.co" in said else f"; {FIXES[part]}"  # the hub's own messages say what to do
        raise ValueError(f"teacher {reference!r} could not be loaded: its {part}: {said}{fix}") from error


def plain(said: str, most: int = 600) -> str:
    """Returns a library's message as one line without control characters or names of exceptions, at most `most` long."""
    said = said.replace("got NoneType (value: None)", "got null").replace("NoneType", "null")
    said = re.sub(r"\b[A-Z]\w*Error: ", "", " ".join(re.sub(r"\x1b\[[\d;]*m|[\x00-\x1f\x7f-\x9f]+", " ", said).split()))
    return said if len(said) <= most else f"{said[: most - 3]}..."


def panicked(error: BaseException) -> bool:
    """Returns whether an error is a panic of Rust code (tokenizers, safetensors): pyo3's PanicException, not importable."""
    return type(error).__name__ == "PanicException"


def check_size(location: str, build: Callable[[], nn.Module]) -> None:
    """Refuse a config whose model is far larger than its files: transformers would allocate and initialise all the rest.

    Args:
        build: builds the model; it is called on the meta device.

    Raises:
        ValueError: giving the number of values in the model and in the files.
    """
    stored = stored_tensors(location)
    if stored is None:
        return
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in build().parameters())
    held = sum(tensor.size for tensor in stored.values())
    if wanted > 2 * held + SPARE:
        raise ValueError(
            f"by config.json the model has {wanted:,} values, but its files hold {held:,}; config and weights do not belong "
            "together"
        )


def check_weights(
    reference: str, location: str, model: PreTrainedModel, info: dict, ignore: Sequence[str] = ()
) -> list[str]:
    """Refuse weights that are missing, quantised, unknown to the model, of a wrong shape, not finite, or of an adapter.

    Args:
        location: a folder or a hub id. info: the loading info of `from_pretrained(..., output_loading_info=True)`.
        ignore: patterns of names of tensors that the model may have no place for.

    Returns:
        the tensors that were left out because `ignore` names them.

    Raises:
        ValueError: naming the first of the tensors.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(f"teacher {reference!r} was loaded with an adapter ({', '.join(model.peft_config)}); {MERGE}")
    left = [name for name in sorted(info["unexpected_keys"]) if not _matches(name, HARMLESS)]
    homeless = [name for name in left if not _matches(name, ignore)]
    stored = stored_tensors(location) or {}
    placed = {name: tensor for name, tensor in stored.items() if name not in left and not _matches(name, HARMLESS)}
    check_tensors(reference, location, placed, homeless)
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
    if homeless:
        raise ValueError(
            f"teacher {reference!r} could not be loaded: by config.json the model has no place for {_some(homeless)} of its "
            "files, so it would not be the model that was saved; correct config.json, or name the tensors that may be left "
            "out in teacher_ignore"
        )
    wrong = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"teacher {reference!r} has weights that are not finite (NaN or infinite) in {_some(wrong)}; nothing can be "
            f"learned from it: {FIXES['weights']}"
        )
    return left


def check_account(reference: str, location: str, model: PreTrainedModel, ignored: Sequence[str] = ()) -> None:
    """Refuse a model that holds more or fewer values than its files, according to the files' headers.

    Names need not agree: transformers renames and joins tensors while it loads them.

    Raises:
        ValueError: giving both numbers and the first names.
    """
    stored, held = stored_tensors(location), model.state_dict()
    if stored is None:
        return
    present = {held[name].data_ptr() for name in stored.keys() & held.keys()}
    lacking = {
        tensor.data_ptr(): (name, tensor.numel())
        for name, tensor in held.items()
        if name not in stored and tensor.data_ptr() not in present
    }
    spare = {
        name: tensor.size
        for name, tensor in stored.items()
        if name not in held and not _matches(name, HARMLESS) and name not in ignored
    }
    extra, short = sum(spare.values()), sum(size for _, size in lacking.values())
    if extra == short:
        return
    said = f"{_some(sorted(spare)) or 'no such tensor'} of its files ({extra:,} values) "
    had = f"{_some(sorted(name for name, _ in lacking.values())) or 'no tensor'} of the model ({short:,} values)"
    raise ValueError(f"teacher {reference!r} is not what its files hold: {said} against {had}; correct config.json")


def keep_own_head(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to false if the files hold an output head that differs from the embeddings.

    transformers loads both whatever `tie_word_embeddings` says, but ties them in every model built from the config later.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.tie_word_embeddings or head.weight is embeddings.weight:
        return
    if torch.equal(head.weight, cast(torch.Tensor, embeddings.weight)):
        model.tie_weights()
    else:
        model.config.tie_word_embeddings = False


def check_tokenizer(reference: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has more entries than the model has embeddings, fails on a text, or returns ids beyond them.

    Raises:
        ValueError: giving the highest id or the number of entries, and the number of embeddings.
    """
    embedded = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)  # not len(): ids of added tokens may leave gaps
    if entries > embedded:  # fewer are fine: the other rows are padding
        raise ValueError(
            f"{reference}: the tokenizer has {entries} entries, but the model embeds only {embedded}; they do not "
            f"belong together: {FIXES['tokenizer']}"
        )
    with loading(reference, "tokenizer"), no_panics():
        highest = max(max(tokenizer(text)["input_ids"], default=0) for text in (*PROBES, *RUNS))
    if highest >= embedded:
        raise ValueError(
            f"{reference}: the tokenizer gives the token {highest}, but the model embeds only {embedded}: "
            f"{FIXES['tokenizer']}"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
