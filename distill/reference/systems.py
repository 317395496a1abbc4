"""The published systems whose layouts a student can have: the parts that match the paper, and the shipped recipes."""

from collections import Counter
from typing import NamedTuple

from distill.loading import teacher_config
from distill.recipe import Recipe
from distill.recipe_file import load
from distill.stages.layouts import first_layout, layouts_of


class System(NamedTuple):
    """A published system, or a layer of one.

    Attributes:
        papers: arXiv numbers. covered: the parts that a student can have.
        recipes: names of shipped recipes; the table shows the layers of the first.
        layouts: names in `distill.benchmarks.layouts.LAYOUTS`, if there is no recipe.
    """

    papers: tuple[str, ...]
    covered: str
    recipes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()


SYSTEMS = {
    "Mamba": System(
        ("2312.00752",),
        "The block, at half of its usual width. The teacher's MLPs stay.",
        ("smollm2-135m_mamba",),
    ),
    "Mamba-2": System(
        ("2405.21060",),
        "The block. Every second head has a constant output, so the state holds half of the usual. The teacher's MLPs stay.",
        (
            "smollm2-135m_mamba2",
            "smollm2-135m_mamba2-hybrid",
            "gemma-3-270m_mamba2-hybrid",
            "llama-3.2-1b_mamba2-hybrid",
            "qwen3-0.6b_mamba2-hybrid",
        ),
    ),
    "Phi-Mamba, Hybrid-Phi-Mamba (MOHAWK)": System(
        ("2408.10189",),
        "Layout, mixer, stages and learning rates.",
        ("phi-1.5_phi-mamba", "phi-1.5_hybrid-phi-mamba"),
    ),
    "Llamba": System(
        ("2502.14458",),
        "Layout, mixer, stages and learning rates. Not covered: its second, larger teacher.",
        ("llama-3.2-1b_llamba",),
    ),
    "The Mamba in the Llama": System(
        ("2408.15237",),
        "Layouts by progressive replacement; loss and learning rates of its distillation. The small recipe adds SFT "
        "(`tune`); DPO (`prefer`) is a run of its own, see docs/instruct.md. Not covered: speculative decoding.",
        ("llama-3-8b_mamba-in-llama", "smollm2-135m_mamba-in-llama"),
    ),
    "Zamba": System(
        ("2405.16712",),
        "One shared attention block among Mamba-2 layers. Not covered: the shared MLP, the embedding as a second input.",
        ("smollm2-135m_zamba",),
    ),
    "Zamba2": System(
        ("2411.15242",),
        "Two shared attention blocks that alternate, with low-rank differences for each layer. Not covered: as for Zamba.",
        ("llama-3.2-1b_zamba2",),
    ),
    "Samba": System(("2406.07522",), "The layout.", ("smollm2-135m_samba", "llama-3.2-1b_samba")),
    "Hymba": System(
        ("2411.13676",),
        "Attention heads and SSM heads in parallel, meta tokens, shared keys and values. The SSM heads are discrete "
        "Mamba-2's, and each branch has its own output projection.",
        ("smollm2-135m_hymba", "llama-3.2-1b_hymba"),
    ),
    "Hymba without windows, norms, shared keys and meta tokens": System(
        ("2411.13676",),
        "Attention heads and SSM heads in parallel, in a form that Falcon-H1's class holds.",
        ("smollm2-135m_hymba-lite",),
    ),
    "Griffin, RecurrentGemma": System(
        ("2402.19427", "2404.07839"),
        "Layout and recurrent block, which is as wide as the teacher's attention.",
        ("smollm2-135m_griffin", "gemma-2-2b_recurrentgemma"),
    ),
    "Retrieval-aware distillation": System(
        ("2602.11374",),
        "Layout and learning rates; for Llama-3.2-1B also the authors' choice of heads.",
        ("smollm2-135m_split-heads", "llama-3.2-1b_split-heads"),
    ),
    "Gated DeltaNet": System(
        ("2412.06464",),
        "The layer. Learning rates are those of published distillations into it. Not covered: their choice of layers.",
        ("smollm2-135m_gated-deltanet", "qwen3-0.6b_gated-deltanet"),
    ),
    "Windows and a state in every converted layer": System(
        (),
        "This project's own: a sliding window beside discrete Mamba-2, which takes a token when it leaves the window.",
        ("quickstart", "smollm2-135m_window-hybrid"),
    ),
    "GLA": System(("2312.06635",), "The layer.", layouts=("GLA",)),
    "RetNet, lightning attention": System(("2307.08621", "2501.08313"), "The layer.", layouts=("RetNet", "lightning")),
    "Longhorn": System(("2407.14207",), "The layer.", layouts=("Longhorn",)),
    "Taipan": System(
        ("2410.18572",),
        "A window beside a state, with a gate that selects tokens. Selecting saves no time here.",
        layouts=("Taipan",),
    ),
    "B'MOJO-F": System(("2407.06324",), "A window beside a state, added.", layouts=("B'MOJO-F",)),
}


def layers(name: str) -> str:
    """The layers of a recipe's finished student by their mixers: "30 layers: 20 `rg_lru`, 10 `attention` (window 1,024)".

    Raises:
        UserError: the recipe, or its teacher's config, cannot be read.
    """
    recipe = load(name)
    depth = int(teacher_config(recipe).num_hidden_layers)
    if not isinstance(recipe.pattern, str):
        return _selected(recipe, depth)
    first = first_layout(recipe, depth, name)
    last = layouts_of(recipe, first, name)[-1]
    counts = Counter(_said(last.mixer_of(layer)) for layer in range(depth))
    extra = f", {last.meta_tokens} meta tokens" if last.meta_tokens else ""
    return f"{depth} layers: " + ", ".join(f"{count} {said}" for said, count in counts.most_common()) + extra


def _selected(recipe: Recipe, depth: int) -> str:
    """The layers of a recipe whose run selects them."""
    pattern = recipe.pattern
    kept = pattern.get("keep") if isinstance(pattern, dict) else None
    others = " or ".join(_said(options) for options in recipe.mixers.values())
    return f"{depth} layers: {kept} of attention, selected by the run, the others {others}"


def _said(options: dict | None) -> str:
    if options is None:
        return "of the teacher's attention"
    window = options.get("window")
    size = window.get("size") if isinstance(window, dict) else window
    return f"`{options['mixer']}`" + (f" (window {size:,})" if size else "")
