"""`distill plan`: what a run would do, from the teacher's config alone. Nothing is trained or written, and nothing loaded
or prepared unless the plan is to be checked."""

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

BYTES = 4  # of a parameter that trains: float32 masters
ASSUMED = {"cpu": "two CPU cores", "cuda": "a Hopper GPU"}
SPEED = {"cpu": 120e9, "cuda": 150e12}  # FLOP/s that training is assumed to reach: two cores; a Hopper GPU in bfloat16
SMALL, SMALL_SPEED = 500e6, 75e12  # parameters below which a GPU waits for launches; 55 to 97e12 measured at 135M (LOG.md)
GPU_MEMORY = 80  # GiB, an H100's
TEXTS = (1024, 32 * 1024, 256 * 1024)  # tokens that a cache is shown for
BANDWIDTH = 3.0e12  # bytes a second that a Hopper GPU's memory is taken to give
MASTERS = "the student's masters, gradients and moments"
DIVIDED = {"student": MASTERS, "all": f"{MASTERS} and the teacher's layers"}


@dataclass
class Plan:
    """The numbers of a plan. layout: the first one. replaced: by stage that converts further layers, what it leaves (even
    layers, where the run chooses). Parameters; bytes at the training peak without activations; FLOP of all stages; bytes of
    a teacher's and a student's cache, a text, by its tokens, and tokens a second that either decodes behind so many at most,
    in bfloat16 at BANDWIDTH. selection: of a recipe whose layout is selected, its options, and
    the tokens that it reads and trains on; the layout is then an even one, and the selection's FLOP are among `flops`.
    exports: for each target why it is `refused` (None where it is not), and then the first transformers that gets it right
    (`since`, None for all) and for each of `engines` why it does not run it (None where it does).
    identity: where the plan was checked, what `identity.check_identity` found. shard: of several GPUs, what they divide.
    needs: what each training stage needs of each of so many GPUs of so many GiB, see `footprint.needs`; empty where that was
    not asked for."""

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
        """The time that the stages' arithmetic takes at that speed."""
        return self.flops / self.speed(device)

    def numbers(self) -> dict:
        """Everything, for JSON; `seconds` by the device assumed."""
        found = {**asdict(self), "seconds": {device: self.seconds(device) for device in SPEED}}
        return found | {"needs": {stage: need.numbers() for stage, need in self.needs.items()}}


def make_plan(recipe: Recipe, gpus: int | None = None, gpu_memory: float = GPU_MEMORY) -> Plan:
    """Work out a recipe's numbers.

    Args:
        gpus: how many share the batches; with them also what the stages need of each, which takes seconds. gpu_memory: of
            one, in GiB.

    Raises:
        UserError: what `run` would refuse (see `training.checks`), or a teacher whose config cannot be found.
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
    most = max(trained.values(), default=0)  # what trains has its own memory; the rest of the student is the teacher's
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
    """Parameters that compute in a student's steps, those of its mixers alone or of all of it."""
    layout = student.layout
    with torch.device("meta"):  # untied: a block that several layers share computes in each of them
        used = sum(_parameters(layout.make(layer, shapes.at(layer))) for layer in layout.converted)
    return _parameters(student) - _parameters(nn.ModuleList(student.mixers.values())) + used if whole else used


def _shares(recipe: Recipe, trained: dict[str, int], teacher: float, gpus: int, gib: float) -> dict | None:
    """What so many GPUs divide, and why."""
    if gpus == 1:
        return None
    counts = zip(stages_of(recipe), trained.values(), strict=True)
    whole = [bytes_of(count, entry.options) for entry, count in counts if entry.kind.whole_student]
    found = share(recipe.shard if whole else "none", gpus, max(whole, default=0), teacher, gib * 2**30)
    return {"gpus": gpus, "asked": recipe.shard, "kind": found.kind, "why": found.reason, "bytes": found.held}


def planned(recipe: Recipe, *, check: bool, gpus: int | None, gpu_memory: float) -> Plan:
    """A recipe's numbers, and what `check_plan` finds where that is asked for; raises what either does."""
    made = make_plan(recipe, gpus, gpu_memory)
    return check_plan(made, recipe) if check else made


def check_plan(plan: Plan, recipe: Recipe) -> Plan:
    """Load the teacher, prepare the text and try what a run tries before it trains: that a student of the teacher is the
    same model with nothing and with plain attention swapped in, that the student of the plan can be built whole, and what
    the end of the run needs. `plan.identity` has the numbers; the plan is returned.

    Raises:
        UserError: what the teacher, the text, the check or the rehearsal refuses.
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
    """What the selection of a recipe's layout does; None where it is written out."""
    if not recipe.selects:
        return None
    options = selection_options(recipe)
    tokens, training = cost_of(options, teacher.n_layers, teacher.config.num_attention_heads)
    return {**described(options), "tokens": tokens, "training_tokens": training}


def _selection_tokens(selection: dict | None) -> float:
    """Forward passes of the teacher that a selection comes to."""
    return selection["tokens"] + TRAINING * selection["training_tokens"] if selection else 0.0


def _skeleton(recipe: Recipe, config: PretrainedConfig) -> tuple[Family, PreTrainedModel]:
    """The teacher's family, and a model of its sizes on the meta device."""
    try:
        family = family_of(config, recipe.teacher)
        with loading(recipe.teacher, "config"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_row(model, family, recipe.teacher)
        return family, model
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error


def _other(recipe: Recipe, entry: StageEntry) -> int:
    """Parameters of the teacher that a stage runs in place of the recipe's; 0 where it runs none."""
    source = entry.source
    if source is None or source.teacher is None or source.offline is not None:
        return 0
    other = other_teacher(recipe, source.teacher)
    return _parameters(_skeleton(other, teacher_config(other))[1])


def _exports(source: Source) -> dict[str, dict]:
    """Of every target, why it is refused, or else since when and in which engines it runs."""
    found: dict[str, dict[str, Any]] = {}
    for name in EXPORTERS:
        chosen = target(name)
        found[name] = {"refused": chosen.refuses(source)}
        if found[name]["refused"] is None:
            found[name] |= {"since": chosen.since(source), "engines": chosen.engines(source)}
    return found


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
