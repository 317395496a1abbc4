"""`distill plan`: what a run would do, computed from the teacher's config alone.

Nothing is trained or written. Weights are loaded and text is prepared only if the plan is checked.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import students
from distill.build import attention_shapes, build
from distill.errors import UserError
from distill.evaluation.identity import check_identity
from distill.exporters import EXPORTERS, target
from distill.exporters.source import Source
from distill.footprint.needs import Need, needs_of
from distill.loading import teacher_config
from distill.memory import enough_memory, or_cpu
from distill.ranges import GPU_GIB, PROCESSES
from distill.recipe import Recipe
from distill.runs.session import Session
from distill.selection.checking import selection_options
from distill.selection.options import described
from distill.selection.resolution import TRAINING, cost_of
from distill.stages import StageEntry, stages_of
from distill.teacher_type import config_type
from distill.training.checks import check_fit, check_here, check_session
from distill.training.rehearsal import rehearse
from distill.training.shares import bytes_of, share
from distill.training.teaching import other_teacher
from students.config import KEEP, Layout, Place, Shapes
from students.skeleton import Student
from students.state_size import limit, state_bytes, weight_bytes
from teachers.checks import loading
from teachers.families import Family, family_of
from teachers.teacher import Teacher
from teachers.weights import check_row

BYTES = 4  # bytes of a trained parameter: float32 masters
ASSUMED = {"cpu": "two CPU cores", "cuda": "a Hopper GPU"}
SPEED = {"cpu": 120e9, "cuda": 150e12}  # FLOP/s that training is assumed to reach: two cores; a Hopper GPU in bfloat16
SMALL, SMALL_SPEED = 500e6, 75e12  # below SMALL parameters launches limit a GPU; 55 to 97e12 measured at 135M (LOG.md)
GPU_MEMORY = 80  # GiB, an H100's
TEXTS = (1024, 32 * 1024, 256 * 1024)  # context lengths in tokens for which cache sizes are shown
BANDWIDTH = 3.0e12  # assumed memory bandwidth of a Hopper GPU, in bytes a second
MASTERS = "the student's masters, gradients and moments"
DIVIDED = {"student": MASTERS, "all": f"{MASTERS} and the teacher's layers"}


@dataclass
class Plan:
    """The numbers of a plan.

    layout: the layout of the first stage. replaced: for each stage that converts further layers, the layout after it (with
    evenly spread layers if the run chooses them). trained, tokens: by stage, trained parameters and tokens. bytes: memory at
    the training peak without activations. flops: of all stages and of a selection.
    exports: for each target why it is `refused` (None if it is not), the first transformers version that runs it correctly
    (`since`, None for all), and for each of `engines` why it does not run the export (None if it does).
    cache: by context length in tokens, the bytes of the teacher's and the student's cache of one sequence. decoding: by
    context length, the most tokens a second that the teacher and the student can decode, in bfloat16 at BANDWIDTH.
    selection: if the recipe's layout is selected, the options, and the tokens that the selection reads and trains on;
    `layout` is then evenly spread. identity: if the plan was checked, the result of `identity.check_identity`. shard: for
    several GPUs, what they divide. needs: what each training stage needs of each of `gpus` GPUs of `gpu_memory` GiB, see
    `footprint.needs`; empty if the number of GPUs was not given."""

    layout: Layout
    teacher_parameters: int
    student_parameters: int
    trained: dict[str, int]
    tokens: dict[str, int]
    bytes: int
    flops: float
    exports: dict[str, dict]
    cache: dict[int, tuple[int, int]]
    decoding: dict[int, tuple[float, float]]
    selection: dict | None = None
    identity: dict | None = None
    shard: dict | None = None
    needs: dict[str, Need] = field(default_factory=dict)
    gpus: int = 1
    gpu_memory: float = GPU_MEMORY
    replaced: dict[str, Layout] = field(default_factory=dict)

    @property
    def last(self) -> Layout:
        """The layout that the run ends with."""
        return [self.layout, *self.replaced.values()][-1]

    def speed(self, device: str) -> float:
        """The FLOP/s assumed."""
        return SMALL_SPEED if device == "cuda" and self.student_parameters < SMALL else SPEED[device]

    def seconds(self, device: str) -> float:
        """The time that the arithmetic of all stages takes at that speed."""
        return self.flops / self.speed(device)

    def numbers(self) -> dict:
        """The plan as a mapping for JSON, with `seconds` by the assumed device."""
        found = {**asdict(self), "seconds": {device: self.seconds(device) for device in SPEED}}
        return found | {"needs": {stage: need.numbers() for stage, need in self.needs.items()}}


def make_plan(recipe: Recipe, gpus: int | None = None, gpu_memory: float = GPU_MEMORY) -> Plan:
    """Compute a recipe's plan.

    Args:
        gpus: the number of GPUs that share the batches. If it is given, the plan also has what the stages need of each GPU,
            which takes seconds to compute. gpu_memory: of one GPU, in GiB.

    Raises:
        UserError: `run` would refuse the recipe (see `training.checks`), or the teacher's config cannot be found.
    """
    gpus, gpu_memory = PROCESSES.check(gpus, "gpus"), GPU_GIB.check(gpu_memory, "gpu_memory")
    check_here(recipe, world=gpus)
    config = teacher_config(recipe)
    family, teacher = _skeleton(recipe, config)
    meta = Teacher(recipe.teacher, teacher, None, family)
    fit, selection = check_fit(recipe, meta), _selection(recipe, meta)
    recipe, student = fit.recipe, fit.student
    place, shapes = Place(family.layers, family.slot, family.documents), attention_shapes(meta)
    sizes = {"teacher": _parameters(teacher), "student": _parameters(student)}
    mixers = _parameters(nn.ModuleList(student.mixers.values()))
    trained, tokens, training, replaced, flops = {}, {}, {}, {}, 2.0 * sizes["teacher"] * _selection_tokens(selection)
    for entry in stages_of(recipe):
        kind, options = entry.kind, entry.options
        key = entry.name if entry.name not in tokens else f"{entry.name} ({entry.index})"
        under = fit.students[entry.index]
        trained[key], tokens[key], training[key] = kind.count(under, options), options.tokens, options
        if kind.changes_layout:
            replaced[key] = under.layout
        before, other = kind.reads_before(options), _other(recipe, entry)
        teaching = sizes["teacher"] if entry.runs_teacher or (before == "teacher" and not other) else other
        teaching += _parameters(under) if before == "student" else 0
        flops += options.tokens * 2 * (teaching + 3 * _computing(under, shapes, kind.whole_student))
    kept = students.build(config, Layout(KEEP * len(fit.layout.pattern)), place, shapes)
    cache = {tokens: (state_bytes(kept, tokens), state_bytes(student, tokens)) for tokens in TEXTS}
    weights = weight_bytes(kept), weight_bytes(student)
    most = max(trained.values(), default=0)  # trained parameters have memory of their own; the others share the teacher's
    steady = max((bytes_of(trained[key], options) for key, options in training.items()), default=0.0)
    held = config_type(recipe, "cpu" if recipe.device == "cpu" else "cuda", cast(torch.dtype | None, config.dtype))
    memory = held.itemsize * sizes["teacher"] + BYTES * (max(most, mixers) - most) + int(steady)
    shares = _shares(recipe, trained, held.itemsize * sizes["teacher"], gpus or 1, gpu_memory)
    divides = "none" if shares is None else shares["kind"]
    return Plan(
        layout=fit.layout,
        replaced=replaced,
        teacher_parameters=sizes["teacher"],
        student_parameters=sizes["student"],
        trained=trained,
        tokens=tokens,
        bytes=memory,
        flops=flops,
        exports=_exports(Source.of(student.config)),
        cache=cache,
        decoding={
            tokens: (limit(weights[0], both[0], 1, BANDWIDTH), limit(weights[1], both[1], 1, BANDWIDTH))
            for tokens, both in cache.items()
        },
        selection=selection,
        shard=shares,
        needs={}
        if gpus is None
        else needs_of(recipe, config, family, fit.students, sizes["teacher"], gpus, gpu_memory, divides),
        gpus=gpus or 1,
        gpu_memory=gpu_memory,
    )


def _computing(student: Student, shapes: Shapes, whole: bool) -> int:
    """Parameters that take part in a training step: those of the mixers alone, or with `whole` of the whole student."""
    layout = student.layout
    with torch.device("meta"):  # untied, since a block that several layers share computes in each of them
        used = sum(_parameters(layout.make(layer, shapes.at(layer))) for layer in layout.converted)
    return _parameters(student) - _parameters(nn.ModuleList(student.mixers.values())) + used if whole else used


def _shares(recipe: Recipe, trained: dict[str, int], teacher: float, gpus: int, gib: float) -> dict | None:
    """What `gpus` GPUs divide, and why; None for one."""
    if gpus == 1:
        return None
    counts = zip(stages_of(recipe), trained.values(), strict=True)
    whole = [bytes_of(count, entry.options) for entry, count in counts if entry.kind.whole_student]
    found = share(recipe.shard if whole else "none", gpus, max(whole, default=0), teacher, gib * 2**30)
    return {"gpus": gpus, "asked": recipe.shard, "kind": found.kind, "why": found.reason, "bytes": found.held}


def planned(recipe: Recipe, *, check: bool, gpus: int | None, gpu_memory: float) -> Plan:
    """A recipe's plan, with `check` also the results of `check_plan`. Raises what `make_plan` and `check_plan` raise."""
    made = make_plan(recipe, gpus, gpu_memory)
    return check_plan(made, recipe) if check else made


def check_plan(plan: Plan, recipe: Recipe) -> Plan:
    """Load the teacher, prepare the text, and try what a run tries before it trains. Returns the plan.

    The checks: a student equals its teacher if no layer is converted, and if plain attention replaces each converted layer;
    the plan's student can be built; the steps at the end of the run work. `plan.identity` has the numbers.

    Raises:
        UserError: the teacher, the text, a check or the rehearsal fails.
    """
    session = Session.open(recipe)
    teacher = session.teacher
    check_session(session)
    smaller = f"the teacher's size (choose a smaller one){or_cpu(teacher.device)}"
    with enough_memory(f"checking {recipe.teacher}", smaller):
        plan.identity = check_identity(teacher, plan.last)
        rehearse(recipe, teacher, build(teacher, plan.last)[0])
    return plan


def _selection(recipe: Recipe, teacher: Teacher) -> dict | None:
    """The options and tokens of the selection of a recipe's layout; None if the layout is written out."""
    if not recipe.selects:
        return None
    options = selection_options(recipe)
    tokens, training = cost_of(options, teacher.n_layers, teacher.config.num_attention_heads)
    return {**described(options), "tokens": tokens, "training_tokens": training}


def _selection_tokens(selection: dict | None) -> float:
    """The tokens of a selection, counted as forward passes of the teacher."""
    return selection["tokens"] + TRAINING * selection["training_tokens"] if selection else 0.0


def _skeleton(recipe: Recipe, config: PretrainedConfig) -> tuple[Family, PreTrainedModel]:
    """The teacher's family, and its model on the meta device."""
    try:
        family = family_of(config, recipe.teacher)
        with loading(recipe.teacher, "config"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_row(model, family, recipe.teacher)
        return family, model
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error


def _other(recipe: Recipe, entry: StageEntry) -> int:
    """The parameters of a stage's own teacher, which it runs in place of the recipe's; 0 if it has none."""
    source = entry.source
    if source is None or source.teacher is None or source.offline is not None:
        return 0
    other = other_teacher(recipe, source.teacher)
    return _parameters(_skeleton(other, teacher_config(other))[1])


def _exports(source: Source) -> dict[str, dict]:
    """For every export target why it is refused, or the transformers version and the engines that run it."""
    found: dict[str, dict[str, Any]] = {}
    for name in EXPORTERS:
        chosen = target(name)
        found[name] = {"refused": chosen.refuses(source)}
        if found[name]["refused"] is None:
            found[name] |= {"since": chosen.since(source), "engines": chosen.engines(source)}
    return found


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
