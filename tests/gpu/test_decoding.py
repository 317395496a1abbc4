"""`make test-gpu-decoding`: tokens replayed as a graph are tokens decoded as they come, of students and teachers."""

from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import students
from distill.evaluation import speed, suites
from students import mixers
from students.kernels.delta_token import cases as delta_cases
from students.kernels.delta_token import kernel as delta_kernel
from students.kernels.lru_token import cases as lru_cases
from students.kernels.rotary_token import cases as rotary_cases
from students.kernels.selective_token import cases as selective_cases
from students.kernels.ssm_token import cases as ssm_cases
from students.kernels.ssm_token import kernel as ssm_kernel
from students.kernels.token_linear import cases as linear_cases
from students.kernels.token_linear import kernel as linear_kernel
from students.kernels.window_token import cases as window_cases
from students.mixers.windowed import Windowed
from students.static_cache import GraphError
from tests.students import test_token_kernels as token_kernels
from tests.students.decoding_cases import (
    CASES,
    FAMILIES,
    check,
    family_models,
    filled,
    near,
    new_cache,
    ordinary,
    padded,
    student_of,
)
from tests.students.layouts import LAYOUTS, text
from tests.teachers.tiny import EVERY, tiny_teacher

pytestmark = pytest.mark.gpu

STEPS = 20
PROMPTS = ((1, 14), (2, 3))
# Relative, of logits. Each path rounds the states that it goes on from: ordinary calls in bf16 are up to 7e-2 off float32.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
every_form = pytest.mark.parametrize("form", TOLERANCE)


def placed(model, form):
    return (speed.in_bfloat16(model) if form == "bf16" else model).cuda()


@every_form
@pytest.mark.parametrize("case", CASES)
def test_a_graph_is_ordinary_decoding(teacher, case, form):
    student = placed(student_of(teacher, *CASES[case]), form)
    for rows, prompt in PROMPTS:
        check(student, text(rows, prompt + STEPS + 5).cuda(), prompt, TOLERANCE[form])


@every_form
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EVERY and name != "falcon-7b"])
def test_families_and_their_teachers(name, form):
    for model in family_models(name):
        for rows, prompt in PROMPTS:
            ids = torch.randint(1, 96, (rows, prompt + STEPS + 5), device="cuda")
            check(placed(model, form), ids, prompt, TOLERANCE[form])


@torch.no_grad()
def test_a_graph_is_the_same_function_run_as_it_is(teacher):
    """No difference but the replay: every operation the same, on the same shapes."""
    student = placed(student_of(teacher, *CASES["mixed"]), "bf16")
    ids, mask = text(2, 40).cuda(), padded(2, 9).cuda()
    caches = [new_cache(student) for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], mask, cache)
    both = [
        students.Decoder(student, cache, STEPS, mask, graph=graph)
        for cache, graph in zip(caches, (True, False), strict=True)
    ]
    for at in range(9, 9 + STEPS):
        found, wanted = (decode(ids[:, at : at + 1]) for decode in both)
        near(found, wanted, 1e-3)


def test_what_a_capture_takes_back_is_there_before_the_first_token(teacher, monkeypatch):
    """On a GPU that others keep busy, too: the capture's stream is late here."""
    undone = students.Decoder._undone

    @contextmanager
    def late(decoder, **options):
        with undone(decoder, **options):
            yield
            torch.cuda._sleep(100_000_000)  # cycles: 50 ms

    monkeypatch.setattr(students.Decoder, "_undone", late)
    student = placed(student_of(teacher, *CASES["parallel heads"]), "fp32")
    check(student, text(1, 14 + STEPS + 5).cuda(), 14, TOLERANCE["fp32"])


@pytest.mark.parametrize("case", ["stock", "hymba", "griffin"])
def test_generate(teacher, case):
    student = student_of(teacher, *CASES[case]).cuda()
    ids, mask = text(2, 13).cuda(), padded(2, 13).cuda()
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    made = [student.generate(ids, custom_generate=function, **options) for function in (None, students.replayed)]
    assert torch.equal(*made)
    sampled = student.generate(ids, custom_generate=students.replayed, **options | {"do_sample": True})
    assert sampled.shape == made[0].shape


@pytest.mark.parametrize("name", [name for name in ("falcon-7b", "mixtral-8x7b-v0.1", "qwen3-30b-a3b") if name in EVERY])
def test_what_waits_for_the_gpu_is_named_and_harms_nothing(name):
    """Falcon's own attention indexes by a list. Experts are captured where transformers can, else named too."""
    model = tiny_teacher(name).model.cuda()
    ids = torch.randint(1, 96, (1, 9 + STEPS + 5), device="cuda")
    cache, untouched = (filled(model, ids[:, :9], new_cache(model)) for _ in range(2))
    try:
        students.Decoder(model, cache, STEPS)
    except GraphError as error:
        assert "cannot be captured as a CUDA graph" in str(error) and "decode without graphs" in str(error)
        near(*(ordinary(model, ids[:, 9:10], None, one) for one in (cache, untouched)), 1e-5)
        torch.rand(4, device="cuda")
    else:
        assert name != "falcon-7b"
        check(model, ids, 9, 1e-3)


def test_speed_counts_both_ways(teacher):
    for model in (teacher.model, student_of(teacher, *CASES["stock"])):
        model.cuda()
        suite = suites.SUITES["standard"]
        cell = speed._cell(speed.in_bfloat16(model), 64, suite.batches[0])
        assert cell["graph_decode_tokens_per_second"] > 0 and cell["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_kernels_of_one_token(dtype):
    """Every shape of the kernels that only decoding runs, and every shipped configuration, against float64."""
    tolerance = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for case in linear_cases.GPU:
        token_kernels.check_linear(case, dtype, "cuda", tolerance, linear_kernel.CONFIGS)
    for case in ssm_cases.GPU:
        token_kernels.check_ssm(case, dtype, "cuda", tolerance, ssm_kernel.CONFIGS)
    for case in delta_cases.GPU:
        token_kernels.check_delta(case, dtype, "cuda", tolerance, delta_kernel.CONFIGS)
    for case in window_cases.GPU:
        token_kernels.check_window(case, dtype, "cuda", tolerance)
    for cases in (selective_cases, lru_cases):
        for op in cases.OPS.values():
            for case in cases.GPU:
                token_kernels.check_op(op, case, dtype, "cuda", tolerance)
    for case in rotary_cases.GPU:
        token_kernels.check_rotary(case, dtype, "cuda", tolerance)


# Kernels that a captured token may run: so many a layer by its mixer, and so many beside the layers. Seen on an H100 at
# Llama-3.2-1B's shape: attention 6, discrete Mamba-2 5, stock 6, discrete Mamba-2 beside a window 7, beside the layers 15.
BESIDE = 24
LAYER = {"kept": 9, "discrete_mamba2": 6, "mamba2": 8, "gated_deltanet": 8, "attention": 10}
WINDOW = 3  # more, where a window stands beside
COMPOSED = 90  # of layers that are made of branches with norms or gates between them, or run other operations


def most_kernels(student):
    """The bound of a student."""
    most = BESIDE
    for index in range(student.config.num_hidden_layers):
        mixer = student.mixers.get(index)
        if isinstance(mixer, Windowed) and not mixer.joins:
            most += WINDOW + LAYER.get(mixer_name(mixer.ssm), COMPOSED)
        else:
            most += LAYER.get(mixer_name(mixer), COMPOSED)
    return most


def mixer_name(mixer):
    """The name of a mixer in recipes, "kept" for a layer that was not replaced."""
    return "kept" if mixer is None else next((n for n, kind in mixers.MIXERS.items() if type(mixer) is kind), None)


@torch.no_grad()
@pytest.mark.parametrize("case", LAYOUTS)
def test_kernels_of_a_captured_token(teacher, case):
    student = placed(student_of(teacher, *LAYOUTS[case]), "bf16")
    ids, cache = text(1, 9).cuda(), new_cache(student)
    ordinary(student, ids, None, cache)
    decode = students.Decoder(student, cache, 4)
    decode(ids[:, :1])
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        decode(ids[:, :1])
        torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType.CUDA
    counts = {event.key: event.count for event in seen.key_averages() if event.device_type == kinds}
    counts = {name: count for name, count in counts.items() if "FillFunctor" not in name}  # the tests' own, of torch.empty
    count = sum(counts.values())
    assert 0 < count <= most_kernels(student), f"{count}: {counts}"
