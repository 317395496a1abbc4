"""The causal convolution in Triton: forward, backward in one pass over the tensors, and a one-token step.

A program goes through time for a block of channels and keeps the last w inputs in registers. So each input is read and
converted once, except the inputs at the border between two programs. The backward pass also keeps the last w gradients
before the activation; the gradient of an input is complete w - 1 tokens later. Loads are issued eight tokens ahead, since
the compiler does not move a load before an earlier token's store, which might have the same address.
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
    """Channels of a program, its steps of eight tokens in the forward and backward pass, and its warps."""

    channels: int
    steps: int
    back_steps: int
    warps: int


CONFIGS = [  # the default first
    Config(128, 8, 16, 1),
    Config(128, 4, 16, 1),
    Config(256, 8, 16, 1),
    Config(256, 8, 16, 2),
    Config(256, 16, 32, 2),
]
AHEAD = tl.constexpr(8)  # tokens by which loads are ahead


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    documents: Tensor | None,
    initial: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `students.kernels.causal_conv.causal_conv`."""
    runs = None if documents is None else number_runs(documents).to(torch.int32)
    initial = None if initial is None else initial.to(x.dtype)
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias, initial))
    if x.shape[1] == 1 and not wanted:
        return _one_token(x, weight, bias, activation, initial)
    y = _Convolution.apply(x, weight, bias, initial, runs, activation == "silu", config or CONFIGS[0])
    return y, _tail(x, weight.shape[1] - 1, runs, initial)


def _tail(x: Tensor, tail: int, runs: Tensor | None, initial: Tensor | None) -> Tensor:
    """Compute the last inputs in PyTorch: they are few, and rarely need a gradient."""
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


def conv_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, ring: Tensor, column: Tensor
) -> Tensor:
    """See `students.kernels.causal_conv.conv_token`."""
    batch, channels = x.shape
    width = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight = launch.rows_of(x), weight.contiguous()
    block = min(1024, triton.next_power_of_2(channels))
    with launch.on(x):
        _token[(triton.cdiv(channels, block), batch)](
            x, weight, bias if bias is not None else weight, ring, column, y, x.stride(0), channels,
            W=width, BIAS=bias is not None, SILU=activation == "silu", BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, runs, silu, config):
        x, weight = launch.rows_of(x), weight.contiguous()
        initial = None if initial is None else initial.contiguous()
        batch, time, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.flags = {
            "W": weight.shape[1], "BIAS": bias is not None, "SILU": silu, "INITIAL": initial is not None,
            "DOCS": runs is not None, "BC": config.channels, "num_warps": config.warps,
        }  # fmt: skip
        ctx.config = config
        ctx.save_for_backward(x, weight, bias, initial, runs)
        grid = (triton.cdiv(channels, config.channels), triton.cdiv(time, AHEAD.value * config.steps), batch)
        with launch.on(x):
            _forward[grid](
                *_pointers(x, weight, bias, initial, runs), y, x.stride(0), x.stride(1), time, channels,
                STEPS=config.steps, **ctx.flags,
            )  # fmt: skip
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
        spans = triton.cdiv(time - first, AHEAD.value * config.back_steps)
        parts = torch.empty((batch, spans, width + 1, channels), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(channels, config.channels), spans, batch)
        with launch.on(x):
            _backward[grid](
                *_pointers(x, weight, bias, initial, runs), dy, dx, dx if d_initial is None else d_initial, parts,
                x.stride(0), x.stride(1), time, channels, first, STEPS=config.back_steps, **ctx.flags,
            )  # fmt: skip
        total = parts.sum((0, 1))
        d_weight = total[:width].t().to(weight.dtype)
        d_bias = None if bias is None else total[width].to(bias.dtype)
        return dx, d_weight, d_bias, d_initial, None, None, None


def _pointers(x, weight, bias, initial, runs):
    """Returns the inputs; a tensor that is never read stands in for a missing one."""
    return x, weight, *(x if part is None else part for part in (bias, initial, runs))


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _if_within(t, first, end, C):
    """Returns the number of valid channels at token t: all C if first <= t < end, else 0."""
    return tl.where(t >= first, tl.where(t < end, C, 0), 0)


@triton.jit
@no_type_check
def _input(x, initial, t, c, sxt, T, C, W: tl.constexpr, INITIAL: tl.constexpr):
    """Load token t of x in float32; tokens before the first come from the tail, or are zero."""
    v = _row(x, t, T, c, sxt, C).to(tl.float32)
    if INITIAL:
        v += _row(initial, t + (W - 1), W - 1, c, C, C).to(tl.float32)
    return v


@triton.jit
@no_type_check
def _row(tensor, t, end, c, stride, C):
    """Load token t of a tensor in its own type; tokens before the first and from `end` on are zero."""
    return tl.load(tensor + t.to(tl.int64) * stride + c, mask=c < _if_within(t, 0, end, C), other=0.0)


@triton.jit
@no_type_check
def _eight(tensor, t, end, c, stride, C):
    """Load tokens t to t + 7."""
    return (
        _row(tensor, t, end, c, stride, C),
        _row(tensor, t + 1, end, c, stride, C),
        _row(tensor, t + 2, end, c, stride, C),
        _row(tensor, t + 3, end, c, stride, C),
        _row(tensor, t + 4, end, c, stride, C),
        _row(tensor, t + 5, end, c, stride, C),
        _row(tensor, t + 6, end, c, stride, C),
        _row(tensor, t + 7, end, c, stride, C),
    )


@triton.jit
@no_type_check
def _run(runs, t, T, DOCS: tl.constexpr):
    """Load the run of token t; the tail has the first token's run, tokens beyond the end have none."""
    if DOCS:
        return tl.load(runs + tl.maximum(t, 0), mask=t < T, other=-1)
    return t


@triton.jit
@no_type_check
def _within(v, run, own, DOCS: tl.constexpr):
    """Returns v if both tokens belong to the same run, else zero."""
    if DOCS:
        return tl.where(run == own, v, 0.0)
    return v


@triton.jit
@no_type_check
def _taps(weight, bias, c, C, W: tl.constexpr, BIAS: tl.constexpr):
    """Load the taps at lags 0 to 3 and the bias in float32; lags that do not exist repeat the first tap."""
    w0 = tl.load(weight + c * W + (W - 1), mask=c < C, other=0.0).to(tl.float32)
    w1 = tl.load(weight + c * W + (W - 2), mask=c < C, other=0.0).to(tl.float32)
    w2, w3 = w0, w0
    if W > 2:
        w2 = tl.load(weight + c * W + (W - 3), mask=c < C, other=0.0).to(tl.float32)
    if W > 3:
        w3 = tl.load(weight + c * W, mask=c < C, other=0.0).to(tl.float32)
    offset = w0 * 0.0
    if BIAS:
        offset = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, offset


@triton.jit
@no_type_check
def _sum(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, offset, W: tl.constexpr, DOCS: tl.constexpr):
    """Compute a token's value before the activation, from inputs and runs at lags 0 to 3."""
    out = offset + w0 * x0 + w1 * _within(x1, r1, r0, DOCS)
    if W > 2:
        out += w2 * _within(x2, r2, r0, DOCS)
    if W > 3:
        out += w3 * _within(x3, r3, r0, DOCS)
    return out


@triton.jit(do_not_specialize=["T"])
@no_type_check
def _forward(
    x, weight, bias, initial, runs, y, sxb, sxt, T, C, STEPS: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, INITIAL: tl.constexpr, DOCS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * (AHEAD * STEPS)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x += b * sxb
    initial += b * (W - 1) * C
    runs += b * T
    y += b * T * C
    w0, w1, w2, w3, offset = _taps(weight, bias, c, C, W, BIAS)
    x1, r1 = _input(x, initial, start - 1, c, sxt, T, C, W, INITIAL), _run(runs, start - 1, T, DOCS)
    x2, r2, x3, r3 = x1, r1, x1, r1
    if W > 2:
        x2, r2 = _input(x, initial, start - 2, c, sxt, T, C, W, INITIAL), _run(runs, start - 2, T, DOCS)
    if W > 3:
        x3, r3 = _input(x, initial, start - 3, c, sxt, T, C, W, INITIAL), _run(runs, start - 3, T, DOCS)
    end = tl.minimum(start + AHEAD * STEPS, T)
    q0, q1, q2, q3, q4, q5, q6, q7 = _eight(x, start, end, c, sxt, C)  # the inputs of the next eight tokens
    for step in range(STEPS):
        for i in tl.static_range(AHEAD):
            t = start + step * AHEAD + i
            x0, r0 = q0.to(tl.float32), _run(runs, t, T, DOCS)
            q0, q1, q2, q3, q4, q5, q6 = q1, q2, q3, q4, q5, q6, q7
            q7 = _row(x, t + AHEAD, end, c, sxt, C)
            out = _sum(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, offset, W, DOCS)
            if SILU:
                out = out * tl.sigmoid(out)
            tl.store(y + t.to(tl.int64) * C + c, out.to(y.dtype.element_ty), mask=c < _if_within(t, 0, T, C))
            x3, x2, x1 = x2, x1, x0
            r3, r2, r1 = r2, r1, r0


@triton.jit
@no_type_check
def _slope(dy, before, SILU: tl.constexpr):
    """Compute a token's gradient before the activation, whose argument is `before`."""
    g = dy.to(tl.float32)
    if SILU:
        s = tl.sigmoid(before)
        g = g * s * (1.0 + before * (1.0 - s))
    return g


@triton.jit
@no_type_check
def _finish(
    dx, d_initial, g0, g1, g2, g3, r0, r1, r2, r3, w0, w1, w2, w3, t, start, c, T, C,
    W: tl.constexpr, INITIAL: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the input w - 1 tokens back, which token t is the last to use; g and r are at lags 0 to 3."""
    if W == 2:
        out = w0 * g1 + w1 * _within(g0, r0, r1, DOCS)
    elif W == 3:
        out = w0 * g2 + w1 * _within(g1, r1, r2, DOCS) + w2 * _within(g0, r0, r2, DOCS)
    else:
        out = w0 * g3 + w1 * _within(g2, r2, r3, DOCS) + w2 * _within(g1, r1, r3, DOCS) + w3 * _within(g0, r0, r3, DOCS)
    back = t - (W - 1)
    far = back.to(tl.int64)
    tl.store(dx + far * C + c, out.to(dx.dtype.element_ty), mask=c < _if_within(back, tl.maximum(start, 0), T, C))
    if INITIAL:
        tl.store(d_initial + (far + (W - 1)) * C + c, out.to(dx.dtype.element_ty), mask=c < _if_within(back, start, 0, C))


@triton.jit(do_not_specialize=["T", "first"])
@no_type_check
def _backward(
    x, weight, bias, initial, runs, dy, dx, d_initial, parts, sxb, sxt, T, C, first,
    STEPS: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, INITIAL: tl.constexpr, DOCS: tl.constexpr,
    BC: tl.constexpr,
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
    start = first + span * (AHEAD * STEPS)
    w0, w1, w2, w3, offset = _taps(weight, bias, c, C, W, BIAS)
    x1, r1 = _input(x, initial, start - 1, c, sxt, T, C, W, INITIAL), _run(runs, start - 1, T, DOCS)
    x2, r2, x3, r3 = x1, r1, x1, r1
    if W > 2:
        x2, r2 = _input(x, initial, start - 2, c, sxt, T, C, W, INITIAL), _run(runs, start - 2, T, DOCS)
    if W > 3:
        x3, r3 = _input(x, initial, start - 3, c, sxt, T, C, W, INITIAL), _run(runs, start - 3, T, DOCS)
    zero = w0 * 0.0
    g1, g2, g3 = zero, zero, zero  # gradients before the activation, at lags 1 to 3
    d0, d1, d2, d3, d_bias = zero, zero, zero, zero, zero
    end = tl.minimum(start + AHEAD * STEPS + (W - 1), T)  # the gradients of the last inputs need the tokens after them
    q0, q1, q2, q3, q4, q5, q6, q7 = _eight(x, start, end, c, sxt, C)
    p0, p1, p2, p3, p4, p5, p6, p7 = _eight(dy, start, end, c, C, C)
    for step in range(STEPS):
        for i in tl.static_range(AHEAD):
            t = start + step * AHEAD + i
            x0, dy0, r0 = q0.to(tl.float32), p0, _run(runs, t, T, DOCS)
            q0, q1, q2, q3, q4, q5, q6 = q1, q2, q3, q4, q5, q6, q7
            p0, p1, p2, p3, p4, p5, p6 = p1, p2, p3, p4, p5, p6, p7
            q7, p7 = _row(x, t + AHEAD, end, c, sxt, C), _row(dy, t + AHEAD, end, c, C, C)
            if INITIAL:
                x0 += _row(initial, t + (W - 1), W - 1, c, C, C).to(tl.float32)
            before = _sum(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, offset, W, DOCS)
            g0 = _slope(dy0, before, SILU)
            d_bias += g0
            d0 += g0 * x0
            d1 += g0 * _within(x1, r1, r0, DOCS)
            if W > 2:
                d2 += g0 * _within(x2, r2, r0, DOCS)
            if W > 3:
                d3 += g0 * _within(x3, r3, r0, DOCS)
            _finish(dx, d_initial, g0, g1, g2, g3, r0, r1, r2, r3, w0, w1, w2, w3, t, start, c, T, C, W, INITIAL, DOCS)
            x3, x2, x1 = x2, x1, x0
            g3, g2, g1 = g2, g1, g0
            r3, r2, r1 = r2, r1, r0
    for i in tl.static_range(W - 1):
        t = start + AHEAD * STEPS + i
        x0, r0 = _input(x, initial, t, c, sxt, T, C, W, INITIAL), _run(runs, t, T, DOCS)
        before = _sum(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, offset, W, DOCS)
        g0 = _slope(_row(dy, t, T, c, C, C), before, SILU)
        _finish(dx, d_initial, g0, g1, g2, g3, r0, r1, r2, r3, w0, w1, w2, w3, t, start, c, T, C, W, INITIAL, DOCS)
        x3, x2, x1 = x2, x1, x0
        g3, g2, g1 = g2, g1, g0
        r3, r2, r1 = r2, r1, r0
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
    """Compute one token's output and shift the tail by one token."""
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


@triton.jit
@no_type_check
def _token(
    x, weight, bias, ring, column, y, sxb, C, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute one token's output with the inputs in a ring."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < C
    at = tl.load(column)
    now = tl.load(x + b * sxb + c, mask=here, other=0.0).to(tl.float32)
    out = now * tl.load(weight + c * W + (W - 1), mask=here, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    ring += b * W * C
    for lag in tl.static_range(1, W):
        v = tl.load(ring + ((at + (W - lag)) % W) * C + c, mask=here, other=0.0).to(tl.float32)
        out += v * tl.load(weight + c * W + (W - 1 - lag), mask=here, other=0.0).to(tl.float32)
    tl.store(ring + (at % W) * C + c, now.to(ring.dtype.element_ty), mask=here)
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + b * C + c, out.to(y.dtype.element_ty), mask=here)
