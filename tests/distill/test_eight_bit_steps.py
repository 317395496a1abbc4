"""Moments of 8 bits: their bytes, and steps close to AdamW's, with the same bits in any number of processes."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distill import moments
from distill.errors import UserError
from distill.runs import checkpoint, parts
from distill.runs.divided import load_optimizer, optimizer_tensors, split
from distill.stages.align import Align
from distill.training import eight_bits
from distill.training.optim import make_optimizer, set_rates
from tests.distill.eight_bits import EIGHT, installed

# bytes


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
