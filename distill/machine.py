"""The Python API of what looks at this machine: what is installed, and how fast it is.

Imports stand inside the functions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.recipe_file import AnyRecipe


def doctor() -> dict[str, str]:
    """Say what is here, by name: versions, devices, kernel back ends, and what is missing."""
    from distill.diagnosis import findings

    return findings()


def bench(
    what: str = "ops",
    names: str | Sequence[str] = (),
    *,
    recipe: "AnyRecipe | Sequence[Any] | None" = None,
    overrides: str | Sequence[str] = (),
    configs: bool | None = None,
    first: bool | None = None,
    peers: bool | None = None,
    references: bool | None = None,
    runs: str | Path | None = None,
    variants: str | Sequence[str] = (),
    lengths: str | Sequence[int] | None = None,
    batches: str | Sequence[int] | None = None,
    protocols: Sequence[str] | None = None,
    prefill_chunk: int | None = None,
) -> dict[str, Any]:
    """Measure speed on this machine: kernels, whole training steps, every layout trained on one budget, or generation.

    Args:
        what: "ops", "steps", "layouts" or "generation"; an option of another one is refused. names: of ops, or of layouts;
            all by default. recipe, overrides: of all but ops, what is timed (smollm2-135m_mamba2-hybrid, of layouts
            quickstart, by default); of generation several too.
        configs: of ops, every tile configuration. first: of ops, only each op's first case. peers: of ops, others' kernels
            too (the default). references: of steps, the reference kernels too (the default). runs: of layouts, their place.
        variants: of generation, further students: `name: key=value; key=value` over each recipe. lengths: tokens before
            those decoded, numbers or "2k,16k". batches: texts at once. protocols: papers' measurements.
            prefill_chunk: columns of a prompt at a time.

    Returns:
        what `distill bench` writes as JSON; a UserError names what it refuses.
    """
    from distill.benchmarks import run_benchmark

    asked = {"names": [names] if isinstance(names, str) else names or None, "recipe": recipe, "configs": configs}
    asked |= {"overrides": overrides or None, "first": first, "peers": peers, "references": references, "runs": runs}
    asked |= {"variants": variants or None, "lengths": lengths, "batches": batches, "protocols": protocols}
    return run_benchmark(what, asked | {"prefill_chunk": prefill_chunk})
