"""What is known of one engine and one export, and the engines' scripts."""

from dataclasses import dataclass, field
from typing import Literal

SCRIPTS = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp", "mlx": "mlx"}


@dataclass(frozen=True)
class Proof:
    """One engine and one export.

    state: proved; absent (it is not installed); cannot (`why` says what of this student it does not run).
    version: the engine's. numbers: what was measured, by name: largest differences, equal tokens, divergences.
    """

    engine: str
    state: Literal["proved", "absent", "cannot"]
    why: str = ""
    version: str | None = None
    numbers: dict[str, float | int | str] = field(default_factory=dict)
