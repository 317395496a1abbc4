"""Other projects' kernels on the same inputs, measured next to ours where their packages can be imported.

A loader takes the case and returns a function of the inputs that the op's `draw` makes. It returns None where the peer does
not support the case, and raises ImportError where the package is missing.
"""

import torch


def _fla_simple_gla(case):
    """flash-linear-attention. On Hopper it refuses its backward pass below Triton 3.7.1, where a gradient may be wrong. The
    refusal is lifted here to get a time; the row shows the error too."""
    if case.g != case.h:
        return None
    from fla.ops.common import chunk_o
    from fla.ops.simple_gla import chunk_simple_gla

    chunk_o.TRITON_ABOVE_3_7_1 = True

    def run(x, log_a, B, C, initial_state, documents):
        return chunk_simple_gla(q=C, k=B, v=x, g=log_a, scale=1.0)[0]

    return run


def _mamba_ssm(case):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(x, log_a, B, C, initial_state, documents):
        dt = -log_a  # with A = -1 its decay is exp(-dt), and its x is multiplied by dt
        return mamba_chunk_scan_combined(x / dt[..., None].to(x.dtype), dt, -torch.ones_like(dt[0, 0]), B, C, chunk_size=256)

    return run


def _fla_conv(case):
    from fla.modules.causal_conv1d import causal_conv1d

    def run(x, weight, bias, initial, activation, documents):
        return causal_conv1d(x=x, weight=weight, bias=bias, activation=activation)[0]

    return run


def _causal_conv1d(case):
    from causal_conv1d import causal_conv1d_fn

    def run(x, weight, bias, initial, activation, documents):
        return causal_conv1d_fn(x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype), activation=activation).transpose(
            1, 2
        )

    return run


def _fla_kl(fp32: bool):
    def load(case):
        from fla.modules.fused_kl_div import ops

        def run(hidden, head, teacher_hidden, teacher_head, **rest):
            weights = (hidden, teacher_hidden, head.weight, teacher_head.weight)
            return ops.fused_kl_div_loss(*weights, accumulate_grad_in_fp32=fp32)

        return run

    return load


def _liger_kl(case):
    """liger-kernel's divergence with beta 0: the forward KL."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run(hidden, head, teacher_hidden, teacher_head, **rest):
        return LigerFusedLinearJSDFunction.apply(hidden, head.weight, teacher_hidden, teacher_head.weight, None, 0.0)

    return run


def _fla_hgrn(case):
    from fla.ops.hgrn import chunk_hgrn

    def run(x, log_a, initial_state, documents):
        return chunk_hgrn(x, log_a)[0]

    return run


def _time_last(case):
    """For peers whose layout is (b, d, t): the functions that convert our inputs and their outputs.

    Checks run on transposed copies. Timings run on the same memory, read as (b, d, t), so that no copy is timed.
    """

    def into(part):
        timed = part.shape[1] == case.t
        return part.reshape(part.shape[0], *part.shape[2:], -1) if timed else part.movedim(1, -1).contiguous()

    def back(part):
        return part.reshape(part.shape[0], part.shape[2], part.shape[1]) if part.shape[2] == case.t else part.transpose(1, 2)

    return into, back


def _accelerated_scan(case):
    """accelerated-scan takes the decay itself; its exponential is not timed, like the change of layout (`_time_last`)."""
    from accelerated_scan.scalar import scan

    into, back = _time_last(case)

    def run(x, log_a, initial_state, documents):
        decay = log_a if log_a.shape[1] == case.t else log_a.exp()
        return back(scan(into(decay), into(x)))

    return run


def _mamba_selective(case):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    into, back = _time_last(case)

    def run(x, dt, A, B, C, initial_state, documents):
        return back(selective_scan_fn(into(x), into(dt), A, into(B), into(C)))

    return run


def _flex_attention(case):
    """PyTorch's FlexAttention, compiled; its block mask is made once and is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def mask(documents, positions, b, t, device):
        def seen(row, head, query, key):
            visible = query >= key
            if case.window is not None:
                near = query - key < case.window
                visible = visible & ((near | (positions[row, key] < case.sinks)) if case.sinks else near)
            return visible if documents is None else visible & (documents[row, query] == documents[row, key])

        return create_block_mask(seen, b, None, t, t, device=device)

    def run(q, k, v, scale, softcap, window, sinks, documents, positions):
        shape = q.shape[:2]
        if shape not in masks:
            batch, time = shape
            masks[shape] = mask(documents, positions, batch, time, q.device)
        queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        return compiled(queries, keys, values, block_mask=masks[shape], scale=scale, enable_gqa=grouped).transpose(1, 2)

    return None if case.softcap or case.before else run


PEERS = {
    "attention": {"flex_attention": _flex_attention},
    "ssd": {"fla simple_gla": _fla_simple_gla, "mamba_ssm": _mamba_ssm},
    "causal_conv": {"fla causal_conv1d": _fla_conv, "causal-conv1d": _causal_conv1d},
    "linear_kl": {"fla kl, dW in bf16": _fla_kl(False), "fla kl, dW in fp32": _fla_kl(True), "liger jsd": _liger_kl},
    "linear_scan": {"fla hgrn": _fla_hgrn, "accelerated-scan": _accelerated_scan},
    "selective_scan": {"mamba_ssm": _mamba_selective},
}
