"""Line charts of a report: training losses, KL after each stage and by position, each layer's error, speed and memory."""

from collections.abc import Mapping, Sequence

from distill.evaluation.rows import NAMES
from distill.reports.page import figures
from distill.reports.svg import Series, averaged, intervals, line_chart, short

ROW_COLOURS = {  # no chart shows both the teacher and the student without windows, so these share a colour
    "teacher": 6,
    "student": 0,
    "no_state": 5,
    "no_window": 6,
    "twin": 1,
    "window_layout": 2,
    "uniform_window": 3,
    "window_everywhere": 4,
}
SPEEDS = (  # key of a cell, title, unit, factor
    ("first_token_seconds", "time to first token", "ms", 1e3),
    ("decode_tokens_per_second", "decoding, eager", "tokens/s", 1.0),
    ("graph_decode_tokens_per_second", "decoding, CUDA graphs", "tokens/s", 1.0),
    ("peak_bytes", "peak memory", "MiB", 2**-20),
    ("cache_bytes", "cache", "MiB", 2**-20),
)


def kl_intervals(rows: Mapping[str, Mapping]) -> str:
    """A chart of each row's KL with one standard error."""
    found = [
        (NAMES[row], results["fidelity"]["kl"], results["fidelity"]["kl_error"] or 0.0, ROW_COLOURS[row])
        for row, results in rows.items()
        if row != "teacher"
    ]
    return intervals("held-out KL, ± one standard error over documents", found, "nats a token")


def loss_curves(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Charts of the training loss by step, one for each stage, with one line for each run.

    A single run also has a faint line with every step.
    """
    stages = list(dict.fromkeys(line["stage"] for metrics in runs.values() for line in metrics))
    bands = []
    for stage in stages:
        series = []
        for colour, (name, metrics) in enumerate(runs.items()):
            lines = [line for line in metrics if line["stage"] == stage]
            steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
            if len(runs) == 1:
                series.append(Series(name, steps, losses, colour, faint=True))
            series.append(Series(name, averaged(steps, 40), averaged(losses, 40), colour, marks=len(lines) == 1))
        bands.append(line_chart(f"stage {stage}", series, "step", "training loss", log_y=True, band=True))
    return figures(*bands)


def story(names: Sequence[str], values: Sequence[float], twin: float | None) -> str:
    """A chart of the held-out KL after each stage, and of the final KL of the window-only control."""
    places = list(range(len(names)))
    series = [Series("student", places, values, marks=True)]
    if twin is not None:
        series.append(Series("finished window-only control", places, [twin] * len(places), ROW_COLOURS["twin"], dashed=True))
    ticks: dict[float, str] = dict(zip(places, names, strict=True))
    return line_chart("held-out KL after each stage", series, "", "nats a token", zero=True, ticks=ticks)


def by_position(rows: Mapping[str, Mapping]) -> str:
    """A chart of the KL by position in the window, with one line for each model."""
    series, ticks = [], {}
    for row, results in rows.items():
        if row != "teacher":
            bands = results["fidelity"]["by_position"]
            starts = [float(band["name"].partition("-")[0]) for band in bands]
            ticks = {start: f"{start:.0f}" for start in starts}
            series.append(Series(NAMES[row], starts, [band["kl"] for band in bands], ROW_COLOURS[row], marks=True))
    return line_chart(
        "KL by position", series, "first token of a band of the window", "nats a token", zero=True, ticks=ticks
    )


def layer_errors(title: str, measured: Mapping[str, Mapping[str, float]], label: str) -> str:
    """A chart of a loss by layer, with one line for each moment or run: {name: {"layer_03": value}}."""
    series = []
    for colour, (name, values) in enumerate(measured.items()):
        layers = sorted(values)
        numbers = [int(layer.rpartition("_")[2]) for layer in layers]
        series.append(Series(name, numbers, [values[layer] for layer in layers], colour, marks=True))
    shown = sorted({int(number) for one in series for number in one.x})
    return line_chart(title, series, "layer", label, zero=True, ticks={number: str(number) for number in shown})


def speed_curves(models: Mapping[str, Mapping], colours: Sequence[int]) -> str:
    """Charts of time and memory by length, with one line for each model and batch size. A cell that was not run has no
    point."""
    charts = []
    for key, title, unit, factor in SPEEDS:
        series: list[Series] = []
        ticks: dict[float, str] = {}
        for colour, (name, speed) in zip(colours, models.items(), strict=True):
            cells = [cell for cell in speed["cells"] if cell.get(key) is not None]
            for batch in sorted({cell["batch"] for cell in cells}):
                own = [cell for cell in cells if cell["batch"] == batch]
                lengths = [cell["length"] for cell in own]
                ticks |= {length: short(length) for length in lengths}
                values = [cell[key] * factor for cell in own]
                series.append(Series(f"{name}, batch {batch}", lengths, values, colour, dashed=batch > 1, marks=True))
        if series:
            charts.append(
                line_chart(title, series, "tokens", unit, log_x=True, log_y=True, ticks=dict(sorted(ticks.items())))
            )
    return figures(*charts) if charts else ""
