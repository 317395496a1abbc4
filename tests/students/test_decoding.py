"""Decoding in place: the logits and the cache of ordinary calls, at addresses that stay, asking for no value on the way."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, StaticCache

import students
from distill.build import build
from students import capturing, decoding, static_cache
from students import mixers as table
from students.compat import CACHE
from students.config import Layout
from students.static_cache import GraphError, StaticKeys
from tests.students.test_meta_tokens import HYMBA
from tests.students.test_model import LAYOUTS, text
from tests.teachers.tiny import EVERY, tiny_teacher

CASES = {name: (*layout, 0) for name, layout in LAYOUTS.items()} | {
    "hymba": ("FPSA", HYMBA, 5),
    "griffin": ("MMW", {"M": {"mixer": "rg_lru"}, "W": {"mixer": "attention", "window": 6, "sinks": 1}}, 0),
    "gated deltanet": ("MMMA", {"M": {"mixer": "gated_deltanet"}}, 0),
    "mamba": ("MMMW", {"M": {"mixer": "mamba1"}, "W": {"mixer": "attention", "window": 40}}, 0),
    "linear": ("GRLA", {"G": {"mixer": "gla"}, "R": {"mixer": "retention"}, "L": {"mixer": "longhorn"}}, 0),
    "kept and sinks": ("AAAW", {"W": {"mixer": "attention", "window": 4, "sinks": 3}}, 3),
}
COVERED = {options["mixer"] for _, mixers, _ in CASES.values() for options in mixers.values()}
CASES |= {name: ("MMMA", {"M": {"mixer": name}}, 0) for name in table.MIXERS if name not in COVERED}
FAMILIES = {  # attention on sliding windows, soft caps, positions that are learned or that name the documents
    "mistral-7b-v0.1": "MA",
    "gemma-2-2b": "AMAW",
    "gemma-3-270m": "AMAW",
    "gpt2": "WA",
    "pythia-160m": "MA",
    "stablelm-2-1_6b": "MA",
    "falcon-7b": "MA",
}
MIXERS = {"M": {"mixer": "mamba2"}, "W": {"mixer": "attention", "window": 5, "sinks": 2}}
PROMPTS = ((1, 14), (2, 3))  # rows and tokens: windows that are full, and such that become so; the second is padded
STEPS = 8
every_case = pytest.mark.parametrize("case", CASES)


def stirred(student):
    """Its mixers at no special values, and its meta tokens so that they matter."""
    with torch.no_grad():
        for mixer in student.mixers.values():
            mixer.rescale(torch.full((len(mixer.out_weight()[0]),), 0.05))
            for parameter in mixer.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        if student.meta_tokens is not None:
            student.meta_tokens.weight += 0.3 * torch.randn_like(student.meta_tokens.weight)
    return student


def student_of(teacher, pattern, mixers, meta_tokens=0):
    used = {letter: options for letter, options in mixers.items() if letter in pattern}
    return stirred(build(teacher, Layout.over(teacher.n_layers, pattern, used, meta_tokens))[0])


def family_models(name):
    """A tiny model of a family and a student of it."""
    teacher = tiny_teacher(name, num_hidden_layers=len(FAMILIES[name]))
    return teacher.model, student_of(teacher, FAMILIES[name], MIXERS)


def padded(rows, length):
    """A mask whose first row begins with padding, or none."""
    if rows == 1:
        return None
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return mask


def ordinary(model, ids, mask, cache):
    """Logits of calls as `generate` makes them: those behind the prompt, or behind one token on a cache that has begun."""
    length = ids.shape[1]
    begun = cache.get_seq_length()
    where = {}
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, length + begun - mask.shape[1]), value=1)
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begun:]}
    return model(input_ids=ids, use_cache=True, **{CACHE: cache}, **where).logits[:, -1]


def new_cache(model):
    return model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)


@torch.no_grad()
def check(model, ids, prompt, tolerance, **options):
    """A decoder beside ordinary calls, and the cache that it gives back."""
    mask, caches, end = padded(len(ids), prompt), [new_cache(model) for _ in range(2)], ids.shape[1] - 5
    mask = None if mask is None else mask.to(ids.device)
    for cache in caches:
        ordinary(model, ids[:, :prompt], mask, cache)
    decode = students.Decoder(model, caches[1], end - prompt + 1, mask, **options)
    places = addresses(caches[1])
    for at in range(prompt, end):
        token = ids[:, at : at + 1]
        near(decode(token.clone()), ordinary(model, token, mask, caches[0]), tolerance)
        assert addresses(caches[1]) == places
        assert caches[1].get_seq_length() == at + 1
    decode.release()
    assert not any(isinstance(layer, StaticKeys) for layer in caches[1].layers)
    for layer, wanted in zip(caches[1].layers, caches[0].layers, strict=True):
        assert type(layer) is type(wanted) and layer.get_seq_length() == wanted.get_seq_length()
        for name, tensor in tensors(wanted).items():
            assert tensor.shape == tensors(layer)[name].shape, name
    for at in range(end, end + 3):
        near(*(ordinary(model, ids[:, at : at + 1], mask, cache) for cache in caches), tolerance)
    near(*(ordinary(model, ids[:, -2:], mask, cache) for cache in caches), tolerance)


def near(found, wanted, tolerance):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, f"{error:.1e}"


def tensors(layer):
    return layer.tensors if hasattr(layer, "tensors") else {"keys": layer.keys, "values": layer.values}


def addresses(cache):
    return [(name, part.data_ptr(), part.shape) for layer in cache.layers for name, part in sorted(tensors(layer).items())]


@every_case
def test_a_decoder_is_ordinary_decoding(teacher, case):
    student = student_of(teacher, *CASES[case])
    for rows, prompt in PROMPTS:
        check(student, text(rows, prompt + STEPS + 5), prompt, 1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EVERY])
def test_families_and_their_teachers(name):
    for model in family_models(name):
        for rows, prompt in PROMPTS:
            check(model, torch.randint(1, 96, (rows, prompt + STEPS + 5)), prompt, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-3.2-1b", *(name for name in FAMILIES if name in EVERY)])
def test_kept_attention_reads_what_it_sees_alone(name, monkeypatch):
    """No mask over what is reserved, padding within the text too, but where a model's attention is its own (Falcon's)."""
    layers = {"num_hidden_layers": len(FAMILIES.get(name, "AA"))}
    model, masks, mask = tiny_teacher(name, **layers).model, [], torch.ones(3, 11, dtype=torch.long)
    ids, caches, make = torch.randint(1, 96, (3, 24)), [new_cache(model) for _ in range(2)], decoding.Decoder._mask
    mask[0, 3:6], mask[1, :4], mask[2, 0], mask[2, 8] = 0, 0, 0, 0
    for cache in caches:
        ordinary(model, ids[:, :11], mask, cache)
    monkeypatch.setattr(decoding.Decoder, "_mask", lambda self, visible: masks.append(visible) or make(self, visible))
    before = model.config._attn_implementation
    decode = students.Decoder(model, caches[1], 40, mask)
    masks.clear()
    for at in range(11, 24):
        near(decode(ids[:, at : at + 1]), ordinary(model, ids[:, at : at + 1], mask, caches[0]), 1e-4)
        assert model.config._attn_implementation == before
    assert bool(masks) == (name == "falcon-7b")


def gpt_oss():
    """Its attention has a logit of its own beside those of the keys."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 64}
    return GptOssForCausalLM(GptOssConfig(num_hidden_layers=2, **sizes, **heads, **rope)).eval()


def deepseek():
    """Its keys are wider than its values, and a cache holds something smaller than both."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 64}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **widths)).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt_oss, deepseek])
def test_attention_that_is_its_models_own(make):
    model = make()
    for rows, prompt in PROMPTS:
        ids = torch.randint(1, 96, (rows, prompt + STEPS + 5))
        check(model, ids, prompt, 1e-4)


class NoValues(TorchDispatchMode):
    """Refuses what a GPU would be waited for, or what would bring numbers from the CPU."""

    refused = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.refused, name
        return function(*arguments, **keywords or {})


# Falcon's own attention indexes by a list.
@pytest.mark.parametrize("case", [*CASES, *(name for name in FAMILIES if name != "falcon-7b")])
@torch.no_grad()
def test_a_token_asks_for_no_value(teacher, case):
    models = family_models(case) if case in FAMILIES else [student_of(teacher, *CASES[case])]
    for model in models:
        cache = new_cache(model)
        ids, mask = torch.randint(1, 96, (2, 9)), padded(2, 9)
        ordinary(model, ids, mask, cache)
        decode = students.Decoder(model, cache, 3, mask)
        with NoValues():
            decode._step()


def test_what_a_decoder_refuses(teacher):
    student = student_of(teacher, "MA", MIXERS)
    ids = text(2, 6)
    with pytest.raises(ValueError, match="the cache holds 0 tokens"):
        students.Decoder(student, student.new_cache(), 4)
    cache = student(ids).past_key_values
    with pytest.raises(ValueError, match="cover the 6 tokens in the cache"):
        students.Decoder(student, cache, 4, torch.ones(2, 7, dtype=torch.long))
    decode = students.Decoder(student, cache, 1)
    decode(ids[:, :1])
    with pytest.raises(ValueError, match="make a new Decoder with more tokens"):
        decode(ids[:, :1])
    with pytest.raises(GraphError, match="layer 0 of the cache is a StaticLayer"):
        static = StaticCache(config=teacher.model.config, max_cache_len=9)
        students.Decoder(teacher.model, filled(teacher.model, ids, static), 2)
    sliding = tiny_teacher("mistral-7b-v0.1").model  # a cache that grows, in a model that looks back 7 tokens
    with pytest.raises(GraphError, match="layer 0 of the cache is a DynamicLayer"):
        students.Decoder(sliding, filled(sliding, ids % 96, DynamicCache()), 2)
    teacher.model.config._attn_implementation = "flex_attention"
    with pytest.raises(GraphError, match="flex_attention attention"):
        students.Decoder(teacher.model, filled(teacher.model, ids, DynamicCache(), "sdpa"), 2)


def test_a_model_that_makes_its_own_masks_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8}
    model = GPTNeoForCausalLM(GPTNeoConfig(attention_types=[[["global", "local"], 1]], **sizes)).eval()
    with pytest.raises(GraphError, match="GPTNeoForCausalLM makes its own masks"):
        students.Decoder(model, filled(model, text(1, 6) % 96, DynamicCache(config=model.config)), 2)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["MA", "MM"])
def test_nobody_else_uses_a_held_cache(teacher, pattern):
    """What a call or a reordering would do to it the decoder could not undo: each is refused, and changes nothing."""
    student = student_of(teacher, pattern, MIXERS)
    ids, caches = text(2, 12), [student.new_cache() for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], None, cache)
    decode = students.Decoder(student, caches[0], 3)
    changes = (
        lambda: student(ids[:, 9:10], past_key_values=caches[0]),
        lambda: student(ids[:, 9:11], past_key_values=caches[0]),
        lambda: caches[0].reorder_cache(torch.tensor([1, 0])),
        lambda: caches[0].batch_select_indices(torch.tensor([0])),
        lambda: caches[0].batch_repeat_interleave(2),
        lambda: caches[0].reset(),
    )
    for change in changes:
        with pytest.raises(RuntimeError, match="a Decoder holds this cache"):
            change()
    for at in (9, 10):
        near(decode(ids[:, at : at + 1]), ordinary(student, ids[:, at : at + 1], None, caches[1]), 1e-5)
    decode.release()
    caches[0].reorder_cache(torch.tensor([1, 0]))


@torch.no_grad()
@pytest.mark.parametrize("call", range(4))
def test_memory_that_runs_out_leaves_the_cache_as_it_was(teacher, call, monkeypatch):
    student = student_of(teacher, "MAAW", MIXERS)
    ids, caches = text(2, 12), [student.new_cache() for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], None, cache)
    laid, calls = static_cache.Ring.laid, []

    def full(self, part):
        calls.append(part)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError
        return laid(self, part)

    monkeypatch.setattr(static_cache.Ring, "laid", full)
    with pytest.raises(torch.OutOfMemoryError):
        students.Decoder(student, caches[0], 3)
    for at in (9, 10):
        near(*(ordinary(student, ids[:, at : at + 1], None, cache) for cache in caches), 1e-6)


def filled(model, ids, cache, attention=None):
    """A cache with a prompt."""
    wanted = model.config._attn_implementation
    model.config._attn_implementation = attention or wanted
    model(input_ids=ids, use_cache=True, **{CACHE: cache})
    model.config._attn_implementation = wanted
    return cache


def test_what_cannot_be_captured_is_named(teacher):
    """The model, the line, and what to do; a lack of memory stays one."""
    said = r"LlamaForCausalLM cannot .*test_decoding.py, line \d+, 'raise .*: a wait;"
    with pytest.raises(GraphError, match=said), capturing.explained(teacher.model):
        raise RuntimeError("a wait\nand more")
    with pytest.raises(torch.OutOfMemoryError), capturing.explained(teacher.model):
        raise torch.OutOfMemoryError


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
