"""The matrix orientation loss in Triton, tile by tile: no tensor of t x t is written, forward or backward.

Three sweeps over the tiles on and below the diagonal, each of which recomputes its inputs:
    1. the log-sum-exp of each row of the attention matrix;
    2. row by row: the error, |A|^2, and if gradients are needed those of C and D;
    3. column by column, with transposed products: the gradient of B.
After this op, the graph only multiplies the error by a factor per head. So sweeps 2 and 3 compute the gradients for a factor
of 1, and the backward pass scales them. Off the diagonal, the decay between two tokens is the product of two factors of at
most 1, from each token to the tile's edge, so a tile needs one exponential per element (of A). The decay's gradient is the
difference of the row and column sums of dM o M, in float32, summed backwards over time.
"""

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.documents import positions
from students.kernels.documents import runs as number_runs

LOG2E = math.log2(math.e)
SIZES = ["T", "window", "min_lag"]  # they vary, so no kernels are specialised for 1 and multiples of 16


class Config(NamedTuple):
    """Tokens of the program's own side of a tile and of the side over which it loops; warps; pipeline stages."""

    own: int
    other: int
    warps: int
    stages: int


# By the widest head or state that each serves: the default first. Tests compare all with float64 on a GPU.
CONFIGS_16 = {
    64: [Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 128, 8, 2)],
    128: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
}
CONFIGS_32 = {
    64: [Config(64, 32, 4, 2)],
    128: [Config(64, 32, 4, 1)],
}


def configs(dtype: torch.dtype, width: int) -> list[Config]:
    """Returns the shipped configurations for products in this type and heads or states of this width, the default first."""
    table = CONFIGS_16 if dtype.itemsize == 2 else CONFIGS_32
    return next(choices for widest, choices in table.items() if width <= widest)


def orientation_error(
    q: Tensor,
    k: Tensor,
    C: Tensor,
    B: Tensor,
    log_a: Tensor,
    D: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    documents: Tensor | None,
    min_lag: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `students.kernels.matrix_orientation.orientation_error`. Under autocast, products run in autocast's type."""
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (C, B, log_a, D))
    options = (scale, softcap, window, documents, min_lag, config)
    return _Orientation.apply(C, B, log_a, D, q.detach(), k.detach(), options, wanted)


class _Orientation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, B, log_a, D, q, k, options, wanted):
        kind = C.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else C.dtype
        with torch.autocast(kind, enabled=False), launch.on(C):
            error, power, gradients = _sweep(q, k, C, B, log_a, D, options, wanted, dtype)
        ctx.save_for_backward(*gradients)
        ctx.types = (C.dtype, B.dtype, log_a.dtype, None if D is None else D.dtype)
        ctx.mark_non_differentiable(power)
        return error, power

    @staticmethod
    @once_differentiable
    def backward(ctx, d_error, _):
        dC, dB, da, dD = ctx.saved_tensors
        types = ctx.types
        dC, dB = ((part * d_error[:, None, :, None]).to(t) for part, t in zip((dC, dB), types, strict=False))
        dD = None if types[3] is None else (dD * d_error).sum(0).to(types[3])
        return dC, dB, (da * d_error[:, None]).to(types[2]), dD, None, None, None, None


def _sweep(q, k, C, B, log_a, D, options, wanted, dtype):
    """Compute the error, |A|^2 and, for a factor of 1, the gradients of C, B, log_a and D (D's per sequence and head)."""
    scale, softcap, window, documents, min_lag, config = options
    batch, time, heads, width = q.shape
    states = C.shape[3]
    config = config or configs(dtype, max(width, states))[0]
    q, k, c, b = (launch.rows_of(part.to(dtype)) for part in (q, k, C, B))
    total = log_a.transpose(1, 2).contiguous().double().cumsum(2) * LOG2E  # [b h t]; a strided cumsum is slow
    runs, first, last = _bounds(documents, time)
    tiles, rows = triton.cdiv(time, config.own), batch * heads
    empty = {"dtype": torch.float32, "device": C.device}
    lse = torch.empty((batch, heads, time), **empty)
    sums = torch.empty((3, rows, tiles), **empty)
    flow = torch.empty((2, batch, heads, time), **empty)
    keep = {"dtype": C.dtype if C.dtype == torch.float32 else dtype, "device": C.device}
    dC, dB = (torch.empty(C.shape if wanted else (1,), **keep) for _ in range(2))
    ids = total if runs is None else runs  # without documents, a placeholder that is never read
    bounds = (ids, total if runs is None else first, total if runs is None else last)
    strides = (*q.stride()[:3], *k.stride()[:3], *c.stride()[:3], *b.stride()[:3])
    numbers = (time, heads, heads // k.shape[2], float(scale), float(softcap or 1.0), window or 0, min_lag)
    flags = {
        "d": width, "OWN": config.own, "OTHER": config.other, "BD": launch.tile(width), "CAP": softcap is not None,
        "WINDOW": window is not None, "DOCS": runs is not None, "PRECISION": launch.precision(dtype),
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    more = flags | {"n": states, "BN": launch.tile(states), "LAG": min_lag > 0, "HAS_D": D is not None}
    grid, inputs = (tiles * rows,), (q, k, c, b, total, total if D is None else D, *bounds, *strides, lse)
    _row_sums[grid](q, k, *bounds, *strides[:6], lse, *numbers, **flags)
    _rows[grid](*inputs, sums, flow, dC, *numbers, GRADIENT=wanted, **more)
    error, power, d_D = sums.sum(2).unflatten(1, (batch, heads))
    if not wanted:
        return error, power, ()
    _columns[grid](*inputs, flow, dB, *numbers, **more)
    da = (flow[0].double() - flow[1]).flip(2).cumsum(2).flip(2).float().transpose(1, 2)
    return error, power, (dC, dB, da, d_D)


def _bounds(documents: Tensor | None, time: int):
    """Returns each token's run, and the first and last token of that run."""
    if documents is None:
        return None, None, None
    runs = number_runs(documents)
    first = torch.arange(time, device=runs.device) - positions(documents)
    last = time - 1 - (torch.arange(time, device=runs.device) - positions(documents.flip(1))).flip(1)
    return (part.to(torch.int32).contiguous() for part in (runs, first, last))


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _tile(pointer, start, T, stride, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows from `start` on of a matrix whose columns are contiguous; zeros outside."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (start + rows < T)[:, None] & (columns < width)[None, :]
    return tl.load(
        pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0
    )


@triton.jit
@no_type_check
def _log2_odds(product, scale, cap, CAP: tl.constexpr):
    """Compute soft-capped attention logits in base 2."""
    if CAP:
        return (cap * 1.4426950408889634) * (2.0 * tl.sigmoid((2.0 * scale / cap) * product) - 1.0)
    return product * (scale * 1.4426950408889634)


@triton.jit
@no_type_check
def _seen(row, column, run_row, run_column, T, DIAGONAL: tl.constexpr, DOCS: tl.constexpr):
    """Returns which tokens `row` sees: no later ones, none of another document, no padding."""
    seen = (row < T) & (column < T)
    if DIAGONAL:
        seen = seen & (column <= row)
    if DOCS:
        seen = seen & (run_row == run_column)
    return seen


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _row_sums(
    q, k, runs, first, last, sqb, sqt, sqh, skb, skt, skh, lse, T, H, share, scale, cap, window, min_lag,
    d: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    i = (blocks - 1 - tl.program_id(0) % blocks) * OWN  # the longest rows first
    row = i + tl.arange(0, OWN)
    q += b * sqb + h * sqh
    k += b * skb + (h // share) * skh
    runs += b * T
    run_row, start = row, 0
    if DOCS:
        run_row = tl.load(runs + row, mask=row < T, other=-1)
        start = tl.load(first + b * T + i)
    if WINDOW:
        start = tl.maximum(start, i - window + 1)
    own = _tile(q, i, T, sqt, d, OWN, BD)
    top = tl.full((OWN,), -1e30, dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    for j in range(start // OTHER * OTHER, tl.minimum(i + OWN, T), OTHER):
        column = j + tl.arange(0, OTHER)
        run_column = column
        if DOCS:
            run_column = tl.load(runs + column, mask=column < T, other=-2)
        other = _tile(k, j, T, skt, d, OTHER, BD)
        odds = _log2_odds(tl.dot(own, tl.trans(other), input_precision=PRECISION), scale, cap, CAP)
        seen = _seen(row[:, None], column[None, :], run_row[:, None], run_column[None, :], T, True, DOCS)
        if WINDOW:
            seen = seen & (row[:, None] - column[None, :] < window)
        odds = tl.where(seen, odds, float("-inf"))
        higher = tl.maximum(top, tl.max(odds, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(odds - higher[:, None]), 1)
        top = higher
    tl.store(lse + head * T + row, top + tl.log2(total), mask=row < T)


@triton.jit
@no_type_check
def _difference(
    odds, lse, product, decay, row, column, run_row, run_column, D, T, window, min_lag,
    DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, LAG: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Compute A, M without D, and A - M of one tile; zero at entries that do not count."""
    a = tl.exp2(odds - lse)
    m = product * decay
    if DIAGONAL or DOCS or WINDOW or LAG:
        seen = _seen(row, column, run_row, run_column, T, DIAGONAL, DOCS)
        if LAG:
            seen = seen & (row - column >= min_lag)
        m = tl.where(seen, m, 0.0)
        if WINDOW:
            seen = seen & (row - column < window)
        a = tl.where(seen, a, 0.0)
    difference = a - m
    if DIAGONAL and HAS_D:
        on = (row == column) & (row < T)
        if LAG:
            on = on & (min_lag <= 0)
        difference = difference - tl.where(on, D, 0.0)
    return a, m, difference


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _rows(
    q, k, C, B, decays, D, runs, first, last, sqb, sqt, sqh, skb, skt, skh, sCb, sCt, sCh, sBb, sBt, sBh,
    lse, sums, flow, dC, T, H, share, scale, cap, window, min_lag,
    d: tl.constexpr, n: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, LAG: tl.constexpr, HAS_D: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    block = blocks - 1 - tl.program_id(0) % blocks
    i = block * OWN
    row = i + tl.arange(0, OWN)
    q += b * sqb + h * sqh
    k += b * skb + (h // share) * skh
    C += b * sCb + h * sCh
    B += b * sBb + h * sBh
    decays += head * T
    runs += b * T
    run_row, start = row, 0
    if DOCS:
        run_row = tl.load(runs + row, mask=row < T, other=-1)
        start = tl.load(first + b * T + i)
    start = start // OTHER * OTHER
    own_q, own_c = _tile(q, i, T, sqt, d, OWN, BD), _tile(C, i, T, sCt, n, OWN, BN)
    bottom = tl.load(lse + head * T + row, mask=row < T, other=float("inf"))
    edge = tl.load(decays + i)
    fall = (tl.load(decays + row, mask=row < T, other=edge) - edge).to(tl.float32)
    reach = tl.exp2(fall)  # decay from the tile's first token to each row
    extra = 0.0
    if HAS_D:
        extra = tl.load(D + h).to(tl.float32)
    error = tl.zeros((OWN,), dtype=tl.float32)
    power = tl.zeros((OWN,), dtype=tl.float32)
    worth = tl.zeros((OWN,), dtype=tl.float32)
    own_d = tl.zeros((OWN,), dtype=tl.float32)
    gradient = tl.zeros((OWN, BN), dtype=tl.float32)
    for j in range(start, i, OTHER):  # tiles entirely below the diagonal
        column = j + tl.arange(0, OTHER)
        run_column = column
        if DOCS:
            run_column = tl.load(runs + column)
        other_k, other_b = _tile(k, j, T, skt, d, OTHER, BD), _tile(B, j, T, sBt, n, OTHER, BN)
        near = tl.exp2((edge - tl.load(decays + column)).to(tl.float32))
        odds = _log2_odds(tl.dot(own_q, tl.trans(other_k), input_precision=PRECISION), scale, cap, CAP)
        product = tl.dot(own_c, tl.trans(other_b), input_precision=PRECISION)
        a, m, difference = _difference(
            odds, bottom[:, None], product, reach[:, None] * near[None, :], row[:, None], column[None, :], run_row[:, None],
            run_column[None, :], extra, T, window, min_lag, False, WINDOW, DOCS, LAG, HAS_D,
        )  # fmt: skip
        error += tl.sum(difference * difference, 1)
        power += tl.sum(a * a, 1)
        if GRADIENT:
            worth += tl.sum(difference * m, 1)
            gradient = tl.dot((difference * near[None, :]).to(own_c.dtype), other_b, gradient, input_precision=PRECISION)
    gradient = gradient * reach[:, None]
    for j in range(i, tl.minimum(i + OWN, T), OTHER):
        column = j + tl.arange(0, OTHER)
        run_column = column
        if DOCS:
            run_column = tl.load(runs + column, mask=column < T, other=-2)
        other_k, other_b = _tile(k, j, T, skt, d, OTHER, BD), _tile(B, j, T, sBt, n, OTHER, BN)
        fallen = (tl.load(decays + column, mask=column < T, other=edge) - edge).to(tl.float32)
        odds = _log2_odds(tl.dot(own_q, tl.trans(other_k), input_precision=PRECISION), scale, cap, CAP)
        product = tl.dot(own_c, tl.trans(other_b), input_precision=PRECISION)
        seen = _seen(row[:, None], column[None, :], run_row[:, None], run_column[None, :], T, True, DOCS)
        if LAG:
            seen = seen & (row[:, None] - column[None, :] >= min_lag)
        decay = tl.exp2(tl.where(seen, fall[:, None] - fallen[None, :], float("-inf")))
        a, m, difference = _difference(
            odds, bottom[:, None], product, decay, row[:, None], column[None, :], run_row[:, None], run_column[None, :],
            extra, T, window, min_lag, True, WINDOW, DOCS, LAG, HAS_D,
        )  # fmt: skip
        error += tl.sum(difference * difference, 1)
        power += tl.sum(a * a, 1)
        if GRADIENT:
            worth += tl.sum(difference * m, 1)
            own_d += tl.sum(tl.where(row[:, None] == column[None, :], difference, 0.0), 1)
            gradient = tl.dot((difference * decay).to(own_c.dtype), other_b, gradient, input_precision=PRECISION)
    heads = (tl.num_programs(0) // blocks).to(tl.int64)
    tl.store(sums + head * blocks + block, tl.sum(error, 0))
    tl.store(sums + (heads + head) * blocks + block, tl.sum(power, 0))
    tl.store(sums + (2 * heads + head) * blocks + block, -2.0 * tl.sum(own_d, 0))
    if GRADIENT:
        tl.store(flow + head * T + row, -2.0 * worth, mask=row < T)
        columns = tl.arange(0, BN)
        place = dC + ((b * T + i) * H + h) * n + tl.arange(0, OWN)[:, None] * (H * n) + columns[None, :]
        tl.store(place, (-2.0 * gradient).to(dC.dtype.element_ty), mask=(row < T)[:, None] & (columns < n)[None, :])


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _columns(
    q, k, C, B, decays, D, runs, first, last, sqb, sqt, sqh, skb, skt, skh, sCb, sCt, sCh, sBb, sBt, sBh,
    lse, flow, dB, T, H, share, scale, cap, window, min_lag,
    d: tl.constexpr, n: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, LAG: tl.constexpr, HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    j = tl.program_id(0) % blocks * OWN  # the longest columns first
    column = j + tl.arange(0, OWN)
    q += b * sqb + h * sqh
    k += b * skb + (h // share) * skh
    C += b * sCb + h * sCh
    B += b * sBb + h * sBh
    decays += head * T
    lse += head * T
    runs += b * T
    run_column, stop = column, T
    if DOCS:
        run_column = tl.load(runs + column, mask=column < T, other=-2)
        stop = tl.load(last + b * T + tl.minimum(j + OWN, T) - 1) + 1
    own_k, own_b = _tile(k, j, T, skt, d, OWN, BD), _tile(B, j, T, sBt, n, OWN, BN)
    edge = tl.load(decays + tl.minimum(j + OWN, T) - 1)
    fallen = (tl.load(decays + column, mask=column < T, other=edge) - edge).to(tl.float32)
    near = tl.exp2(-fallen)  # decay from each column to the tile's last token
    extra = 0.0
    if HAS_D:
        extra = tl.load(D + h).to(tl.float32)
    worth = tl.zeros((OWN,), dtype=tl.float32)
    gradient = tl.zeros((OWN, BN), dtype=tl.float32)
    for i in range(j + OWN, stop, OTHER):  # tiles entirely below the diagonal
        row = i + tl.arange(0, OTHER)
        run_row = row
        if DOCS:
            run_row = tl.load(runs + row, mask=row < T, other=-1)
        other_q, other_c = _tile(q, i, T, sqt, d, OTHER, BD), _tile(C, i, T, sCt, n, OTHER, BN)
        bottom = tl.load(lse + row, mask=row < T, other=float("inf"))
        reach = tl.exp2((tl.load(decays + row, mask=row < T, other=edge) - edge).to(tl.float32))
        odds = _log2_odds(tl.dot(own_k, tl.trans(other_q), input_precision=PRECISION), scale, cap, CAP)
        product = tl.dot(own_b, tl.trans(other_c), input_precision=PRECISION)
        _, m, difference = _difference(
            odds, bottom[None, :], product, near[:, None] * reach[None, :], row[None, :], column[:, None], run_row[None, :],
            run_column[:, None], extra, T, window, min_lag, False, WINDOW, DOCS, LAG, HAS_D,
        )  # fmt: skip
        worth += tl.sum(difference * m, 1)
        gradient = tl.dot((difference * reach[None, :]).to(own_b.dtype), other_c, gradient, input_precision=PRECISION)
    gradient = gradient * near[:, None]
    for i in range(j, tl.minimum(j + OWN, T), OTHER):
        row = i + tl.arange(0, OTHER)
        run_row = row
        if DOCS:
            run_row = tl.load(runs + row, mask=row < T, other=-1)
        other_q, other_c = _tile(q, i, T, sqt, d, OTHER, BD), _tile(C, i, T, sCt, n, OTHER, BN)
        bottom = tl.load(lse + row, mask=row < T, other=float("inf"))
        fall = (tl.load(decays + row, mask=row < T, other=edge) - edge).to(tl.float32)
        odds = _log2_odds(tl.dot(own_k, tl.trans(other_q), input_precision=PRECISION), scale, cap, CAP)
        product = tl.dot(own_b, tl.trans(other_c), input_precision=PRECISION)
        seen = _seen(row[None, :], column[:, None], run_row[None, :], run_column[:, None], T, True, DOCS)
        if LAG:
            seen = seen & (row[None, :] - column[:, None] >= min_lag)
        decay = tl.exp2(tl.where(seen, fall[None, :] - fallen[:, None], float("-inf")))
        _, m, difference = _difference(
            odds, bottom[None, :], product, decay, row[None, :], column[:, None], run_row[None, :], run_column[:, None],
            extra, T, window, min_lag, True, WINDOW, DOCS, LAG, HAS_D,
        )  # fmt: skip
        worth += tl.sum(difference * m, 1)
        gradient = tl.dot((difference * decay).to(own_b.dtype), other_c, gradient, input_precision=PRECISION)
    tl.store(flow + ((tl.num_programs(0) // blocks).to(tl.int64) + head) * T + column, -2.0 * worth, mask=column < T)
    columns = tl.arange(0, BN)
    place = dB + ((b * T + j) * H + h) * n + tl.arange(0, OWN)[:, None] * (H * n) + columns[None, :]
    tl.store(place, (-2.0 * gradient).to(dB.dtype.element_ty), mask=(column < T)[:, None] & (columns < n)[None, :])
