"""Whole students: equal to the teacher where nothing is swapped, and to their own training forward when they generate."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import students
from distill.build import build
from students.config import Layout
from tests.students.layouts import LAYOUTS, WINDOW, text

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def student(teacher, layout):
    """A student of the tiny teacher, its mixers stirred so that nothing is at a special value."""
    pattern, mixers = LAYOUTS[layout]
    made, transfers = build(teacher, Layout.over(4, pattern, mixers))
    probe = torch.randint(1, 320, (2, 40))
    for seen in teacher.observe(probe, torch.arange(40).expand(2, -1), made.layout.converted):
        mixer = made.mixers[seen.layer]
        mixer.calibrate(seen.input, transfers[seen.layer])
        mixer.rescale(torch.full((len(mixer.out_weight()[0]),), 0.5))
    with torch.no_grad():
        for mixer in made.mixers.values():
            for parameter in mixer.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return made


def test_nothing_swapped_is_the_teacher_bit_for_bit(teacher):
    student, _ = build(teacher, Layout("AAAA"))
    ids = text(2, 50)
    assert torch.equal(student(ids).logits, teacher.model(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    assert torch.equal(student(ids, attention_mask=mask).logits, teacher.model(ids, attention_mask=mask).logits)
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)
    packed = teacher.model(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(student(ids, position_ids=positions, use_cache=False).logits, packed)


def test_nothing_swapped_is_the_real_teacher_bit_for_bit(smollm2):
    student, _ = build(smollm2, Layout("A" * 30))
    ids = smollm2.tokenizer("Rivers flow from mountains to the sea.", return_tensors="pt").input_ids
    assert torch.equal(student(ids).logits, smollm2.model(ids).logits)
    generated = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (student, smollm2.model)]
    assert torch.equal(*generated)


@every_layout
def test_cache_equals_forward(student):
    """Prefill, further chunks on the filled cache, and single tokens, left-padded rows included."""
    ids = text(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = student(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, outputs, start = student.new_cache(), [], 0
    for length in (12, 9, 1, 1, 5, 2):
        stop = start + length
        out = student(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop], past_key_values=cache
        )
        outputs.append(out.logits)
        start = stop
    found = torch.cat(outputs, 1)
    assert cache.get_seq_length() == 30
    real = mask.bool()
    assert torch.allclose(found[real], whole[real], atol=2e-4, rtol=1e-4)


@every_layout
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "sampling", "beam", "chunked prefill"],
)
def test_generate_equals_generating_without_a_cache(student, how):
    ids = text(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    made = []
    for cached in (True, False):
        torch.manual_seed(3)
        options = how if cached else {key: value for key, value in how.items() if key != "prefill_chunk_size"}
        made.append(
            student.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=cached, pad_token_id=0, **options)
        )
    assert torch.equal(*made)


@every_layout
def test_left_padding_changes_nothing(student):
    ids = text(1, 11)
    alone = student.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones_like(ids)], 1)
    found = student.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:, 6:], alone)


@every_layout
def test_packed_documents_do_not_leak(student):
    """Three ways to say it, one result, and each document as if alone."""
    first, second = text(1, 17), text(1, 14)
    ids = torch.cat([first, second], 1)
    documents = torch.tensor([[0] * 17 + [1] * 14])
    positions = torch.cat([torch.arange(17), torch.arange(14)])[None]
    by_ids = student(ids, document_ids=documents).logits
    by_positions = student(ids, position_ids=positions, use_cache=False).logits
    by_hidden = student.get_output_embeddings()(student.hidden(ids, documents))
    alone = torch.cat([student(first).logits, student(second).logits], 1)
    for found in (by_ids, by_positions, by_hidden):
        assert torch.allclose(found, alone, atol=1e-4, rtol=1e-4)


@every_layout
def test_save_and_load(student, tmp_path):
    student.save_pretrained(tmp_path)
    ids = text(2, 20)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), students.load(tmp_path)):
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.config.model_type == "distill_llama"
    narrow = students.load(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, tensor in narrow.named_parameters() if tensor.dtype == torch.float32}
    said = {name for mixer in narrow.mixers.values() for part in mixer.modules() for name in getattr(part, "float32", ())}
    wide = {name for name, _ in narrow.named_parameters() if said & set(name.split("."))}
    assert wide == kept and narrow.dtype == torch.bfloat16
    assert narrow.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 22)


@pytest.mark.parametrize("layout", ["windowed", "shared keys"])
def test_activation_checkpointing_changes_no_gradient(student):
    ids, gradients = text(2, 20), []
    documents = torch.tensor([[0] * 12 + [1] * 8] * 2)
    student.requires_grad_(True).train()
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        student.hidden(ids, documents).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", ["discrete"])
def test_what_a_student_refuses(student):
    ids = text(2, 6)
    ones = torch.ones_like(ids)
    right = ones.clone()
    right[0, 4:] = 0
    with pytest.raises(ValueError, match="row 0 of the attention_mask has no token among the last 2"):
        student.generate(ids, attention_mask=right, max_new_tokens=2, pad_token_id=0, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="is 6 wide, but there are 4 tokens"):
        student(ids[:, :4], attention_mask=ones)
    with pytest.raises(ValueError, match="2-D attention_mask"):
        student(ids, attention_mask=ones[:, None, None])
    with pytest.raises(ValueError, match="pack documents for training"):
        student(ids, attention_mask=ones, document_ids=ones)
    with pytest.raises(ValueError, match="cannot hold a student's states"):
        student.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    cache = student.new_cache()
    student(ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-1)


def test_layouts_that_cannot_be():
    with pytest.raises(ValueError, match="names 5 layers, but the model has 4"):
        Layout.over(4, "AMMMM", {"M": {"mixer": "mamba2"}})
    with pytest.raises(ValueError, match="uses 'X', but no mixer"):
        Layout.over(4, "AX", {})
    with pytest.raises(ValueError, match="does not use it"):
        Layout.over(4, "A", {"M": {"mixer": "mamba2"}})
    with pytest.raises(ValueError, match="is empty"):
        Layout.over(4, "", {})
    with pytest.raises(ValueError, match="there is no mixer 'mamba9'"):
        Layout.over(4, "M", {"M": {"mixer": "mamba9"}})
    assert Layout.over(7, "AMM", {"M": {"mixer": "mamba2"}}).pattern == "AMMAMMA"


def test_heads_by_layer(teacher, tmp_path):
    """Each layer keeps its own heads; a layer that is not named takes the default, or none; saving keeps them."""
    keep = {0: [1], "2": [3, 0], "default": [2]}
    layout = Layout.over(4, "HHHA", {"H": {"mixer": "split_heads", "keep": keep}})
    student, _ = build(teacher, layout)
    student.save_pretrained(tmp_path)
    for model in (student, students.load(tmp_path)):
        assert [mixer.heads["attention"] for mixer in model.mixers.values()] == [[1], [2], [0, 3]]
    without = Layout.over(4, "H", {"H": {"mixer": "split_heads", "keep": {1: [0]}}})
    assert [mixer.heads["attention"] for mixer in build(teacher, without)[0].mixers.values()] == [[], [0], [], []]
    with pytest.raises(ValueError, match=r"keep \(H\) is given for '3'; the layers of H are 0, 1, 2"):
        Layout.over(4, "HHHA", {"H": {"mixer": "split_heads", "keep": {3: [0]}}})
    with pytest.raises(ValueError, match="is given for 'defalt'"):
        Layout.over(4, "H", {"H": {"mixer": "split_heads", "keep": {"defalt": [0]}}})


def test_a_folder_that_is_no_student(tiny_teacher):
    with pytest.raises(ValueError, match="not a student made by distill"):
        students.load(tiny_teacher)


def test_state_size_is_constant(teacher):
    """An all-SSM student's cache does not grow with the text; attention's does."""
    student, _ = build(teacher, Layout("MMMM", {"M": {"mixer": "discrete_mamba2", "window": WINDOW}}))
    sizes = []
    for length in (20, 200):
        cache = student.new_cache()
        student(text(1, length), past_key_values=cache)
        tensors = [tensor for layer in cache.layers for tensor in layer.tensors.values()]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(held.values()) <= 2 * sizes[-1]  # no view keeps the prompt
    assert sizes[0] == sizes[1]


def test_documents_that_positions_tell_apart_by_default(teacher):
    """Packed positions get no cache, in whose presence kept attention would see every document."""
    student, _ = build(teacher, Layout("MAMA", {"M": {"mixer": "discrete_mamba2"}}))
    ids, documents = text(2, 12), torch.tensor([[0] * 5 + [1] * 7] * 2)
    positions = torch.tensor([[*range(5), *range(7)]] * 2)
    packed = student(ids, position_ids=positions)
    assert packed.past_key_values is None
    assert torch.allclose(packed.logits, student(ids, document_ids=documents).logits, atol=1e-6)


def test_an_id_that_comes_back_is_a_new_document(teacher):
    student, _ = build(teacher, Layout("MWAW", {"M": {"mixer": "mamba2"}, "W": {"mixer": "attention"}}))
    ids = text(1, 12)
    back, new = (student.hidden(ids, torch.tensor([[0] * 4 + [1] * 4 + [last] * 4])) for last in (0, 2))
    assert torch.equal(back, new)


def test_a_cache_without_room_for_states_is_refused(teacher):
    student, _ = build(teacher, Layout("MAMA", {"M": {"mixer": "discrete_mamba2"}}))
    for cache in (DynamicCache(), DynamicCache(config=student.config)):
        with pytest.raises(ValueError, match="use the student's new_cache"):
            student(text(1, 4), past_key_values=cache)
