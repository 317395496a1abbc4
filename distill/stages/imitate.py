"""Stage 3, imitate: the whole student against the teacher's next-token distribution (end-to-end distillation).

Forward KL by default, on the last hidden states of both through both heads in chunks: the logits of a batch never exist.
MOHAWK trains every weight here at a low rate; `train` says what does, and `lr` may give each role its own rate. Meta tokens
join the text here: the stages before show each mixer the teacher's own inputs, which have none.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill.output_head import head_of, wide_head, wide_logits
from distill.ranges import SHARE, Range, whole
from distill.schema import Schema
from distill.stages import adapters
from distill.stages.nonfinite import CHUNK, first_nonfinite, told
from distill.stages.rates import Point
from distill.stages.recomputing import Recomputed, recompute, recompute_nothing
from distill.stages.stage import Stage, TrainingOptions, Transfers, meta_parameters, mixer_parameters
from distill.text.windows import Batch, Calibration
from students.kernels.linear_kl import linear_kl

NORMS = ("norm", "layernorm", "ln_")


class Lora(Schema):
    """Low-rank adapters (arXiv 2106.09685) on the skeleton's linear layers.

    targets: names of modules or their last parts; every linear layer outside the mixers and the head where none is given.
    save: "merged" into the weights when the stage ends, or as "adapters" beside them, which only a last stage can leave.
    """

    rank: Annotated[int, whole(1, 65_536)] = 16
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 32.0
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    save: Literal["merged", "adapters"] = "merged"


class Imitate(Stage):
    """End-to-end knowledge distillation."""

    whole_student = True
    probed = True
    rates = (
        Point(134.5e6, 69_709, "smollm2-135m_mamba2-hybrid, 8 windows at a time (docs/performance.md)"),
        Point(596e6, 55_297, "qwen3-0.6b_mamba2-hybrid, 32 windows a step"),
        Point(1236e6, 22_226, "llama-3.2-1b_mamba2-hybrid, 8 windows at a time, layers recomputed"),
        Point(8030e6, 4_311, "llama-3-8b_mamba-in-llama, 1 window at a time, mixers and norms"),
    )

    class Options(TrainingOptions):
        """divergence, temperature: of teacher and student. ce: share of plain cross-entropy. hidden: weight of the relative
        squared error of the last hidden state. scale: of the whole loss, a mean over tokens; where somebody's is a sum,
        `clip` and AdamW's epsilon are meant for that. train: what learns beside the mixers. lora: adapters, where train is
        "lora". activation_checkpointing: recompute layers in the backward pass, for memory; "selective" keeps their
        matrix products and attention."""

        reserved: ClassVar[frozenset[str]] = frozenset({"teacher", "offline_logits"})

        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
        temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
        ce: Annotated[float, SHARE] = 0.0
        hidden: Annotated[float, Range(0, 1e6)] = 0.0
        scale: Annotated[float, Range(0, 1e9, above=True)] = 1.0
        train: Literal["mixers", "mixers+norms", "all", "lora"] = "all"
        lora: Lora = Lora()
        activation_checkpointing: Recomputed = False

        @model_validator(mode="after")
        def _adapters_are_used(self):
            if "lora" in self.model_fields_set and self.train != "lora":
                raise ValueError(f"lora is given, but train is {self.train!r}; set train: lora, or leave lora out")
            return self

    def __init__(self, teacher, student, options: "Imitate.Options", transfers: Transfers | None = None) -> None:
        super().__init__(teacher, student, options, transfers)
        self._targets: list[str] = []  # linear layers with adapters, also after these are merged

    def prepare(self) -> None:
        student = self.student
        student.requires_grad_(False)
        if self.options.train == "lora":
            self.add_adapters()
        own_copies(student, self.trained())
        recompute(student, self.options.activation_checkpointing)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        options = self.options
        teacher_hidden = self.teacher.hidden(batch.ids, batch.positions)
        hidden = self.student.hidden(batch.ids, batch.documents)
        loss = linear_kl(
            hidden.flatten(0, 1),
            head_of(self.student),
            teacher_hidden.flatten(0, 1).to(hidden.dtype),
            head_of(self.teacher.model),
            batch.weights.flatten(),
            batch.targets.flatten() if options.ce else None,
            divergence=options.divergence,
            temperature=options.temperature,
            ce_weight=options.ce,
        )
        if options.hidden:
            wanted = teacher_hidden.float()
            error = (hidden.float() - wanted).square().sum(-1) / wanted.square().sum(-1)
            loss = loss + options.hidden * (error * batch.weights).sum() / batch.weights.sum()
        yield "loss", options.scale * loss

    @torch.no_grad()
    def blame(self, batch: Batch) -> str | None:
        teacher, student = self.teacher, self.student
        runs = {
            "teacher": (teacher.model, teacher.family.layers, lambda: teacher.hidden(batch.ids, batch.positions)),
            "student": (student, student.place.layers, lambda: student.hidden(batch.ids, batch.documents)),
        }
        for whose, (model, layers, forward) in runs.items():
            if found := first_nonfinite(model, forward, layers):
                return told(whose, found, model)
            logits = (wide_logits(part, wide_head(model)) for part in forward().flatten(0, 1).split(CHUNK))
            if not all(part.isfinite().all() for part in logits):
                return told(whose, "the output head", model)
        return None

    def size(self, batch: Batch) -> float:
        return batch.weights.sum().item()

    def finish(self, calibration: Calibration) -> None:
        recompute_nothing(self.student, self.options.activation_checkpointing)
        if self.options.train == "lora" and self.options.lora.save == "merged":
            adapters.merge(self.student)

    def reinstate(self) -> None:
        if self.options.train == "lora" and self.options.lora.save == "adapters":
            self.add_adapters()

    def add_adapters(self) -> None:
        """Put the adapters that the options ask for on the student."""
        lora = self.options.lora
        self._targets = list(adapters.targets(self.student, lora.targets))
        adapters.add(self.student, self._targets, lora.rank, lora.alpha)

    @classmethod
    def check(cls, student: nn.Module, options: "Imitate.Options", last: bool) -> None:
        if options.train == "lora":
            adapters.check_rank(adapters.targets(student, options.lora.targets), options.lora.rank)
            if options.lora.save == "adapters" and not last:
                raise ValueError("lora.save is 'adapters', but a stage follows that would train on top of them; use merged")

    @classmethod
    def roles(cls, student: nn.Module, options: "Imitate.Options") -> set[str]:
        beside = {"mixers": set(), "mixers+norms": {"norms"}, "all": {"norms", "rest"}, "lora": {"rest"}}
        new = {role for role, _ in meta_parameters(student).values()}
        return super().roles(student, options) | new | beside[options.train]

    def trained(self) -> dict[str, tuple[str, nn.Parameter]]:
        found, mixers, new = {}, mixer_parameters(self.student), meta_parameters(self.student)
        for name, parameter in self.student.named_parameters():
            if name in mixers:
                found[name] = mixers[name]
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
    def count(cls, student: nn.Module, options: "Imitate.Options") -> int:
        inside = mixer_parameters(student) | meta_parameters(student)
        ours = sum(parameter.numel() for _, parameter in inside.values())
        if options.train == "lora":
            return ours + adapters.parameters_of(adapters.targets(student, options.lora.targets), options.lora.rank)
        outside = {name: parameter for name, parameter in student.named_parameters() if name not in inside}
        kept = {"mixers": lambda name: False, "mixers+norms": _is_norm, "all": lambda name: True}[options.train]
        return ours + sum(parameter.numel() for name, parameter in outside.items() if kept(name))

    def changed(self, done: bool) -> set[str]:
        if done and self.options.lora.save == "merged" and self._targets:
            return {f"{name}.weight" for name in self._targets}
        return super().changed(done) | {f"{name}.base_layer.weight" for name in self._own_bases()}

    def _own_bases(self) -> list[str]:
        """Adapted layers whose weight an earlier stage trained: it lies no longer in the teacher's memory."""
        teachers = {name: parameter.data_ptr() for name, parameter in self.teacher.model.named_parameters()}
        bases = {name: layer.get_base_layer().weight for name, layer in adapters.adapted(self.student).items()}
        return [name for name, base in bases.items() if base.data_ptr() != teachers.get(f"{name}.weight")]


def _is_norm(name: str) -> bool:
    return any(part.endswith(NORMS[:2]) or part.startswith(NORMS[2]) for part in name.split("."))


def own_copies(student: nn.Module, trained: dict[str, tuple[str, nn.Parameter]]) -> None:
    """Give trained parameters their own memory (the student's began as the teacher's) and let them learn."""
    for _, parameter in trained.values():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
