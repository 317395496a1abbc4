"""The causal convolution in Triton: forward, backward in one pass over the tensors, and one token at a time.

A program handles a tile of tokens and channels, channels contiguous. Shifted tiles of the same rows come out of the cache.
The backward pass makes the pre-activation again: a token's gradient needs it at the w - 1 tokens after it too.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.documents import runs as number_runs


class Config(NamedTuple):
    """Tokens and channels of a tile, tiles a backward program goes through, warps."""

    time: int
    channels: int
    tiles: int
    warps: int


CONFIGS = [Config(32, 64, 8, 4), Config(16, 64, 16, 4), Config(16, 128, 16, 4)]  # the default first


def causal_conv(x, weight, bias, activation, documents, initial, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """See `students.kernels.causal_conv.causal_conv`."""
    runs = None if documents is None else number_runs(documents).to(torch.int32)
    initial = None if initial is None else initial.to(x.dtype)
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias, initial))
    if x.shape[1] == 1 and not wanted:
        return _one_token(x, weight, bias, activation, initial)
    y = _Convolution.apply(x, weight, bias, initial, runs, activation == "silu", config or CONFIGS[0])
    return y, _tail(x, weight.shape[1] - 1, runs, initial)


def _tail(x: Tensor, tail: int, runs: Tensor | None, initial: Tensor | None) -> Tensor:
    """The last inputs, in PyTorch: few, and rarely differentiated."""
    before = x.new_zeros(x.shape[0], tail, x.shape[2]) if initial is None else initial
    last = torch.cat([before, x[:, -tail:]], 1)[:, -tail:]
    if runs is None:
        return last
    ids = torch.cat([runs[:, :1].expand(-1, tail), runs[:, -tail:]], 1)[:, -tail:]
    return last * (ids == runs[:, -1:])[..., None]


def _one_token(x, weight, bias, activation, initial) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    width = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tail = torch.empty((batch, width - 1, channels), dtype=x.dtype, device=x.device)
    x, weight = launch.rows_of(x), weight.contiguous()
    before = tail if initial is None else initial.contiguous()
    block = min(1024, triton.next_power_of_2(channels))
    with launch.on(x):
        _step[(triton.cdiv(channels, block), batch)](
            x, weight, bias if bias is not None else weight, before, y, tail, x.stride(0), channels,
            W=width, BIAS=bias is not None, SILU=activation == "silu", INITIAL=initial is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y, tail


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, runs, silu, config):
        x, weight = launch.rows_of(x), weight.contiguous()
        initial = None if initial is None else initial.contiguous()
        batch, time, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.flags = {
            "W": weight.shape[1], "BIAS": bias is not None, "SILU": silu, "INITIAL": initial is not None,
            "DOCS": runs is not None, "BT": config.time, "BC": config.channels, "num_warps": config.warps,
        }  # fmt: skip
        ctx.config = config
        ctx.save_for_backward(x, weight, bias, initial, runs)
        grid = (triton.cdiv(channels, config.channels), triton.cdiv(time, config.time), batch)
        with launch.on(x):
            _forward[grid](
                *_pointers(x, weight, bias, initial, runs), y, x.stride(0), x.stride(1), time, channels, **ctx.flags
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial, runs = ctx.saved_tensors
        config, width = ctx.config, weight.shape[1]
        batch, time, channels = x.shape
        dy = dy.to(x.dtype).contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_initial = None if initial is None else torch.empty(initial.shape, dtype=x.dtype, device=x.device)
        first = 0 if initial is None else 1 - width  # the tokens before the first have gradients too
        spans = triton.cdiv(time - first, config.time * config.tiles)
        parts = torch.empty((batch, spans, width + 1, channels), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(channels, config.channels), spans, batch)
        with launch.on(x):
            _backward[grid](
                *_pointers(x, weight, bias, initial, runs), dy, dx, dx if d_initial is None else d_initial, parts,
                x.stride(0), x.stride(1), time, channels, first, TILES=config.tiles, **ctx.flags,
            )  # fmt: skip
        total = parts.sum((0, 1))
        d_weight = total[:width].t().to(weight.dtype)
        d_bias = None if bias is None else total[width].to(bias.dtype)
        return dx, d_weight, d_bias, d_initial, None, None, None


def _pointers(x, weight, bias, initial, runs):
    """The inputs, with a pointer that is never read for each that is not there."""
    return x, weight, *(x if part is None else part for part in (bias, initial, runs))


# Kernels. no_type_check keeps the tests' shape checker, which cannot read them, away.


@triton.jit
@no_type_check
def _inputs(x, initial, t, c, sxt, T, C, W: tl.constexpr, INITIAL: tl.constexpr):
    """Rows t of x in float32; before the first token those of the tail, or zeros."""
    here = (c < C)[None, :]
    rows = t.to(tl.int64)[:, None]
    v = tl.load(x + rows * sxt + c[None, :], mask=((t >= 0) & (t < T))[:, None] & here, other=0.0).to(tl.float32)
    if INITIAL:
        before = ((t < 0) & (t > -W))[:, None] & here
        v += tl.load(initial + (rows + (W - 1)) * C + c[None, :], mask=before, other=0.0).to(tl.float32)
    return v


@triton.jit
@no_type_check
def _ids(runs, t, T, DOCS: tl.constexpr):
    """The run of each token; the tail belongs to the first, what lies beyond the end to none."""
    run = t
    if DOCS:
        run = tl.load(runs + tl.maximum(t, 0), mask=t < T, other=-1)
    return run


@triton.jit
@no_type_check
def _within(v, run, own, DOCS: tl.constexpr):
    """v where both tokens are of one run, else zero."""
    if DOCS:
        return tl.where((run == own)[:, None], v, 0.0)
    return v


@triton.jit
@no_type_check
def _tap(weight, c, C, lag: tl.constexpr, W: tl.constexpr):
    return tl.load(weight + c * W + (W - 1 - lag), mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
@no_type_check
def _forward(
    x, weight, bias, initial, runs, y, sxb, sxt, T, C, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    INITIAL: tl.constexpr, DOCS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x += b * sxb
    initial += b * (W - 1) * C
    runs += b * T
    own = _ids(runs, t, T, DOCS)
    out = tl.zeros((BT, BC), dtype=tl.float32)
    if BIAS:
        out += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(W):
        v = _inputs(x, initial, t - lag, c, sxt, T, C, W, INITIAL)
        out += _tap(weight, c, C, lag, W) * _within(v, _ids(runs, t - lag, T, DOCS), own, DOCS)
    if SILU:
        out = out * tl.sigmoid(out)
    place = y + b * T * C + t.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
@no_type_check
def _slope(dy, t, c, T, C, x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, offset,
           W: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr):  # fmt: skip
    """The gradient before the activation at tokens t, whose inputs at lags 0 to 3 are x0 to x3 and runs r0 to r3."""
    mask = ((t >= 0) & (t < T))[:, None] & (c < C)[None, :]
    g = tl.load(dy + t.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        pre = offset + w0 * x0 + w1 * _within(x1, r1, r0, DOCS)
        if W > 2:
            pre += w2 * _within(x2, r2, r0, DOCS)
        if W > 3:
            pre += w3 * _within(x3, r3, r0, DOCS)
        s = tl.sigmoid(pre)
        g = g * s * (1.0 + pre * (1.0 - s))
    return g


@triton.jit(do_not_specialize=["T", "first"])
@no_type_check
def _backward(
    x, weight, bias, initial, runs, dy, dx, d_initial, parts, sxb, sxt, T, C, first,
    TILES: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, INITIAL: tl.constexpr, DOCS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    span = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x += b * sxb
    initial += b * (W - 1) * C
    runs += b * T
    dy += b * T * C
    dx += b * T * C
    d_initial += b * (W - 1) * C
    offset = tl.zeros((1, BC), dtype=tl.float32)
    if BIAS:
        offset += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w0 = _tap(weight, c, C, 0, W)
    w1 = _tap(weight, c, C, 1, W)
    w2, w3 = w0, w0
    if W > 2:
        w2 = _tap(weight, c, C, 2, W)
    if W > 3:
        w3 = _tap(weight, c, C, 3, W)
    d0 = tl.zeros((BC,), dtype=tl.float32)
    d1, d2, d3, d_bias = d0, d0, d0, d0
    for tile in range(TILES):
        t = first + (span * TILES + tile) * BT + tl.arange(0, BT)
        # a: inputs and runs at lags 0 to 3;  b: of the tokens after
        a0, a1 = _inputs(x, initial, t, c, sxt, T, C, W, INITIAL), _inputs(x, initial, t - 1, c, sxt, T, C, W, INITIAL)
        b1 = _inputs(x, initial, t + 1, c, sxt, T, C, W, INITIAL)
        ra0, ra1, rb1 = _ids(runs, t, T, DOCS), _ids(runs, t - 1, T, DOCS), _ids(runs, t + 1, T, DOCS)
        a2, a3, b2, b3, ra2, ra3, rb2, rb3 = a0, a0, a0, a0, ra0, ra0, ra0, ra0
        if W > 2:
            a2, b2 = (
                _inputs(x, initial, t - 2, c, sxt, T, C, W, INITIAL),
                _inputs(x, initial, t + 2, c, sxt, T, C, W, INITIAL),
            )
            ra2, rb2 = _ids(runs, t - 2, T, DOCS), _ids(runs, t + 2, T, DOCS)
        if W > 3:
            a3, b3 = (
                _inputs(x, initial, t - 3, c, sxt, T, C, W, INITIAL),
                _inputs(x, initial, t + 3, c, sxt, T, C, W, INITIAL),
            )
            ra3, rb3 = _ids(runs, t - 3, T, DOCS), _ids(runs, t + 3, T, DOCS)
        g = _slope(dy, t, c, T, C, a0, a1, a2, a3, ra0, ra1, ra2, ra3, w0, w1, w2, w3, offset, W, SILU, DOCS)
        out = w0 * g
        d_bias += tl.sum(g, 0)
        d0 += tl.sum(g * a0, 0)
        d1 += tl.sum(g * _within(a1, ra1, ra0, DOCS), 0)
        if W > 2:
            d2 += tl.sum(g * _within(a2, ra2, ra0, DOCS), 0)
        if W > 3:
            d3 += tl.sum(g * _within(a3, ra3, ra0, DOCS), 0)
        g = _slope(dy, t + 1, c, T, C, b1, a0, a1, a2, rb1, ra0, ra1, ra2, w0, w1, w2, w3, offset, W, SILU, DOCS)
        out += w1 * _within(g, rb1, ra0, DOCS)
        if W > 2:
            g = _slope(dy, t + 2, c, T, C, b2, b1, a0, a1, rb2, rb1, ra0, ra1, w0, w1, w2, w3, offset, W, SILU, DOCS)
            out += w2 * _within(g, rb2, ra0, DOCS)
        if W > 3:
            g = _slope(dy, t + 3, c, T, C, b3, b2, b1, a0, rb3, rb2, rb1, ra0, w0, w1, w2, w3, offset, W, SILU, DOCS)
            out += w3 * _within(g, rb3, ra0, DOCS)
        rows = t.to(tl.int64)[:, None]
        here = (c < C)[None, :]
        tl.store(dx + rows * C + c[None, :], out.to(dx.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & here)
        if INITIAL:
            before = (t < 0)[:, None] & here
            tl.store(d_initial + (rows + (W - 1)) * C + c[None, :], out.to(dx.dtype.element_ty), mask=before)
    parts += (b * tl.num_programs(1) + span) * (W + 1) * C + c
    tl.store(parts + (W - 1) * C, d0, mask=c < C)
    tl.store(parts + (W - 2) * C, d1, mask=c < C)
    if W > 2:
        tl.store(parts + (W - 3) * C, d2, mask=c < C)
    if W > 3:
        tl.store(parts + (W - 4) * C, d3, mask=c < C)
    tl.store(parts + W * C, d_bias, mask=c < C)


@triton.jit
@no_type_check
def _step(
    x, weight, bias, before, y, tail, sxb, C, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its output, and the tail moved on by it."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < C
    now = tl.load(x + b * sxb + c, mask=here, other=0.0).to(tl.float32)
    out = now * tl.load(weight + c * W + (W - 1), mask=here, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    tail += b * (W - 1) * C
    before += b * (W - 1) * C
    for i in tl.static_range(W - 1):
        if INITIAL:
            v = tl.load(before + i * C + c, mask=here, other=0.0).to(tl.float32)
        else:
            v = tl.zeros((BLOCK,), dtype=tl.float32)
        out += v * tl.load(weight + c * W + i, mask=here, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(tail + (i - 1) * C + c, v.to(tail.dtype.element_ty), mask=here)
    tl.store(tail + (W - 2) * C + c, now.to(tail.dtype.element_ty), mask=here)
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + b * C + c, out.to(y.dtype.element_ty), mask=here)
