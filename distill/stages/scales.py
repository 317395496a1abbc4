"""Output scales: one factor for each term of a mixer's output, by least squares against the teacher's attention output.

A mixer's output is a sum over terms (each head of each branch), sum_k W_k f_k. The factors s that bring sum_k s_k W_k f_k
nearest to the teacher's output solve a small linear system. Without them, the output of a mixer made from raw q and k
starts hundreds of times too large.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from students.mixers.mixer import Context, Mixer

RIDGE = 1e-3  # relative to each term's own energy: bounds the factors where two terms are almost collinear


class OutputScales:
    """The normal equations of one mixer, summed over batches in float64; memory (terms x channels)^2."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.gram: Tensor | None = None
        self.moment: Tensor | None = None
        self.power = 0.0

    @torch.no_grad()
    def add(self, h: Float[Tensor, "b t d"], context: Context, target: Float[Tensor, "b t d"]) -> None:
        """Add one batch: the layer's inputs and the teacher's outputs."""
        mixer = self.mixer
        features = mixer.features(mixer.mix(mixer.project(h, context), context), h).float()
        weight, bias = mixer.out_weight()
        terms, _, channels = weight.shape
        target = (target if bias is None else target - bias).flatten(0, 1).double()
        flat = features.flatten(0, 1).flatten(1).double()
        joined = weight.double().transpose(0, 1).flatten(1)  # [d k*p]
        products = (flat.T @ flat) * (joined.T @ joined)
        gram = products.unflatten(1, (terms, channels)).sum(2).unflatten(0, (terms, channels)).sum(1)
        moment = (flat * (target @ joined)).sum(0).unflatten(0, (terms, channels)).sum(1)
        self.gram = gram if self.gram is None else self.gram + gram
        self.moment = moment if self.moment is None else self.moment + moment
        self.power += target.square().sum().item()

    def solve(self) -> tuple[Float[Tensor, " k"], float]:
        """The factors, and the share of the target's power that stays unexplained. A term without energy keeps factor 1."""
        gram, moment = cast(Tensor, self.gram), cast(Tensor, self.moment)
        energy = gram.diagonal()
        silent = energy <= 1e-12 * energy.max()
        most = energy.max() if energy.max() > 0 else torch.ones_like(energy[0])  # a layer whose output is zero has no energy
        system = gram + torch.diag(RIDGE * energy + silent.double() * most)
        moment = moment.masked_fill(silent, 0.0)
        factors = torch.linalg.solve(system, moment)
        left = self.power - 2 * factors @ moment + factors @ gram @ factors
        return torch.where(silent, torch.ones_like(factors), factors), left.item() / max(self.power, 1e-30)
