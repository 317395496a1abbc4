"""Stage 1, orient: matrix orientation, which fits each mixer's matrix M to the attention matrix A, tile by tile.

Source: MOHAWK, section 4.1. The loss of a layer is |A - alpha M|_F^2 / |A|_F^2: both norms are summed over heads, and the
quotient is averaged over the rows of the batch. MOHAWK's own number, the mean over heads of |A - alpha M|_F, is logged too.
Unlike in MOHAWK, alpha, one number a head, is set in closed form when the stage begins, because a mixer's output scale is
not part of its matrix; the output scales are solved again when the stage ends. A mixer with a window branch is fitted at
the lags that the window does not cover.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.schema import Count
from distill.stages.initialise import solve_scales
from distill.stages.observing import layer_name, observed
from distill.stages.rates import Point
from distill.stages.stage import LayerLoss, Stage, TrainingOptions, Transfers
from distill.text.windows import Batch, Calibration
from students.kernels.matrix_orientation import orientation_error
from students.mixers.mixer import Context, Mixer
from students.skeleton import Student
from teachers.observe import Observation
from teachers.teacher import Teacher

_log = logging.getLogger(__name__)
TINY = 1e-20  # share of the attention's power below which a matrix counts as zero


class Orient(Stage):
    """Matrix orientation: fits each mixer's matrix to its layer's attention matrix (MOHAWK, arXiv 2408.10189, stage 1).

    All orientable mixers are trained at once."""

    for_twin = False  # windows alone have no matrix to orient
    probed = True
    layer_loss = LayerLoss("matrix against attention's", "relative squared error")
    rates = (
        Point(134.5e6, 71_804, "smollm2-135m_mamba2-hybrid, 4 windows (docs/performance.md)"),
        Point(1236e6, 87_724, "llama-3.2-1b_mamba2-hybrid, 8 windows at a time"),
    )

    class Options(TrainingOptions):
        """Options of matrix orientation."""

        calibration_tokens: Count = 8192
        """Tokens of text on which output scales are solved when the stage ends."""
        layers: Literal["new", "all"] = "new"
        """Which mixers are trained: `all`, or only the `new` ones that the last `initialise` or `replace` made."""

    options: Options
    alpha: Tensor

    def __init__(
        self, teacher: Teacher, student: Student, options: "Orient.Options", transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        chosen = self.trained_layers(student, options)
        self.oriented = [layer for layer in chosen if student.mixers[layer].orientable]
        self.register_buffer("alpha", torch.ones(teacher.n_layers, teacher.config.num_attention_heads))
        self.norms: dict[str, Tensor] = {}
        skipped = sorted(set(chosen) - set(self.oriented))
        if skipped:
            _log.info("orient skips layers %s: their mixers' matrices are not semiseparable", skipped)

    @torch.no_grad()
    def begin(self, calibration: Calibration) -> None:
        """Find alpha: |A - alpha M|^2 is quadratic in alpha, so its values at a and -a give the minimum.

        a is chosen so that a M is as large as A. Otherwise rounding would hide a small matrix, or one that has almost
        decayed at the end of the window.
        """
        batch = next(iter(calibration(1)))
        for seen, context in observed(self.teacher, self.student, batch, self.oriented, qkv=True, wide=True):
            mixer = self.student.mixers[seen.layer]
            heads, lag = mixer.oriented(), max(1, mixer.min_lag)
            self.alpha[seen.layer, heads] = 1.0
            beyond, _ = self._error(seen, context, window=lag, min_lag=lag)  # |M|^2 where the attention sees nothing
            scale = _one_size(self._error(seen, context)[1].sum(0), beyond.sum(0))
            for _ in range(2):  # the first scale may be too large, because it is measured without the diagonal
                (plus, minus), power = self._both_signs(seen, context, scale)
                power = power.sum(0)
                size, along = (plus + minus).sum(0) / 2 - power, (minus - plus).sum(0) / 4  # |scale M|^2 and A . scale M
                found, scale = scale * along / size.clamp_min(1e-12), scale * _one_size(power, size)
            self.alpha[seen.layer, heads] = torch.where(size > 0, found, 1.0)

    def _both_signs(self, seen: Observation, context: Context, scale: Tensor, **rules: Any) -> tuple[list[Tensor], Tensor]:
        """The errors at alpha = scale and at -scale, and sum A^2."""
        heads = self.student.mixers[seen.layer].oriented()
        errors: list[Tensor] = []
        for sign in (1.0, -1.0):
            self.alpha[seen.layer, heads] = sign * scale
            error, power = self._error(seen, context, **rules)
            errors.append(error)
        return errors, power

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        for seen, context in observed(self.teacher, self.student, batch, self.oriented, qkv=True):
            error, power = self._error(seen, context)
            name = layer_name(seen.layer)
            self.norms[name] = error.detach().sqrt().mean()  # read once a step: reading waits for the GPU
            yield name, (error.sum(1) / power.sum(1).clamp_min(1e-12)).mean()

    def size(self, batch: Batch) -> float:
        return batch.ids.shape[0]

    def finish(self, calibration: Calibration) -> None:
        if self.oriented:
            layers = self.trained_layers(self.student, self.options)
            solve_scales(self.teacher, self.student, calibration(self.options.calibration_tokens), layers)

    def describe(self, loss: float) -> dict[str, float]:
        return {"mohawk_norm": float(sum(self.norms.values())) / max(len(self.norms), 1)}

    @classmethod
    def count(cls, student: Student, options: "Orient.Options") -> int:
        return sum(p.numel() for mixer in cls._orientable(student, options) for p in mixer.parameters())

    @classmethod
    def roles(cls, student: Student, options: "Orient.Options") -> set[str]:
        return {role for mixer in cls._orientable(student, options) for role in mixer.roles().values()}

    @classmethod
    def probe_options(cls) -> "Orient.Options":
        return cls.Options(tokens=1, lr=1.0, layers="all")

    @classmethod
    def _orientable(cls, student: Student, options: "Orient.Options") -> list[Mixer]:
        return [mixer for layer in cls.trained_layers(student, options) if (mixer := student.mixers[layer]).orientable]

    def trained(self) -> dict[str, tuple[str, nn.Parameter]]:
        prefixes = tuple(self.student.mixer_prefix(layer) for layer in self.oriented)
        return {name: entry for name, entry in super().trained().items() if name.startswith(prefixes)}

    def _error(
        self, seen: Observation, context: Context, window: int | None = None, min_lag: int | None = None
    ) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
        """sum (A - alpha M)^2 and sum A^2. `window`, `min_lag`: in place of the teacher's window and the mixer's min_lag."""
        mixer = self.student.mixers[seen.layer]
        matrix = mixer.semiseparable(mixer.project(seen.input, context))
        heads, q, k = mixer.oriented(), cast(Tensor, seen.q), cast(Tensor, seen.k)
        if len(heads) < q.shape[2]:
            k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)[:, :, heads]
            q = q[:, :, heads]
        alpha = self.alpha[seen.layer, heads]
        matrix = replace(
            matrix, C=matrix.C.float() * alpha[:, None], D=None if matrix.D is None else matrix.D.float() * alpha
        )
        rules = self.teacher.logit_rules(seen.layer)
        return orientation_error(
            q.float(),
            k.float(),
            matrix.C,
            matrix.B.float(),
            matrix.log_a,
            matrix.D,
            scale=rules.scale,
            softcap=rules.softcap,
            window=rules.window if window is None else window,
            documents=context.documents,
            min_lag=mixer.min_lag if min_lag is None else min_lag,
        )


def _one_size(wanted: Float[Tensor, " h"], found: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    """The factor that makes a sum of squares `found` become `wanted`; 1 where `found` is almost zero."""
    return torch.where(found > TINY * wanted, (wanted / found.clamp_min(torch.finfo(found.dtype).tiny)).sqrt(), 1.0)
