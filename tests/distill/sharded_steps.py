"""Steps of `imitate` and `tune` in one process or divided over several; torchrun runs this, and it writes a file."""

import errno
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from distill.build import build, layout_of
from distill.errors import UserError
from distill.recipe_file import check
from distill.runs import divided, parts, random_states
from distill.runs.checkpoint import RunState
from distill.runs.session import Session
from distill.runs.together import all_or_none, check_same
from distill.stages import stage_class
from distill.stages.probe import probe
from distill.training.reduction import average_gradients, first_nonfinite_name
from distill.training.sharding import Sharding
from distill.training.trainer import Trainer

HEADS = {"mixer": "parallel_heads", "window": 16, "sinks": 2, "ssm": {"mixer": "discrete_mamba2", "d_state": 8}}
ZAMBA = {"S": {"mixer": "shared_attention", "blocks": 1, "rank": 4, "start": "mean"}, "M": {"mixer": "mamba2"}}
CASES = {  # changes of the tiny recipe, options of the stage, what is divided
    "masters": ({}, {}, "student"),
    "sums after each micro-batch": ({}, {"ce": 0.5}, "student"),
    "shared keys, meta tokens, recomputed layers": (
        {"pattern": "PSPS", "mixers": {"P": HEADS, "S": HEADS | {"share_kv": True}}, "meta_tokens": 2},
        {"activation_checkpointing": True, "train": "mixers+norms"},
        "all",
    ),
    "shared blocks, adapters": (
        {"pattern": "MSMS", "mixers": ZAMBA},
        {"train": "lora", "lora": {"rank": 4}, "activation_checkpointing": True},
        "all",
    ),
    "cross-entropy, recomputed layers": ({}, {"activation_checkpointing": True}, "all"),
}
TUNED = "cross-entropy, recomputed layers"  # the rest imitates


def prepared(entries: dict, options: dict, layers: int = 4, name: str = "imitate"):
    """A session, a student and its stage."""
    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    layout = layout_of(recipe.pattern, recipe.mixers, layers, "tiny.yaml", recipe.meta_tokens)
    student, _ = build(session.teacher, layout)
    kind = stage_class(name)
    stage = kind(session.teacher, student, kind.Options(tokens=1, lr=1e-3, **options))
    stage.prepare()
    return session, student, stage


def stepped(entries: dict, case: str, divide: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The student's weights after two steps, and their losses and norms and a probe's losses."""
    changes, options, kind = CASES[case]
    session, student, stage = prepared(entries | changes, options, name="tune" if case == TUNED else "imitate")
    kinds = {name: type(module) for name, module in student.named_modules()}
    sharding = Sharding(stage, torch.device("cpu"), teacher_too=kind == "all", narrow=None) if divide else None
    if sharding:
        sharding.sums_whole = case != "sums after each micro-batch"
        assert any(isinstance(parameter, DTensor) for parameter in student.parameters())
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 8, 2, sharding)
    reports = [trainer.step(step) for step in range(2)]
    found = {f"{name} {step}": getattr(r, name) for step, r in enumerate(reports) for name in ("loss", "gradient_norm")}
    if sharding:
        with sharding.gathered():
            gathered = probe(session.teacher, student, session.probe_batch())
        sharding.restore()
        assert {name: type(module) for name, module in student.named_modules()} == kinds
        assert not any(isinstance(p, DTensor) for model in (student, session.teacher.model) for p in model.parameters())
    found |= probe(session.teacher, student, session.probe_batch())
    if sharding:
        assert all(abs(gathered[name] - found[name]) <= 1e-5 * abs(found[name]) for name in gathered)
    stage.finish(lambda tokens: [])
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}, found


def types_of_computation(entries: dict) -> dict[str, str]:
    """The type that each parameter of a divided student has while its layer runs, in bfloat16."""
    session, student, stage = prepared(entries | {"precision": "bfloat16"}, {})
    sharding = Sharding(stage, torch.device("cpu"), teacher_too=False, narrow=torch.bfloat16)
    found = {}
    for path, module in student.named_modules():
        if any(True for _ in module.parameters(recurse=False)):

            def look(module, inputs, path=path):
                found.update({f"{path}.{name}": str(p.dtype) for name, p in module.named_parameters(recurse=False)})

            module.register_forward_pre_hook(look)
    for layer, mixer in student.mixers.items():

        def inside(module, inputs, layer=layer):
            prefix = student.mixer_prefix(layer)
            found.update({prefix + name: str(p.dtype) for name, p in module.named_parameters()})

        mixer.register_forward_pre_hook(inside)
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 4, 2, sharding)
    trainer.step(0)
    masters = {str(parameter.dtype) for parameter in trainer.parameters.values()}
    assert masters == {"torch.float32"}, masters
    return found


def agreements(place: Path) -> dict[str, str]:
    """What two processes say of recipes that differ, shares of work that fail, disks that are full, and NaN in one part."""
    rank, device, said = dist.get_rank(), torch.device("cpu"), {}

    def full(file, tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    def failing():
        if rank == 1:
            raise UserError("the second one cannot")

    for name, work in {
        "recipes": lambda: check_same("0000000a" if rank else "81affc48", "tiny", device),
        "same recipes": lambda: check_same("81affc48", "tiny", device),
        "shares": lambda: all_or_none(failing, device),
    }.items():
        try:
            work()
            said[name] = "nothing"
        except UserError as error:
            said[name] = str(error)
    state = RunState(1, "imitate", 3, False, 0, "t", recipe="r", processes=2)
    tensors = {"rng": random_states.random_tensors(), "student": {"whole": torch.arange(3.0)}}
    held = {"student": {"rows": parts.Part(torch.full((1 + rank, 2), float(rank)), rank, (3, 2))}}
    divided.save_together(place, state, tensors, held, 2, device)
    state.step, write = 4, parts.write_tensors
    if rank == 1:
        parts.write_tensors = full
    try:
        divided.save_together(place, state, tensors, held, 2, device)
    except UserError as error:
        said["full disk"] = str(error)
    parts.write_tensors = write
    said["checkpoints"] = ", ".join(sorted(path.name for path in place.iterdir()))
    said["nan"] = first_nonfinite_name(
        {"b": torch.ones(2)}, {"c": torch.tensor([1.0, float("nan") if rank else 1.0]), "d": torch.ones(0)}, list("abcd")
    )
    one = {
        "x": torch.nn.Parameter(torch.ones(3)),
        "y": torch.nn.Parameter(torch.ones(2)),
        "z": torch.nn.Parameter(torch.ones(1)),
    }
    one["x"].grad = torch.full((3,), 1.0 + rank)
    if rank:
        one["y"].grad = torch.full((2,), 4.0)
    average_gradients(one | {"again": one["x"]})
    said["averages"] = str([None if p.grad is None else p.grad.tolist() for p in one.values()])
    return said


if __name__ == "__main__":
    place = Path(sys.argv[1])
    entries = yaml.safe_load((place / "tiny.yaml").read_text())
    tensors, numbers = {}, {}
    for case in CASES:
        weights, numbers[case] = stepped(entries, case, divide=True)
        tensors |= {f"{case}|{name}": tensor for name, tensor in weights.items()}
    numbers["types"] = types_of_computation(entries)
    numbers["said"] = agreements(place / "checkpoints")
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "divided.safetensors")
    (place / f"numbers-{dist.get_rank()}.json").write_text(json.dumps(numbers))
