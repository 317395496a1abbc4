"""The selective scan in Triton: a program goes through time with the states of a block of channels in registers.

The exponentials, one per token, channel and state, dominate the time. They are computed as 2^x, with A scaled beforehand. A
program loads a tile of a few tokens (rows) at a time and processes them one by one. The loads of a tile are issued while the
tile before is computed, since too few warps run on a multiprocessor to hide the latency in another way. The forward pass
saves the state before every chunk. The backward pass goes forward through a chunk once, writes the state before each tile to
a small scratch buffer, which stays in the L2 cache, and then goes back through the chunk. If blocks of channels are too few
to fill the GPU, time is divided into segments that run in parallel, after a pass that computes each segment's effect on a
state.

Gradients of B and C are summed over a block's channels in the kernel and over blocks in PyTorch; the gradient of A is
likewise summed over time. Every sum has a fixed order, so results are bitwise reproducible.
"""

# ruff: noqa: RUF005  (xs + (x,): Triton reads no star inside a tuple)

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.linear_scan.reference import continues

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHUNK = 64  # tokens between the states that are kept for the backward pass
SIZES = ["T", "chunks", "each", "segments", "blocks"]  # they vary, so no kernels are specialised for 1 and multiples of 16
WARPS = 48  # warps per multiprocessor for which time is divided
CUT = 10  # least number of segments: fewer do not pay for the extra pass, which computes every exponential once more


class Config(NamedTuple):
    """Channels of a block, tokens of a tile (a divisor of CHUNK) and warps; the same three for the backward pass."""

    channels: int
    rows: int
    warps: int
    back_channels: int
    back_rows: int
    back_warps: int


# By the widest tile of states that each serves: the default first.
CONFIGS = {
    16: [Config(32, 8, 2, 16, 4, 1), Config(16, 8, 1, 32, 4, 2), Config(64, 8, 4, 64, 4, 4)],
    64: [Config(16, 4, 4, 8, 4, 1), Config(16, 8, 4, 16, 4, 4), Config(8, 4, 1, 8, 2, 1)],
    128: [Config(16, 8, 8, 16, 4, 8), Config(8, 8, 4, 16, 2, 4)],
    256: [Config(8, 8, 8, 8, 4, 8), Config(8, 4, 8, 8, 2, 8)],
}


def configs(states: int) -> list[Config]:
    """Returns the shipped configurations for channels of `states` states, the default first."""
    return next(choices for widest, choices in CONFIGS.items() if states <= widest)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    initial_state: Tensor | None,
    config: Config | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `students.kernels.selective_scan.selective_scan`. The configuration and the number of segments may be set."""
    follows = continues(documents)
    goes_on = None if follows is None else follows.view(torch.int8)
    leaves = (x, dt, A, B, C, initial_state)
    keep = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in leaves)
    return _Scan.apply(*leaves, goes_on, config or configs(A.shape[1])[0], segments, keep)


class _Plan:
    """The sizes of one call and its division into segments and blocks. A block of channels lies within one group."""

    def __init__(self, x: Tensor, B: Tensor, config: Config, segments: int | None, goes_on: Tensor | None) -> None:
        self.batch, self.time, self.channels = x.shape
        self.groups, self.states = B.shape[2:]
        self.config, self.docs = config, goes_on is not None
        self.chunks = triton.cdiv(self.time, CHUNK)
        if segments is None:
            warps = self.batch * self.groups * self.blocks(config.channels) * config.warps
            segments = WARPS * launch.multiprocessors(x) // warps
            segments = 1 if segments < CUT else segments
        self.each = triton.cdiv(self.chunks, max(1, min(segments, self.chunks)))
        self.segments = triton.cdiv(self.chunks, self.each)
        self.state_shape = (self.batch, self.channels, self.states)

    def blocks(self, width: int) -> int:
        """Returns the number of blocks of `width` channels in a group."""
        return triton.cdiv(self.channels // self.groups, width)

    def launch(self, channels: int, rows: int, warps: int) -> tuple[tuple[int, int, int], tuple, dict]:
        """Returns grid, sizes and options of a kernel with tiles of this size."""
        blocks = self.blocks(channels)
        width, states = self.channels // self.groups, triton.next_power_of_2(self.states)
        sizes = (self.time, self.channels, width, blocks, self.chunks, self.each, self.segments)
        options = {
            "DOCS": self.docs, "EVEN": self.time % rows == 0, "FULL": width % channels == 0 and states == self.states,
            "N": self.states, "K": rows, "LOG": rows.bit_length() - 1, "TILES": CHUNK // rows, "BD": channels, "BN": states,
            "num_warps": warps,
        }  # fmt: skip
        return (self.groups * blocks, self.batch, self.segments), sizes, options

    def sums(self, left, dt, A, right, goes_on, reverse: bool) -> Tensor:
        """Compute each segment's effect on a state: decays, and what it adds. reverse: its effect on a state's gradient."""
        parts = torch.empty((2, self.batch, self.segments, *self.state_shape[1:]), dtype=torch.float32, device=dt.device)
        if self.segments > 1:
            (blocks, batch, segments), sizes, options = self.launch(*self.config[:3])
            _sum_segments[(blocks, batch, segments - 1)](  # no segment follows the last one
                left, dt, A, right, goes_on, parts, parts[1], *left.stride()[:2], *dt.stride()[:2], *right.stride()[:3],
                *sizes, REVERSE=reverse, **options,
            )  # fmt: skip
        return parts


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial, goes_on, config, segments, keep):
        ctx.types = [None if part is None else part.dtype for part in (A, B, C, initial)]
        x, dt, B, C = launch.rows_of(x), launch.rows_of(dt), B.float(), C.float()  # else every thread would convert B and C
        B, C = launch.rows_of(B), launch.rows_of(C)
        A = A.float().contiguous()
        initial = None if initial is None else initial.contiguous()
        plan = _Plan(x, B, config, segments, goes_on)
        flags = x if goes_on is None else goes_on  # x is a placeholder that is never read
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty(plan.state_shape, dtype=torch.float32, device=x.device)
        shape = (plan.batch, plan.chunks, plan.channels, plan.states)
        starts = torch.empty(shape if keep else (1,), dtype=torch.float32, device=x.device)
        with launch.on(x):
            sums = plan.sums(x, dt, A, B, flags, reverse=False)
            grid, sizes, options = plan.launch(*config[:3])
            _forward[grid](
                x, dt, A, B, C, flags, A if initial is None else initial, sums, sums[1], y, starts, final,
                *_strides(x, dt, B, C), *sizes, ENTRY=initial is not None, KEEP=keep, **options,
            )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, goes_on, starts)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, goes_on, starts = ctx.saved_tensors
        plan = ctx.plan
        flags = x if goes_on is None else goes_on
        dy = torch.zeros_like(x) if dy is None else launch.rows_of(dy.to(x.dtype))
        d_final = None if d_final is None else d_final.float().contiguous()
        grid, sizes, options = plan.launch(*plan.config[3:])
        blocks = plan.blocks(options["BD"])

        def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        dx, d_dt = fresh(*x.shape, dtype=x.dtype), fresh(*dt.shape, dtype=dt.dtype)
        d_BC = fresh(plan.batch, plan.time, plan.groups, blocks, plan.states, 2)
        dA = fresh(plan.batch, plan.segments, plan.channels, plan.states)
        d_initial = fresh(*plan.state_shape)
        scratch = fresh(grid[2], grid[1], grid[0], options["TILES"], options["BD"], options["BN"])
        with launch.on(x):
            sums = plan.sums(dy, dt, A, C, flags, reverse=True)
            _backward[grid](
                x, dt, A, B, C, flags, A if d_final is None else d_final, sums, sums[1], dy, starts, scratch,
                dx, d_dt, d_BC, dA, d_initial, *_strides(x, dt, B, C), *dy.stride()[:2], *sizes,
                ENTRY=d_final is not None, **options,
            )  # fmt: skip
            dB, dC = d_BC.sum(3).unbind(-1)
        type_of_A, type_of_B, type_of_C, type_of_initial = ctx.types
        of_initial = None if type_of_initial is None else d_initial.to(type_of_initial)
        return dx, d_dt, dA.sum((0, 1)).to(type_of_A), dB.to(type_of_B), dC.to(type_of_C), of_initial, None, None, None, None


def _strides(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    return (*x.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3])


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _place(W, blocks, BD: tl.constexpr):
    """Returns a program's group, its channels, and which of them exist in the group."""
    group = tl.program_id(0) // blocks
    local = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    return group, group * W + local, local < W


@triton.jit
@no_type_check
def _row(first, k, last, stride: tl.constexpr, here, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Load row k of the tile that begins at `first`; rows after the last repeat it, and `_counted` removes them."""
    place = first + (k if EVEN else tl.minimum(last, k)) * stride
    return tl.load(place) if FULL else tl.load(place, mask=here, other=0.0)  # a mask costs one instruction per number


@triton.jit
@no_type_check
def _rows(first, tile, last, K: tl.constexpr, stride: tl.constexpr, here, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Load the rows of a tile."""
    first += tl.cast(tile * K, tl.int64) * stride
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (_row(first, k, last - tile * K, stride, here, EVEN, FULL),)
    return rows


@triton.jit
@no_type_check
def _counted(row, k, last, EVEN: tl.constexpr):
    """Returns a row in float32; zeros outside the sequence. EVEN: no tile has such rows."""
    return row.to(tl.float32) if EVEN else tl.where(k <= last, row.to(tl.float32), 0.0)


@triton.jit
@no_type_check
def _stacked(rows, K: tl.constexpr, LOG: tl.constexpr, BD: tl.constexpr):
    """Join K vectors as the columns of a matrix, so that they are moved between threads and stored all at once."""
    for level in tl.static_range(LOG):
        pairs = ()
        for k in tl.static_range(K >> (level + 1)):
            pairs = pairs + (tl.join(rows[k], rows[k + (K >> (level + 1))]),)
        rows = pairs
    return tl.reshape(rows[0], (BD, K))


@triton.jit
@no_type_check
def _breaks(goes_on, tile, last, K: tl.constexpr, DOCS: tl.constexpr):
    """Returns, for each row of a tile, the summand of its decay's exponent: -inf at the start of a document, else 0."""
    breaks = ()
    for k in tl.static_range(K):
        place = tl.cast(tile * K + k, tl.int64)
        same = tl.load(goes_on + place, mask=place <= last, other=1) if DOCS else 1
        breaks = breaks + (tl.where(same != 0, tl.full((), 0.0, tl.float32), float("-inf")),)
    return breaks


@triton.jit
@no_type_check
def _inputs(
    left, dt, right, goes_on, tile, last, slt: tl.constexpr, sdt: tl.constexpr, srt: tl.constexpr, here, there,
    K: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Load the rows of a tile (`left`, dt, `right` and breaks), one iteration before they are used."""
    lefts = _rows(left, tile, last, K, slt, here, EVEN, FULL)
    ds = _rows(dt, tile, last, K, sdt, here, EVEN, FULL)
    rights = _rows(right, tile, last, K, srt, there, EVEN, FULL)
    return lefts, ds, rights, _breaks(goes_on, tile, last, K, DOCS)


@triton.jit
@no_type_check
def _decay(d, A2, added, DOCS: tl.constexpr):
    """Compute the states' decays at a token."""
    return tl.exp2(d[:, None] * A2 + added) if DOCS else tl.exp2(d[:, None] * A2)


@triton.jit
@no_type_check
def _entering(state, decays, sums, cells, here, size, segment):
    """Returns the state that enters a segment: the first segment's state, passed through the segments before."""
    for i in range(0, segment):
        far = tl.cast(i, tl.int64) * size
        state = state * tl.load(decays + far + cells, mask=here, other=0.0)
        state += tl.load(sums + far + cells, mask=here, other=0.0)
    return state


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _sum_segments(
    left, dt, A, right, goes_on, decays, sums, slb, slt: tl.constexpr, sdb, sdt: tl.constexpr, srb, srt: tl.constexpr, srg,
    T, D, W, blocks, chunks, each, segments, REVERSE: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Compute what a segment adds to a state (from x and B) or to a state's gradient (from dy and C), and its decay."""
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    group, channels, here = _place(W, blocks, BD)
    n = tl.arange(0, BN)
    cells = channels[:, None] * N + n[None, :]
    both = here[:, None] & (n < N)[None, :]
    A2 = tl.load(A + cells, mask=both, other=0.0) * LOG2E
    left = left + b * slb + channels
    dt = dt + b * sdb + channels
    right = right + (b * srb + group * srg) + n
    goes_on += b * T
    state = tl.zeros((BD, BN), dtype=tl.float32)
    total = tl.zeros((BD,), dtype=tl.float32)
    broken = 0.0  # -inf once a document has started
    begin = segment * each * TILES
    end = begin + each * TILES
    if REVERSE:  # the first segment is the sequence's last
        begin, end = chunks * TILES - end, chunks * TILES - begin
    begin, end = tl.maximum(begin, 0), tl.minimum(end, tl.cdiv(T, K))  # the last chunk may have fewer tiles
    tile = end - 1 if REVERSE else begin
    lefts, ds, rights, breaks = _inputs(
        left, dt, right, goes_on, tile, T - 1, slt, sdt, srt, here, n < N, K, EVEN, FULL, DOCS
    )
    for i in range(begin, end):
        tile = end - 1 - (i - begin) if REVERSE else i
        ahead = tl.maximum(tile - 1, begin) if REVERSE else tl.minimum(tile + 1, end - 1)
        following = _inputs(left, dt, right, goes_on, ahead, T - 1, slt, sdt, srt, here, n < N, K, EVEN, FULL, DOCS)
        last = T - 1 - tile * K
        for j in tl.static_range(K):
            d = _counted(ds[K - 1 - j if REVERSE else j], K - 1 - j if REVERSE else j, last, EVEN)
            a = _decay(d, A2, breaks[K - 1 - j if REVERSE else j], DOCS)
            v = _counted(lefts[K - 1 - j if REVERSE else j], K - 1 - j if REVERSE else j, last, EVEN)
            r = rights[K - 1 - j if REVERSE else j].to(tl.float32)[None, :]
            state = a * (state + v[:, None] * r) if REVERSE else a * state + (d * v)[:, None] * r
            total += d
            if DOCS:
                broken += breaks[K - 1 - j if REVERSE else j]
        lefts, ds, rights, breaks = following
    place = (b * segments + segment) * D * N
    tl.store(decays + place + cells, tl.exp2(total[:, None] * A2 + broken), mask=both)
    tl.store(sums + place + cells, state, mask=both)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _forward(
    x, dt, A, B, C, goes_on, entry, decays, sums, y, starts, final, sxb, sxt: tl.constexpr, sdb, sdt: tl.constexpr, sBb,
    sBt: tl.constexpr, sBg, sCb, sCt: tl.constexpr, sCg, T, D, W, blocks, chunks, each, segments, ENTRY: tl.constexpr,
    KEEP: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    LOG: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    group, channels, here = _place(W, blocks, BD)
    n = tl.arange(0, BN)
    cells = channels[:, None] * N + n[None, :]
    both = here[:, None] & (n < N)[None, :]
    A2 = tl.load(A + cells, mask=both, other=0.0) * LOG2E
    x = x + b * sxb + channels
    dt = dt + b * sdb + channels
    B = B + (b * sBb + group * sBg) + n
    C = C + (b * sCb + group * sCg) + n
    y += b * T * D
    goes_on += b * T
    size = D * N
    state = tl.zeros((BD, BN), dtype=tl.float32)
    if ENTRY:
        state += tl.load(entry + b * size + cells, mask=both, other=0.0).to(tl.float32)
    state = _entering(state, decays + b * segments * size, sums + b * segments * size, cells, both, size, segment)
    begin = segment * each * TILES
    end = tl.minimum(begin + each * TILES, tl.cdiv(T, K))
    xs, ds, Bs, breaks = _inputs(x, dt, B, goes_on, begin, T - 1, sxt, sdt, sBt, here, n < N, K, EVEN, FULL, DOCS)
    Cs = _rows(C, begin, T - 1, K, sCt, n < N, EVEN, FULL)
    for i in range(begin, end):
        ahead = tl.minimum(i + 1, end - 1)  # its loads come before the stores, so that they do not wait for them
        following = _inputs(x, dt, B, goes_on, ahead, T - 1, sxt, sdt, sBt, here, n < N, K, EVEN, FULL, DOCS)
        next_Cs = _rows(C, ahead, T - 1, K, sCt, n < N, EVEN, FULL)
        if KEEP and i % TILES == 0:
            tl.store(starts + (b * chunks + i // TILES) * size + cells, state, mask=both)
        far = tl.cast(i * K, tl.int64)
        last = T - 1 - i * K
        outs = ()
        for k in tl.static_range(K):
            d = _counted(ds[k], k, last, EVEN)
            v = d * xs[k].to(tl.float32)
            state = _decay(d, A2, breaks[k], DOCS) * state + v[:, None] * Bs[k].to(tl.float32)[None, :]
            outs = outs + (tl.sum(state * Cs[k].to(tl.float32)[None, :], 1),)
        k = tl.arange(0, K)[None, :]
        inside = here[:, None] & (k <= last)
        place = y + far * D + k * D + channels[:, None]
        tl.store(place, _stacked(outs, K, LOG, BD).to(y.dtype.element_ty), mask=inside)
        Cs = next_Cs
        xs, ds, Bs, breaks = following
    if segment == segments - 1:
        tl.store(final + b * size + cells, state, mask=both)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _backward(
    x, dt, A, B, C, goes_on, entry, decays, sums, dy, starts, scratch, dx, d_dt, d_BC, dA, d_initial, sxb,
    sxt: tl.constexpr, sdb, sdt: tl.constexpr, sBb, sBt: tl.constexpr, sBg, sCb, sCt: tl.constexpr, sCg, syb,
    syt: tl.constexpr, T, D, W, blocks, chunks, each, segments, ENTRY: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr, TILES: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)  # counted from the end of the sequence
    group, channels, here = _place(W, blocks, BD)
    n = tl.arange(0, BN)
    cells = channels[:, None] * N + n[None, :]
    both = here[:, None] & (n < N)[None, :]
    A2 = tl.load(A + cells, mask=both, other=0.0) * LOG2E
    x = x + b * sxb + channels
    dt = dt + b * sdb + channels
    B = B + (b * sBb + group * sBg) + n
    C = C + (b * sCb + group * sCg) + n
    dy = dy + b * syb + channels
    dx += b * T * D
    d_dt += b * T * D
    goes_on += b * T
    size = D * N
    program = (segment * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    scratch += program.to(tl.int64) * (TILES * BD * BN) + tl.arange(0, BD)[:, None] * BN + n[None, :]
    pairs = 2 * n[:, None] + tl.arange(0, 2)[None, :]
    d_BC += (b * T * tl.num_programs(0) + tl.program_id(0)) * (2 * N)
    width = tl.num_programs(0) * (2 * N)  # numbers of a token in d_BC
    up = tl.zeros((BD, BN), dtype=tl.float32)  # gradient of the state before the following token
    if ENTRY:
        up += tl.load(entry + b * size + cells, mask=both, other=0.0).to(tl.float32)
    up = _entering(up, decays + b * segments * size, sums + b * segments * size, cells, both, size, segment)
    slope = tl.zeros((BD, BN), dtype=tl.float32)  # gradient of A
    for turned in range(segment * each, tl.minimum(segment * each + each, chunks)):
        z = chunks - 1 - turned
        tiles = tl.minimum(TILES, tl.cdiv(T, K) - z * TILES)
        state = tl.load(starts + (b * chunks + z) * size + cells, mask=both, other=0.0)
        tl.debug_barrier()  # no thread still reads the scratch buffer
        tl.store(scratch, state)
        first = z * TILES
        xs, ds, Bs, breaks = _inputs(x, dt, B, goes_on, first, T - 1, sxt, sdt, sBt, here, n < N, K, EVEN, FULL, DOCS)
        for i in range(0, tiles - 1):
            following = _inputs(x, dt, B, goes_on, first + i + 1, T - 1, sxt, sdt, sBt, here, n < N, K, EVEN, FULL, DOCS)
            for k in tl.static_range(K):
                d = ds[k].to(tl.float32)
                v = d * xs[k].to(tl.float32)
                state = _decay(d, A2, breaks[k], DOCS) * state + v[:, None] * Bs[k].to(tl.float32)[None, :]
            tl.store(scratch + (i + 1) * (BD * BN), state)
            xs, ds, Bs, breaks = following
        gs = _rows(dy, first + tiles - 1, T - 1, K, syt, here, EVEN, FULL)  # the last tile's other rows are loaded already
        Cs = _rows(C, first + tiles - 1, T - 1, K, sCt, n < N, EVEN, FULL)
        tl.debug_barrier()
        for i in range(0, tiles):
            tile = tiles - 1 - i
            ahead = first + tl.maximum(tile - 1, 0)
            following = _inputs(x, dt, B, goes_on, ahead, T - 1, sxt, sdt, sBt, here, n < N, K, EVEN, FULL, DOCS)
            next_gs = _rows(dy, ahead, T - 1, K, syt, here, EVEN, FULL)
            next_Cs = _rows(C, ahead, T - 1, K, sCt, n < N, EVEN, FULL)
            far = tl.cast((first + tile) * K, tl.int64)
            last = T - 1 - (first + tile) * K
            state = tl.load(scratch + tile * (BD * BN))
            decayed, left = (), ()  # the decays, and the decayed state before each token
            for k in tl.static_range(K):
                d = _counted(ds[k], k, last, EVEN)
                a = _decay(d, A2, breaks[k], DOCS)
                state = a * state
                decayed = decayed + (a,)
                left = left + (state,)
                state = state + (d * xs[k].to(tl.float32))[:, None] * Bs[k].to(tl.float32)[None, :]
            alongs, d_ds = (), ()
            for j in tl.static_range(K):  # from the last token to the first
                v, d, g = xs[K - 1 - j].to(tl.float32), _counted(ds[K - 1 - j], K - 1 - j, last, EVEN), gs[K - 1 - j]
                g = _counted(g, K - 1 - j, last, EVEN)[:, None]
                right = Bs[K - 1 - j].to(tl.float32)[None, :]
                scaled = (d * v)[:, None]
                grad = g * Cs[K - 1 - j].to(tl.float32)[None, :] + up  # gradient of the state after the token
                over_channels = tl.sum(tl.join(grad * scaled, g * (left[K - 1 - j] + scaled * right)), 0)  # dB, dC [n 2]
                place = d_BC + (far + (K - 1 - j)) * width + pairs
                tl.store(place, over_channels, mask=(n < tl.where(last >= K - 1 - j, N, 0))[:, None])
                worth = grad * left[K - 1 - j]
                along = tl.sum(grad * right, 1)
                alongs = (d * along,) + alongs
                d_ds = (v * along + LN2 * tl.sum(worth * A2, 1),) + d_ds
                slope += d[:, None] * worth
                up = decayed[K - 1 - j] * grad
            k = tl.arange(0, K)[None, :]
            inside = here[:, None] & (k <= last)
            place = far * D + k * D + channels[:, None]
            tl.store(dx + place, _stacked(alongs, K, LOG, BD).to(dx.dtype.element_ty), mask=inside)
            tl.store(d_dt + place, _stacked(d_ds, K, LOG, BD).to(d_dt.dtype.element_ty), mask=inside)
            gs, Cs = next_gs, next_Cs
            xs, ds, Bs, breaks = following
    tl.store(dA + (b * segments + segment) * size + cells, slope, mask=both)
    if segment == segments - 1:
        tl.store(d_initial + b * size + cells, up, mask=both)
