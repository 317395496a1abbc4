"""The base class and options of stages that train the student end to end.

They hold the choice of trained parameters, adapters, recomputation of layers, and the source of next-token distributions.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.output_head import wide_head, wide_logits
from distill.ranges import Range, whole
from distill.schema import Schema
from distill.stages import adapters, kept_attention
from distill.stages.masters import is_own, make_masters
from distill.stages.nonfinite import CHUNK, first_nonfinite, told
from distill.stages.recomputing import Recomputed, recompute, recompute_nothing
from distill.stages.stage import Stage, TrainingOptions, Transfers, meta_parameters, mixer_parameters
from distill.stages.targets import Online, Targets
from distill.text.windows import Batch, Calibration
from students.skeleton import Student
from teachers.teacher import Teacher

NORMS = ("norm", "layernorm", "ln_")


class Lora(Schema):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the teacher's own linear layers."""

    rank: Annotated[int, whole(1, 65_536)] = 16
    """Rank of each adapter."""
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 32.0
    """An adapter's output is multiplied by `alpha` / `rank`."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of linear layers, or their last parts. Default: every linear layer outside the mixers and the head."""
    save: Literal["merged", "adapters"] = "merged"
    """How the adapters are saved when the stage ends: `merged` adds them to the weights; `adapters` saves them separately
    in peft's format, next to the weights, which only the last stage may do."""


class WholeOptions(TrainingOptions):
    """Options of every stage that trains the student end to end."""

    train: Literal["mixers", "mixers+norms", "all", "lora"] = "all"
    """What is trained: the `mixers` alone, `mixers+norms`, `all`, or `lora`: the mixers, and adapters on the rest."""
    layers: Literal["new", "all"] = "all"
    """Which mixers are trained: `all`, or only the `new` ones that the last `initialise` or `replace` made."""
    freeze: list[Literal["q", "k"]] = []
    """Projections of kept attention that are not trained, with their norms. Only with `train: all`."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """The rates of a layer are multiplied by this factor once for every layer above it, and those of the embeddings once
    for every layer of the model."""
    lora: Lora = Lora()
    """The adapters of `train: lora`."""
    activation_checkpointing: Recomputed = False
    """What the backward pass recomputes to save memory: nothing (`false`), every decoder layer (`true`), or `selective`:
    every layer except its matrix products and attention. Loss and gradients are the same."""

    @model_validator(mode="after")
    def _adapters_are_used(self) -> "WholeOptions":
        if "lora" in self.model_fields_set and self.train != "lora":
            raise ValueError(f"lora is given, but train is {self.train!r}; set train: lora, or leave lora out")
        return self

    @model_validator(mode="after")
    def _frozen_would_learn(self) -> "WholeOptions":
        if self.freeze and self.train != "all":
            raise ValueError(
                f"freeze is {self.freeze}, but train is {self.train!r}, which does not train the projections of kept "
                "attention; leave freeze out, or set train: all"
            )
        return self


class TaughtOptions(WholeOptions):
    """Options of stages that compare the student's next-token distributions with another model's."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence between the student's next-token distribution and the teacher's."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
    """The temperature of both distributions."""
    teacher: Annotated[str, Field(min_length=1)] | None = None
    """Another teacher than the run's, for instance a larger one. Its vocabulary must be the same token by token. It is
    loaded when the stage begins and freed when it ends. See docs/teachers.md#another-teacher."""
    offline_logits: Annotated[str, Field(min_length=1)] | None = None
    """A folder that `distill cache` wrote. The stage learns from the likeliest tokens in it, and no teacher is on the GPU.
    See docs/teachers.md#cached-logits."""


class WholeStudent(Stage):
    """Base class of stages that train the student end to end. Losses are means weighted by `batch.loss_weights`."""

    Options = WholeOptions
    whole_student = True

    options: WholeOptions

    def __init__(
        self, teacher: Teacher, student: Student, options: WholeOptions, transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        self.targets: Targets = Online(teacher)
        self._targets: list[str] = []  # linear layers with adapters, kept after the adapters are merged

    def prepare(self) -> None:
        student = self.student
        student.requires_grad_(False)
        if self.options.train == "lora":
            self.add_adapters()
        make_masters(student, self.trained())
        recompute(student, self.options.activation_checkpointing)

    @property
    def running(self) -> Teacher | None:
        return self.targets.teacher

    def learn_from(self, targets: Targets) -> None:
        self.targets = targets

    def size(self, batch: Batch) -> float:
        return batch.loss_weights.sum().item()

    @torch.no_grad()
    def blame(self, batch: Batch) -> str | None:
        teacher, student = self.running, self.student
        runs: dict[str, tuple[PreTrainedModel, str, Callable[[], Tensor]]] = {}
        if teacher is not None:
            runs["teacher"] = (teacher.model, teacher.family.layers, lambda: teacher.hidden(batch.ids, batch.positions))
        runs["student"] = (student, student.place.layers, lambda: student.hidden(batch.ids, batch.documents))
        for whose, (model, layers, forward) in runs.items():
            if found := first_nonfinite(model, forward, layers):
                return told(whose, found, model)
            logits = (wide_logits(part, wide_head(model)) for part in forward().flatten(0, 1).split(CHUNK))
            if not all(part.isfinite().all() for part in logits):
                return told(whose, "the output head", model)
        return None

    def finish(self, calibration: Calibration) -> None:
        self.targets = Online(self.teacher)  # drops the only reference to another teacher and frees its memory
        recompute_nothing(self.student, self.options.activation_checkpointing)
        if self.options.train == "lora" and self.options.lora.save == "merged":
            adapters.merge(self.student)

    def reinstate(self) -> None:
        if self.options.train == "lora" and self.options.lora.save == "adapters":
            self.add_adapters()

    def add_adapters(self) -> None:
        """Put adapters on the student as the options say."""
        lora = self.options.lora
        self._targets = list(adapters.targets(self.student, lora.targets))
        adapters.add(self.student, self._targets, lora.rank, lora.alpha)

    @classmethod
    def check(cls, student: Student, options: Any, last: bool) -> None:
        kept_attention.check(student, options.freeze)
        if options.train == "lora":
            adapters.check_rank(adapters.targets(student, options.lora.targets), options.lora.rank)
            if options.lora.save == "adapters" and not last:
                raise ValueError("lora.save is 'adapters', but a later stage would train on top of them; use merged")

    @classmethod
    def roles(cls, student: Student, options: "WholeOptions") -> set[str]:
        beside: dict[str, set[str]] = {
            "mixers": set(),
            "mixers+norms": {"norms"},
            "all": {"norms", "rest"},
            "lora": {"rest"},
        }
        new = {role for role, _ in meta_parameters(student).values()}
        return super().roles(student, options) | new | beside[options.train]

    def trained(self) -> dict[str, tuple[str, nn.Parameter]]:
        student = self.student
        found: dict[str, tuple[str, nn.Parameter]] = {}
        mixers, new = mixer_parameters(student, self.trained_layers(student, self.options)), meta_parameters(student)
        still = {*mixer_parameters(student), *kept_attention.frozen(student, self.options.freeze)}
        for name, parameter in student.named_parameters():
            if name in mixers:
                found[name] = mixers[name]
            elif name in still:
                continue
            elif name in new:
                found[name] = new[name]
            elif self.options.train == "lora":
                if ".lora_" in name:
                    found[name] = ("rest", parameter)
            elif _is_norm(name) and self.options.train in ("mixers+norms", "all"):
                found[name] = ("norms", parameter)
            elif self.options.train == "all":
                found[name] = ("rest", parameter)
        return found

    @classmethod
    def count(cls, student: Student, options: "WholeOptions") -> int:
        learning = mixer_parameters(student, cls.trained_layers(student, options)) | meta_parameters(student)
        ours = sum(parameter.numel() for _, parameter in learning.values())
        if options.train == "lora":
            return ours + adapters.parameters_of(adapters.targets(student, options.lora.targets), options.lora.rank)
        still = {*mixer_parameters(student), *meta_parameters(student), *kept_attention.frozen(student, options.freeze)}
        outside = {name: parameter for name, parameter in student.named_parameters() if name not in still}
        kept: Callable[[str], bool] = {"mixers": lambda name: False, "mixers+norms": _is_norm, "all": lambda name: True}[
            options.train
        ]
        return ours + sum(parameter.numel() for name, parameter in outside.items() if kept(name))

    def rate_factor(self, name: str) -> float:
        return kept_attention.depth_factor(self.student, name, self.options.layer_decay)

    def changed(self, done: bool) -> set[str]:
        if done and self.options.lora.save == "merged" and self._targets:
            return {f"{name}.weight" for name in self._targets}
        return super().changed(done) | {f"{name}.base_layer.weight" for name in self._own_bases()}

    def _own_bases(self) -> list[str]:
        """Adapted layers whose weight an earlier stage trained, so that it is no longer in the teacher's memory."""
        shared = dict(self.teacher.model.named_parameters())
        bases = {name: layer.get_base_layer().weight for name, layer in adapters.adapted(self.student).items()}
        return [name for name, base in bases.items() if is_own(base, shared.get(f"{name}.weight"))]


def _is_norm(name: str) -> bool:
    return any(part.endswith(NORMS[:2]) or part.startswith(NORMS[2]) for part in name.split("."))
