"""`make test-gpu-decoding`: tokens replayed as a graph are tokens decoded as they come, of students and teachers."""

import pytest
import torch

import students
from distill.evaluation import speed, suites
from students.static_cache import GraphError
from tests.students.test_decoding import (
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
    text,
)
from tests.teachers.tiny import EVERY, tiny_teacher

pytestmark = pytest.mark.gpu

STEPS = 20
PROMPTS = ((1, 14), (2, 3))
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative, of logits; each path also rounds the states it goes on from
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
