"""The printed form of a plan."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from distill.console import bold, duration
from distill.errors import printable
from distill.footprint.table import remarks, stage_table
from distill.planning import ASSUMED, BANDWIDTH, DIVIDED, Plan
from distill.recipe import Recipe
from distill.selection.checking import measured_stages
from distill.stages.layouts import Further
from students.config import Layout
from students.converting import further


def show(plan: Plan, recipe: Recipe, place: str | Path, console: Console) -> None:
    """Print a recipe's plan. place: the recipe's path."""
    console.print(Text.assemble(bold(recipe.name), printable(f"  {place}")))
    console.print(Text.assemble("layers   ", *_strip(plan.layout), "   (A keeps the teacher's attention)"))
    before = plan.layout
    for stage, layout in plan.replaced.items():
        new, count = further(before, layout), len(layout.converted)
        said = f"   {stage} converts {len(new)} more, then {count} of {len(layout.pattern)} are converted"
        console.print(Text.assemble("         ", *_strip(layout), said))
        before = layout
    if chosen := ", ".join(
        dict.fromkeys(cast(str, cast(Further, entry.options).scorer) for entry in measured_stages(recipe))
    ):
        console.print(f"         the run chooses these layers by {chosen}; evenly spread layers are shown", highlight=False)
    for letter, options in recipe.mixers.items():
        console.print(f"      {letter}  {options}", highlight=False)
    if plan.selection:
        trains = f", trains gates on {plan.selection['training_tokens']:,}" if plan.selection["training_tokens"] else ""
        console.print(
            f"select   the run chooses the layout by {plan.selection['by']} before it trains: reads about "
            f"{plan.selection['tokens']:,} tokens{trains}; an evenly spread layout of the same budget is shown",
            highlight=False,
        )
    if recipe.meta_tokens:
        console.print(f"meta     {recipe.meta_tokens} learned tokens in front of every document", highlight=False)
    console.print(stage_table(plan.tokens, plan.trained, plan.needs))
    for line in remarks(plan.needs, plan.gpus, plan.gpu_memory):
        console.print(line, highlight=False)
    times = ", ".join(f"{duration(plan.seconds(device))} on {name}" for device, name in ASSUMED.items())
    console.print(
        f"parameters  teacher {plan.teacher_parameters:,}, student {plan.student_parameters:,}\n"
        f"memory      about {plan.bytes / 2**30:.1f} GiB for weights, gradients and optimizer, plus activations\n"
        f"time        about {times} (assumed: {plan.speed('cpu'):.1e} and {plan.speed('cuda'):.1e} FLOP/s of training; "
        f"loading and evaluation come on top; GPU hours by stage are from measured rates)"
    )
    for number, line in enumerate(export_lines(plan.exports)):
        console.print(f"{'' if number else 'exports':12}{line}", highlight=False, markup=False)
    if plan.shard:
        found = plan.shard
        said = "nothing is divided" if found["kind"] == "none" else f"divides {DIVIDED[found['kind']]}"
        console.print(f"shard       {found['asked']}, over {found['gpus']} GPUs: {said} ({found['why']})", highlight=False)
    if plan.identity:
        found = plan.identity
        swapped = (
            "no layer is converted"
            if found["layer"] is None
            else (
                f"plain attention in each converted layer is off by {found['attention']:.1g} of its output at most (layer "
                f"{found['layer']})"
            )
        )
        console.print(
            "check       with the teacher's attention in every layer the student's logits are off by "
            f"{found['logits']:.1g} of the teacher's; {swapped}; every tensor has a value; {found['seconds']:.2f} s\n"
            "            the steps at the end of the run were tried: rows, questions, saving, exports, generation",
            highlight=False,
        )
    for tokens, (theirs, ours) in plan.cache.items():
        share = f"{_size(ours)} ({ours / theirs:.1%})"
        console.print(
            f"cache       {tokens:,} tokens in bfloat16: teacher {_size(theirs)}, student {share}", highlight=False
        )
    limits = ", ".join(f"{theirs:,.0f} / {ours:,.0f} after {tokens:,}" for tokens, (theirs, ours) in plan.decoding.items())
    console.print(
        f"decoding    at most, teacher / student: {limits} tokens/s, batch size 1 in bfloat16 at an H100's "
        f"{BANDWIDTH / 1e12:.1f} TB/s (weights and cache read once a token)",
        highlight=False,
    )


def export_lines(exports: Mapping[str, dict]) -> Iterator[str]:
    """For each target: the engines that run its export, the engines that do not and why, or why the target is refused."""
    for name, found in exports.items():
        if found["refused"]:
            yield f"{name}: refused: {found['refused']}"
            continue
        since = f" >= {found['since']}" if found["since"] else ""
        runs = [engine + since * (engine == "transformers") for engine, why in found["engines"].items() if why is None]
        yield f"{name}: runs in {', '.join(runs) or 'no engine'}"
        reasons: dict[str, list[str]] = {}
        for engine, why in found["engines"].items():
            if why is not None:
                reasons.setdefault(why, []).append(engine)
        for why, engines in reasons.items():
            yield f"    not in {', '.join(engines)}: {why}"


def _strip(layout: Layout) -> list:
    """A layout's letters, with mixers in bold."""
    return [bold(letter, "bold blue") if letter in layout.mixers else letter for letter in layout.pattern]


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
