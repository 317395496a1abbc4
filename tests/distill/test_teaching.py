"""Another teacher for imitate, online and cached."""

import gc
import json
import shutil
import weakref

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

import distill
import teachers
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.logits.reader import LogitCache
from distill.runs.stopper import Stopper
from distill.stages.imitate import Imitate
from distill.stages.probe import probe
from distill.stages.targets import Online
from distill.training import pipeline, teaching
from distill.training.aside import Aside, own_weights
from students.config import Layout
from students.kernels.linear_kl import Head, linear_kl
from teachers.vocabulary import tokenizer_of, vocabulary_difference
from tests.distill.two_documents import MIXER, text

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def larger(tmp_path_factory, tokenizer):
    """The folder of a teacher of the same vocabulary: wider, deeper, and with eight rows of padding in its head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=328, num_key_value_heads=2, max_position_embeddings=512, **sizes, **ids)
    folder = tmp_path_factory.mktemp("larger")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, tiny_recipe, monkeypatch, larger):
    """A recipe that imitates the larger teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.evaluation.judging.EVALUATIONS", {"fidelity": ""})
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], {"imitate": {"tokens": 512, "lr": 1e-3, "teacher": str(larger)}}]
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return tiny_recipe


# another teacher


def test_a_larger_teacher(recipe, larger, monkeypatch):
    """The stage's loss is the KL to it over the rows that both have; it is let go of before the student is judged; the run
    remembers it."""
    seen, alive = [], []
    real, judged = teaching.load_other, pipeline.fidelity

    def loaded(*arguments):
        seen.append(weakref.ref((teacher := real(*arguments)).model))
        return teacher

    def fidelity(*arguments):
        gc.collect()
        alive.append([reference() is not None for reference in seen])
        return judged(*arguments)

    monkeypatch.setattr(teaching, "load_other", loaded)
    monkeypatch.setattr(pipeline, "fidelity", fidelity)
    folder = distill.run(recipe, console=QUIET)
    assert len(seen) == 1 and alive == [[], [False]]
    taught = folder.read("run.json")["taught"]
    assert taught == {"1-imitate": f"teacher {teachers.load(str(larger)).fingerprint}"}


def test_over_the_rows_that_both_have(teacher, larger):
    student, _ = build(teacher, Layout.over(4, "AM", {"M": MIXER}))
    other, batch = teachers.load(str(larger)), text()
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0))
    stage.learn_from(Online(other, 320))
    ((_, loss),) = stage.losses(batch)
    hidden, theirs = student.hidden(batch.ids, batch.documents), other.hidden(batch.ids, batch.positions)
    heads = Head(student.get_output_embeddings().weight), Head(other.model.get_output_embeddings().weight[:320])
    wanted = linear_kl(hidden.flatten(0, 1), heads[0], theirs.flatten(0, 1), heads[1], batch.weights.flatten())
    torch.testing.assert_close(loss, wanted)


def test_cached_with_another_teacher(recipe, larger):
    """The larger one's numbers are cached, and the training loads it no more."""
    folder = distill.cache(recipe, out="logits", top_k=8, console=QUIET)
    facts = json.loads((folder / "cache.json").read_text())
    assert facts["vocabulary"] == 320 and facts["reference"] == str(larger)
    assert facts["teacher"] == teachers.load(str(larger)).fingerprint
    batch = LogitCache(folder, "x")
    assert batch.count == 16
    done = distill.run(recipe, overrides="stages.imitate.offline_logits=logits", console=QUIET)
    assert done.read("run.json")["taught"]["1-imitate"].startswith("cache ")
    del recipe["stages"][1]["imitate"]["teacher"]
    with pytest.raises(UserError, match=r"a cache of another teacher .*; they differ in the weights.*stage's teacher="):
        distill.run(recipe, overrides="stages.imitate.offline_logits=logits", console=QUIET)


def test_goes_on_with_the_same_teacher_alone(recipe, larger, tmp_path, monkeypatch):
    moved = shutil.copytree(larger, tmp_path / "moved")
    over = f"stages.imitate.teacher={moved}"
    asked = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 1 else None)
        distill.run(recipe, overrides=over, console=QUIET)
    weights = load_file(moved / "model.safetensors")
    other = {**weights, "model.norm.weight": weights["model.norm.weight"] * 2}
    save_file(other, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the teacher of stage imitate is not the one that it began with; restore that one"):
        distill.run(recipe, overrides=over, console=QUIET)
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert distill.run(recipe, overrides=over, console=QUIET).read("run.json")["finished"]


def changed(larger, place, **config):
    """A copy of the larger teacher with other entries of its config."""
    folder = shutil.copytree(larger, place)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def another_token(folder):
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    name = next(name for name, number in vocabulary.items() if number == 310)
    vocabulary["new"] = vocabulary.pop(name)
    said["model"]["merges"] = [pair for pair in said["model"]["merges"] if "".join(pair) != name]
    file.write_text(json.dumps(said))
    return repr(name)


def test_what_other_teachers_are_refused(recipe, larger, tmp_path):
    def refused(said, *overrides):
        with pytest.raises(UserError, match=said):
            distill.run(recipe, overrides=overrides, console=QUIET)
        assert not (tmp_path / "runs").exists()

    refused(
        r"stages.imitate.hidden compares hidden states, and those of .* have 48 channels, the student's 32",
        *["stages.imitate.hidden=1"],
    )
    refused(
        "stages.imitate.teacher: teacher 'nowhere/at-all/x' is no folder here", "stages.imitate.teacher=nowhere/at-all/x"
    )
    short = changed(larger, tmp_path / "short", max_position_embeddings=16)
    refused(
        r"data.seq_len is 32, but stages.imitate.teacher, .*short, has positions for 16", f"stages.imitate.teacher={short}"
    )
    other = changed(larger, tmp_path / "other")
    name = another_token(other)
    refused(
        f"stages.imitate.teacher is .*other, whose vocabulary is not that of .*: token 310 is {name} here and 'new' there",
        f"stages.imitate.teacher={other}",
    )
    small = changed(larger, tmp_path / "few", vocab_size=300)
    refused(
        r"stages.imitate.teacher is .*few, which has 300 embeddings, but the tokenizer has a token 319",
        f"stages.imitate.teacher={small}",
    )
    wide = changed(larger, tmp_path / "wide", hidden_size=32)
    refused(
        "stages.imitate.hidden_layers needs a teacher of the student's depth, but .* has 5 layers, the student 4",
        *[f"stages.imitate.teacher={wide}", "stages.imitate.hidden=1", "stages.imitate.hidden_layers=[1]"],
    )


def test_vocabularies_token_by_token(larger, tiny_teacher, tmp_path, tokenizer):
    ours, theirs = tokenizer_of(str(tiny_teacher)), tokenizer_of(str(larger))
    assert vocabulary_difference(ours, theirs) is None
    theirs.add_tokens(["<more>"])
    assert vocabulary_difference(ours, theirs) == "token 320 is nothing here and '<more>' there (320 tokens here, 321 there)"
    other = tokenizer_of(str(larger))
    other.eos_token = "a"
    assert vocabulary_difference(ours, other) == "eos_token is '<end>' here and 'a' there"
    other = tokenizer_of(str(larger))
    other.pad_token = "a"  # stands in no text
    assert vocabulary_difference(ours, other) is None


# the teacher aside


def test_what_is_the_teachers_own(teacher):
    """What the student shares stays; what it has copies of, or has replaced, goes."""
    student, _ = build(teacher, Layout.over(4, "AM", {"M": MIXER}))
    names = {id(parameter): name for name, parameter in teacher.model.named_parameters()}
    own = {names[id(parameter)] for parameter in own_weights(teacher.model, student)}
    assert own == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (1, 3) for p in "qkvo"}
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0, train="all"))
    stage.prepare()
    assert len(own_weights(teacher.model, student)) == len(names)
    before = probe(teacher, student, text())
    aside = Aside(teacher)
    with aside.away(student), aside.back():
        assert probe(teacher, student, text()).keys() == before.keys()


def test_plans_and_benchmarks_of_them(recipe, larger):
    """Another teacher's forward pass counts in a plan, a cache has none; steps are timed with what they learn from."""
    own = {**recipe, "stages": [recipe["stages"][0], {"imitate": {"tokens": 512, "lr": 1e-3}}]}
    plain, other = (distill.plan(each) for each in (own, recipe))
    sizes = [sum(p.numel() for p in teachers.load(str(each)).model.parameters()) for each in (recipe["teacher"], larger)]
    assert other.flops - plain.flops == pytest.approx(512 * 2 * (sizes[1] - sizes[0]))
    distill.cache(own, out="logits", top_k=8, console=QUIET)
    cached = distill.plan(own, overrides="stages.imitate.offline_logits=logits")
    assert plain.flops - cached.flops == pytest.approx(512 * 2 * sizes[0])
    for overrides in ([], ["stages.imitate.offline_logits=made-up"]):
        (row,) = distill.bench("steps", recipe=recipe, overrides=overrides)["rows"]
        assert row["stage"] == "imitate" and row["loss"] > 0
