"""Every op against its definition, forward and all gradients, in float64; then narrower types against that."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch

import students
from students import kernels
from students.kernels import attention, causal_conv, linear_kl, matrix_orientation, ssd
from students.kernels.attention import cases as attention_cases
from students.kernels.causal_conv import cases as conv_cases
from students.kernels.linear_kl import cases as kl_cases
from students.kernels.matrix_orientation import cases as orientation_cases
from students.kernels.op import all_ops, folders
from students.kernels.ssd import cases as ssd_cases
from students.kernels.ssd.reference import ssd_recurrence
from tests.conftest import TOLERANCE


def draw(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def packed_documents(batch, time, packed):
    """Documents of random lengths, another draw a row; None where nothing is packed."""
    if not packed:
        return None
    return (torch.rand(batch, time) < 0.15).long().cumsum(1)


def assert_close(actual, expected, tolerance=TOLERANCE[torch.float64], name=""):
    scale = expected.abs().max().clamp_min(1.0)
    assert (actual - expected).abs().max() <= tolerance * scale, name


def assert_same_gradients(outputs, expected, inputs):
    weights = [torch.randn_like(output) for output in expected]
    losses = [sum((o * w).sum() for o, w in zip(group, weights, strict=True)) for group in (outputs, expected)]
    found, wanted = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_close(a, b, name=f"gradient {index}")


# what an op says of itself


def tiny(op):
    """A case of an op that its reference in float64, and Triton's interpreter, are done with at once."""
    case = op.small(op.cases[0])
    sizes = {"t": 20, "v": 30, "d": 8, "e": 8, "c": 64}
    return case._replace(
        **{field: size for field, size in sizes.items() if hasattr(case, field) and getattr(case, "t", 1) > 1}
    )


@pytest.mark.parametrize("folder", folders())
def test_a_folder_with_a_kernel_describes_it(folder):
    package = import_module(f"students.kernels.{folder}")
    described = getattr(import_module(f"{package.__name__}.cases"), "OPS", {})
    assert bool(described) == (Path(package.__file__).with_name("kernel.py").exists())
    for name, op in described.items():
        assert name.startswith(folder) and op.target.startswith(f"{package.__name__}.")
        assert callable(op.kernel()) and name in package.CHECKED
        assert all_ops()[name] is op


@pytest.mark.parametrize("name", all_ops())
def test_an_op_draws_its_smallest_case_and_its_reference_takes_it(name):
    op = all_ops()[name]
    leaves, fixed = op.draw(tiny(op), torch.float32, "cpu")
    outputs = op.adapted(op.reference)(**leaves, **fixed)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert torch.isfinite(first).all() and op.configs(tiny(op), torch.bfloat16)


def test_what_a_student_runs_imports_no_cases():
    """Portable exports take along whatever is imported."""
    folder = Path(students.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.name != "cases.py":
                assert node.module != "students.kernels.op" and not node.module.endswith(".cases"), path
                assert not {"cases", "op"} & {alias.name for alias in node.names}, path


# ssd


def ssd_inputs(case):
    x, B, C = (
        draw(case.b, case.t, case.h, case.p),
        draw(case.b, case.t, case.g, case.n),
        draw(case.b, case.t, case.g, case.n),
    )
    log_a = (-torch.rand(case.b, case.t, case.h, dtype=torch.float64)).requires_grad_()
    return x, log_a, B, C, packed_documents(case.b, case.t, case.packed), draw(case.b, case.h, case.p, case.n)


@pytest.mark.parametrize("case", [*ssd_cases.TEST, ssd_cases.LONG], ids=str)
def test_ssd(case):
    x, log_a, B, C, documents, state = ssd_inputs(case)
    found = ssd.ssd(x, log_a, B, C, documents, state)
    wanted = ssd_recurrence(x, log_a, B, C, documents, state)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, (x, log_a, B, C, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_narrow(dtype):
    x, log_a, B, C, documents, state = (
        part if part is None or not part.is_floating_point() else part.detach().to(dtype)
        for part in ssd_inputs(ssd_cases.TEST[3])
    )
    y, final = ssd.ssd(x, log_a, B, C, documents, state)
    wanted, wanted_final = ssd_recurrence(x, log_a, B, C, documents, state)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y.double(), wanted, TOLERANCE[dtype])
    assert_close(final.double(), wanted_final, TOLERANCE[torch.float32])


def test_ssd_survives_decay_to_nothing():
    case = ssd_cases.TEST[1]
    x, _, B, C, documents, state = ssd_inputs(case)
    log_a = torch.full((case.b, case.t, case.h), -300.0, dtype=torch.float64, requires_grad=True)
    y, final = ssd.ssd(x, log_a, B, C, documents, state)
    (y.sum() + final.sum()).backward()
    assert_close(y, ssd_recurrence(x, log_a, B, C, documents, state)[0])
    assert all(torch.isfinite(part.grad).all() for part in (x, log_a, B, C, state))


def test_ssd_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        ssd.ssd(draw(1, 2, 4, 2), draw(1, 2, 4), draw(1, 2, 3, 2), draw(1, 2, 3, 2))


# causal_conv


@pytest.mark.parametrize("case", conv_cases.TEST, ids=str)
def test_causal_conv(case):
    x, weight, bias, initial = (
        draw(case.b, case.t, case.c),
        draw(case.c, case.w),
        draw(case.c),
        draw(case.b, case.w - 1, case.c),
    )
    documents = packed_documents(case.b, case.t, case.packed)
    found = causal_conv.causal_conv(x, weight, bias, case.activation, documents, initial)
    wanted = conv_by_definition(x, weight, bias, case.activation, documents, initial)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, (x, weight, bias, initial))


def conv_by_definition(x, weight, bias, activation, documents, initial):
    batch, time, _ = x.shape
    width = weight.shape[1]
    ids = torch.zeros(batch, time, dtype=torch.long) if documents is None else documents
    ids = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)
    joined = torch.cat([initial, x], 1)
    rows = []
    for row in range(batch):
        outputs = []
        for t in range(width - 1, time + width - 1):
            taps = [weight[:, width - 1 - i] * joined[row, t - i] for i in range(width) if ids[row, t - i] == ids[row, t]]
            outputs.append(bias + sum(taps))
        rows.append(torch.stack(outputs))
    y = torch.stack(rows)
    kept = (ids[:, time:] == ids[:, -1:])[..., None]
    return torch.nn.functional.silu(y) if activation == "silu" else y, joined[:, time:] * kept


def test_causal_conv_refuses():
    with pytest.raises(ValueError, match="'relu' is unknown"):
        causal_conv.causal_conv(draw(1, 3, 2), draw(2, 4), activation="relu")
    with pytest.raises(ValueError, match="initial holds 2 tokens"):
        causal_conv.causal_conv(draw(1, 3, 2), draw(2, 4), initial=draw(1, 2, 2))


# attention


@pytest.mark.parametrize("case", attention_cases.TEST, ids=str)
def test_attention(case):
    keys = case.t + case.before
    q, k, v = draw(case.b, case.t, case.h, case.d), draw(case.b, keys, case.kv, case.d), draw(case.b, keys, case.kv, 3)
    documents = packed_documents(case.b, keys, True) if case.packed else torch.zeros(case.b, keys, dtype=torch.long)
    positions = kernels.documents.positions(documents)
    found = attention.attention(
        q,
        k,
        v,
        scale=0.3,
        softcap=case.softcap,
        window=case.window,
        sinks=case.sinks,
        documents=documents,
        positions=positions if case.sinks else None,
    )
    wanted = attention_by_definition(q, k, v, case, documents, positions)
    assert_close(found, wanted, 1e-6 if case.softcap else TOLERANCE[torch.float64])
    if case.softcap is None:
        assert_same_gradients((found,), (wanted,), (q, k, v))


def attention_by_definition(q, k, v, case, documents, positions):
    keys = case.t + case.before
    k, v = (part.repeat_interleave(case.h // case.kv, 2) for part in (k, v))
    rows = torch.arange(case.before, keys)[:, None]
    columns = torch.arange(keys)
    seen = (columns <= rows) & (documents[:, case.before :, None] == documents[:, None])
    if case.window is not None:
        seen = seen & ((rows - columns < case.window) | (positions[:, None] < case.sinks))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return torch.einsum("bhts,bshp->bthp", logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def test_attention_takes_values_of_every_head_beside_grouped_keys():
    q, k, v = draw(1, 9, 4, 2), draw(1, 9, 2, 2), draw(1, 9, 4, 2)
    found = attention.attention(q, k, v, scale=1.0, window=3)
    assert_close(found, attention.attention(q, k.repeat_interleave(2, 2), v, scale=1.0, window=3))


def test_attention_refuses():
    q = draw(1, 4, 1, 2)
    with pytest.raises(ValueError, match="window of 0 tokens"):
        attention.attention(q, q, q, scale=1.0, window=0)
    with pytest.raises(ValueError, match="2 sinks need"):
        attention.attention(q, q, q, scale=1.0, window=2, sinks=2)
    with pytest.raises(ValueError, match="4 queries cannot be the last of 3 keys"):
        attention.attention(q, q[:, 1:], q[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="3 heads cannot share 2 key heads"):
        attention.attention(draw(1, 4, 3, 2), draw(1, 4, 2, 2), draw(1, 4, 2, 2), scale=1.0)


def test_attention_never_asks_for_cudnn(monkeypatch):
    """Its backward pass is wrong where the layout of the output's gradient changes: see the reference."""
    allowed = []

    def seen(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.zeros_like(inputs[0])

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", seen)
    q = draw(1, 300, 1, 2)
    for options in ({}, {"window": 2}, {"window": 2, "documents": torch.zeros(1, 300, dtype=torch.long)}):
        attention.attention(q, q, q, scale=1.0, **options)
    assert allowed == [False] * 3


# matrix_orientation


@pytest.mark.parametrize("case", orientation_cases.TEST, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_matrix_orientation(case, softcap):
    q, k = draw(case.b, case.t, case.h, case.d, grad=False), draw(case.b, case.t, case.kv, case.d, grad=False)
    C, B, D = draw(case.b, case.t, case.h, case.n), draw(case.b, case.t, case.h, case.n), draw(case.h)
    log_a = (-torch.rand(case.b, case.t, case.h, dtype=torch.float64)).requires_grad_()
    documents = packed_documents(case.b, case.t, case.packed)
    options = {"scale": 0.4, "softcap": softcap, "window": case.window, "min_lag": case.min_lag}
    found = matrix_orientation.orientation_error(q, k, C, B, log_a, D, documents=documents, **options)
    wanted = orientation_by_definition(q, k, C, B, log_a, D, documents, **options)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found[:1], wanted[:1], (C, B, log_a, D))


def orientation_by_definition(q, k, C, B, log_a, D, documents, scale, softcap, window, min_lag):
    time = q.shape[1]
    ids = torch.zeros(q.shape[:2], dtype=torch.long) if documents is None else documents
    lag = torch.arange(time)[:, None] - torch.arange(time)
    same = ((lag >= 0) & (ids[:, :, None] == ids[:, None]))[:, None]
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = same if window is None else same & (lag < window)
    A = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    total = log_a.cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~same, -torch.inf).exp()
    M = decay * torch.einsum("bthn,bshn->bhts", C, B) + torch.diag_embed(D[:, None].expand(-1, time))
    counted = lag >= min_lag
    return ((A - M) * counted).square().sum((2, 3)), (A * counted).square().sum((2, 3))


def test_matrix_orientation_memory_is_linear():
    """Twice the length takes about twice the memory, not four times: no t x t tensor is kept for the backward pass."""
    held = [_saved_bytes(time) for time in (512, 1024)]
    assert held[1] < 2.5 * held[0]


def _saved_bytes(time):
    kept = {}  # by storage: every block keeps the same inputs

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, C, B, log_a = draw(1, time, 2, 4), draw(1, time, 2, 4), draw(1, time, 2, 4), -torch.rand(1, time, 2).double()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        error, _ = matrix_orientation.orientation_error(q, q, C, B, log_a, scale=1.0)
    assert error.requires_grad
    return sum(kept.values())


# linear_kl


@pytest.mark.parametrize("case", kl_cases.TEST, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("temperature", "ce_weight", "softcap"), [(1.0, 0.0, None), (2.0, 0.3, None), (1.0, 0.0, 2.0)])
def test_linear_kl(case, divergence, temperature, ce_weight, softcap):
    hidden, weight, bias = draw(case.t, case.d), draw(case.v, case.d), draw(case.v)
    teacher_hidden, teacher_weight = draw(case.t, case.e, grad=False), draw(case.v, case.e, grad=False)
    weights, targets = torch.rand(case.t, dtype=torch.float64) + 0.1, torch.randint(0, case.v, (case.t,))
    heads = linear_kl.Head(weight, bias, 0.7, softcap), linear_kl.Head(teacher_weight)
    found = linear_kl.linear_kl(
        hidden,
        heads[0],
        teacher_hidden,
        heads[1],
        weights,
        targets,
        divergence=divergence,
        temperature=temperature,
        ce_weight=ce_weight,
    )
    logits = 0.7 * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = kl_by_definition(
        logits, teacher_hidden @ teacher_weight.T, weights, targets, divergence, temperature, ce_weight
    )
    assert_close(found, wanted)
    assert_same_gradients((found,), (wanted,), (hidden, weight, bias))


def kl_by_definition(logits, teacher_logits, weights, targets, divergence, temperature, ce_weight):
    student, teacher = ((part / temperature).softmax(-1) for part in (logits, teacher_logits))

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    middle = (student + teacher) / 2
    value = {
        "forward_kl": kl(teacher, student),
        "reverse_kl": kl(student, teacher),
        "jsd": (kl(teacher, middle) + kl(student, middle)) / 2,
    }[divergence]
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    terms = (1 - ce_weight) * temperature**2 * value + ce_weight * ce
    return (weights * terms).sum() / weights.sum()


def test_linear_kl_frozen_head_gets_no_gradient():
    hidden, weight = draw(5, 4), draw(7, 4, grad=False)
    loss = linear_kl.linear_kl(hidden, linear_kl.Head(weight), draw(5, 4, grad=False), linear_kl.Head(weight), torch.ones(5))
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_linear_kl_refuses():
    head, other = linear_kl.Head(draw(7, 4)), linear_kl.Head(draw(8, 4))
    with pytest.raises(ValueError, match="7 entries and the teacher's 8"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), other, torch.ones(2))
    with pytest.raises(ValueError, match="'mse' is unknown"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), head, torch.ones(2), divergence="mse")
    with pytest.raises(ValueError, match="no targets"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), head, torch.ones(2), ce_weight=0.5)


# the switch


def test_backend_switch():
    with pytest.raises(ValueError, match="'cuda' does not exist"), kernels.backend("cuda"):
        pass
    case = ssd_cases.TEST[0]
    x, log_a, B, C, _, _ = ssd_inputs(case)
    with kernels.backend("reference"):
        ssd.ssd(x, log_a, B, C)
    with kernels.backend("triton"), pytest.raises(ValueError, match="float16, bfloat16 or float32, not float64"):
        ssd.ssd(x, log_a, B, C)
