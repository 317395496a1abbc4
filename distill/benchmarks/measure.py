"""Times on a GPU: medians of calls, launched one by one and as a replayed CUDA graph; and the hardware's two ceilings."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LONG = 25.0  # milliseconds; for longer calls, two are enough and launch overhead does not matter


class Ceilings(NamedTuple):
    """Measured ceilings of this GPU, a second: bytes read and written by a large copy, and bf16 FLOP of a large product."""

    bytes_per_second: float
    flop_per_second: float


class Times(NamedTuple):
    """Milliseconds of the forward pass and of both passes, eager and in a graph, and the peak of extra memory in MiB."""

    forward: float
    forward_graph: float | None
    both: float | None
    both_graph: float | None
    mib: float


def ceilings() -> Ceilings:
    """Measure the ceilings with a copy of 1 GiB and a product of two 8,192 x 8,192 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Ceilings(copied(torch.device("cuda")), 2 * 8192**3 / _median(lambda: a @ b) * 1e3)


def copied(device: torch.device) -> float:
    """Bytes read and written a second by a large copy on a device."""
    source = torch.randint(0, 100, (2**30 if device.type == "cuda" else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        return 2 * source.numel() / _median(lambda: target.copy_(source)) * 1e3
    times = []
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * source.numel() / min(times)


def timed(
    function: Callable, leaves: Mapping[str, Tensor], fixed: Mapping[str, object], backward: bool, graph: bool
) -> Times:
    """Time `function(**leaves, **fixed)`. backward: time it with the gradients of all leaves too. graph: as a graph too."""
    wanting = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}

    @torch.no_grad()
    def forward():
        return function(**leaves, **fixed)

    def both():
        outputs = function(**wanting, **fixed)
        outputs = [part for part in (outputs if isinstance(outputs, tuple) else (outputs,)) if part.requires_grad][:1]
        return torch.autograd.grad(outputs, list(wanting.values()), directions, allow_unused=True)

    first = function(**leaves, **fixed)
    first = first[0] if isinstance(first, tuple) else first
    directions = [torch.randn_like(first)]
    del first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (both if backward else forward)()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    calls = [forward, both] if backward else [forward]
    times = [(_median(call), _graph(call) if graph else None) for call in calls]
    once, twice = times[0], times[1] if backward else (None, None)
    return Times(once[0], once[1], twice[0], twice[1], extra)


def _median(call: Callable) -> float:
    """Median milliseconds of one launched call, the L2 cache cleared before each."""
    from triton.testing import do_bench

    call()
    taken = _once(call)
    if taken > LONG:
        return min(taken, _once(call))
    return do_bench(call, warmup=10, rep=50, return_mode="median")


def _graph(call: Callable) -> float | None:
    """Median milliseconds of a replayed call; None where launches do not matter (a long call) or it cannot be captured."""
    from triton.testing import do_bench_cudagraph

    if _once(call) > LONG:
        return None
    try:
        return do_bench_cudagraph(call, rep=10, return_mode="median")
    except RuntimeError as reason:
        print(f"not captured as a graph: {str(reason).splitlines()[0]}")
        return None


def _once(call: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
