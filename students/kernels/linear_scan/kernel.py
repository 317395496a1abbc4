"""The diagonal recurrence in Triton: both passes read each input from memory once and write each output once.

A program goes through time for a block of channels, tile by tile. A tile is [row, slot, channel]. Slots are neighbouring
spans of time, ideally one per thread. So most of the scan is a chain of products in registers, and threads exchange only
each slot's total. Loads of later tiles overlap with the computation (stages).

Blocks are as wide as possible while every multiprocessor has one. If even narrow blocks are too few, time is divided into
short segments that run in parallel. A program takes the next segment, sums what it adds, stores the sum for later segments,
waits for the state that enters its segment, and scans the segment again; its inputs are then in the L2 cache. Segments form
groups. A segment waits for the state after the previous group and for the sums of earlier segments in its own group, so the
chain of waits has one link per group. This is decoupled look-back (Merrill and Garland 2016), but with an order of sums that
does not depend on timing.

Backward, row t holds the gradient of h_t, the decay of token t + 1 and h_t, so that no row needs its neighbour:
    g_t = dh_t + a_{t+1} g_{t+1},  dx_t = g_t,  dlog_a_{t+1} = (g_t - dh_t) h_t.
The same scan runs over reversed time. Every sum has a fixed order, so results are bitwise reproducible.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.linear_scan.reference import continues

LOG2E = tl.constexpr(1.4426950408889634)
VECTOR = tl.constexpr(2)  # neighbouring channels of a thread
SIZES = ["T", "batch", "tiles", "each", "segments"]  # they vary, so no kernels are specialised for 1 and multiples of 16
STEP_BLOCK = 512  # channels of one program in the one-token kernel


class Config(NamedTuple):
    """Channels of a block, rows of a slot forward and backward, warps, tiles in flight.

    For divided time: tokens of a segment, segments of a group (a power of 2), programs per multiprocessor. The inputs of all
    running segments (`programs` per multiprocessor) and their outputs must fit in the L2 cache.
    """

    channels: int
    rows: int
    back_rows: int
    warps: int
    stages: int
    tokens: int = 64
    group: int = 8
    programs: int = 8

    def slots(self) -> int:
        """The number of slots at which every thread has one."""
        return 32 * self.warps * VECTOR.value // self.channels


# With one warp a block has few slots, so threads exchange little. The first is the default if its blocks fill the GPU, the
# second if time must be divided as well.
CONFIGS_16 = [
    Config(32, 16, 8, 1, 4),
    Config(128, 16, 16, 2, 3, programs=4),
    Config(64, 8, 8, 1, 6),
    Config(64, 16, 8, 1, 4),
]
CONFIGS_32 = [Config(32, 8, 8, 1, 4), Config(64, 8, 8, 1, 4, tokens=32)]  # if one input has 4 bytes
PROGRAMS = 4  # warps per multiprocessor below which time is divided


def configs(x: Tensor, log_a: Tensor) -> list[Config]:
    """Returns the shipped configurations for inputs like these, the default first."""
    first, second, *others = CONFIGS_16 if max(x.dtype.itemsize, log_a.dtype.itemsize) == 2 else CONFIGS_32
    blocks = x.shape[0] * triton.cdiv(x.shape[2], first.channels)
    filled = blocks * first.warps >= PROGRAMS // 2 * launch.multiprocessors(x)
    return [first, second, *others] if filled else [second, first, *others]


def linear_scan(
    x: Tensor,
    log_a: Tensor,
    documents: Tensor | None,
    initial_state: Tensor | None,
    config: Config | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `students.kernels.linear_scan.linear_scan`. The configuration and the number of segments may be set."""
    follows = continues(documents)
    goes_on = None if follows is None else follows.view(torch.int8)
    if config is None:
        config = configs(x, log_a)[0]
    return _Scan.apply(x, log_a, initial_state, goes_on, config, segments)


def linear_scan_step(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `students.kernels.linear_scan.linear_scan_step`. `state` is updated in place and returned."""
    batch, channels = x.shape
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with launch.on(x):
        _step[(triton.cdiv(channels, STEP_BLOCK), batch)](
            x, log_a, state, h, channels, *x.stride(), *log_a.stride(), *state.stride(), BLOCK=STEP_BLOCK, num_warps=4
        )
    return h, state


class _Plan(NamedTuple):
    """The division of one pass: tokens of a tile, tiles, segments, tiles of a segment, blocks, and the launch grid."""

    tile: int
    tiles: int
    each: int
    segments: int
    blocks: int
    grid: tuple[int, int, int]


def _plan(x: Tensor, config: Config, rows: int, segments: int | None) -> _Plan:
    batch, time, channels = x.shape
    tile = rows * config.slots()
    tiles = triton.cdiv(time, tile)
    blocks = triton.cdiv(channels, config.channels)
    chains = batch * blocks
    if segments is None:  # short ones, enough to give every multiprocessor its warps
        wanted = PROGRAMS * launch.multiprocessors(x) // (chains * config.warps)
        segments = 1 if wanted < 3 else max(wanted, triton.cdiv(time, config.tokens))
    each = triton.cdiv(tiles, min(segments, tiles))
    segments = triton.cdiv(tiles, each)
    if segments == 1:
        return _Plan(tile, tiles, each, 1, blocks, (blocks, batch, 1))
    programs = min(segments * chains, config.programs * launch.multiprocessors(x))
    return _Plan(tile, tiles, each, segments, blocks, (programs, 1, 1))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, initial, goes_on, config, segments):
        x, log_a = launch.rows_of(x), launch.rows_of(log_a)
        initial = None if initial is None else initial.contiguous()
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty((x.shape[0], x.shape[2]), dtype=torch.float32, device=x.device)
        _run(x, log_a, h, goes_on, initial, None, h, final, None, config, segments)
        ctx.save_for_backward(log_a, h, initial, goes_on)
        ctx.set_materialize_grads(False)
        ctx.config, ctx.segments = config, segments
        return h, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, d_final):
        log_a, h, initial, goes_on = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else launch.rows_of(dh.to(h.dtype))
        d_final = None if d_final is None else d_final.float().contiguous()
        dx, da = (
            torch.empty(h.shape, dtype=h.dtype, device=h.device),
            torch.empty_like(log_a, memory_format=torch.contiguous_format),
        )
        d_initial = torch.empty((h.shape[0], h.shape[2]), dtype=torch.float32, device=h.device)
        _run(dh, log_a, h, goes_on, d_final, initial, dx, d_initial, da, ctx.config, ctx.segments)
        return dx, da, None if initial is None else d_initial.to(initial.dtype), None, None, None


def _run(x, log_a, h, goes_on, entry, initial, out, end, da, config: Config, segments: int | None) -> None:
    """Launch one pass: backward if `da` is given, otherwise forward. `entry` is the state in which the first tile starts."""
    back = da is not None
    rows = config.back_rows if back else config.rows
    plan = _plan(x, config, rows, segments)
    x, log_a = (part.contiguous() if part.stride(1) * plan.tile >= 2**31 else part for part in (x, log_a))
    batch, time, channels = x.shape
    cut = plan.segments > 1
    rows_ = flags_ = x  # placeholders that are never read
    if cut:  # per segment a row (its decay and sum) and a flag; the first flag counts the segments that were taken
        rows_ = torch.empty((batch, plan.segments + 1, 2, channels), dtype=torch.float32, device=x.device)
        flags_ = torch.zeros(batch * plan.blocks * (plan.segments + 1), dtype=torch.int32, device=x.device)
    goes_on_, entry_, initial_, da_ = (x if part is None else part for part in (goes_on, entry, initial, da))
    arguments = (
        x, log_a, h, goes_on_, entry_, initial_, rows_, flags_, out, end, da_, *x.stride()[:2], *log_a.stride()[:2],
        time, channels, batch, plan.tiles, plan.each, plan.segments,
    )  # fmt: skip
    options = {
        "CUT": cut, "GROUP": config.group, "BACK": back, "DOCS": goes_on is not None,
        "ENTRY": entry is not None, "INITIAL": initial is not None, "ROWS": rows, "SLOTS": config.slots(),
        "BD": config.channels, "STAGES": config.stages, "num_warps": config.warps,
    }  # fmt: skip
    with launch.on(x):
        _walk[plan.grid](*arguments, **options)


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _after(decay, h, next_decay, next_h):
    """Join the recurrences over two neighbouring spans."""
    return decay * next_decay, next_decay * h + next_h


@triton.jit
@no_type_check
def _after_with_before(decay, h, before_decay, before_h, next_decay, next_h, next_before_decay, next_before_h):
    """Join as `_after` does, and also return the recurrence over all but the last span."""
    return (
        decay * next_decay,
        next_decay * h + next_h,
        decay * next_before_decay,
        next_before_decay * h + next_before_h,
    )


@triton.jit
@no_type_check
def _decays(log_a, goes_on, offsets, back, channel, stride, inside, here, DOCS: tl.constexpr):
    """Compute the decays exp(log_a) of a tile's rows: 0 at the start of a document, 1 outside the sequence.

    `back` counts tokens backwards from the tile's latest one, to which `goes_on` points. So Triton does not see neighbours
    in memory: it would assign them to neighbouring threads, and move all other numbers of the tile to match.
    """
    a = tl.load(log_a + (offsets * stride + channel), mask=inside & here, other=0.0).to(tl.float32)
    a = tl.exp2(a * LOG2E)
    if DOCS:
        same = tl.max_contiguous(tl.broadcast_to(back, a.shape), [1, 1, 1])
        a = a * tl.load(goes_on - same, mask=inside & here, other=1).to(tl.float32)
    return a


@triton.jit
@no_type_check
def _places(i, channels, T, BACK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Returns, for tile i: its first token, the rows' offsets from it, `back` of `_decays`, which rows exist, and decay."""
    row = tl.arange(0, ROWS)[:, None, None]
    slot = tl.arange(0, SLOTS)[None, :, None]
    place = slot * ROWS + row
    offsets = -place if BACK else place  # of the rows' tokens from the tile's first token; 32 bits suffice within a tile
    back = place if BACK else (SLOTS - 1 - slot) * ROWS + (ROWS - 1 - row)
    gone = i * (SLOTS * ROWS)
    first = (T - 1 - gone if BACK else gone).to(tl.int64)
    inside = place < T - gone
    decaying = place > -gone if BACK else inside  # no token follows the last one's state
    return first, offsets, back, inside, decaying & inside, channels[None, None, :]


@triton.jit
@no_type_check
def _tile(
    x, log_a, goes_on, i, channels, T, D: tl.constexpr, sxt: tl.constexpr, sat: tl.constexpr,
    BACK: tl.constexpr, DOCS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Read tile i. Returns its inputs, the scan over each slot, the scan before each slot, and the scan over the tile."""
    first, offsets, back, inside, decaying, channel = _places(i, channels, T, BACK, ROWS, SLOTS)
    wanted = channel < D
    latest = 1 if BACK else SLOTS * ROWS - 1
    shift = 1 if BACK else 0
    added = tl.load(x + first * sxt + (offsets * sxt + channel), mask=inside & wanted, other=0.0).to(tl.float32)
    flags = goes_on + first + latest
    a = _decays(log_a + (first + shift) * sat, flags, offsets, back, channel, sat, decaying, wanted, DOCS)
    running, local = tl.associative_scan((a, added), 0, _after)
    last = tl.arange(0, ROWS)[:, None, None] == ROWS - 1
    slot_decay = tl.sum(tl.where(last, running, 0.0), 0)
    slot_sum = tl.sum(tl.where(last, local, 0.0), 0)
    before_decay = tl.full((SLOTS, BD), 1.0, dtype=tl.float32)
    before_sum = tl.zeros((SLOTS, BD), dtype=tl.float32)
    if SLOTS > 1:
        slot_decay, slot_sum, before_decay, before_sum = tl.associative_scan(
            (slot_decay, slot_sum, before_decay, before_sum), 0, _after_with_before
        )
    final = tl.arange(0, SLOTS)[:, None] == SLOTS - 1
    tile_decay = tl.sum(tl.where(final, slot_decay, 0.0), 0)
    tile_sum = tl.sum(tl.where(final, slot_sum, 0.0), 0)
    return added, running, local, before_decay, before_sum, tile_decay, tile_sum


@triton.jit
@no_type_check
def _write(
    h, out, da, i, channels, carry, added, running, local, before_decay, before_sum, T, D: tl.constexpr,
    BACK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Write tile i; `carry` is the state that enters it."""
    first, offsets, _, inside, decaying, channel = _places(i, channels, T, BACK, ROWS, SLOTS)
    wanted = channel < D
    reaching = before_decay * carry[None, :] + before_sum
    scanned = running * reaching[None, :, :] + local
    cells = offsets * D + channel
    tl.store(out + first * D + cells, scanned.to(out.dtype.element_ty), mask=inside & wanted)
    if BACK:
        state = tl.load(h + first * D + cells, mask=inside & wanted, other=0.0).to(tl.float32)
        slope = ((scanned - added) * state).to(da.dtype.element_ty)
        tl.store(da + (first + 1) * D + cells, slope, mask=decaying & wanted)


@triton.jit
@no_type_check
def _before(rows, flags, segment, carry, channels, here, D: tl.constexpr, GROUP: tl.constexpr):
    """Returns the state that enters a segment: waits for the rows of earlier segments in its group, and joins them."""
    member = tl.arange(0, GROUP)
    row = segment - segment % GROUP + member
    wanted = (row > 0) & (row <= segment)
    complete = 0  # a scalar: Triton 3.6 fails if such a loop carries a tensor
    while complete == 0:
        seen = tl.atomic_add(flags + row, 0, mask=wanted, sem="acquire", scope="gpu")
        complete = tl.min(tl.where(wanted, seen, 1), 0)
    tl.debug_barrier()  # after one thread's acquire, all may read; .cg bypasses the L1 cache, which may be stale
    cells = rows + row.to(tl.int64)[:, None] * (2 * D) + channels[None, :]
    there = wanted[:, None] & here[None, :]
    decay = tl.load(cells, mask=there, other=1.0, cache_modifier=".cg")
    added = tl.load(cells + D, mask=there, other=0.0, cache_modifier=".cg")
    decay, added = tl.associative_scan((decay, added), 0, _after)
    last = member[:, None] == GROUP - 1
    return tl.sum(tl.where(last, decay, 0.0), 0) * carry + tl.sum(tl.where(last, added, 0.0), 0)


@triton.jit
@no_type_check
def _leave(row, flag, decay, added, channels, here, D: tl.constexpr):
    """Write a row, and set its flag after all threads have written: a program that sees the flag sees the row."""
    tl.store(row + channels, decay, mask=here)
    tl.store(row + D + channels, added, mask=here)
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release", scope="gpu")


@triton.jit
@no_type_check
def _segment(
    x, log_a, h, goes_on, entry, initial, rows, flags, out, end, da, sxb, sxt: tl.constexpr, sab, sat: tl.constexpr, T,
    D: tl.constexpr, tiles, each, segments, block, b, segment,
    CUT: tl.constexpr, GROUP: tl.constexpr, BACK: tl.constexpr, DOCS: tl.constexpr,
    ENTRY: tl.constexpr, INITIAL: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Scan one segment of a block of channels of one sequence."""
    channels = tl.max_contiguous(block * BD + tl.arange(0, BD), VECTOR)  # a function's argument loses this hint
    here = channels < D
    x += b * sxb
    log_a += b * sab
    h += b * T * D
    out += b * T * D
    da += b * T * D
    goes_on += b * T
    begin = segment * each
    stop = tl.minimum(begin + each, tiles)
    carry = tl.zeros((BD,), dtype=tl.float32)
    if ENTRY:
        reached = tl.where(segment < GROUP, D, 0) if CUT else D  # only for the first group of segments
        carry += tl.load(entry + b * D + channels, mask=channels < reached, other=0.0).to(tl.float32)
    if CUT:
        # 1. The segment's decay and sum, for later segments. 2. The state that enters it.
        whole = tl.full((BD,), 1.0, dtype=tl.float32)
        total = tl.zeros((BD,), dtype=tl.float32)
        for i in tl.range(begin, stop, num_stages=STAGES):
            _, _, _, _, _, tile_decay, tile_sum = _tile(
                x, log_a, goes_on, i, channels, T, D, sxt, sat, BACK, DOCS, ROWS, SLOTS, BD
            )
            whole = whole * tile_decay
            total = tile_decay * total + tile_sum
        rows += b * (segments + 1) * 2 * D
        flags += (b * tl.cdiv(D, BD) + block) * (segments + 1)
        row = rows + (segment + 1).to(tl.int64) * 2 * D
        closing = segment % GROUP == GROUP - 1
        if not closing:
            _leave(row, flags + segment + 1, whole, total, channels, here, D)
        carry = _before(rows, flags, segment, carry, channels, here, D, GROUP)
        if closing:
            _leave(row, flags + segment + 1, tl.zeros_like(whole), whole * carry + total, channels, here, D)
    for i in tl.range(begin, stop, num_stages=STAGES):
        added, running, local, before_decay, before_sum, tile_decay, tile_sum = _tile(
            x, log_a, goes_on, i, channels, T, D, sxt, sat, BACK, DOCS, ROWS, SLOTS, BD
        )
        _write(h, out, da, i, channels, carry, added, running, local, before_decay, before_sum, T, D, BACK, ROWS, SLOTS)
        carry = tile_decay * carry + tile_sum
    if segment == segments - 1:
        if BACK:  # the first token's decay, and the state before it
            carry = carry * tl.exp2(tl.load(log_a + channels, mask=here, other=0.0).to(tl.float32) * LOG2E)
            slope = tl.zeros((BD,), dtype=tl.float32)
            if INITIAL:
                slope += carry * tl.load(initial + b * D + channels, mask=here, other=0.0).to(tl.float32)
            tl.store(da + channels, slope.to(da.dtype.element_ty), mask=here)
        tl.store(end + b * D + channels, carry, mask=here)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _walk(
    x, log_a, h, goes_on, entry, initial, rows, flags, out, end, da, sxb, sxt: tl.constexpr, sab, sat: tl.constexpr, T,
    D: tl.constexpr, batch, tiles, each, segments,
    CUT: tl.constexpr, GROUP: tl.constexpr, BACK: tl.constexpr, DOCS: tl.constexpr,
    ENTRY: tl.constexpr, INITIAL: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute `out` of a block of channels, and `end` at the end of time. BACK: with reversed time, and `da`.

    CUT: process segments as long as there are any. They are taken in order of time, so that a program only waits for
    segments of programs that are already running.
    """
    if CUT:
        blocks = tl.cdiv(D, BD)
        drawn = tl.atomic_add(flags, 1, sem="relaxed", scope="gpu")
        while drawn < segments * batch * blocks:
            segment = drawn // (batch * blocks)
            chain = drawn % (batch * blocks)
            _segment(
                x, log_a, h, goes_on, entry, initial, rows, flags, out, end, da, sxb, sxt, sab, sat, T,
                D, tiles, each, segments, chain % blocks, (chain // blocks).to(tl.int64), segment,
                CUT, GROUP, BACK, DOCS, ENTRY, INITIAL, ROWS, SLOTS, BD, STAGES,
            )  # fmt: skip
            drawn = tl.atomic_add(flags, 1, sem="relaxed", scope="gpu")
    else:
        _segment(
            x, log_a, h, goes_on, entry, initial, rows, flags, out, end, da, sxb, sxt, sab, sat, T,
            D, tiles, each, segments, tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2),
            CUT, GROUP, BACK, DOCS, ENTRY, INITIAL, ROWS, SLOTS, BD, STAGES,
        )  # fmt: skip


@triton.jit
@no_type_check
def _step(x, log_a, state, h, D, sxb, sxd, sab, sad, ssb, ssd, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < D
    a = tl.load(log_a + b * sab + c * sad, mask=here, other=0.0).to(tl.float32)
    added = tl.load(x + b * sxb + c * sxd, mask=here, other=0.0).to(tl.float32)
    place = state + b * ssb + c * ssd
    s = tl.exp2(a * LOG2E) * tl.load(place, mask=here, other=0.0).to(tl.float32) + added
    tl.store(place, s.to(state.dtype.element_ty), mask=here)
    tl.store(h + b * D + c, s.to(h.dtype.element_ty), mask=here)
