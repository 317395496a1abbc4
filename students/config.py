"""A student's layout, its place in the skeleton and the attention that it was made from; `entry.py` writes them down."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from students.compat import brings_code
from students.mixers import check_options, has_own_window, make_mixer, mixer_class
from students.mixers.mixer import Mixer, Shape
from students.skeleton import SkeletonConfig

KEEP = "A"  # the letter of a layer whose attention stays, unless a layout gives it a mixer


@dataclass(frozen=True)
class Place:
    """Where a family keeps its attention: path of the list of layers, name in a layer.

    documents: how documents and padding reach the slot there, by "keywords" of its own or only by "positions".
    """

    layers: str = "model.layers"
    name: str = "self_attn"
    documents: str = "keywords"


@dataclass(frozen=True)
class Shapes:
    """The attention of every layer: one shape, and what is different in single layers."""

    shape: Shape
    exceptions: dict[int, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Mapping[int, Shape]) -> "Shapes":
        """Of the shapes by layer; the most common one is the rule."""
        rule = max(shapes.values(), key=list(shapes.values()).count)
        usual = asdict(rule)
        found = {}
        for layer, shape in shapes.items():
            changes = {name: value for name, value in asdict(shape).items() if value != usual[name]}
            if changes:
                found[layer] = changes
        return cls(rule, found)

    def at(self, layer: int) -> Shape:
        """One layer's."""
        return replace(self.shape, **self.exceptions.get(layer, {}))


@dataclass(frozen=True)
class Layout:
    """One letter a layer, and what each letter stands for: {"mixer": name, option: value ...}.

    meta_tokens: learned vectors in front of every document.
    """

    pattern: str
    mixers: dict[str, dict] = field(default_factory=dict)
    meta_tokens: int = 0

    @classmethod
    def over(cls, layers: int, pattern: str, mixers: dict[str, dict], meta_tokens: int = 0) -> "Layout":
        """A layout for so many layers, from a pattern that repeats over depth.

        Raises:
            ValueError: an empty pattern, one longer than the model, a letter without a mixer, a mixer or option that
                does not exist, or a letter that the pattern does not use.
        """
        if not pattern:
            raise ValueError("the layout's pattern is empty")
        if len(pattern) > layers:
            raise ValueError(f"the layout's pattern {pattern!r} names {len(pattern)} layers, but the model has {layers}")
        for letter in sorted(set(pattern) - set(mixers) - {KEEP}):
            raise ValueError(
                f"the layout's pattern uses {letter!r}, but no mixer is given for it ({KEEP!r} keeps attention)"
            )
        for letter in sorted(set(mixers) - set(pattern)):
            raise ValueError(f"a mixer is given for {letter!r}, but the layout's pattern {pattern!r} does not use it")
        for letter, options in mixers.items():
            if not isinstance(options.get("mixer"), str):
                raise ValueError(f"there is no mixer {options.get('mixer')!r} ({letter}); give it by name")
            check_options(options["mixer"], set(options) - {"mixer"}, f" ({letter})")
        named = {letter: _text_keys(options) for letter, options in mixers.items()}
        layout = cls((pattern * layers)[:layers], named, meta_tokens)
        for letter in mixers:
            layout._check_layers(letter)
        return layout

    def check(self) -> None:
        """Refuse letters and mixers that there are none of, in a layout that was read.

        Raises:
            ValueError: naming the letter.
        """
        if not re.fullmatch("[A-Z]+", self.pattern):
            raise ValueError(f"the layout's pattern {self.pattern[:60]!r} is not one capital letter a layer")
        for letter, options in self.mixers.items():
            if not re.fullmatch("[A-Z]", letter) or not isinstance(options.get("mixer"), str):
                raise ValueError(f"the layout has no mixer's name for {letter[:60]!r}")
            check_options(options["mixer"], set(options) - {"mixer"}, f" ({letter})")
        for letter in sorted(set(self.pattern) - set(self.mixers) - {KEEP}):
            raise ValueError(f"the layout's pattern uses {letter!r}, but no mixer is given for it")

    def mixer_of(self, layer: int) -> dict | None:
        """The mixer and options of a layer; None where the attention stays."""
        return self.mixers.get(self.pattern[layer])

    @property
    def converted(self) -> list[int]:
        """The layers that have a mixer."""
        return [layer for layer in range(len(self.pattern)) if self.mixer_of(layer) is not None]

    @property
    def groups(self) -> list[list[int]]:
        """The converted layers, those whose mixers share parameters together; the first of a group owns them.

        Raises:
            ValueError: a letter has more blocks to share than layers.
        """
        found = []
        for letter, options in self.mixers.items():
            layers = [layer for layer in self.converted if self.pattern[layer] == letter]
            blocks = options.get("blocks", 1) if mixer_class(options["mixer"]).shares else len(layers)
            if blocks > len(layers):
                raise ValueError(f"blocks ({letter}) is {blocks}, but {letter} has {len(layers)} layers to share them")
            found += [layers[block::blocks] for block in range(blocks)]
        return sorted(found)

    @property
    def givers(self) -> dict[int, int]:
        """For each layer that shares keys and values, the layer whose they are: the nearest converted one before it whose
        attention has its own.

        Raises:
            ValueError: there is none before it.
        """
        found: dict[int, int] = {}
        giver: int | None = None
        for layer in self.converted:
            options = self.mixers[self.pattern[layer]]
            if options.get("share_kv"):
                if giver is None:
                    raise ValueError(
                        f"layer {layer} ({self.pattern[layer]}) shares keys and values, but no layer before has any"
                    )
                found[layer] = giver
            elif has_own_window(options["mixer"]):
                giver = layer
        return found

    def make(self, layer: int, shape: Shape) -> Mixer:
        """A new mixer for a layer.

        Raises:
            ValueError: what the mixer refuses.
        """
        options = self.options_at(layer)
        return make_mixer(options.pop("mixer"), shape, options)

    def options_at(self, layer: int) -> dict:
        """The options of a converted layer, those given by layer resolved; one that says nothing of it is left out."""
        options = dict(self.mixers[self.pattern[layer]])
        for name, values in _by_layer(options).items():
            del options[name]
            found = values.get(str(layer), values.get("default"))
            options |= {} if found is None else {name: found}
        return options

    def _check_layers(self, letter: str) -> None:
        """Refuse an option given by layer that names what is no layer of its letter."""
        there = {str(layer) for layer, other in enumerate(self.pattern) if other == letter}
        for name, values in _by_layer(self.mixers[letter]).items():
            if wrong := sorted(set(values) - there - {"default"}):
                known = ", ".join(sorted(there, key=int))
                raise ValueError(f"{name} ({letter}) is given for {wrong[0]!r}; the layers of {letter} are {known}")


class StudentConfigMixin(SkeletonConfig):
    """What a student adds to its skeleton's config class."""

    def to_dict(self) -> dict:
        """Without an auto_map where no code comes along: read from a portable folder, a config may be saved elsewhere."""
        entries = super().to_dict()
        if not brings_code(self):
            entries.pop("auto_map", None)
        return entries


def _by_layer(options: dict) -> dict[str, dict]:
    """The options of a mixer that are given layer by layer: mappings from layers to values, `default` for the layers that
    they leave out."""
    names = mixer_class(options["mixer"]).layer_options
    return {name: value for name, value in options.items() if name in names and isinstance(value, dict)}


def _text_keys(options: dict) -> dict:
    """Options whose layers are named as JSON will name them."""
    by_layer = _by_layer(options).items()
    return options | {name: {str(layer): value for layer, value in values.items()} for name, values in by_layer}
