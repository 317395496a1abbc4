"""`distill bench ops`: times every op with a Triton kernel on this GPU, next to its reference and the installed peers.

An op describes itself in its folder's cases.py (`students.kernels.op`).
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from distill.benchmarks.check import relative_errors, tolerance
from distill.benchmarks.measure import Ceilings, Times, ceilings, timed
from distill.benchmarks.peers import PEERS
from distill.errors import UserError, nearest
from distill.runs.run_dir import versions
from students.kernels.op import Op, all_ops, forced

DTYPE = torch.bfloat16


def run(names: Sequence[str] = (), *, configs: bool = False, first: bool = False, peers: bool = True) -> dict:
    """Measure these ops (all by default) in every case.

    Args:
        configs: measure every shipped tile configuration, not only the default. first: measure only each op's first case.
        peers: measure other projects' kernels too, where their packages can be imported.

    Returns:
        the GPU, versions, ceilings and one row for each (op, case, implementation); a row whose check failed has no times.

    Raises:
        UserError: an op is unknown, or there is no GPU.
    """
    known = all_ops()
    names = names or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"there is no op {name!r} to bench; {nearest(name, [*known, 'ops'])}")
    if not torch.cuda.is_available():
        raise UserError("bench times kernels on a GPU, and torch.cuda.is_available() is False on this machine")
    top = ceilings()
    rows = []
    for name in names:
        op = known[name]
        for case in op.cases[: 1 if first else None]:
            for row in _rows(name, op, case, top, configs, peers):
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
    return {"gpu": torch.cuda.get_device_name(), "versions": versions(), "ceilings": top._asdict(), "rows": rows}


def _rows(name: str, op: Op, case, top: Ceilings, configs: bool, peers: bool) -> Iterator[dict]:
    known = {"op": name, "case": _label(case)}
    choices = op.configs(case, DTYPE) if configs else op.configs(case, DTYPE)[:1]
    for index, config in enumerate(choices):
        label = "triton" if index == 0 else f"triton {tuple(config) if isinstance(config, tuple) else config}"
        yield known | {"by": label} | _one(op, forced(op.kernel(), **op.force(config)), case, top, own=True)
    yield known | {"by": "reference"} | _one(op, op.reference, case, top, check=False, graph=False)
    for peer, load in (PEERS.get(name, {}) if peers else {}).items():
        try:
            function = load(case)
        except ImportError:
            continue
        if function is not None:
            yield known | {"by": peer} | _one(op, function, case, top)


def _one(op: Op, function, case, top: Ceilings, check: bool = True, graph: bool = True, own: bool = False) -> dict:
    """Errors, times and shares of one implementation in one case; a failure is reported in the row, not raised."""
    row: dict[str, Any] = {}
    try:
        if check:
            errors = relative_errors(op.adapted(function), op.adapted(op.reference), *op.draw(op.small(case), DTYPE, "cuda"))
            worst = max(errors.values())
            if math.isfinite(worst):  # JSON has no infinity
                row["error"] = worst
            if worst > tolerance(DTYPE) and (own or not math.isfinite(worst)):
                return row | {"failed": f"wrong, so not timed: {errors}"}
        times = timed(op.adapted(function), *op.draw(case, DTYPE, "cuda"), op.backward, graph)
        row |= times._asdict() | _shares(op, case, times, top)
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as reason:  # a peer may refuse this GPU, this Triton or these shapes
        row["failed"] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
    finally:
        torch.cuda.empty_cache()
    return row


def _shares(op: Op, case, times: Times, top: Ceilings) -> dict:
    """GB/s, TFLOP/s, and the share of the time that the larger floor (bytes or FLOP at the measured ceilings) would take."""
    shares: dict[str, float] = {}
    for part, (size, work) in op.work(case)._asdict().items():
        taken = [value for value in (getattr(times, part), getattr(times, f"{part}_graph")) if value]
        if not taken:
            continue
        taken = min(taken)
        floor = max(size / top.bytes_per_second, work / top.flop_per_second) * 1e3
        shares |= {
            f"{part}_gb_s": size / taken / 1e6, f"{part}_tflop_s": work / taken / 1e9, f"{part}_share": floor / taken,
        }  # fmt: skip
    return shares


def _label(case) -> str:
    return " ".join(f"{name}{value}" for name, value in case._asdict().items() if value not in (None, False, 0))


def all_right(result: Mapping) -> bool:
    """Whether every kernel of ours passed its check and ran."""
    return not any("failed" in row and row["by"].startswith("triton") for row in result["rows"])


COLUMNS = {
    "op": "op", "case": "case", "by": "by", "forward": "fwd ms", "forward_graph": "graph", "forward_share": "share",
    "both": "f+b ms", "both_graph": "graph", "both_share": "share", "mib": "MiB", "error": "error",
}  # fmt: skip


def line(row: Mapping) -> str:
    """One row as text, for a log."""
    return "  ".join(f"{COLUMNS[key]} {_text(key, row[key])}" for key in COLUMNS if row.get(key) is not None) + (
        f"  {row['failed']}" if "failed" in row else ""
    )


def table(result: Mapping) -> Table:
    """What `run` returned, as a table. Shares: the larger floor (bytes or FLOP at the measured ceilings) over the time."""
    top = result["ceilings"]
    found = Table(
        title=f"{result['gpu']}: copy {top['bytes_per_second'] / 1e9:.0f} GB/s, "
        f"bf16 product {top['flop_per_second'] / 1e12:.0f} TFLOP/s",
        box=None,
    )
    for key, name in COLUMNS.items():
        found.add_column(name, justify="left" if key in ("op", "case", "by") else "right")
    found.add_column("")
    for row in result["rows"]:
        found.add_row(*[_text(key, row.get(key)) for key in COLUMNS], row.get("failed", ""))
    return found


def _text(key: str, value) -> str:
    if value is None:
        return ""
    if key.endswith("share"):
        return f"{value:.0%}"
    if key == "error":
        return f"{value:.0e}"
    return f"{value:.0f}" if key == "mib" else f"{value:.3f}" if isinstance(value, float) else str(value)
