"""The table of mixers, and `make_mixer`, which builds one from the options of a layout.

A new mixer needs one file in this folder and one line in the table. The contract tests read the table.
"""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module

from students.mixers.attention import Attention
from students.mixers.mixer import Mixer, Shape
from students.mixers.windowed import Windowed

MIXERS = {
    "attention": "students.mixers.attention:Attention",
    "discrete_mamba2": "students.mixers.discrete_mamba2:DiscreteMamba2",
    "mamba1": "students.mixers.mamba1:Mamba1",
    "mamba2": "students.mixers.mamba2:Mamba2",
    "rg_lru": "students.mixers.rg_lru:RgLru",
    "gated_deltanet": "students.mixers.gated_deltanet:GatedDeltaNet",
    "gla": "students.mixers.gla:GatedLinearAttention",
    "longhorn": "students.mixers.longhorn:Longhorn",
    "retention": "students.mixers.retention:Retention",
    "shared_attention": "students.mixers.shared_attention:SharedAttention",
    "split_heads": "students.mixers.split_heads:SplitHeads",
    "parallel_heads": "students.mixers.parallel_heads:ParallelHeads",
}
IN_TOKENS = frozenset({"window", "size", "sinks", "lag"})  # options that are lengths
LONGEST, WIDEST = 2**20, 2**14  # upper bounds: of lengths in tokens; of widths, ranks and counts


def mixer_class(name: str) -> type[Mixer]:
    """The class of a mixer's name.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in MIXERS:
        raise ValueError(f"there is no mixer {name!r}; {_nearest(name, MIXERS)}there are {', '.join(MIXERS)}")
    module, _, attribute = MIXERS[name].partition(":")
    return getattr(import_module(module, __package__), attribute)


def mixer_options(name: str) -> set[str]:
    """The options that a layout may give this mixer; `window` adds a window branch to an SSM mixer."""
    return set(_types_of(name)) - mixer_class(name).hidden_options | {"window"}


def has_own_window(name: str) -> bool:
    """Whether a mixer contains attention; `window` is then its own option and adds no branch."""
    return "window" in _types_of(name)


def check_options(name: str, options: Iterable[str], where: str = "") -> None:
    """Refuse options that a mixer does not have.

    Raises:
        ValueError: naming the option and the most similar known one.
    """
    if unknown := sorted(set(options) - mixer_options(name)):
        known = sorted(mixer_options(name))
        raise ValueError(
            f"mixer {name}{where} has no option {unknown[0]!r}; {_nearest(unknown[0], known)}it has {', '.join(known)}"
        )


def range_of(option: str, kind: type[Mixer]) -> tuple[int, int]:
    """The smallest and the largest value of a mixer's whole-number option.

    The largest is more than any use needs; larger values are taken for typing errors, because they would take all memory.
    """
    low = 0 if option in kind.zero_options else 1
    return low, kind.largest_options.get(option, LONGEST if option in IN_TOKENS else WIDEST)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def make_mixer(name: str, shape: Shape, options: dict) -> Mixer:
    """Build a mixer; an SSM mixer with the option `window` gets a window branch.

    `window` is a mapping of `size` and other options, which `Windowed.meanings` explains.

    Raises:
        ValueError: an unknown mixer or option, or a value that the mixer refuses.
    """
    check_options(name, options)
    options = dict(options)
    if has_own_window(name) or "window" not in options:
        _check_values(f"mixer {name}", options, _types_of(name), mixer_class(name), shape)
        return mixer_class(name)(shape, **options)
    if not isinstance(options["window"], dict):
        raise ValueError(f"the window of mixer {name} is {options['window']!r}; write it as window: {{size: 64}}")
    if "lag" in options:
        raise ValueError(f"mixer {name} has both a lag and a window; set lag (true or false) inside window")
    return _windowed(name, shape, dict(options.pop("window")), options)


def defaults_of(name: str) -> dict:
    """The type and default of each option that a layout may give a mixer, by name, without those of a window branch."""
    parameters, hidden = inspect.signature(mixer_class(name)).parameters.values(), mixer_class(name).hidden_options
    options = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in hidden]
    return {each.name: (each.annotation, each.default) for each in options}


def _types_of(name: str) -> dict:
    """The types of a mixer's options, by name: the keyword-only arguments of its class."""
    parameters = inspect.signature(mixer_class(name)).parameters.values()
    return {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}


def _check_values(where: str, options: dict, types: dict, kind: type[Mixer], shape: Shape) -> None:
    """Refuse values of a wrong type, numbers out of their range, and ranks above the model's width."""
    for key, value in options.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, types[key]) or (isinstance(value, bool) and not isinstance(True, types[key])):
            raise ValueError(f"{where}: {key} is {value!r}, which is no {getattr(types[key], '__name__', types[key])}")
        low, high = range_of(key, kind)
        if number and not low <= value <= high:
            small = "small" if value < low else "large"
            raise ValueError(f"{where}: {key} is {value}, which is too {small}; it should be from {low} to {high:,}")
        if number and key.endswith("_rank") and value > shape.d_model:
            raise ValueError(f"{where}: {key} is {value}, more than the model's width {shape.d_model}; make it smaller")


def _windowed(name: str, shape: Shape, window: dict, options: dict) -> Mixer:
    known = Windowed.window_options
    unknown = set(window) - set(known)
    if unknown or "size" not in window:
        wrong = min(unknown, default="")
        said = f"an unknown {wrong!r}; {_nearest(wrong, known)}" if unknown else "no size; "
        raise ValueError(f"the window of mixer {name} has {said}it takes {', '.join(sorted(known))}")
    if isinstance(window["size"], int) and window["size"] < 1:
        raise ValueError(f"a window of {window['size']} tokens sees nothing; its size must be at least 1")
    size, kind = window["size"], mixer_class(name)
    _check_values(f"the window of mixer {name}", window, known, Windowed, shape)
    _check_values(f"mixer {name}", options, _types_of(name), kind, shape)
    lag = _lag(name, size, window)
    window = Windowed.window_defaults | window
    own = window["own"]
    if not own and not kind.lends:
        raise ValueError(f"mixer {name} has no q, k and v projections for its window to borrow; set own: true")
    if not own and (shape.qkv_bias or shape.qk_norm):
        has = "biases" if shape.qkv_bias else "norms"
        raise ValueError(f"a window that borrows {name}'s projections cannot have the {has} of q and k; set own: true")
    ssm = kind(shape, **lag, **options)
    if not own and (ssm.d_state != shape.head_dim or getattr(ssm, "n_groups", shape.n_heads) != shape.n_heads):
        raise ValueError(f"a window that borrows {name}'s projections needs d_state = head_dim and one group a head")
    branch = Attention(replace(shape, o_bias=False), window=size, sinks=window["sinks"], borrowed=not own)
    return Windowed(ssm, branch, shape.d_model, gate=window["gate"])


def _lag(name: str, size: int, window: dict) -> dict[str, int]:
    """The option `lag` of an SSM with a window: the window's size, or 0 if the window has `lag: false`.

    Empty for a mixer without lag.
    """
    can = "lag" in _types_of(name)
    if window.get("lag") and not can:
        raise ValueError(f"mixer {name} has no lag: its state takes every token at once; leave lag: true out of its window")
    return {"lag": size if window.get("lag", Windowed.window_defaults["lag"]) else 0} if can else {}
