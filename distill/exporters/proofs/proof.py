"""The class `Proof`, and the names of the engines' scripts."""

from dataclasses import dataclass, field
from typing import Literal

SCRIPTS = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp", "mlx": "mlx"}


@dataclass(frozen=True)
class Proof:
    """The result of one engine's proof of an export.

    state: proved; absent (the engine is not installed); cannot (the engine does not run this student; `why` says why).
    version: the engine's. numbers: the measurements by name: largest differences, equal tokens, divergences.
    """

    engine: str
    state: Literal["proved", "absent", "cannot"]
    why: str = ""
    version: str | None = None
    numbers: dict[str, float | int | str] = field(default_factory=dict)
