"""The Python API about this machine: what is installed, and how fast it is.

Imports are inside the functions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.recipe_file import AnyRecipe


def doctor() -> dict[str, str]:
    """Return what this machine has, by name: versions, devices, kernel back ends, and missing packages."""
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
        what: "ops", "steps", "layouts" or "generation". An option that belongs to another of these is refused.
        names: for ops or layouts, those to measure; all by default. recipe, overrides: for all but ops, the recipe to
            measure (by default quickstart for layouts, smollm2-135m_mamba2-hybrid else); for generation it may be a list.
        configs: for ops, time every tile configuration. first: for ops, time only each op's first case. peers: for ops,
            also time other projects' kernels (the default). references: for steps, also time the reference kernels (the
            default). runs: for layouts, the folder of their runs.
        variants: for generation, further students: `name: key=value; key=value` changes each recipe. lengths: for
            generation, the context lengths in tokens, as numbers or "2k,16k". batches: for generation, the batch sizes.
            protocols: for generation, measurements as in papers. prefill_chunk: for generation, the tokens of each prompt
            that are read at a time.

    Returns:
        the measurements that `distill bench` writes as JSON.

    Raises:
        UserError: an option that is refused.
    """
    from distill.benchmarks import run_benchmark

    asked = {"names": [names] if isinstance(names, str) else names or None, "recipe": recipe, "configs": configs}
    asked |= {"overrides": overrides or None, "first": first, "peers": peers, "references": references, "runs": runs}
    asked |= {"variants": variants or None, "lengths": lengths, "batches": batches, "protocols": protocols}
    return run_benchmark(what, asked | {"prefill_chunk": prefill_chunk})
