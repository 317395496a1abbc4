"""`optimizer: adamw_8bit`: 8-bit moments learn as AdamW's do, take the bytes that plans state, and are restored from
checkpoints to the bit, in one process or in several."""

import io
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import distill
from distill import moments
from distill.errors import Interrupted, UserError
from distill.plan_table import show
from distill.recipe_file import check
from distill.runs import checkpoint, parts
from distill.runs.divided import load_optimizer, optimizer_tensors, split
from distill.runs.stopper import Stopper
from distill.stages.align import Align
from distill.training import eight_bits
from distill.training.optim import make_optimizer, set_rates
from distill.training.shares import bytes_of
from distill.training.trainer import Trainer
from tests.conftest import tiny_entries
from tests.distill.sharded_steps import prepared
from tests.distill.test_processes import STOPPED, TWO

installed = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra int8)")
EIGHT = {"optimizer": "adamw_8bit"}


def quiet():
    return Console(file=io.StringIO(), width=400)


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory, tokenizer):
    """The folder of a random Llama whose matrices are large enough for moments of 8 bits, rows of 64 and 192 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes, **rest)
    folder = tmp_path_factory.mktemp("wide teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def entries_of(wide_teacher, text_files):
    """A recipe that trains everything, a checkpoint a step."""
    entries = tiny_entries(wide_teacher, text_files)
    imitate = {"tokens": 768, "lr": 1e-3, "train": "all", **EIGHT}
    entries["stages"] = [entries["stages"][0], {"align": {"tokens": 512, "lr": 3e-3, **EIGHT}}, {"imitate": imitate}]
    entries["evaluation"] |= {"passkey": [], "documents": 1}
    return entries | {"checkpoints": {"steps": 1, "keep": 20}}


@pytest.fixture
def entries(wide_teacher, text_files):
    """`entries_of`, a copy to change."""
    return entries_of(wide_teacher, text_files)


def with_adamw(entries):
    stages = [{name: {**options}} for stage in entries["stages"] for name, options in stage.items()]
    for stage in stages:
        for options in stage.values():
            options.pop("optimizer", None)
    return entries | {"stages": stages}


def losses(folder):
    return [(line["stage"], line["step"], line["loss"]) for line in folder.metrics()]


# which moments, and how many bytes


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 4096), 256),
        ((4096, 14336), 256),
        ((100, 576), 192),
        ((8, 16, 96), 256),  # stacked experts: a row is a matrix
        ((128, 96), 96),
        ((4096, 33), 33),
        ((64, 63), None),  # few numbers
        ((4096, 31), None),
        ((1000, 2 * 257), None),  # no divisor from 32 to 256
        ((100_000,), None),
        ((4096, 1, 4), None),
    ],
)
def test_blocks_lie_within_rows(shape, block):
    assert moments.block_of(shape) == block
    count = torch.Size(shape).numel()
    wanted = 4 * count if block is None else count + 4 * count / block
    assert moments.bytes_of(shape, "adamw_8bit") == wanted
    assert moments.bytes_of(shape, "adamw") == moments.bytes_of(shape, "adamw_8bit", wide=True) == 4 * count


def test_ten_bytes_a_parameter():
    assert moments.bytes_a_parameter("adamw") == 8 and moments.bytes_a_parameter("adamw_8bit") == 2 + 8 / 256


@installed
def test_plans_count_what_a_trainer_makes(entries, capsys):
    needs = {name: distill.plan(each, gpus=1) for name, each in (("8", entries), ("32", with_adamw(entries)))}
    session, student, stage = prepared(entries, EIGHT | {"train": "all"}, layers=2)
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 4, 4)
    state = trainer.optimizer_state()
    made = sum(t.numel() * t.element_size() for name, t in state.items() if not name.endswith(("|step", ".qmap")))
    found, before = (needs[name].needs["imitate"].footprint for name in ("8", "32"))
    assert found.moments == made < 0.4 * before.moments and found.gradients == before.gradients
    assert needs["8"].bytes < needs["32"].bytes and needs["8"].numbers()["needs"]["imitate"]["optimizer"] == "adamw_8bit"
    names = set(trainer.parameters)
    narrow = {name.partition("|")[0] for name in state if name.endswith("exp_avg_sq.codes")}
    assert narrow >= {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    assert not any(moments.block_of(trainer.parameters[name].shape) is None for name in narrow)
    assert moments.wide_names(student, names) and narrow.isdisjoint(moments.wide_names(student, names))
    for name, said in (("8", "moments (8 bits) "), ("32", "moments ")):
        show(needs[name], check(entries, "tiny"), "tiny.yaml", Console(width=200))
        assert f"gradients 0.0, {said}0.0" in capsys.readouterr().out
    shares = [bytes_of(1e9, stage.Options(tokens=1, lr=1.0, **how)) for how in ({}, EIGHT)]
    assert shares == [16e9, pytest.approx(10.03e9, rel=1e-3)]


# steps


def parameters_of(seed=0):
    """A matrix, one that stays float32 whatever it is, one of two rows, and a vector."""
    torch.manual_seed(seed)
    shapes = {"matrix": (64, 192), "decays": (64, 128), "rows": (2, 4096), "vector": (300,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def optimizer_of(parameters, **options):
    trained = {name: ("ssm", parameter) for name, parameter in parameters.items()}
    return make_optimizer(trained, Align.Options(tokens=1, lr=1e-2, **options), wide={"decays"})


def gradient(name, step, like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * step + len(name)))


def take(optimizer, parameters, steps, whole=lambda name, gradient: gradient):
    for step in steps:
        rate = set_rates(optimizer, 1 / (step + 1))
        assert pytest.approx(1e-2 / (step + 1)) == rate == pytest.approx(float(optimizer.param_groups[0]["lr"]))
        for name, parameter in parameters.items():
            parameter.grad = whole(name, gradient(name, step, parameter))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in parameters.values())


def saved(optimizer, parameters):
    return optimizer_tensors(optimizer, {id(parameter): name for name, parameter in parameters.items()})


@installed
def test_steps_are_close_to_adamws():
    """What keeps float32 moments is equal but for rounding, the rest moves the same way."""
    theirs, ours, before = parameters_of(), parameters_of(), parameters_of()
    take(optimizer_of(theirs), theirs, range(6))
    optimizer = optimizer_of(ours, **EIGHT)
    take(optimizer, ours, range(6))
    for name in ours:
        moved = theirs[name] - before[name]
        error = (ours[name] - theirs[name]).norm() / moved.norm()
        assert error < 1e-5 if name in ("decays", "vector") else 1e-5 < error < 0.05, name
    kept = saved(optimizer, ours)
    assert kept["matrix|exp_avg.codes"].dtype == torch.uint8 and kept["matrix|exp_avg.scale"].shape == (64, 1)
    assert kept["rows|exp_avg_sq.scale"].shape == (2, 16) and kept["decays|exp_avg"].dtype == torch.float32
    assert all(tensor == 6 for name, tensor in kept.items() if name.endswith("|step"))


def divided_over(world, rank, whole):
    """The parameters' rows of one process of several, in a group that talks to nobody."""
    mesh = init_device_mesh("cpu", (world,))
    return {name: nn.Parameter(rows_here(parameter.detach(), mesh, rank)) for name, parameter in whole.items()}


def rows_here(tensor, mesh, rank):
    parts = tensor.chunk(mesh.size())
    rows = parts[rank] if rank < len(parts) else tensor[:0]
    return DTensor.from_local(rows.clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


@pytest.fixture
def group():
    """`group(world, rank)` makes this process one of several that talk to nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def begin(world, rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), world_size=world, rank=rank)

    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()


@installed
def test_any_number_of_processes_holds_the_same_moments(group, tmp_path):
    """Two steps by one process, one by three, of which one has no row of a matrix, one by two: the bits of four by one."""
    whole = parameters_of()
    optimizer = optimizer_of(whole, **EIGHT)
    take(optimizer, whole, range(2))
    weights, folder = {name: parameter.detach().clone() for name, parameter in whole.items()}, tmp_path / "1"
    folder.mkdir()
    parts.write_tensors(folder / "optimizer.safetensors", saved(optimizer, whole))
    for world in (3, 2):
        step, came, folder = 5 - world, {}, tmp_path / str(world)
        folder.mkdir()
        for rank in range(world):
            group(world, rank)
            here = divided_over(world, rank, {name: nn.Parameter(tensor) for name, tensor in weights.items()})
            mesh = next(iter(here.values())).device_mesh
            others = optimizer_of(here, **EIGHT)
            load_optimizer(others, here, parts.Stored(tmp_path / ("1" if world == 3 else "3"), "optimizer"))
            take(others, here, [step], lambda name, gradient, mesh=mesh, rank=rank: rows_here(gradient, mesh, rank))
            rest, held = split(saved(others, here))
            parts.write_parts(folder, rank, world, {"optimizer": held}, {})
            if rank == 0:
                parts.write_tensors(folder / "optimizer.safetensors", rest)
            for name, parameter in here.items():
                came.setdefault(name, []).append(parameter.detach().to_local())
        weights = {name: torch.cat(rows) for name, rows in came.items()}
    take(optimizer, whole, range(2, 4))
    wanted, stored = saved(optimizer, whole), parts.Stored(tmp_path / "2", "optimizer")
    assert set(stored) == set(wanted)
    assert all(torch.equal(weights[name], parameter) for name, parameter in whole.items())
    assert all(torch.equal(stored[name], tensor) for name, tensor in wanted.items())


@installed
def test_without_a_compiler(monkeypatch, caplog):
    """On a CPU nothing is compiled. Where that was to be and fails, it is said once and the numbers are the same."""
    plain, other = parameters_of(), parameters_of()
    take(optimizer_of(plain, **EIGHT), plain, range(2))

    def failing(*unused, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    eight_bits._compiles.cache_clear()
    entries = optimizer_of(other).param_groups
    groups = [{name: group[name] for name in ("params", "lr", "peak", "weight_decay")} for group in entries]
    for _ in range(2):
        optimizer = eight_bits.EightBitAdamW(groups, (0.9, 0.95), {id(other["decays"])}, compiled=True)
    take(optimizer, other, range(2))
    eight_bits._compiles.cache_clear()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert caplog.text.count("steps of adamw_8bit are not compiled") == 1 and "no compiler here" in caplog.text


# runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory, wide_teacher, text_files):
    """The folder of a run of `entries` that nothing stopped."""
    return distill.run(entries_of(wide_teacher, text_files), runs=tmp_path_factory.mktemp("alone"), console=quiet())


@installed
def test_a_run_learns_as_with_adamw(entries, alone, tmp_path):
    other = distill.run(with_adamw(entries), runs=tmp_path, console=quiet())
    assert alone.path.name != other.path.name
    wide, narrow = losses(other), losses(alone)
    assert [line[:2] for line in wide] == [line[:2] for line in narrow] and len(wide) > 8 and wide != narrow
    assert [line[2] for line in narrow] == pytest.approx([line[2] for line in wide], rel=0.005)
    aligned = [line[2] for line in narrow if line[0] == "align"]
    assert aligned[-1] < 0.9 * aligned[0]


@installed
@pytest.mark.parametrize("steps", [2, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(entries, alone, tmp_path, monkeypatch, steps):
    asked = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == steps else None)
        distill.run(entries, runs=tmp_path, console=quiet())
    (folder,) = tmp_path.glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    names = set(load_file(newest / "optimizer.safetensors"))
    assert any(name.endswith("|exp_avg.codes") for name in names)
    done = distill.run(entries, runs=tmp_path, console=quiet())
    assert losses(done) == losses(alone)
    found, wanted = (load_file(run.student / "model.safetensors") for run in (done, alone))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@installed
@pytest.mark.parametrize("change", ["rows", "type", "no such moment"])
def test_moments_that_lie_are_refused(tmp_path, change):
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, **EIGHT)
    tensors = dict(saved(optimizer, parameters))
    codes = tensors.pop("matrix|exp_avg.codes")
    changed = {"rows": codes[:32], "type": codes.float(), "no such moment": codes}[change]
    tensors["matrix|exp_avg.codes" if change != "no such moment" else "vector|exp_avg.codes"] = changed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "optimizer.safetensors")
    with pytest.raises(UserError, match="is damaged"), checkpoint.whole(tmp_path):
        load_optimizer(optimizer, parameters, parts.Stored(tmp_path, "optimizer"))


@installed
def test_two_processes_that_divide_and_one_that_goes_on(entries, alone, tmp_path):
    """Stopped in imitate, whose masters, gradients and moments two processes divide."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries | {"shard": "student"}))
    (tmp_path / "stopped.py").write_text(STOPPED.replace("== 2", "== 6"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *TWO, str(tmp_path / "stopped.py"), str(tmp_path / "tiny.yaml"), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest.name.startswith("2-imitate-000") and checkpoint.read_state(newest).processes == 2
    held = load_file(newest / "optimizer-00002-of-00002.safetensors")
    assert held["model.embed_tokens.weight|exp_avg.codes"].shape == (160, 64)
    assert held["model.embed_tokens.weight|exp_avg.scale"].shape == (160, 1)
    gone_on = distill.run(entries, runs=tmp_path / "runs", console=quiet())
    assert gone_on.path == folder
    found, wanted = losses(gone_on), losses(alone)
    assert [line[:2] for line in found] == [line[:2] for line in wanted]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in wanted], rel=1e-4)


# refusals


@pytest.mark.parametrize("twice", [False, True])
def test_without_torchao(tiny_recipe, tmp_path, monkeypatch, twice):
    monkeypatch.setattr("distill.moments.find_spec", lambda name: None)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    tiny_recipe["stages"] += [{"align": {"tokens": 64, "lr": 1e-3}}] if twice else []
    recipe, key = check(tiny_recipe, "tiny.yaml"), "2" if twice else "align"
    said = rf"^tiny: stages.{key}.optimizer is 'adamw_8bit', which needs torchao, .*: pip install 'distill-hybrids\[int8\]'$"
    for verb in (lambda: distill.plan(recipe), lambda: distill.run(recipe, runs=tmp_path)):
        with pytest.raises(UserError, match=said):
            verb()
    assert not list(tmp_path.iterdir())


def test_of_an_old_torchao(tiny_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr("distill.moments.find_spec", lambda name: name)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    with pytest.raises(UserError, match=r"stages.align.optimizer is 'adamw_8bit', .*version 0.15 or newer"):
        distill.plan(tiny_recipe)


def test_names_of_optimizers(tiny_recipe):
    tiny_recipe["stages"][2]["align"]["optimizer"] = "adam8"
    with pytest.raises(UserError, match=r"stages.align.*optimizer.*'adamw' or 'adamw_8bit'"):
        check(tiny_recipe, "tiny.yaml")


def test_recipes_that_do_not_use_it_keep_their_runs(tiny_recipe):
    before = check(tiny_recipe, "tiny.yaml")
    assert "optimizer" not in before.yaml() and "optimizer" not in str(before.stages)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    assert check(tiny_recipe, "tiny.yaml").fingerprint != before.fingerprint
