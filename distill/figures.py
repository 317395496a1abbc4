"""The pictures of a report, as data that stands inside its HTML: SVG for lines, PNG for matrices."""

import base64
import io
from collections.abc import Sequence

import numpy as np

INK, FAINT = "#7a8391", "#7a839133"  # readable on white and on black
COLOURS = ("#2b7de9", "#e4572e", "#2a9d62", "#b455c4", "#c98a00")
SIZE = (7.2, 2.9)  # inches


def loss_curves(metrics: Sequence[dict]) -> str:
    """Training losses over steps, each stage a band with its own scale."""
    stages = list(dict.fromkeys(line["stage"] for line in metrics))
    figure, axes = _subplots(1, max(len(stages), 1))
    for axis, stage, colour in zip(axes, stages, COLOURS * len(stages), strict=False):
        lines = [line for line in metrics if line["stage"] == stage]
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axis.plot(steps, losses, color=colour, alpha=0.35, linewidth=1)
        axis.plot(steps, _smooth(losses), color=colour, linewidth=1.8)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.set_facecolor(colour + "12")
    axes[0].set_ylabel("loss")
    return _svg(figure)


def story(names: Sequence[str], values: Sequence[float], twin: float | None) -> str:
    """Held-out KL after each stage, and where the twin ended."""
    figure, (axis,) = _subplots(1, 1)
    axis.plot(range(len(names)), values, marker="o", color=COLOURS[0], linewidth=2)
    for place, value in enumerate(values):
        axis.annotate(f"{value:.3f}", (place, value), textcoords="offset points", xytext=(0, 8), ha="center", color=INK)
    if twin is not None:
        axis.axhline(twin, color=COLOURS[1], linestyle="--", linewidth=1.4)
        axis.annotate(
            f"twin {twin:.3f}",
            (len(names) - 1, twin),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=COLOURS[1],
        )
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("held-out KL, nats a token")
    axis.set_ylim(0, max(values) * 1.2)
    return _svg(figure)


def layer_errors(before: dict[str, float], after: dict[str, float]) -> str:
    """Each converted layer's relative L2 error before and after the stages."""
    figure, (axis,) = _subplots(1, 1)
    layers = sorted(before)
    places = np.arange(len(layers))
    axis.bar(places - 0.2, [before[layer] for layer in layers], 0.4, label="after initialise", color=COLOURS[4])
    axis.bar(places + 0.2, [after.get(layer, np.nan) for layer in layers], 0.4, label="finished", color=COLOURS[0])
    axis.set_xticks(places, [str(int(layer.rpartition("_")[2])) for layer in layers])
    axis.set_xlabel("layer")
    axis.set_ylabel("relative L2 error")
    axis.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def by_position(rows: dict[str, list[dict]]) -> str:
    """KL against the place in the window, a line a model."""
    figure, (axis,) = _subplots(1, 1)
    for (name, bands), colour in zip(rows.items(), COLOURS, strict=False):
        axis.plot([band["name"] for band in bands], [band["kl"] for band in bands], marker="o", label=name, color=colour)
    axis.set_xlabel("position in the window")
    axis.set_ylabel("KL, nats a token")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", labelrotation=30)
    axis.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def matrix_pair(attention: np.ndarray, mixer: np.ndarray) -> str:
    """An attention matrix and the mixer's, side by side on one scale (square roots, so that small weights show)."""
    figure, axes = _subplots(1, 2, (4.6, 2.4))
    top = np.sqrt(max(attention.max(), 1e-6))
    for axis, matrix, title in zip(axes, (attention, mixer), ("attention", "mixer"), strict=True):
        shown = np.sign(matrix) * np.sqrt(np.abs(matrix))
        axis.imshow(shown, cmap="RdBu", vmin=-top, vmax=top, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=True, bbox_inches="tight")
    _close(figure)
    return (
        f'<img alt="attention and mixer matrix" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def _subplots(rows: int, columns: int, size: tuple[float, float] = SIZE):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.grid(color=FAINT, linewidth=0.6)
        axis.tick_params(colors=INK, labelsize=8)
        axis.title.set_color(INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        for spine in axis.spines.values():
            spine.set_color(FAINT)
    return figure, list(axes.flat)


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    _close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _close(figure) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def _smooth(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    width = max(1, round(len(values) * share))
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.ones(width) / width, mode="valid")
