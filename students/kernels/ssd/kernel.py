"""SSD in Triton, forward and backward: the state stays on the chip during a segment of chunks.

One program scans a segment of one head for a slice of its values, chunk by chunk. C B^T is computed, masked and used in
registers and never written. If batch x heads x slices do not fill the GPU, the sequence is divided into segments: a first
kernel sums what each segment adds to the state, a second passes states on, and then all segments are scanned in parallel. A
segment's last chunk may be short. The state before each chunk is saved for the backward pass (bf16 for bf16 inputs).

The gradient of log_a needs no square matrix of its own: within a chunk, sum_{i >= t > j} dM_ij M_ij is the sum over i >= t
of C_i dC_i - B_i dB_i, plus the contribution of the chunk's final state. No accumulator of a product is transposed in
registers, which Triton 3.4 to 3.7 compile wrongly on Hopper; S^T and dB^T are computed as products of their own.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.documents import runs as number_runs

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["T", "chunks", "each", "segments"]  # they vary, so no kernels are specialised for 1 and multiples of 16
STEP_ELEMENTS = 4096  # elements of the state in one program of the one-token kernel


class Config(NamedTuple):
    """Tokens of a chunk, values of a slice, and the warps and pipeline stages of the forward and backward pass."""

    chunk: int
    values: int
    warps: int
    stages: int
    back_warps: int
    back_stages: int


ROOM = 165 * 1024  # most bytes of shared memory that three stages take

# By the widest tile of states that each serves: the default first; the second is the default if a program has less than ROOM
# (Ampere, Ada). Tests compare all with float64 on a GPU.
# A tile of 64 rows belongs to one warpgroup: 8 warps would compute it twice. There are no chunks of 64 with slices of 32
# above 64 states: Triton 3.6 compiles them to illegal memory accesses on Hopper, with 4 and 8 warps, with 1 and 2 stages.
CONFIGS_16 = {
    64: [Config(64, 64, 4, 3, 4, 3), Config(64, 64, 4, 3, 4, 2), Config(64, 32, 4, 3, 4, 2), Config(128, 64, 8, 2, 8, 1)],
    128: [Config(64, 64, 4, 2, 8, 3), Config(64, 64, 4, 2, 8, 2), Config(64, 64, 4, 2, 4, 2), Config(32, 32, 4, 1, 4, 1)],
    256: [Config(32, 32, 8, 2, 8, 1), Config(32, 32, 8, 1, 8, 1)],
}
CONFIGS_32 = {  # 4-byte inputs
    64: [Config(32, 32, 4, 2, 4, 1)],
    128: [Config(32, 32, 4, 2, 8, 1)],
    256: [Config(32, 16, 8, 1, 8, 1)],
}


def configs(dtype: torch.dtype, states: int, values: int) -> list[Config]:
    """Returns the shipped configurations for inputs of this type and heads of these widths, the default first."""
    table = CONFIGS_16 if dtype.itemsize == 2 else CONFIGS_32
    choices = next(choices for widest, choices in table.items() if states <= widest)
    narrow = states > 64 and launch.tile(values) < 64  # a slice is no wider than its head
    return [config for config in choices if not (narrow and config.chunk == 64)]


def _default(x: Tensor, B: Tensor) -> Config:
    choices = configs(x.dtype, B.shape[3], x.shape[3])
    return choices[0] if choices[0].back_stages < 3 or launch.shared_memory(x) >= ROOM else choices[1]


def ssd(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    initial_state: Tensor | None,
    config: Config | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `students.kernels.ssd.ssd`. Tests and benchmarks may set the configuration and the number of segments."""
    config = config or _default(x, B)
    runs = None if documents is None else number_runs(documents).to(torch.int32)
    B, C = B.to(x.dtype), C.to(x.dtype)
    keep = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (x, log_a, B, C, initial_state)
    )
    return _SSD.apply(x, log_a, B, C, initial_state, runs, config, segments, keep)


def ssd_step(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `students.kernels.ssd.ssd_step`. `state` is updated in place and returned."""
    (batch, heads, values), (groups, states) = x.shape, B.shape[1:]
    x, B, C = (launch.rows_of(part) for part in (x, B, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = launch.tile(states)
    slice_ = max(1, min(triton.next_power_of_2(values), STEP_ELEMENTS // wide))
    with launch.on(x):
        _step[(triton.cdiv(values, slice_) * batch * heads,)](
            x, log_a, B, C, state, y, heads, heads // groups,
            x.stride(0), x.stride(1), log_a.stride(0), log_a.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            state.stride(0), state.stride(1), state.stride(2), state.stride(3),
            values, states, slice_, wide, num_warps=launch.warps(slice_ * wide, 4),
        )  # fmt: skip
    return y, state


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, B, C, initial, runs, config, segments, keep):
        x, B, C = (launch.rows_of(part) for part in (x, B, C))
        plan = _Plan(x, log_a, B, C, runs, config, segments)
        initial = None if initial is None else initial.contiguous()
        with launch.on(x):
            entries, layout = plan.entries(initial)
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            shape = (plan.batch * plan.heads, plan.chunks, plan.states, plan.values)
            starts = torch.empty(shape if keep else (1,), dtype=x.dtype, device=x.device)
            final = torch.empty(plan.state_shape, dtype=torch.float32, device=x.device)
            _forward[plan.grid](
                *plan.tensors, *plan.strides, entries, *layout, y, starts, final, *plan.sizes,
                INITIAL=entries is not None, KEEP=keep, **plan.options, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        ctx.save_for_backward(x, log_a, B, C, runs, starts)
        ctx.set_materialize_grads(False)
        ctx.plan = plan.let_go()  # with recomputation, ctx lives longer than the saved tensors
        ctx.initial_type = None if initial is None else initial.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, log_a, B, C, runs, starts = ctx.saved_tensors
        plan, config = ctx.plan.hold(x, log_a, B, C, runs), ctx.plan.config
        dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype).contiguous()
        with launch.on(x):
            exits, layout = plan.exits(dy, d_final)
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            shape = (
                plan.slices,
                plan.batch,
                plan.time,
                plan.heads,
                plan.states,
            )  # a head's own part of its group's gradient
            dB, dC = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
            da = torch.empty((plan.slices, *log_a.shape), dtype=torch.float32, device=x.device)
            d_initial = torch.empty(plan.state_shape, dtype=torch.float32, device=x.device)
            _backward[plan.grid](
                *plan.tensors, *plan.strides, exits, *layout, dy, starts, dx, dB, dC, da, d_initial, *plan.sizes, plan.batch,
                FINAL=exits is not None, **plan.options, num_warps=config.back_warps, num_stages=config.back_stages,
            )  # fmt: skip
            dB, dC = (_over_heads(part, plan.groups) for part in (dB, dC))
            da = da[0] if plan.slices == 1 else da.sum(0)
        of_initial = None if ctx.initial_type is None else d_initial.to(ctx.initial_type)
        return dx, da.to(log_a.dtype), dB, dC, of_initial, None, None, None, None


def _over_heads(parts: Tensor, groups: int) -> Tensor:
    """Sum a gradient over slices of values and over the heads that share a group, in float32."""
    slices, _, _, heads, _ = parts.shape
    return parts[0] if slices == 1 and heads == groups else parts.unflatten(3, (groups, -1)).sum((0, 4))


class _Plan:
    """The sizes and strides of one call and its division into segments, shared by its kernels."""

    def __init__(self, x, log_a, B, C, runs, config: Config, segments: int | None) -> None:
        self.batch, self.time, self.heads, self.values = x.shape
        self.groups, self.states = B.shape[2:]
        self.repeat = self.heads // self.groups
        self.config = config
        self.slice = min(launch.tile(self.values), config.values)
        self.slices = triton.cdiv(self.values, self.slice)
        self.chunks = triton.cdiv(self.time, config.chunk)
        rows = self.batch * self.heads
        wanted = segments or max(1, round(2 * launch.multiprocessors(x) / (rows * self.slices)))
        self.each = triton.cdiv(self.chunks, min(wanted, self.chunks))
        self.segments = triton.cdiv(self.chunks, self.each)
        self.grid = (self.slices * rows, self.segments)  # rows on the first axis: the others hold at most 65,535
        self.state_shape = (self.batch, self.heads, self.values, self.states)
        self.options = {
            "P": self.values, "N": self.states, "CHUNK": config.chunk, "BP": self.slice, "BN": launch.tile(self.states),
            "DOCS": runs is not None, "PRECISION": launch.precision(x.dtype),
        }  # fmt: skip
        self.sizes = (self.time, self.chunks, self.each, self.segments, self.heads, self.repeat)
        self.strides = (*x.stride()[:3], *log_a.stride(), *B.stride()[:3], *C.stride()[:3])
        self.hold(x, log_a, B, C, runs)

    def hold(self, x, log_a, B, C, runs) -> "_Plan":
        self.tensors: tuple[Tensor, ...] = (
            x,
            log_a,
            B,
            C,
            log_a if runs is None else runs,
        )  # without runs, a placeholder that is never read
        return self

    def let_go(self) -> "_Plan":
        self.tensors = ()
        return self

    def entries(self, initial: Tensor | None):
        """Returns the state that enters each segment, with its strides over (head, segment, value, state)."""
        size = self.values * self.states
        if self.segments == 1:
            return initial, (size, 0, self.states, 1)
        return self._passed(initial, self.tensors[0], self.tensors[2], reverse=False)

    def exits(self, dy: Tensor, d_final: Tensor | None):
        """Returns the gradient of the state that leaves each segment, with its strides as in `entries`."""
        size = self.values * self.states
        d_final = None if d_final is None else d_final.float().contiguous()
        if self.segments == 1:
            return d_final, (size, 0, self.states, 1)
        return self._passed(d_final, dy, self.tensors[3], reverse=True)

    def _passed(self, first: Tensor | None, left: Tensor, right: Tensor, reverse: bool):
        rows, tile = self.batch * self.heads, self.states * self.values
        _, log_a, *_, runs = self.tensors
        sums = torch.empty((rows, self.segments, self.states, self.values), dtype=torch.float32, device=left.device)
        decays = torch.empty((rows, self.segments), dtype=torch.float32, device=left.device)
        config = self.config
        _sum_segments[self.grid](
            left, log_a, right, runs, *left.stride()[:3], *log_a.stride(), *right.stride()[:3], sums, decays, *self.sizes,
            REVERSE=reverse, **self.options, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        _pass_states[(self.slices * rows,)](
            sums, decays, first, self.segments, self.values, self.states, self.slice, self.options["BN"], first is not None,
            reverse, num_warps=4,
        )  # fmt: skip
        return sums, (self.segments * tile, tile, 1, self.values)


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _place(P, BP: tl.constexpr):
    """Returns a program's row (sequence and head) and its slice of the values."""
    slices = tl.cdiv(P, BP)
    return (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices


@triton.jit
@no_type_check
def _decays(log_a, runs, start, T, stride, CHUNK: tl.constexpr, DOCS: tl.constexpr):
    """Returns a chunk's running log2 decay, three weights (of the entering state in each row, of each row in the leaving
    state, of the entering state in the leaving one), and each row's run."""
    rows = tl.arange(0, CHUNK)
    inside = start + rows < T
    a = tl.load(log_a + rows * stride, mask=inside, other=0.0).to(tl.float32) * LOG2E
    running = tl.cumsum(a, 0)
    whole = tl.sum(tl.where(rows == CHUNK - 1, running, 0.0), 0)  # bitwise equal, so that the last row's weight is exactly 1
    before = tl.exp2(running)
    after = tl.exp2(whole - running)
    across = tl.exp2(whole)
    run = rows
    if DOCS:
        run = tl.load(runs + start + rows, mask=inside, other=-1)
        entering = tl.load(runs + tl.maximum(start - 1, 0))
        leaving = tl.load(runs + tl.minimum(start + CHUNK, T) - 1)
        before = tl.where(run == entering, before, 0.0)
        after = tl.where(run == leaving, after, 0.0)
        across = tl.where(entering == leaving, across, 0.0)
    return running, before, after, across, run


@triton.jit
@no_type_check
def _rows(pointer, start, T, stride, columns, width, CHUNK: tl.constexpr):
    """Load a chunk's rows of a matrix whose columns are contiguous; zeros outside."""
    rows = tl.arange(0, CHUNK)
    mask = (start + rows < T)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def _square(running_rows, running_columns, keep):
    """Compute the decay between each two tokens of a chunk; zero where `keep` is false."""
    return tl.exp2(tl.where(keep, running_rows - running_columns, float("-inf")))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _forward(
    x, log_a, B, C, runs, sxb, sxt, sxh, sab, sat, sah, sBb, sBt, sBg, sCb, sCt, sCg,
    entries, seh, ses, sep, sen, y, starts, final, T, chunks, each, segments, H, repeat,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOCS: tl.constexpr,
    INITIAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, slab = _place(P, BP)
    segment = tl.program_id(1)
    b, h = row // H, row % H
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    here = (n < N)[:, None] & (p < P)[None, :]
    x += b * sxb + h * sxh
    log_a += b * sab + h * sah
    B += b * sBb + (h // repeat) * sBg
    C += b * sCb + (h // repeat) * sCg
    y += (b * T * H + h) * P
    runs += b * T
    state = tl.zeros((BN, BP), dtype=tl.float32)
    if INITIAL:
        first = entries + row * seh + segment * ses + p[None, :] * sep + n[:, None] * sen
        state += tl.load(first, mask=here, other=0.0).to(tl.float32)
    index = tl.arange(0, CHUNK)
    for z in range(segment * each, tl.minimum(segment * each + each, chunks)):
        start = z * CHUNK
        far = start.to(tl.int64)
        running, before, after, across, run = _decays(log_a + far * sat, runs, start, T, sat, CHUNK, DOCS)
        c = _rows(C + far * sCt, start, T, sCt, n, N, CHUNK)
        k = _rows(B + far * sBt, start, T, sBt, n, N, CHUNK)
        v = _rows(x + far * sxt, start, T, sxt, p, P, CHUNK)
        if KEEP:
            place = starts + (row * chunks + z) * (N * P) + n[:, None] * P + p[None, :]
            tl.store(place, state.to(v.dtype), mask=here)
        keep = index[:, None] >= index[None, :]
        if DOCS:
            keep = keep & (run[:, None] == run[None, :])
        square = tl.dot(c, tl.trans(k), input_precision=PRECISION) * _square(running[:, None], running[None, :], keep)
        out = tl.dot(c, state.to(c.dtype), input_precision=PRECISION) * before[:, None]
        out = tl.dot(square.to(v.dtype), v, out, input_precision=PRECISION)
        place = y + far * H * P + index[:, None] * (H * P) + p[None, :]
        tl.store(place, out.to(v.dtype), mask=(start + index < T)[:, None] & (p < P)[None, :])
        added = (v * after[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(k), added, state * across, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(final + row * (P * N) + p[None, :] * N + n[:, None], state, mask=here)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _sum_segments(
    left, log_a, right, runs, slb, slt, slh, sab, sat, sah, srb, srt, srg, sums, decays, T, chunks, each, segments, H,
    repeat, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOCS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what each segment adds to the state at its end (from x, B), or to the gradient at its start (from dy, C)."""
    row, slab = _place(P, BP)
    segment = tl.program_id(1)
    b, h = row // H, row % H
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    left += b * slb + h * slh
    log_a += b * sab + h * sah
    right += b * srb + (h // repeat) * srg
    runs += b * T
    state = tl.zeros((BN, BP), dtype=tl.float32)
    whole = 1.0
    begin = segment * each
    end = tl.minimum(begin + each, chunks)
    for i in range(0, end - begin):
        z = begin + i
        if REVERSE:
            z = end - 1 - i
        start = z * CHUNK
        far = start.to(tl.int64)
        _, before, after, across, _ = _decays(log_a + far * sat, runs, start, T, sat, CHUNK, DOCS)
        k = _rows(right + far * srt, start, T, srt, n, N, CHUNK)
        v = _rows(left + far * slt, start, T, slt, p, P, CHUNK)
        weight = after
        if REVERSE:
            weight = before
        state = tl.dot(tl.trans(k), (v * weight[:, None]).to(v.dtype), state * across, input_precision=PRECISION)
        whole = whole * across
    place = sums + (row * segments + segment) * (N * P) + n[:, None] * P + p[None, :]
    tl.store(place, state, mask=(n < N)[:, None] & (p < P)[None, :])
    if slab == 0:
        tl.store(decays + row * segments + segment, whole)


@triton.jit(do_not_specialize=["segments"])
@no_type_check
def _pass_states(
    sums, decays, first, segments, P, N, BP: tl.constexpr, BN: tl.constexpr, INITIAL: tl.constexpr, REVERSE: tl.constexpr
):
    """Replace each segment's sum by the state that enters it (REVERSE: by the gradient of the state that leaves it)."""
    row, slab = _place(P, BP)
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    here = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros((BN, BP), dtype=tl.float32)
    if INITIAL:
        state += tl.load(first + row * (P * N) + p[None, :] * N + n[:, None], mask=here, other=0.0).to(tl.float32)
    for i in range(0, segments):
        segment = i
        if REVERSE:
            segment = segments - 1 - i
        place = sums + (row * segments + segment) * (N * P) + n[:, None] * P + p[None, :]
        added = tl.load(place, mask=here, other=0.0)
        tl.store(place, state, mask=here)
        state = state * tl.load(decays + row * segments + segment) + added


@triton.jit(do_not_specialize=[*SIZES, "batch"])
@no_type_check
def _backward(
    x, log_a, B, C, runs, sxb, sxt, sxh, sab, sat, sah, sBb, sBt, sBg, sCb, sCt, sCg,
    exits, seh, ses, sep, sen, dy, starts, dx, dB, dC, da, d_initial, T, chunks, each, segments, H, repeat, batch,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOCS: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, slab = _place(P, BP)
    segment = tl.program_id(1)
    b, h = row // H, row % H
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    here = (n < N)[:, None] & (p < P)[None, :]
    x += b * sxb + h * sxh
    log_a += b * sab + h * sah
    B += b * sBb + (h // repeat) * sBg
    C += b * sCb + (h // repeat) * sCg
    dy += (b * T * H + h) * P
    dx += (b * T * H + h) * P
    token = (slab.to(tl.int64) * batch + b) * T * H + h  # index of the first token's head in da, dB and dC
    runs += b * T
    state = tl.zeros((BN, BP), dtype=tl.float32)  # gradient of the state after the chunk, [n p]
    if FINAL:
        last = exits + row * seh + segment * ses + p[None, :] * sep + n[:, None] * sen
        state += tl.load(last, mask=here, other=0.0).to(tl.float32)
    index = tl.arange(0, CHUNK)
    begin = segment * each
    end = tl.minimum(begin + each, chunks)
    for i in range(0, end - begin):
        z = end - 1 - i
        start = z * CHUNK
        far = start.to(tl.int64)
        running, before, after, across, run = _decays(log_a + far * sat, runs, start, T, sat, CHUNK, DOCS)
        c = _rows(C + far * sCt, start, T, sCt, n, N, CHUNK)
        k = _rows(B + far * sBt, start, T, sBt, n, N, CHUNK)
        v = _rows(x + far * sxt, start, T, sxt, p, P, CHUNK)
        g = _rows(dy + far * H * P, start, T, H * P, p, P, CHUNK)
        incoming = tl.load(starts + (row * chunks + z) * (N * P) + n[:, None] * P + p[None, :], mask=here, other=0.0)
        keep = index[:, None] >= index[None, :]
        upper = index[:, None] <= index[None, :]
        if DOCS:
            same = run[:, None] == run[None, :]
            keep, upper = keep & same, upper & same
        low = state.to(v.dtype)

        # dx_j = sum_i M_ij dy_i + after_j (B_j dS), from M^T = (B C^T) o L^T
        squareT = tl.dot(k, tl.trans(c), input_precision=PRECISION) * _square(running[None, :], running[:, None], upper)
        out = tl.dot(k, low, input_precision=PRECISION) * after[:, None]
        out = tl.dot(squareT.to(v.dtype), g, out, input_precision=PRECISION)
        inside = (start + index < T)[:, None]
        tl.store(dx + far * H * P + index[:, None] * (H * P) + p[None, :], out.to(v.dtype), mask=inside & (p < P)[None, :])

        # dC = dS B + before (dy S_in),   dS = (dy x^T) o L
        ds = tl.dot(g, tl.trans(v), input_precision=PRECISION) * _square(running[:, None], running[None, :], keep)
        ds = ds.to(v.dtype)
        d_c = tl.dot(g, tl.trans(incoming), input_precision=PRECISION) * before[:, None]
        d_c = tl.dot(ds, k, d_c, input_precision=PRECISION)
        flow = tl.sum(c.to(tl.float32) * d_c, 1)
        first = token + far * H
        cells = dC + first * N + (index * (H * N))[:, None] + n[None, :]
        tl.store(cells, d_c.to(dC.dtype.element_ty), mask=inside & (n < N)[None, :])

        # dB^T = C^T dS + (dS_out x^T) after
        d_kT = tl.dot(low, tl.trans(v), input_precision=PRECISION) * after[None, :]
        kT = tl.trans(k).to(tl.float32)
        worth = tl.sum(tl.sum(d_kT * kT, 1), 0) + across * tl.sum(tl.sum(state * incoming.to(tl.float32), 1), 0)
        d_kT = tl.dot(tl.trans(c), ds, d_kT, input_precision=PRECISION)
        cells = dB + first * N + (index * (H * N))[None, :] + n[:, None]
        tl.store(cells, d_kT.to(dB.dtype.element_ty), mask=(n < N)[:, None] & (start + index < T)[None, :])

        flow -= tl.sum(kT * d_kT, 0)
        tl.store(da + first + index * H, tl.cumsum(flow, 0, reverse=True) + worth, mask=start + index < T)

        state = tl.dot(tl.trans(c), (g * before[:, None]).to(g.dtype), state * across, input_precision=PRECISION)
    if segment == 0:
        tl.store(d_initial + row * (P * N) + p[None, :] * N + n[:, None], state, mask=here)


@triton.jit
@no_type_check
def _step(
    x, log_a, B, C, state, y, H, repeat, sxb, sxh, sab, sah, sBb, sBg, sCb, sCg, ssb, ssh, ssp, ssn,
    P, N, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, slab = _place(P, BP)
    b, h = row // H, row % H
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    here = (p < P)[:, None] & (n < N)[None, :]
    v = tl.load(x + b * sxb + h * sxh + p, mask=p < P, other=0.0).to(tl.float32)
    a = tl.load(log_a + b * sab + h * sah).to(tl.float32)
    k = tl.load(B + b * sBb + (h // repeat) * sBg + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C + b * sCb + (h // repeat) * sCg + n, mask=n < N, other=0.0).to(tl.float32)
    place = state + b * ssb + h * ssh + p[:, None] * ssp + n[None, :] * ssn
    s = tl.load(place, mask=here, other=0.0).to(tl.float32)
    s = tl.exp2(a * LOG2E) * s + v[:, None] * k[None, :]
    tl.store(place, s.to(state.dtype.element_ty), mask=here)
    tl.store(y + row * P + p, tl.sum(s * c[None, :], 1).to(y.dtype.element_ty), mask=p < P)
