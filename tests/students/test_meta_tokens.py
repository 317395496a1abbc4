"""Meta tokens: as if they had been typed in front of every document, and never seen in what comes out."""

import pytest
import torch
from transformers import DynamicCache

import students
from distill.build import build, transfer_report
from distill.errors import UserError
from distill.recipe_file import check
from distill.runs.checkpoint import student_tensors
from distill.stages.imitate import Imitate
from distill.text.windows import Batch
from students.compat import CACHE
from students.config import Layout
from tests.students.hymba import COUNT, HYMBA
from tests.students.layouts import LAYOUTS, text
from tests.teachers.tiny import supported, tiny_teacher

SINKS = {"mixer": "attention", "window": 4, "sinks": COUNT}
CASES = {"mixed": LAYOUTS["mixed"], "all SSM": LAYOUTS["all SSM"], "hymba": ("FPSA", HYMBA), "kept": ("AAAW", {"W": SINKS})}
every_case = pytest.mark.parametrize("case", CASES)


def with_meta(teacher, pattern, mixers, count=COUNT):
    """A student whose mixers and meta tokens are stirred, so that the latter matter."""
    student, _ = build(teacher, Layout.over(teacher.n_layers, pattern, mixers, count))
    with torch.no_grad():
        for mixer in student.mixers.values():
            mixer.rescale(torch.full((len(mixer.out_weight()[0]),), 0.05))
            for parameter in mixer.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        if count:
            student.meta_tokens.weight += 0.3 * torch.randn_like(student.meta_tokens.weight)
    return student


@pytest.fixture
def student(teacher, case):
    """One of CASES."""
    return with_meta(teacher, *CASES[case])


def near(a, b):
    return torch.allclose(a, b, atol=2e-4, rtol=1e-4)


@every_case
def test_they_are_tokens_in_front_of_the_text(teacher, student, case):
    """The same student without meta tokens, given theirs as embeddings, says the same of the text."""
    plain, _ = build(teacher, Layout.over(4, *CASES[case]))
    weights = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith("meta_tokens")}
    plain.load_state_dict(weights)
    ids = text(2, 23)
    front = student.meta_tokens.weight.expand(2, -1, -1)
    wanted = plain(inputs_embeds=torch.cat([front, student.get_input_embeddings()(ids)], 1)).logits
    found = student(ids).logits
    assert found.shape == (2, 23, 320) and near(found, wanted[:, COUNT:])
    assert not near(found, plain(ids).logits)


@every_case
def test_padding_changes_nothing(student):
    """On either side, in one row of several."""
    ids, pads = text(2, 21), torch.zeros(1, 6, dtype=torch.long)
    rows = torch.cat([torch.cat([pads, ids[:1, 6:]], 1), ids[1:]])
    mask = torch.ones_like(rows)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for options in ({}, {"position_ids": positions}):
        padded = student(rows, attention_mask=mask, **options).logits
        assert near(padded[0, 6:], student(ids[:1, 6:]).logits[0]) and near(padded[1], student(ids[1:]).logits[0])
    right = student(rows.flip(1), attention_mask=mask.flip(1), use_cache=False).logits
    assert near(right[0, :15], student(rows.flip(1)[:1, :15]).logits[0])


@every_case
def test_each_packed_document_has_its_own(student):
    pieces = [text(1, 9), text(1, 5), text(1, 12), text(1, 14)]
    ids = torch.cat([torch.cat(pieces[:3], 1), torch.cat([pieces[3], text(1, 12)], 1)])
    documents = torch.tensor([[0] * 9 + [1] * 5 + [2] * 12, [0] * 14 + [-1] * 12])
    positions = torch.tensor([[*range(9), *range(5), *range(12)], [*range(14), *range(12)]])
    by_ids, by_hidden = student(ids, document_ids=documents).logits, student.hidden(ids, documents)
    alone = torch.cat([student(piece).logits for piece in pieces[:3]], 1)
    assert near(by_ids[:1], alone) and near(by_ids[1:, :14], student(pieces[3]).logits)
    assert near(student.get_output_embeddings()(by_hidden), by_ids)
    by_positions = student(ids, position_ids=positions, use_cache=False).logits
    assert near(by_positions[:1], alone) and near(by_positions[1:, :14], by_ids[1:, :14])


@every_case
def test_cache_equals_forward(student):
    ids = text(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = student(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for given in (True, False):
        cache, outputs, start = student.new_cache(), [], 0
        for length in (12, 9, 1, 1, 5, 2):
            stop = start + length
            where = {"position_ids": positions[:, start:stop]} if given else {}
            out = student(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **where)
            assert out.past_key_values is cache and cache.get_seq_length() == stop
            outputs.append(out.logits)
            start = stop
        assert near(torch.cat(outputs, 1)[mask.bool()], whole[mask.bool()])
        assert {layer.get_seq_length() for layer in cache.layers} == {30 + COUNT}


@every_case
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beam", "chunked prefill", "sampling"],
)
def test_generate_equals_generating_without_a_cache(student, how):
    ids = text(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made = []
    for cached in (True, False):
        torch.manual_seed(3)
        options = how if cached else {key: value for key, value in how.items() if key != "prefill_chunk_size"}
        options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **options}
        made.append(student.generate(ids, attention_mask=mask, use_cache=cached, **options))
    assert torch.equal(*made)


@every_case
def test_a_conversation_goes_on_with_its_cache(student):
    first, options = text(1, 9), {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    cache = {CACHE: student.new_cache()}
    said = student.generate(first, **cache, **options)
    second = torch.cat([said, text(1, 6)], 1)
    assert torch.equal(student.generate(second, **cache, **options), student.generate(second, **options))


@every_case
def test_what_comes_out_is_the_text_alone(student):
    ids = text(2, 15)
    whole = student(ids, labels=ids, output_hidden_states=True)
    assert near(student(ids, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert {tuple(states.shape) for states in whole.hidden_states} == {(2, 15, 32)}
    loss = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.isclose(whole.loss, loss, rtol=1e-5)
    assert near(student(inputs_embeds=student.get_input_embeddings()(ids)).logits, whole.logits)
    assert near(student(ids, return_dict=False)[0], whole.logits)


def test_windows_see_them_by_their_sinks(teacher):
    """40 tokens back, four layers with windows of 4 reach nothing; as sinks the meta tokens are always there."""
    ids = text(1, 40)
    for sinks, seen in ((0, False), (COUNT, True)):
        student = with_meta(teacher, "W", {"W": SINKS | {"sinks": sinks}})
        before = student(ids).logits[0, -1]
        with torch.no_grad():
            student.meta_tokens.weight += 1.0
        assert torch.equal(student(ids).logits[0, -1], before) != seen


@every_case
def test_save_and_load(student, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = students.load(tmp_path)
    assert torch.equal(loaded.meta_tokens.weight, student.meta_tokens.weight)
    ids = text(2, 20)
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("case", ["hymba"])
def test_imitate_trains_them(teacher, student):
    ids = text(2, 21)
    documents = torch.tensor([[0] * 12 + [1] * 8] * 2)
    positions = torch.tensor([[*range(12), *range(8)]] * 2)
    batch = Batch(ids[:, :-1], documents, positions, ids[:, 1:], torch.ones(2, 20), documents)
    before = student.meta_tokens.weight.clone()
    for train in ("mixers", "all", "lora"):
        options = Imitate.Options(tokens=1, lr=1e-3, train=train)
        assert Imitate.count(student, options) >= before.numel() and "new" in Imitate.roles(student, options)
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1e-3, train="mixers", activation_checkpointing=True))
    stage.prepare()
    assert stage.trained()["meta_tokens.weight"][0] == "new" and "meta_tokens.weight" in student_tensors(student, set())
    optimizer = torch.optim.Adam([parameter for _, parameter in stage.trained().values()], 1e-3)
    for _ in range(2):
        for _, loss in stage.losses(batch):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ((student.meta_tokens.weight - before).abs() > 1e-4).all()


def test_where_they_start(teacher):
    student, transfers = build(teacher, Layout.over(4, "AAAW", {"W": {"mixer": "attention"}}, 64))
    embeddings = teacher.model.get_input_embeddings().weight
    apart = (student.meta_tokens.weight - embeddings.mean(0)) / embeddings.std(0)
    assert 0.7 < apart.square().mean().sqrt() < 1.3
    assert (
        "deviation of the token embeddings" in transfer_report(teacher, student, transfers)["sources"]["meta_tokens.weight"]
    )


def test_none_of_them_is_a_student_as_before(teacher):
    layout = Layout.over(4, *LAYOUTS["mixed"], 0)
    student, _ = build(teacher, layout)
    assert layout == Layout.over(4, *LAYOUTS["mixed"])
    assert student.meta_tokens is None and not any("meta" in name for name in student.state_dict())


@pytest.mark.parametrize("case", ["mixed"])
def test_what_they_refuse(student, tiny_recipe):
    ids = text(2, 12)
    with pytest.raises(ValueError, match="no room for 5 meta tokens"):
        student(ids, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="meta_tokens is 8, but only imitate, tune or prefer trains them"):
        check({**tiny_recipe, "meta_tokens": 8, "stages": tiny_recipe["stages"][:3]}, "tiny.yaml")


@pytest.mark.parametrize(
    "name",
    ["gpt2", *["falcon-7b"] * supported("falcon"), "stablelm-2-1_6b", "gemma-3-270m", "mistral-7b-v0.1", "qwen3-30b-a3b"],
)
def test_families(name):
    """Learned positions, documents read off positions, sliding windows, experts: padded, packed and cached alike."""
    student = with_meta(tiny_teacher(name), "AM", {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": COUNT}}})
    ids = torch.randint(1, 96, (2, 20))
    alone = [student(ids[:1, 6:]).logits[0], student(ids[1:]).logits[0]]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = student(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(padded[0, 6:], alone[0], atol=1e-3) and torch.allclose(padded[1], alone[1], atol=1e-3)
    documents = torch.tensor([[0] * 6 + [1] * 14, [0] * 20])
    packed = student(ids, document_ids=documents).logits
    assert torch.allclose(packed[0, 6:], alone[0], atol=1e-3) and torch.allclose(packed[1], alone[1], atol=1e-3)
    cache, outputs = student.new_cache(), []
    for start, stop in ((0, 9), (9, 10), (10, 17), (17, 20)):
        where = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        outputs.append(student(ids[:, start:stop], past_key_values=cache, **where).logits)
    assert torch.allclose(torch.cat(outputs, 1)[mask.bool()], padded[mask.bool()], atol=1e-3)
