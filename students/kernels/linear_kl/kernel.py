"""LM head loss in chunks of tokens: cuBLAS for the matrix products, one Triton kernel for the rest.

The logits of a chunk are written once in the type of the hidden states. One program per row reads them with running maxima
and sums for both softmaxes and the divergence in float32. It then reads the row again and overwrites the student's logits
with their gradient. The gradient of the head's weight accumulates in float32 inside the product.

Under autocast the factors of products have autocast's type. If the hidden states are float32, the logits stay in float32
(products of bfloat16 factors, summed and stored in float32), and their gradient has a bfloat16 buffer of its own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import compute_type, launch
from students.kernels.linear_kl.head import Head
from students.kernels.linear_kl.products import GradientsKept, accumulate, product

BYTES = 2**30  # of the student's and the teacher's logits of a chunk; twice that if logits are wider than their factors
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
BLOCKS = (2048, 4096, 1024)  # logits that a program reads at a time: the default, then others that are tested
WARPS = 8
LN2 = tl.constexpr(0.6931471805599453)


def linear_kl(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    targets: Tensor | None,
    divergence: str,
    temperature: float,
    ce_weight: float,
    rows: int | None = None,
    block: int | None = None,
) -> Tensor:
    """See `students.kernels.linear_kl.linear_kl`. The tokens of a chunk and the logits of a block may be set."""
    rest = (head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight, rows, block)
    return _LinearKL.apply(hidden, head.weight, head.bias, rest)


class _LinearKL(GradientsKept):
    """The loss with its gradients, which the forward pass computes chunk by chunk and keeps in place of the logits.

    This is possible because the loss is the last operation of the graph.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest):
        wanted, dtype = ctx.needs_input_grad[:3], compute_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            loss, ctx.grads = _run(hidden, weight, bias, rest, wanted, dtype)
        ctx.op, ctx.types = "linear_kl", (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss


def _run(hidden, weight, bias, rest, wanted, dtype):
    head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight, rows, block = rest
    time, vocabulary = hidden.shape[0], weight.shape[0]
    stride = triton.cdiv(vocabulary, 16) * 16  # so that rows of logits begin at aligned addresses
    kept = torch.promote_types(hidden.dtype, dtype)  # type of the logits
    written = 2 * kept.itemsize + (dtype.itemsize if kept != dtype else 0)
    rows = min(max(time, 1), rows or max(128, (1 + (kept != dtype)) * BYTES // (written * stride) // 128 * 128))
    h, w, th, tw = (part.to(dtype) for part in (hidden, weight, teacher_hidden, teacher_head.weight))
    weights = weights.float() / weights.float().sum().clamp_min(torch.finfo(torch.float32).tiny)
    student, teacher = (torch.empty((rows, stride), dtype=kept, device=h.device)[:, :vocabulary] for _ in range(2))
    gradient = student if kept == dtype else torch.empty((rows, stride), dtype=dtype, device=h.device)[:, :vocabulary]
    losses = torch.empty(time, dtype=torch.float32, device=h.device)
    d_hidden = torch.empty(hidden.shape, dtype=dtype, device=h.device) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=h.device) if wanted[1] else None
    d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=h.device) if wanted[2] else None
    block = block or min(BLOCKS[0], triton.next_power_of_2(vocabulary))
    for start in range(0, time, rows):
        piece = slice(start, min(start + rows, time))
        count = piece.stop - start
        s, t, d = student[:count], teacher[:count], gradient[:count]
        product(h[piece], w.t(), s)
        product(th[piece], tw.t(), t)
        with launch.on(h):
            _divergence[(count,)](
                s, t, d, bias if bias is not None else s, teacher_head.bias if teacher_head.bias is not None else t,
                weights[piece], targets[piece] if targets is not None else s, losses[piece], vocabulary, stride,
                float(head.scale), float(head.softcap or 1.0), float(teacher_head.scale), float(teacher_head.softcap or 1.0),
                1.0 / temperature, temperature, float(ce_weight),
                KIND=KINDS[divergence], BIAS=bias is not None, TEACHER_BIAS=teacher_head.bias is not None,
                CAP=head.softcap is not None, TEACHER_CAP=teacher_head.softcap is not None, DIVERGE=ce_weight < 1,
                ENTROPY=bool(ce_weight), WARM=temperature != 1.0, GRADIENT=any(wanted), BLOCK=block, num_warps=WARPS,
            )  # fmt: skip
        if d_hidden is not None:
            torch.mm(d, w, out=d_hidden[piece])
        if d_weight is not None:
            accumulate(d_weight, d.t(), h[piece])
        if d_bias is not None:
            d_bias += d.sum(0, dtype=torch.float32)
    return losses.sum(), (d_hidden, d_weight, d_bias)


@triton.jit
@no_type_check
def _logits(pointer, bias, v, V, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Compute softcap(scale (raw + bias)) in float32; -inf outside the vocabulary."""
    z = tl.load(pointer + v, mask=v < V, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
    z = z * scale
    if CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return tl.where(v < V, z, float("-inf"))


@triton.jit
@no_type_check
def _grow(top, total, block):
    """Update a running log-sum-exp with a block; also returns the factor that rescales earlier sums, and the new terms."""
    higher = tl.maximum(top, tl.max(block, 0))
    shrink = tl.exp(top - higher)
    terms = tl.exp(block - higher)
    return higher, total * shrink + tl.sum(terms, 0), shrink, terms


@triton.jit
@no_type_check
def _log_middle(ls, lt):
    """Compute log((exp ls + exp lt) / 2)."""
    return tl.maximum(ls, lt) + tl.log(1.0 + tl.exp(-tl.abs(ls - lt))) - LN2


@triton.jit
@no_type_check
def _divergence(
    student, teacher, gradient, bias, teacher_bias, weights, targets, losses, V, stride, scale, cap, teacher_scale,
    teacher_cap, cool, temperature, ce_weight, KIND: tl.constexpr, BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, DIVERGE: tl.constexpr, ENTROPY: tl.constexpr, WARM: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * stride
    gradient += row * stride
    lanes = tl.arange(0, BLOCK)
    low = -1e30
    top_s, top_t, top_1 = low, low, low
    sum_s, sum_t, sum_1, cross = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        v = start + lanes
        z = _logits(student, bias, v, V, scale, cap, BIAS, CAP)
        s = z * cool
        top_s, sum_s, shrink_s, terms_s = _grow(top_s, sum_s, s)
        if ENTROPY and WARM:
            top_1, sum_1, _, _ = _grow(top_1, sum_1, z)
        if DIVERGE:
            t = _logits(teacher, teacher_bias, v, V, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAP) * cool
            top_t, sum_t, shrink_t, terms_t = _grow(top_t, sum_t, t)
            if KIND == 0:
                cross = cross * shrink_t + tl.sum(tl.where(v < V, terms_t * (t - s), 0.0), 0)
            if KIND == 1:
                cross = cross * shrink_s + tl.sum(tl.where(v < V, terms_s * (s - t), 0.0), 0)
    log_s = top_s + tl.log(sum_s)
    log_t = 0.0
    own = 0.0  # for JSD: KL(student || middle)
    value = 0.0
    if DIVERGE:
        log_t = top_t + tl.log(sum_t)
        if KIND == 0:
            value = cross / sum_t - log_t + log_s
        if KIND == 1:
            value = cross / sum_s - log_s + log_t
        if KIND == 2:
            for start in range(0, V, BLOCK):
                v = start + lanes
                ls = _logits(student, bias, v, V, scale, cap, BIAS, CAP) * cool - log_s
                lt = (
                    _logits(teacher, teacher_bias, v, V, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAP) * cool
                    - log_t
                )
                middle = _log_middle(ls, lt)
                own += tl.sum(tl.where(v < V, tl.exp(ls) * (ls - middle), 0.0), 0)
                value += tl.sum(tl.where(v < V, tl.exp(lt) * (lt - middle), 0.0), 0)
            value = 0.5 * (value + own)
    weight = tl.load(weights + row)
    loss = (1.0 - ce_weight) * temperature * temperature * value
    log_1 = log_s
    target = -1
    if ENTROPY:
        if WARM:
            log_1 = top_1 + tl.log(sum_1)
        target = tl.load(targets + row).to(tl.int32)
        known = tl.maximum(target, 0) + tl.arange(0, 1)
        chosen = tl.sum(_logits(student, bias, known, V, scale, cap, BIAS, CAP), 0)
        loss += tl.where(target >= 0, ce_weight * (log_1 - chosen), 0.0)
    tl.store(losses + row, weight * loss)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            v = start + lanes
            z = _logits(student, bias, v, V, scale, cap, BIAS, CAP)
            ls = z * cool - log_s
            ps = tl.exp(ls)
            d = tl.zeros((BLOCK,), dtype=tl.float32)
            if DIVERGE:
                lt = (
                    _logits(teacher, teacher_bias, v, V, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAP) * cool
                    - log_t
                )
                if KIND == 0:
                    d = ps - tl.exp(lt)
                if KIND == 1:
                    d = ps * (ls - lt - value)
                if KIND == 2:
                    d = 0.5 * ps * (ls - _log_middle(ls, lt) - own)
                d = d * (1.0 - ce_weight) * temperature
            if ENTROPY:
                likely = tl.exp(z - log_1) - tl.where(v == target, 1.0, 0.0)
                d += tl.where(target >= 0, ce_weight, 0.0) * likely
            if CAP:
                d = d * (1.0 - (z / cap) * (z / cap))
            tl.store(gradient + v, (weight * scale * d).to(gradient.dtype.element_ty), mask=v < V)
