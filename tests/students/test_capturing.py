"""Decoding as captured graphs, pretended on a CPU: no trace of capturing, failed captures, and the end of the cache."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import students
from students import decoding
from students.static_cache import GraphError
from tests.students.decoding_cases import (
    CASES,
    FAMILIES,
    PROMPTS,
    STEPS,
    check,
    family_models,
    near,
    new_cache,
    ordinary,
    student_of,
)
from tests.students.layouts import text


@pytest.fixture
def pretended(monkeypatch):
    """Streams and graphs that a CPU has not: what is captured runs once, and a replay runs it again."""

    class Graph:
        def replay(self):
            self.decoder._logits.copy_(self.decoder._step())

    for module, name in ((decoding, "side_stream"), (torch.cuda, "current_stream")):
        monkeypatch.setattr(module, name, lambda device: SimpleNamespace(wait_stream=lambda other: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **keywords: nullcontext())
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    decoder = students.Decoder

    def captured(*arguments):
        made = decoder(*arguments, graph=True)
        made.graph.decoder = made
        assert modes == ["default", "error", "default"]
        return made

    monkeypatch.setattr(students, "Decoder", captured)
    return modes


@pytest.mark.parametrize("case", ["mixed", "shared keys", "hymba", "griffin", "mistral-7b-v0.1"])
def test_capturing_leaves_no_trace(teacher, case, pretended):
    models = family_models(case) if case in FAMILIES else [student_of(teacher, *CASES[case])]
    for model in models:
        for rows, prompt in PROMPTS:
            check(model, torch.randint(1, 96, (rows, prompt + STEPS + 5)), prompt, 1e-5)
            del pretended[1:]


def test_a_failed_capture_leaves_the_cache_as_it_was(teacher, pretended):
    student = student_of(teacher, *CASES["mixed"])
    ids, caches = text(1, 12), [student.new_cache() for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], None, cache)

    def wait(*arguments):
        if pretended[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    hook = student.mixers[1].register_forward_hook(wait)
    with pytest.raises(GraphError, match=r"DistillLlamaForCausalLM cannot be captured .* synchronizing .* decode without"):
        students.Decoder(student, caches[1], 3)
    hook.remove()
    for at in (9, 10):
        near(*(ordinary(student, ids[:, at : at + 1], None, cache) for cache in caches), 1e-6)


@torch.no_grad()
def test_what_a_decoder_says_of_its_end(teacher):
    student = student_of(teacher, *CASES["stock"])
    cache = new_cache(student)
    ordinary(student, text(1, 5), None, cache)
    decode = students.Decoder(student, cache, 1)
    decode(text(1, 1))
    with pytest.raises(ValueError, match="the 1 tokens of this decoder are used up"):
        decode(text(1, 1))
    decode.release()
    with pytest.raises(ValueError, match="given its cache back"):
        decode(text(1, 1))
    with pytest.raises(ValueError, match="tokens is 0"):
        students.Decoder(student, cache, 0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="the model is on the cpu"):
            students.Decoder(student, cache, 4, graph=True)
    students.Decoder(student, cache, 4)(text(1, 1))  # a refusal leaves the cache as it was
