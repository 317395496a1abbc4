"""Prompts in chunks of any size leave the cache and the logits of one call with all of it."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

import students
from students import cuts, growing_keys, key_blocks, prompt_attention, prompts
from students.compat import CACHE
from tests.students.decoding_cases import CASES, FAMILIES, family_models, near, new_cache, ordinary, padded, student_of
from tests.students.layouts import text
from tests.students.rotary_teachers import MIXERS, teacher_of
from tests.teachers.tiny import EVERY

LENGTH = 17
PADDED = {"none": None, "in front": 0, "behind": 1}


def whole(model, ids, mask):
    """Logits and cache of one call, told where each token stands as `generate` tells it."""
    cache, where = new_cache(model), {}
    if mask is not None:
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return model(input_ids=ids, use_cache=True, **{CACHE: cache}, **where).logits[:, -1], cache


@torch.no_grad()
def check(model, sizes, tolerance=1e-5, vocabulary=96, rows=2, begun=0, goes_on=True):
    """A cache filled in chunks goes on as one that was filled by one call: what it holds shows in what comes next."""
    ids = torch.randint(1, vocabulary, (rows, LENGTH + 3))
    mask = padded(rows, LENGTH)
    wanted, whole_cache = whole(model, ids[:, :LENGTH], mask)
    after = list(following(model, ids, whole_cache, mask)) if goes_on else []
    for size in sizes:
        cache = new_cache(model)
        if begun:
            students.prefill(model, ids[:, :begun], cache, None if mask is None else mask[:, :begun])
        near(students.prefill(model, ids[:, begun:LENGTH], cache, mask, chunk=size), wanted, tolerance)
        for found, other in zip(following(model, ids, cache, mask) if goes_on else (), after, strict=True):
            near(found, other, tolerance)
        for layer, other in zip(cache.layers, whole_cache.layers, strict=True):
            assert type(layer) is type(other) and layer.get_seq_length() == other.get_seq_length()


def following(model, ids, cache, mask):
    """Logits behind one token more, and behind two."""
    for start, end in ((LENGTH, LENGTH + 1), (LENGTH + 1, LENGTH + 3)):
        longer = None if mask is None else torch.nn.functional.pad(mask, (0, end - LENGTH), value=1)
        yield ordinary(model, ids[:, start:end], longer, cache)


@pytest.mark.parametrize("case", CASES)
def test_chunks_of_any_size(teacher, case):
    student = student_of(teacher, *CASES[case])
    check(student, (6,), vocabulary=320)
    check(student, (3, 99), vocabulary=320, rows=1, begun=4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EVERY])
def test_families_and_their_teachers(name):
    for model in family_models(name):
        check(model, (4,), 1e-4)


@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize("kind", ["phi3", "longrope", "dynamic"])
@torch.no_grad()
def test_embeddings_that_change_with_the_length(kind, meta):
    """Turned for the whole text from the first chunk on, and as ever behind it; `generate` and teachers too."""
    teacher = teacher_of(kind)
    student = student_of(teacher, "MA", MIXERS, meta)
    for model in (student, teacher.model):
        check(model, (4, 16), 1e-4, rows=1, goes_on=kind != "dynamic")
        if model is student or kind != "dynamic":
            ids, options = text(1, 20), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            wanted = model.generate(ids, **options)
            seen = []
            hook = model.model.embed_tokens.register_forward_hook(
                lambda module, given, out, seen=seen: seen.append(given[0].shape[1])
            )
            options |= {"custom_generate": students.replayed, "prefill_chunk_size": 7}
            assert torch.equal(model.generate(ids, **options), wanted)
            assert seen[:3] == [7, 7, 6]
            hook.remove()


@torch.no_grad()
def test_a_cache_that_cannot_go_on_is_refused():
    student = student_of(teacher_of("longrope"), "MA", MIXERS)
    ids, cache = text(1, 30), student.new_cache()
    students.prefill(student, ids[:, :9], cache)
    with pytest.raises(ValueError, match="7 more may follow, then compute the whole sequence again"):
        students.prefill(student, ids[:, 9:], cache, chunk=3)
    with pytest.raises(ValueError, match="chunk is 0 tokens; it should be 1 or more"):
        students.prefill(student, ids, student.new_cache(), chunk=0)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("case", ["hymba", "kept and sinks", "shared keys"])
def test_generate_by_default(teacher, case, padding, monkeypatch):
    """Long prompts go through in chunks unasked, and the last token's logits alone are made."""
    student, options = student_of(teacher, *CASES[case]), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, mask = text(3, 150), torch.ones(3, 150, dtype=torch.long)
    if PADDED[padding] is not None:
        mask[1, :9] = 0
        mask = mask if padding == "in front" else mask.flip(1)
    wanted = student.generate(ids, attention_mask=mask, **options)
    monkeypatch.setattr(cuts, "chunk_columns", lambda *shape: 64)
    seen, made = [], []
    student.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    student.lm_head.register_forward_hook(lambda module, given, out: made.append(out.shape[1]))
    told = []
    with prompts.watched(lambda done, total: told.append((done, total))):
        assert torch.equal(student.generate(ids, attention_mask=mask, **options), wanted)
    first = [150] if padding == "behind" else [64, 64, 22]
    assert seen == first + [1] * 5 and told[-1] == (150, 150) and len(told) == len(first)
    assert set(made) == {1}


def test_generate_from_embeddings_and_with_a_cache_that_has_begun(teacher):
    student = student_of(teacher, *CASES["stock"])
    ids, options = text(2, 20), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = student.generate(ids, **options)
    embeds, mask = student.get_input_embeddings()(ids), torch.ones_like(ids)
    for size in (None, 6):
        given = {"attention_mask": mask, "prefill_chunk_size": size, **options}
        assert torch.equal(student.generate(inputs_embeds=embeds, **given), wanted[:, 20:])
        cache = student.new_cache()
        students.prefill(student, ids[:, :7], cache)
        assert torch.equal(student.generate(ids, **{CACHE: cache}, **given), wanted)


@torch.no_grad()
def test_kept_attention_needs_no_mask_and_its_keys_one_room(teacher, monkeypatch):
    """Of chunk x keys numbers there is none, and what is kept is written where it stays."""
    masks, places, ids = [], [], text(2, 24)
    attend, room = prompt_attention.attend, growing_keys._room

    def watching(module, query, key, value, attention_mask, **rest):
        masks.append(None if attention_mask is None else attention_mask.dim())
        return attend(module, query, key, value, attention_mask, **rest)

    monkeypatch.setattr(growing_keys, "_room", lambda *given: places.append(given[-1]) or room(*given))
    AttentionInterface.register(prompt_attention.NAME, watching)
    try:
        for mask, kind in ((None, None), (padded(2, 24), 2)):
            cache = DynamicCache(config=teacher.model.config)
            students.prefill(teacher.model, ids, cache, mask, chunk=7)
            assert set(masks) == {kind} and places == [24] * 2 * len(cache.layers)
            assert all(layer.keys.is_contiguous() and layer.keys.shape[2] == 24 for layer in cache.layers)
            masks.clear(), places.clear()
    finally:
        AttentionInterface.register(prompt_attention.NAME, attend)
    assert teacher.model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_memory_that_runs_out_leaves_a_cache_of_transformers(teacher, monkeypatch):
    cache, ids = DynamicCache(config=teacher.model.config), text(1, 24)
    students.prefill(teacher.model, ids[:, :5], cache)
    before = [layer.keys.clone() for layer in cache.layers]

    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(growing_keys, "_room", full)
    with pytest.raises(torch.OutOfMemoryError):
        students.prefill(teacher.model, ids[:, 5:], cache, chunk=4)
    assert all(type(layer) is DynamicLayer for layer in cache.layers)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))
    assert teacher.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("behind", [8, 12, 13, 200])
def test_keys_in_blocks_are_all_keys(behind, monkeypatch):
    """Blocks of powers of two, joined by their sums, with an end that is no multiple of their unit."""
    monkeypatch.setattr(key_blocks, "UNIT", 4)
    monkeypatch.setattr(key_blocks, "LONGEST", 8)
    q, k, v = torch.randn(2, 6, 8, 5), torch.randn(2, 3, behind + 8, 5), torch.randn(2, 3, behind + 8, 5)
    shapes = set()

    def part(q, k, v, scale, causal):
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        logits = q @ k.transpose(2, 3) * scale
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1 + k.shape[2] - q.shape[2]).bool(), -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    def whole(q, k, v, scale, causal):
        assert k.is_contiguous() and (not causal or k.shape[2] == q.shape[2])
        shapes.add(k.shape[2])
        return part(q, k, v, scale, causal)

    wanted = part(q, k, v, 0.3, True)[0]
    assert torch.allclose(key_blocks.in_blocks(q, k, v, 0.3, whole, part), wanted, atol=1e-5)
    assert shapes <= {4, 8, 16, 32}
    assert not key_blocks.serves(q, k, v)


def test_a_default_that_fits(teacher):
    """Fewer columns for wider models and more texts, whole multiples of what scans cut by; masks bound them too."""
    config = teacher.model.config
    gpu = torch.device("cuda")
    config.hidden_size, config.intermediate_size = 2048, 8192  # Llama-3.2-1B
    columns = {rows: cuts.chunk_columns(config, rows, gpu, 2) for rows in (1, 2, 16, 256, 10_000)}
    assert columns == {1: 8192, 2: 4096, 16: 512, 256: 32, 10_000: 32}
    assert cuts.chunk_columns(config, 1, torch.device("cpu"), 4) < columns[1]
    prompt = cuts.Prompt(text(1, 40_000))
    assert cuts._masked(teacher.model, prompt) == 40_000
    config._attn_implementation = "eager"
    assert cuts._masked(teacher.model, prompt) * 40_000 * 8 * config.num_attention_heads <= cuts.MASKS


@pytest.mark.parametrize("padding", ["none", "in front"])
def test_tokens_wait_for_no_mask_without_padding(teacher, padding):
    """Whether all of it are tokens is asked once, of the prompt."""
    student, seen = student_of(teacher, *CASES["stock"]), []
    hook = lambda module, given, keywords: seen.append(keywords["attention_mask"] is None)  # noqa: E731
    student.model.register_forward_pre_hook(hook, with_kwargs=True)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, : 3 * (padding == "in front")] = 0
    student.generate(text(2, 9), attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert seen[1:] == [padding == "none"] * 3
