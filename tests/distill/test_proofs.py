"""Proofs of exports: a correct export is proved with its numbers; every planted fault is found and located."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import UserError
from distill.exporters import target
from distill.exporters.engines import ENGINES
from distill.exporters.proofs import prove
from distill.exporters.proofs.answer import Answer
from distill.exporters.proofs.asked import Asked, Reading
from distill.exporters.proofs.bounds import BOUNDS, bounds_of
from distill.exporters.proofs.comparing import check_ways, compare, compare_ids
from distill.exporters.proofs.fresh import HERE
from distill.exporters.proofs.reference import script
from distill.exporters.proofs.rounding import check_rounded
from distill.exporters.source import Source
from distill.exporters.target import Form
from tests.distill.random_students import saved, student_of

SHORT = Reading(lengths=(8, 21, 40), tokens=12, rows=24)
STOCK = {"M": {"mixer": "mamba2"}}


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    return saved(student_of("llama", "AMMM", STOCK), tmp_path_factory.mktemp("proofs") / "student", tokenizer)


def written(student, to, out, dtype="float32"):
    target(to).write(student, out, Form(dtype))
    return out


def proved(student, out, to, dtype="float32", pythons=None, told=None):
    source = Source.read(student)
    said = [] if told is None else told
    return prove(student, out, target(to), source, Form(dtype), pythons=pythons or {}, say=said.append, reading=SHORT)


def test_a_portable_export_is_proved_without_this_project(student, tmp_path):
    told = []
    out = written(student, "portable", tmp_path / "a folder")
    proofs = {proof.engine: proof for proof in proved(student, out, "portable", told=told)}
    assert list(proofs) == list(ENGINES)
    assert proofs["vllm"].state == "cannot" and proofs["vllm"].why
    numbers = proofs["transformers"].numbers
    assert proofs["transformers"].state == "proved" and proofs["transformers"].version
    assert numbers["tokens"] == "36 of 36" and numbers["logits"] < 1e-4 and 1 < numbers["perplexity"] < 1e6
    assert {"left padding", "chunks", "cached decoding", "log-probabilities"} <= set(numbers)
    assert any("tokens from a cache" in line for line in told) and any("the student" in line for line in told)
    assert not list(tmp_path.glob(".proof*")), "the scratch folder should be gone"


def test_a_rounded_native_export_is_proved_and_one_changed_weight_is_found(student, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.exporters.proofs.installed.find_spec", lambda name: None if name != "transformers" else 1)
    out = written(student, "native", tmp_path / "native", "bfloat16")
    proofs = {proof.engine: proof for proof in proved(student, out, "native", "bfloat16")}
    assert proofs["vllm"].state == "absent" and proofs["mlx"].state in ("absent", "cannot")
    numbers = proofs["transformers"].numbers
    assert 0 < numbers["kl of bfloat16"] < 1 and 0 < numbers["top-1 agreement of bfloat16"] <= 1

    exact = written(student, "native", tmp_path / "exact")
    file = out / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 0.25
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight of the export is not the student's, rounded.*at \[3\]"):
        check_rounded(out, exact, "bfloat16")


def test_what_float32_cannot_tell_is_held_against_the_student_in_float64(student, tmp_path, monkeypatch):
    """The bounds are closer than float32 rounds: the same function is proved, and another one is not."""
    monkeypatch.setitem(BOUNDS, "transformers", replace(BOUNDS["transformers"], logits=1e-12, logprobs=1e-12))
    out = written(student, "native", tmp_path / "native")
    numbers = proved(student, out, "native")[0].numbers
    assert numbers["compared with the student in"] == "float64" and numbers["tokens"] == "36 of 36"
    assert numbers["logits"] < 1e-9 < numbers["log-probabilities, rounded to float32"] < 1e-4
    assert all(numbers[way] < 1e-9 for way in ("left padding", "chunks", "cached decoding"))
    entries = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(entries | {"residual_multiplier": 1 + 1e-5}))
    with pytest.raises(UserError, match=r"the student gives .*; in float64 too: .* prompt \d"):
        proved(student, out, "native")


def test_a_wrong_multiplier_is_found_in_a_fresh_process(student, tmp_path):
    out = written(student, "native", tmp_path / "native")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"residual_multiplier": 1.01}))
    with pytest.raises(
        UserError, match=r"transformers \S+: prompt 1, position \d+: the logit of token \d+ is \S+, but the "
    ):
        proved(student, out, "native")


def test_what_rounding_is_held_against(student, tmp_path):
    exact, out = written(student, "native", tmp_path / "exact"), written(student, "native", tmp_path / "out", "bfloat16")
    check_rounded(out, exact, "bfloat16")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"has rms_norm_eps 0.001, but that of the same in float32 has "):
        check_rounded(out, exact, "bfloat16")
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, out / "model.safetensors")
    with pytest.raises(UserError, match=r"do not have the same tensors: only one of them has model.norm.weight"):
        check_rounded(out, exact, "bfloat16")


class Faulty:
    """A model whose forward pass is changed by `fault(model's forward, arguments)`."""

    @staticmethod
    def made(fault):
        from transformers import LlamaConfig, LlamaForCausalLM

        class Model(LlamaForCausalLM):
            def forward(self, input_ids=None, **rest):
                return fault(super().forward, input_ids, rest)

        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
        return Model(config).eval()


def right(forward, ids, rest):
    return forward(ids, **rest)


def forgets(forward, ids, rest):
    """A decoder that sees the last token alone."""
    if ids.shape[1] == 1:
        rest = {"position_ids": rest["position_ids"]} if "position_ids" in rest else {}
        rest["use_cache"] = False
        from transformers import DynamicCache

        out = forward(ids, **rest)
        out.past_key_values = DynamicCache()
        return out
    return forward(ids, **rest)


def leaks(forward, ids, rest):
    """Padding that is seen."""
    return forward(ids, **rest | {"attention_mask": None, "position_ids": None} if rest.get("use_cache") is False else rest)


def cuts(forward, ids, rest):
    """A later chunk that does not see the one before it whole."""
    cache = rest.get("cache", rest.get("past_key_values"))  # its name before and since transformers 5.18
    if cache is not None and cache.get_seq_length() and ids.shape[1] > 1:
        cache.layers[0].values = cache.layers[0].values * 0
    return forward(ids, **rest)


@pytest.fixture(scope="module")
def asked(student):
    from transformers import AutoTokenizer

    return Asked.of(AutoTokenizer.from_pretrained(student), Source.read(student), SHORT)


def answered(model, asked, folder, **job):
    """What the script of transformers answers of a model, in this process."""
    engine = script(HERE / "transformers.py")
    entries = {"texts": asked.texts, "rows": asked.rows, "prompts": asked.prompts, "steps": asked.steps}
    out, rows = engine.answer(model, {**entries, "forced": None, "checks": True, **job})
    folder.mkdir(exist_ok=True)
    engine.write(folder, out | {"version": "5"}, rows)
    return Answer.read(folder, "transformers")


@pytest.mark.parametrize(
    ("fault", "named"),
    [(forgets, "cached decoding"), (leaks, "left padding"), (cuts, "chunks")],
    ids=["decoding", "padding", "chunks"],
)
def test_ways_of_computing_the_same(fault, named, asked, tmp_path):
    bounds = BOUNDS["transformers"]
    torch.manual_seed(3)
    model = Faulty.made(right)
    found = answered(model, asked, tmp_path / "right")
    assert set(check_ways(found, bounds)) == {"left padding", "chunks", "cached decoding"}
    torch.manual_seed(3)
    other = answered(Faulty.made(fault), asked, tmp_path / "wrong")
    with pytest.raises(UserError, match=rf"transformers 5: {named} differs from the whole text alone: prompt \d, pos"):
        check_ways(other, bounds)


def test_a_student_along_an_engines_tokens_says_what_it_would_have_taken(asked, tmp_path):
    model = Faulty.made(right)
    found = answered(model, asked, tmp_path / "free")
    along = answered(model, asked, tmp_path / "along", forced=found.tokens, checks=False)
    assert along.own == found.own and along.second == found.second
    numbers = compare(found, along, asked, BOUNDS["transformers"])
    assert numbers["tokens"] == "36 of 36" and numbers["near ties"] == 0 and numbers["logits"] == 0
    assert numbers["kl"] == pytest.approx(0, abs=1e-12) and numbers["top-1 agreement"] == 1


def test_near_ties(asked, tmp_path):
    """A token may be the reference's second where that is within the bound, and no other one, and nowhere else."""
    found = answered(Faulty.made(right), asked, tmp_path / "free", checks=False)
    bounds = BOUNDS["transformers"]

    def other(token, margin):
        own = [list(tokens) for tokens in found.own]
        own[1][4] = token
        margins = [list(values) for values in found.margins]
        margins[1][4] = margin
        return compare(replace(found, own=own), replace(found, margins=margins), asked, bounds)

    second = found.second[1][4]
    third = next(token for token in range(320) if token not in (second, found.own[1][4]))
    assert other(second, bounds.tie / 2)["near ties"] == 1
    wrong = rf"transformers 5: prompt 2 of 10 tokens: token 5 after it is {second}, but transformers 5 gives"
    with pytest.raises(UserError, match=wrong):
        other(second, bounds.tie * 2)
    with pytest.raises(UserError, match=rf"token 5 after it is {third}"):
        other(third, bounds.tie / 2)


def test_differences_are_named_with_their_place_and_both_values(asked, tmp_path):
    found = answered(Faulty.made(right), asked, tmp_path / "free", checks=False)
    bounds = BOUNDS["transformers"]
    rows = numpy.array(found.rows)
    rows[10, 7] += 0.5
    with pytest.raises(UserError, match=rf"prompt 2, position {asked.rows[1][2]}: the logit of token 7 is "):
        compare(replace(found, rows=rows), found, asked, bounds)
    rows[10, 7] = numpy.nan
    with pytest.raises(UserError, match="the logit of token 7 is nan"):
        compare(replace(found, rows=rows), found, asked, bounds)
    logs = [each.copy() for each in found.logprobs]
    logs[2][5] -= 0.1
    with pytest.raises(UserError, match="prompt 3, position 6: the log-probability of its token is"):
        compare(replace(found, logprobs=logs), found, asked, bounds)
    logs[2][5] = numpy.nan
    with pytest.raises(UserError, match="prompt 3, position 6: the log-probability is nan"):
        compare(replace(found, logprobs=logs), found, asked, bounds)


def test_bounds_of_coarser_types(asked, tmp_path):
    found = answered(Faulty.made(right), asked, tmp_path / "free", checks=False)
    other = replace(found, rows=numpy.array(found.rows)[:, ::-1])
    for bounds, said in (
        (bounds_of("vllm", "qwen3_5_text"), "nats a token; at most"),
        (bounds_of("mlx", "qwen3_5_text", Form()), "nats a token; at most"),
        (BOUNDS["llama.cpp"], "nats a token"),
    ):
        assert compare(found, found, asked, bounds)["kl"] == pytest.approx(0, abs=1e-12)
        with pytest.raises(UserError, match=said):
            compare(other, found, asked, bounds)
    doubtful = replace(found, logprobs=[each - 0.01 for each in found.logprobs])
    with pytest.raises(UserError, match=r"the perplexity of the text is \S+, but that of transformers 5 is .*differ by 0.5"):
        compare(doubtful, found, asked, BOUNDS["llama.cpp"])
    first = next(iter(asked.strings))
    ids = [list(tokens) for tokens in asked.strings.values()]
    compare_ids(replace(found, ids=ids), asked)
    ids[0][2] += 1
    with pytest.raises(UserError, match=r"token 3 is \[\d+\] instead of \[\d+\]"):
        compare_ids(replace(found, ids=ids), asked)
    assert len(asked.strings[first]) >= 8


def test_texts_are_longer_than_windows_and_within_positions(student):
    from transformers import AutoTokenizer

    source, tokenizer = Source.read(student), AutoTokenizer.from_pretrained(student)
    asked = Asked.of(tokenizer, source, Reading())
    assert [len(text) for text in asked.texts] == [24, 128, 128] and asked.steps == 128  # of 256 positions
    assert len({len(prompt) for prompt in asked.prompts}) == 3
    source.config.max_position_embeddings = 4096
    wide = replace(
        source, layout=replace(source.layout, mixers={"M": {"mixer": "mamba2", "window": {"size": 700, "sinks": 2}}})
    )
    assert [len(text) for text in Asked.of(tokenizer, wide, Reading()).texts] == [24, 131, 724]
    source.config.vocab_size = 60
    with pytest.raises(UserError, match=r"gives token 3.., but the student has 60"):
        Asked.of(tokenizer, source, Reading())
