"""GGUF files as teachers: one conversion to a transformers folder.

`gguf_config` converts the config, `gguf_tokenizer` the tokenizer, and this file the weights. gguf-py reads, names and
dequantises the tensors. A file is refused unless each of its tensors has a place in the model and each parameter of the
model has a tensor: transformers' own loader leaves out unknown tensors and initialises missing parameters at random.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from teachers.cache import CacheError, once, writing
from teachers.checks import panicked, plain
from teachers.gguf_config import TOKENS, Architecture, config_of
from teachers.gguf_facts import Facts
from teachers.gguf_header import check_header
from teachers.gguf_tokenizer import ends_of, suppressed, tokenizer_of
from teachers.quiet import no_bars_in_logs

CONVERTER = "4"  # part of the cache key: raise it when a conversion changes


def converted(path: Path) -> Path:
    """Returns the transformers folder of a GGUF file, made on first use.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: the file is not GGUF, is damaged, or holds a model that cannot be rebuilt exactly; gives the reason.
    """
    read(path)  # refuses a file that is not a model before it is hashed
    digest = hashlib.sha256(CONVERTER.encode())
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    name = f"{path.stem}-{digest.hexdigest()[:16]}"

    def convert(folder: Path) -> None:
        with _as_model(path):
            _convert(path, folder)

    return once("teachers", name, convert, str(path))


def config(path: Path) -> PretrainedConfig:
    """Returns the transformers config of a file's model; weights are not read.

    Raises:
        ImportError, ValueError: see `converted`.
    """
    facts = read(path)
    with _as_model(path):
        return config_of(facts)[0]


@contextmanager
def _as_model(path: Path) -> Iterator[None]:
    """Turn the errors of any type that libraries raise inside the block on contradictory entries into ValueError."""
    try:
        yield
    except (ImportError, OSError, MemoryError, KeyboardInterrupt, CacheError):
        raise
    except BaseException as error:
        if str(path) in str(error) or (not isinstance(error, Exception) and not panicked(error)):
            raise  # our own errors name the file
        said = plain(str(error)) or "its entries do not fit each other"
        raise ValueError(f"{path} holds no model that could be rebuilt: {said}; download it again") from error


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts = read(path)
    config, architecture = config_of(facts)
    tokenizer = tokenizer_of(facts)
    for name in TOKENS:
        setattr(config, name, getattr(tokenizer, name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights(facts, model, architecture), strict=False, assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = ends_of(facts) or None
    model.generation_config.suppress_tokens = suppressed(facts) or None
    with no_bars_in_logs(), writing(target.parent):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def read(path: Path) -> Facts:
    """Read a file's entries and tensors.

    Raises:
        ImportError: the gguf package is not installed. ValueError: the file is not GGUF, or is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'distill-hybrids[gguf]'") from error
    try:
        check_header(path)
        return Facts(GGUFReader(path), path)
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}; download it again") from error


def weights(facts: Facts, model: PreTrainedModel, architecture: Architecture) -> dict[str, Tensor]:
    """Returns the model's parameters in float32, from the file's tensors; a tied head is left out.

    Raises:
        ValueError: a tensor without a place, a parameter without a tensor, a wrong shape, or an unknown quantisation.
    """
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    sources = tensor_names(wanted, facts.architecture, model.config.num_hidden_layers)
    missing = [name for name in wanted if sources.get(name) not in facts.tensors]
    spare = facts.tensors.keys() - set(sources.values()) - facts.taken
    if missing or spare:
        raise ValueError(
            f"{facts.path} and transformers' {type(model).__name__} do not hold the same model: "
            + "; ".join(
                f"{text} {_listed(names)}"
                for text, names in (("no place for", sorted(spare)), ("no tensor for", missing))
                if names
            )
        )
    found = {}
    for name, shape in wanted.items():
        tensor = _dequantised(facts, sources[name])
        if tensor.shape != shape:
            raise ValueError(
                f"{facts.path}: {sources[name]} is {list(tensor.shape)}, but {name} of the model is {list(shape)}"
            )
        found[name] = _as_trained(name, tensor, model.config, architecture)
    return found


def tensor_names(parameters: Iterable[str], architecture: str, layers: int) -> dict[str, str]:
    """Returns the tensor name of each parameter by gguf-py's table; a parameter that the table does not have is left out."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table, found = get_tensor_name_map(kind, layers), {}
    for parameter in parameters:
        module, _, suffix = parameter.rpartition(".")
        name = table.get_name(module)
        if name is not None:
            found[parameter] = f"{name}.{suffix}"
    return found


def _dequantised(facts: Facts, name: str) -> Tensor:
    from gguf import dequantize

    tensor = facts.tensors[name]
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    except NotImplementedError as error:
        raise ValueError(
            f"{facts.path}: {name} is quantised as {tensor.tensor_type.name}, which gguf cannot read"
        ) from error


def _as_trained(name: str, tensor: Tensor, config, architecture: Architecture) -> Tensor:
    """Undo the changes of llama.cpp's converter to a tensor: norm offsets and the row order of rotary projections."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        return tensor - architecture.norm_offset
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if architecture.interleaved and f".{projection}." in name:
            pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
            return pairs.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
