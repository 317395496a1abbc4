"""The files shipped in recipes/: published configs with the sizes in README.md, and a row there for every recipe."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.benchmarks.layouts import LAYOUTS
from distill.build import count_parameters, layout_of
from distill.recipe_file import load
from distill.reference.published import PUBLISHED
from distill.reference.systems import SYSTEMS
from distill.reference.systems import layers as layers_of
from distill.shipped import shipped_folder
from distill.stages import stages_of
from distill.stages.layouts import first_layout, layouts_of

README = (shipped_folder() / "README.md").read_text()
CONFIGS = sorted(path.stem for path in (shipped_folder() / "configs").glob("*.json"))


def rows(heading):
    """A table of the README as lists of cells, by the name in its first column."""
    section = README.split(f"# {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_the_published_number_of_parameters(name):
    config = AutoConfig.from_pretrained(shipped_folder() / "configs" / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    published = PUBLISHED[name]
    assert published.place.rpartition("/")[2].lower() == name
    assert count_parameters(model) == published.parameters


def test_every_recipe_and_config_has_its_row():
    assert sorted(PUBLISHED) == CONFIGS
    assert sorted(rows("Recipes")) == sorted(path.stem for path in shipped_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", rows("Recipes"))
def test_a_row_says_how_much_text_the_recipe_takes(name):
    said = re.match(r"([\d.]+)([kMB])", rows("Recipes")[name][2])
    tokens = sum(entry.options.tokens for entry in stages_of(load(name)))
    assert tokens == pytest.approx(float(said[1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[said[2]], rel=0.01)


@pytest.mark.parametrize(
    ("name", "layers", "kept"),
    [
        ("phi-1.5_phi-mamba", 24, []),
        ("phi-1.5_hybrid-phi-mamba", 24, [4, 10, 16, 22]),
        ("smollm2-135m_mamba2", 30, []),
        ("smollm2-135m_zamba", 30, []),
        ("qwen3-0.6b_mamba2-hybrid", 28, [0, 4, 8, 12, 16, 20, 24]),
        ("qwen3-0.6b_gated-deltanet", 28, [3, 7, 11, 15, 19, 23, 27]),
        ("smollm2-135m_hymba-lite", 30, []),
    ],
)
def test_layouts_keep_the_attention_they_say(name, layers, kept):
    recipe = load(name)
    layout = layout_of(recipe.pattern, recipe.mixers, layers, name)
    assert [layer for layer in range(layers) if layout.mixer_of(layer) is None] == kept


@pytest.mark.parametrize(
    ("name", "layers", "kept"), [("smollm2-135m_split-heads", 30, 12), ("llama-3.2-1b_split-heads", 16, 20)]
)
def test_layouts_keep_the_heads_they_say(name, layers, kept):
    recipe = load(name)
    layout = layout_of(recipe.pattern, recipe.mixers, layers, name)
    heads = [layout.options_at(layer)["keep"] for layer in range(layers)]
    assert sum(map(len, heads)) == kept and f" {kept} of " in README and not any(heads[-4:])


def test_every_recipe_belongs_to_one_system():
    named = [name for system in SYSTEMS.values() for name in system.recipes]
    assert sorted(named) == sorted(path.stem for path in shipped_folder().glob("*.yaml"))
    assert {name for system in SYSTEMS.values() for name in system.layouts} <= set(LAYOUTS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135m_griffin", "30 layers: 20 `rg_lru`, 10 `attention` (window 1,024)"),
        ("llama-3-8b_mamba-in-llama", "32 layers: 28 `mamba2`, 4 of the teacher's attention"),
        ("smollm2-135m_hymba", "30 layers: 27 `parallel_heads` (window 1,024), 3 `parallel_heads`, 128 meta tokens"),
    ],
)
def test_the_layers_of_a_recipe(name, said):
    assert layers_of(name) == said


def test_zambas_share_their_blocks():
    """Zamba: one block in every sixth layer. Zamba2: two that take turns."""
    for name, layers, blocks in (
        ("smollm2-135m_zamba", 30, [[4, 10, 16, 22, 28]]),
        ("llama-3.2-1b_zamba2", 16, [[3, 11], [7, 15]]),
    ):
        recipe = load(name)
        layout = layout_of(recipe.pattern, recipe.mixers, layers, name)
        assert [group for group in layout.groups if len(group) > 1] == blocks


def test_gemma_keeps_the_layers_that_see_everything():
    recipe = load("gemma-3-270m_mamba2-hybrid")
    kinds = AutoConfig.from_pretrained(shipped_folder() / "configs" / "gemma-3-270m.json").layer_types
    layout = layout_of(recipe.pattern, recipe.mixers, len(kinds), recipe.name)
    assert [kind == "sliding_attention" for kind in kinds] == [layer in layout.converted for layer in range(len(kinds))]


def test_mohawk_counts():
    tokens = {entry.name: entry.options.tokens for entry in stages_of(load("phi-1.5_phi-mamba"))}
    assert tokens["orient"] == 80_000_000 and tokens["align"] == 160_000_000 and tokens["imitate"] == 2_760_000_000


def stage_of(recipe, name):
    return next(entry.options for entry in stages_of(load(recipe)) if entry.name == name)


def converted(name, layers):
    """The layers that are converted under each stage of a recipe."""
    recipe = load(name)
    return [layout.converted for layout in layouts_of(recipe, first_layout(recipe, layers, name), name)]


def test_the_mamba_in_the_llama_replaces_layers_as_its_authors_do():
    """Every fourth layer, the even ones, then all but every fourth and every eighth."""
    found = converted("llama-3-8b_mamba-in-llama", 32)
    steps = [found[place] for place in range(len(found)) if place == 0 or found[place] != found[place - 1]]
    fourth, eighth = ([layer for layer in range(32) if layer % every != every - 1] for every in (4, 8))
    assert steps == [list(range(0, 32, 4)), list(range(0, 32, 2)), fourth, eighth]
    names = [entry.name for entry in stages_of(load("llama-3-8b_mamba-in-llama"))]
    assert names == ["initialise", "align", "imitate"] + 3 * ["replace", "align", "imitate"]


def test_the_small_mamba_in_llama_goes_from_half_to_a_quarter():
    found = converted("smollm2-135m_mamba-in-llama", 30)
    assert found[0] == list(range(0, 30, 2)) and len(found[2]) == 15
    assert [layer for layer in range(30) if layer not in found[-1]] == [1, 3, 7, 11, 15, 19, 23, 27]
    *_, imitate, tune = stages_of(load("smollm2-135m_mamba-in-llama"))
    assert imitate.options.freeze == ["q", "k"] and imitate.options.train == "all" and tune.name == "tune"


@pytest.mark.parametrize(("which", "warm"), [(0, 1500), (1, 500), (2, 500), (3, 500)])
def test_the_mamba_in_the_llama_trains_as_its_authors_code_does(which, warm):
    recipe = load("llama-3-8b_mamba-in-llama")
    options, data = [entry.options for entry in stages_of(recipe) if entry.name == "imitate"][which], recipe.data
    assert options.layers == "all"
    assert options.scale * options.ce == pytest.approx(1.0, rel=1e-3)  # cross-entropy, a mean over tokens
    assert options.scale * (1 - options.ce) == pytest.approx(
        0.1 * data.seq_len, rel=1e-3
    )  # 0.1 of the KL's sum over a window
    assert (options.lr, options.betas, options.clip, options.weight_decay) == (8e-5, (0.9, 0.98), 0.1, 0.0)
    assert options.train == "mixers" and (options.schedule, options.final) == ("cosine", 0.0)
    steps = options.tokens / (data.batch * data.seq_len)
    assert data.batch == 64 and round(options.warmup * steps) == pytest.approx(warm, abs=5)


@pytest.mark.parametrize(
    ("recipe", "stage", "published"),
    [  # rate (of the rest), schedule, warm-up, decay or final, weight decay, tokens a step
        ("phi-1.5_phi-mamba", "orient", (2e-4, "wsd", 0.1, 0.1, 0.1, 64 * 2048)),
        ("phi-1.5_phi-mamba", "align", (1e-4, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("phi-1.5_hybrid-phi-mamba", "imitate", (1e-4, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("llama-3.2-1b_llamba", "orient", (1e-4, "wsd", 0.1, 0.1, 0.1, 64 * 2048)),
        ("llama-3.2-1b_llamba", "align", (1e-4, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("llama-3.2-1b_llamba", "imitate", (5e-5, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("llama-3.2-1b_split-heads", "align", (1e-4, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("llama-3.2-1b_split-heads", "imitate", (1e-5, "wsd", 0.1, 0.1, 0.1, 128 * 2048)),
        ("qwen3-0.6b_gated-deltanet", "align", (1e-3, "cosine", 0.0, 0.01, 0.01, 96 * 512)),
        ("qwen3-0.6b_gated-deltanet", "imitate", (7e-6, "constant", 0.0, None, 0.01, 32 * 4096)),
    ],
)
def test_a_published_recipe_has_the_published_rates(recipe, stage, published):
    """As recipes/README.md says that they were checked."""
    options, data = stage_of(recipe, stage), load(recipe).data
    end = {"wsd": options.decay, "cosine": options.final, "constant": None}[options.schedule]
    tokens = (options.batch or data.batch) * data.seq_len
    assert (options.rate("rest"), options.schedule, options.warmup, end, options.weight_decay, tokens) == published
    assert options.betas == (0.9, 0.95) and options.clip == 1.0
    assert getattr(options, "ce", 0.0) == 0.0 and getattr(options, "scale", 1.0) == 1.0
