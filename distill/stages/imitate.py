"""Stage 3, imitate: the whole student against the teacher's next-token distribution (end-to-end distillation).

Forward KL by default, on the last hidden states of both through both heads in chunks: the logits of a batch never exist.
Of text with chats every loss here, that of hidden states too, is a mean over the tokens that are trained on.
MOHAWK trains every weight here at a low rate; `train` says what does, and `lr` may give each role its own rate. Meta tokens
join the text here: the stages before show each mixer the teacher's own inputs, which have none.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill.output_head import head_of, wide_head, wide_logits
from distill.ranges import SHARE, Range, whole
from distill.schema import Schema
from distill.stages import adapters, kept_attention
from distill.stages.layer_states import recorded
from distill.stages.masters import is_own, make_masters
from distill.stages.nonfinite import CHUNK, first_nonfinite, told
from distill.stages.on_policy import written
from distill.stages.rates import Point
from distill.stages.recomputing import Recomputed, recompute, recompute_nothing
from distill.stages.stage import Stage, TrainingOptions, Transfers, meta_parameters, mixer_parameters
from distill.stages.targets import Online, Source, Targets, relative_error
from distill.text.windows import Batch, Calibration
from teachers.teacher import Teacher

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
        Point(1236e6, 30_282, "llama-3.2-1b_mamba2-hybrid, 8 windows at a time, layers recomputed"),
        Point(8030e6, 7_124, "llama-3-8b_mamba-in-llama, 4 windows at a time, layers recomputed, mixers and norms"),
    )

    class Options(TrainingOptions):
        """divergence, temperature: of teacher and student. teacher: another one with the same vocabulary. offline_logits: a
        folder of `distill cache`, in place of a teacher. on_policy: share of the windows whose answers the student writes
        (see `on_policy`). ce: share of plain cross-entropy. hidden: weight of the relative squared error of the last hidden
        state and of the outputs of `hidden_layers`, on average. scale: of the whole loss, a mean over tokens; where
        somebody's is a sum, `clip` and AdamW's epsilon are meant for that. train: what learns beside the mixers. layers:
        whose mixers learn, "new" for those that the last stage made which made any. freeze: of kept attention, what does
        not learn (see `kept_attention`). layer_decay: multiplies the rates of a layer once for every layer above it (see
        `kept_attention`). lora: adapters, where train is "lora". activation_checkpointing: recompute layers in the backward
        pass, for memory; "selective" keeps their matrix products and attention."""

        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
        temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
        teacher: Annotated[str, Field(min_length=1)] | None = None
        offline_logits: Annotated[str, Field(min_length=1)] | None = None
        on_policy: Annotated[float, SHARE] = 0.0
        ce: Annotated[float, SHARE] = 0.0
        hidden: Annotated[float, Range(0, 1e6)] = 0.0
        hidden_layers: list[Annotated[int, whole(0, 65_536)]] = []
        scale: Annotated[float, Range(0, 1e9, above=True)] = 1.0
        train: Literal["mixers", "mixers+norms", "all", "lora"] = "all"
        layers: Literal["new", "all"] = "all"
        freeze: list[Literal["q", "k"]] = []
        layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
        lora: Lora = Lora()
        activation_checkpointing: Recomputed = False

        @model_validator(mode="after")
        def _adapters_are_used(self):
            if "lora" in self.model_fields_set and self.train != "lora":
                raise ValueError(f"lora is given, but train is {self.train!r}; set train: lora, or leave lora out")
            return self

        @model_validator(mode="after")
        def _frozen_would_learn(self):
            if self.freeze and self.train != "all":
                raise ValueError(
                    f"freeze is {self.freeze}, but train is {self.train!r}, which leaves the projections of kept attention "
                    "as they are; leave freeze out, or set train: all"
                )
            return self

        @model_validator(mode="after")
        def _targets_fit(self):
            if self.offline_logits is not None and self.divergence != "forward_kl":
                raise ValueError(
                    f"divergence is {self.divergence!r}, and offline_logits hold a teacher's likeliest tokens alone, which "
                    "give a bound of the forward KL and of no other; set divergence: forward_kl, or leave offline_logits out"
                )
            if self.on_policy and (self.offline_logits is not None or self.ce):
                what = f"ce is {self.ce}, and would teach it" if self.ce else "offline_logits hold nothing of"
                raise ValueError(
                    f"on_policy is {self.on_policy}: the student writes answers, and {what} its own words; leave one of "
                    "the two out"
                )
            if self.offline_logits is not None and self.hidden:
                raise ValueError(
                    f"hidden is {self.hidden}, and offline_logits hold no hidden states; set hidden: 0, or leave "
                    "offline_logits out"
                )
            if self.hidden_layers and not self.hidden:
                raise ValueError(
                    f"hidden_layers is {self.hidden_layers}, but hidden, their weight, is 0; give hidden a weight"
                )
            if len(set(self.hidden_layers)) != len(self.hidden_layers):
                raise ValueError(f"hidden_layers is {self.hidden_layers}, which names a layer twice")
            return self

    def __init__(self, teacher, student, options: "Imitate.Options", transfers: Transfers | None = None) -> None:
        super().__init__(teacher, student, options, transfers)
        self.targets: Targets = Online(teacher)
        self.writes = options.on_policy > 0
        self._targets: list[str] = []  # linear layers with adapters, also after these are merged

    def prepare(self) -> None:
        student = self.student
        student.requires_grad_(False)
        if self.options.train == "lora":
            self.add_adapters()
        make_masters(student, self.trained())
        recompute(student, self.options.activation_checkpointing)

    @classmethod
    def source(cls, options: "Imitate.Options") -> Source:
        layers = tuple(options.hidden_layers)
        return Source(options.temperature, options.teacher, options.offline_logits, options.hidden > 0, layers)

    @property
    def running(self) -> Teacher | None:
        return self.targets.teacher

    def learn_from(self, targets: Targets) -> None:
        self.targets = targets

    def read(self, batch: Batch) -> Batch:
        return written(batch, self.student, self.options.on_policy) if self.writes else batch

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        options, student = self.options, self.student
        seen = self.targets.see(batch, options.hidden_layers)
        layers = student.get_submodule(student.place.layers)
        with recorded({layer: layers[layer] for layer in options.hidden_layers}, lambda: student.text_columns) as states:
            hidden = student.hidden(batch.ids, batch.documents)
        loss = self.targets.divergence(hidden, head_of(student), seen, batch, options)
        if options.hidden:
            ours, theirs = [hidden], [seen.last]
            for layer in options.hidden_layers:
                ours.append(states[layer])
                theirs.append(seen.layers[layer])
            loss = loss + options.hidden * relative_error(ours, theirs, batch.loss_weights)
        yield "loss", options.scale * loss

    @torch.no_grad()
    def blame(self, batch: Batch) -> str | None:
        teacher, student = self.targets.teacher, self.student
        runs = {"student": (student, student.place.layers, lambda: student.hidden(batch.ids, batch.documents))}
        if teacher is not None:
            theirs = (teacher.model, teacher.family.layers, lambda: teacher.hidden(batch.ids, batch.positions))
            runs = {"teacher": theirs} | runs
        for whose, (model, layers, forward) in runs.items():
            if found := first_nonfinite(model, forward, layers):
                return told(whose, found, model)
            logits = (wide_logits(part, wide_head(model)) for part in forward().flatten(0, 1).split(CHUNK))
            if not all(part.isfinite().all() for part in logits):
                return told(whose, "the output head", model)
        return None

    def size(self, batch: Batch) -> float:
        return batch.loss_weights.sum().item()

    def describe(self, loss: float) -> dict[str, float]:
        options = self.options
        if options.offline_logits is None or options.ce:
            return {}
        return {"kl_lower_bound": loss / options.scale / options.temperature**2}

    def finish(self, calibration: Calibration) -> None:
        self.targets = Online(self.teacher)  # nothing else holds another teacher
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
        kept_attention.check(student, options.freeze)
        count = len(student.layout.pattern)
        if beyond := [layer for layer in options.hidden_layers if layer >= count]:
            raise ValueError(f"hidden_layers names layer {beyond[0]}, and the model has the layers 0 to {count - 1}")
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
        student, found = self.student, {}
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
    def count(cls, student: nn.Module, options: "Imitate.Options") -> int:
        learning = mixer_parameters(student, cls.trained_layers(student, options)) | meta_parameters(student)
        ours = sum(parameter.numel() for _, parameter in learning.values())
        if options.train == "lora":
            return ours + adapters.parameters_of(adapters.targets(student, options.lora.targets), options.lora.rank)
        still = {*mixer_parameters(student), *meta_parameters(student), *kept_attention.frozen(student, options.freeze)}
        outside = {name: parameter for name, parameter in student.named_parameters() if name not in still}
        kept = {"mixers": lambda name: False, "mixers+norms": _is_norm, "all": lambda name: True}[options.train]
        return ours + sum(parameter.numel() for name, parameter in outside.items() if kept(name))

    def rate_factor(self, name: str) -> float:
        return kept_attention.depth_factor(self.student, name, self.options.layer_decay)

    def changed(self, done: bool) -> set[str]:
        if done and self.options.lora.save == "merged" and self._targets:
            return {f"{name}.weight" for name in self._targets}
        return super().changed(done) | {f"{name}.base_layer.weight" for name in self._own_bases()}

    def _own_bases(self) -> list[str]:
        """Adapted layers whose weight an earlier stage trained: it lies no longer in the teacher's memory."""
        shared = dict(self.teacher.model.named_parameters())
        bases = {name: layer.get_base_layer().weight for name, layer in adapters.adapted(self.student).items()}
        return [name for name, base in bases.items() if is_own(base, shared.get(f"{name}.weight"))]


def _is_norm(name: str) -> bool:
    return any(part.endswith(NORMS[:2]) or part.startswith(NORMS[2]) for part in name.split("."))
