"""GGUF files as teachers: converted once to a transformers folder, with what transformers drops put back.

transformers dequantises GGUF tensors and rebuilds config and tokenizer, but ignores `rope_freqs.weight`, the tensor by
which llama.cpp stores Llama-3's scaled rotary frequencies: such a model would load with wrong positions, silently.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

CONVERTER = "1"  # part of the cache key: raise it when a conversion changes
ORIGINAL_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # tried for llama3 scaling; the file does not say


def cache_folder() -> Path:
    """Where conversions are kept: $DISTILL_CACHE, else ~/.cache/distill."""
    return Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distill"))


def converted(path: Path) -> Path:
    """The transformers folder of a GGUF file, made on first use.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: the file is not GGUF, is damaged, or holds rotary frequencies that no known rule gives.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install gguf") from error
    digest = hashlib.sha256(CONVERTER.encode())
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    target = cache_folder() / "teachers" / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
        try:
            _convert(path, scratch)
            _move_into_place(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _move_into_place(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.exists():  # otherwise another process was faster, with the same result
            raise


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    factors = rope_factors(path)
    arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **arguments, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers cannot read {path}: {error}; load the original checkpoint instead") from error
    if factors is not None:
        model.config.rope_parameters = llama3_rope(factors, model.config, path)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def rope_factors(path: Path) -> torch.Tensor | None:
    """The divisors of the rotary frequencies that a GGUF file stores, if it does.

    Raises:
        ValueError: the file is not GGUF or is damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}; download it again") from error
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            return torch.tensor(tensor.data.copy(), dtype=torch.float32).flatten()
    return None


def llama3_rope(factors: torch.Tensor, config, path: Path) -> dict:
    """The llama3 rope parameters that give these divisors.

    Raises:
        ValueError: none of the known ones does, so the model would load with wrong positions.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    plain = theta ** (-torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors)))
    for length in ORIGINAL_LENGTHS:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        trial = type(config)(**{**config.to_dict(), "rope_parameters": parameters})
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](trial)
        if torch.allclose(plain / scaled, factors, rtol=1e-3):
            return parameters
    raise ValueError(
        f"{path} stores rotary frequencies (rope_freqs.weight) that no llama3 scaling gives; load the original "
        "checkpoint instead of its GGUF"
    )
