"""Selection by learned gates: one gate a layer mixes attention and its stand-in, under a budget, with frozen weights.

The method follows FlashMorph (arXiv 2606.30562): all weights are frozen and all gates learn together, so that layers which
need each other are found. FlashMorph reads synthetic recall texts; here part of the steps reads the recipe's training text.
The loss is

    KL(teacher || mixture) + multiplier (mean gate - budget) + (mean gate - budget)^2

The multiplier grows as long as the budget is exceeded (augmented Lagrangian, as for L0 gates in arXiv 1712.01312).
"""

import time
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.evaluation.recall.families import make
from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.wording import SELECTING
from distill.evaluation.scoring import Marked, last_hidden, padded
from distill.output_head import head_of
from distill.ranges import SHARE
from distill.recipe import Selected
from distill.schema import Count
from distill.selection.measurer import Measurer
from distill.selection.options import Options, Whole
from distill.selection.scorer import Ranked, Scorer, count_of
from distill.stages.stage import Rate
from distill.text.heldout import Heldout
from students.kernels.linear_kl import linear_kl
from students.skeleton import Student

START = 2.0  # initial logit of every gate: 0.88 of attention
STEP = 0.5  # growth of the multiplier at each step, times the mean gate's distance from the budget
BETAS, EPS = (0.9, 0.99), 1e-8


@dataclass
class GateState:
    """The state of learning: everything that the next step depends on, so that a resumed selection takes the same steps."""

    logits: Float[Tensor, " layer"]
    first: Float[Tensor, " layer"]
    second: Float[Tensor, " layer"]
    multiplier: float = 0.0
    step: int = 0

    @classmethod
    def new(cls, layers: int) -> "GateState":
        """The state before the first step."""
        return cls(torch.full((layers,), START), torch.zeros(layers), torch.zeros(layers))

    @classmethod
    def read(cls, saved: dict) -> "GateState":
        """The inverse of `entries`."""
        vectors = {name: torch.tensor(saved[name]) for name in ("logits", "first", "second")}
        return cls(**vectors, multiplier=saved["multiplier"], step=saved["step"])

    def entries(self) -> dict:
        """The state as JSON values. Values of float32 are kept exactly."""
        vectors = {name: getattr(self, name).tolist() for name in ("logits", "first", "second")}
        return {**vectors, "multiplier": self.multiplier, "step": self.step}

    def take(self, gradient: Float[Tensor, " layer"], lr: float) -> None:
        """Take one step of Adam."""
        self.step += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.square()
        mean, power = self.first / (1 - BETAS[0] ** self.step), self.second / (1 - BETAS[1] ** self.step)
        self.logits = self.logits - lr * mean / (power.sqrt() + EPS)


class GateOptions(Options):
    """Options of trained gates."""

    training_tokens: Count = 20_000_000
    """Tokens that the gates are trained on. The default is that of the paper."""
    lr: Rate = 0.05
    """Adam's learning rate for the gates."""
    retrieval: Annotated[float, SHARE] = 0.5
    """Share of the steps that read synthetic recall texts. The others read the recipe's training text."""
    save: Whole = 20
    """Steps between two saves."""


class Gates(Scorer):
    """Keeps the layers whose trained gate between attention and stand-in stays open (FlashMorph, arXiv 2606.30562):
    score = the layer's gate at the end; 1 is attention alone."""

    Options = GateOptions

    @classmethod
    def trains_on(cls, options: GateOptions) -> int:
        return options.training_tokens

    @classmethod
    def selected_by(cls, options: GateOptions) -> Selected:
        return Selected(by=options.by, families=options.families if options.retrieval else [])

    def rank(self, measurer: Measurer) -> list[Ranked]:
        budget = count_of(measurer.options, measurer.layers) / measurer.layers
        state, trained = self._resume(measurer)
        while trained["tokens"] < measurer.options.training_tokens:
            measurer.stop_if_asked()
            began = time.monotonic()
            trained["tokens"] += self._step(measurer, state, budget)
            trained["seconds"] = round(trained["seconds"] + time.monotonic() - began, 3)
            done = trained["tokens"] >= measurer.options.training_tokens
            if done or state.step % measurer.options.save == 0:
                measurer.records.save(gates=state.entries(), trained=dict(trained))
            measurer.trained(trained["tokens"], measurer.options.training_tokens)
        gates = state.logits.sigmoid().tolist()
        order = sorted(range(measurer.layers), key=lambda layer: (-gates[layer], layer))
        return [Ranked(layer, gates[layer], {}) for layer in order if layer not in measurer.options.protect]

    def _resume(self, measurer: Measurer) -> tuple[GateState, dict]:
        saved = measurer.records.content
        state = GateState.read(saved["gates"]) if "gates" in saved else GateState.new(measurer.layers)
        if {len(vector) for vector in (state.logits, state.first, state.second)} != {measurer.layers}:
            raise UserError(
                f"{measurer.records.path}: its gates are not those of {measurer.layers} layers; delete the file "
                "to measure again"
            )
        return state, dict(saved.get("trained", {"tokens": 0, "seconds": 0.0}))

    def _step(self, measurer: Measurer, state: GateState, budget: float) -> int:
        """Take one step. Protected layers have a gate of 1. Returns the number of tokens read."""
        session, options = measurer.session, measurer.options
        logits = state.logits.to(session.teacher.device).requires_grad_(True)
        free = torch.ones(measurer.layers, device=logits.device)
        free[list(options.protect)] = 0.0
        gates = free * logits.sigmoid() + (1 - free)
        model = measurer.switched.mix(gates.unbind())
        with session.accelerator.autocast():
            kl, tokens = (
                self._on_recall(measurer, model, state.step)
                if _reads_recall(state.step, options)
                else self._on_text(measurer, model, state.step)
            )
        excess = gates.mean() - budget
        (gradient,) = torch.autograd.grad(kl + state.multiplier * excess + excess.square(), logits)
        state.multiplier = max(0.0, state.multiplier + STEP * excess.item())
        state.take(gradient.cpu(), options.lr)
        return tokens

    def _on_text(self, measurer: Measurer, model: Student, step: int) -> tuple[Tensor, int]:
        """KL on a micro-batch of the recipe's training text."""
        session, data = measurer.session, measurer.session.recipe.data
        size = data.calibrated
        batch = session.windows.batch(step * size, size).to(session.teacher.device)
        seen = Heldout.of(session.teacher, [batch], session.windows.label_names)
        hidden = model.hidden(batch.ids, batch.documents)
        return _divergence(measurer, model, hidden, seen.hidden[0], batch.weights), batch.tokens

    def _on_recall(self, measurer: Measurer, model: Student, step: int) -> tuple[Tensor, int]:
        """KL at the answers of recall texts, which are new at each step."""
        session, options = measurer.session, measurer.options
        teacher, family = session.teacher, options.families[step % len(options.families)]
        seed = -2 - step - 2**33 * (1 + session.recipe.seed)
        texts = make(
            Tokens(cast(PreTrainedTokenizerBase, teacher.tokenizer), SELECTING),
            family,
            options.length,
            options.trials,
            seed=seed,
        )
        ids = padded(texts).to(teacher.device)
        weights = _answer_weights(texts, ids.shape[1]).to(teacher.device)
        hidden = last_hidden(teacher, model, ids)
        return _divergence(measurer, model, hidden, last_hidden(teacher, None, ids), weights), ids.numel()


def _reads_recall(step: int, options: GateOptions) -> bool:
    """Whether a step reads recall texts. These steps are spread evenly."""
    return int((step + 1) * options.retrieval) > int(step * options.retrieval)


def _answer_weights(texts: list[Marked], width: int) -> Float[Tensor, "b t"]:
    """1 where the next token belongs to an answer."""
    weights = torch.zeros(len(texts), width)
    for row, text in enumerate(texts):
        for start, end in text.spans:
            weights[row, start - 1 : end - 1] = 1.0
    return weights


def _divergence(
    measurer: Measurer, model: Student, hidden: Tensor, teacher_hidden: Tensor, weights: Tensor
) -> Float[Tensor, ""]:
    arguments = (teacher_hidden.flatten(0, 1), head_of(measurer.session.teacher.model), weights.flatten())
    return linear_kl(hidden.flatten(0, 1), head_of(model), *arguments)
