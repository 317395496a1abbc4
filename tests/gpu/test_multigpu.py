"""Several GPUs through NCCL: a run divided over them against one GPU's losses, and gone on with by one when a process was
killed. Up to four GPUs; `make test-multigpu`."""

import io
import os
import time

import pytest
import torch
from rich.console import Console

import distill
from distill.errors import Ended
from distill.runs import checkpoint
from tests.conftest import tiny_entries
from tests.distill.test_launching import KILLED

pytestmark = pytest.mark.gpu
GPUS = min(4, torch.cuda.device_count() if torch.cuda.is_available() else 0)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory, tokenizer):
    """The folder of a random Llama whose heads have 32 channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    rest = {"num_hidden_layers": 4, "max_position_embeddings": 512, "initializer_range": 0.05, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES, **rest)
    folder = tmp_path_factory.mktemp("wide teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def entries_of(wide_teacher, text_files, **options):
    """A recipe of every stage in float32, with a checkpoint every second step. What is divided is looked at here: layers are
    not compiled, and the references run (`on_references`), for compiling float32 kernels takes minutes."""
    tiny_recipe = tiny_entries(wide_teacher, text_files)
    stages = [{"initialise": {"tokens": 256}}, {"align": {"tokens": 1024, "lr": 1e-3, "compile": False}}]
    stages += [{"imitate": {"tokens": 2048, "lr": 1e-3, "train": "all", "compile": False, **options}}]
    changes = {"device": "cuda", "precision": "float32", "checkpoints": {"steps": 2, "keep": 4}, "stages": stages}
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 1}
    tiny_recipe["data"] |= {"batch": 8, "micro_batch": 1}
    return tiny_recipe | changes


@pytest.fixture
def entries(wide_teacher, text_files, on_references):
    """`entries_of`, a copy to change."""
    return entries_of(wide_teacher, text_files)


@pytest.fixture
def on_references(monkeypatch):
    """Runs of this process and of those that it starts are on the references."""
    monkeypatch.setenv("DISTILL_KERNELS", "reference")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, wide_teacher, text_files):
    """The recipe's run on one GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_KERNELS", "reference")
        entries = entries_of(wide_teacher, text_files)
        return distill.run(entries, runs=tmp_path_factory.mktemp("alone"), console=quiet())


def quiet():
    return Console(file=io.StringIO(), width=400)


def losses(folder):
    return [(line["stage"], line["step"], line["loss"]) for line in folder.metrics()]


def assert_same(found, wanted, rel):
    assert [line[:2] for line in found] == [line[:2] for line in wanted]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in wanted], rel=rel)


@pytest.fixture(autouse=True)
def several():
    if GPUS < 2:
        pytest.fail(f"these tests need two GPUs or more, and PyTorch sees {GPUS} here")


@pytest.mark.parametrize("shard", ["none", "student", "all"])
def test_as_on_one_gpu(entries, alone, tmp_path, shard):
    began = time.monotonic()
    done = distill.run(entries | {"shard": shard}, runs=tmp_path / "several", gpus=GPUS)
    print(f"{GPUS} GPUs, shard {shard}: {time.monotonic() - began:.1f} s")
    assert_same(losses(done), losses(alone), 1e-4)  # sums of a GPU's kernels differ in their last bits from run to run
    assert done.read("evaluations.json")["after"]["2-imitate"]["kl"] == pytest.approx(
        alone.read("evaluations.json")["after"]["2-imitate"]["kl"], rel=1e-3
    )


def test_killed_and_gone_on_with_by_one(entries, alone, tmp_path, monkeypatch, capfd):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    began = time.monotonic()
    with pytest.raises(Ended):
        distill.run(entries | {"shard": "student"}, runs=tmp_path / "runs", gpus=GPUS)
    print(f"ended after {time.monotonic() - began:.1f} s")
    said = capfd.readouterr().err
    assert said.count("error:") == 1 and f"error: process 1 of {GPUS} was killed by SIGKILL" in said
    monkeypatch.delenv("PYTHONPATH")
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest.name == "2-imitate-0000004" and checkpoint.read_state(newest).processes == GPUS
    done = distill.run(entries, runs=tmp_path / "runs", console=quiet())
    assert_same(losses(done), losses(alone), 1e-4)


def test_moments_of_8_bits_divided(wide_teacher, text_files, on_references, tmp_path):
    """Each process has its rows' codes and scales, and the steps are one GPU's."""
    pytest.importorskip("torchao")
    entries = entries_of(wide_teacher, text_files, optimizer="adamw_8bit")
    alone = distill.run(entries, runs=tmp_path / "alone", console=quiet())
    done = distill.run(entries | {"shard": "student"}, runs=tmp_path / "several", gpus=GPUS)
    assert_same(losses(done), losses(alone), 1e-3)


def test_bfloat16_divided(entries, tmp_path, monkeypatch):
    """Masters are float32, layers are gathered in bfloat16: close to one GPU's autocast, not equal. On the kernels, and
    compiled."""
    monkeypatch.delenv("DISTILL_KERNELS")
    entries |= {"precision": "bfloat16"}
    for stage in entries["stages"][1:]:
        next(iter(stage.values()))["compile"] = True
    alone = distill.run(entries, runs=tmp_path / "alone", console=quiet())
    done = distill.run(entries | {"shard": "all"}, runs=tmp_path / "several", gpus=GPUS)
    assert_same(losses(done), losses(alone), 2e-2)
