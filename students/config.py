"""A student's layout, the place of its mixers in the skeleton, and the shapes of the attention that they replace.

`students.entry` writes them to config.json and reads them.
"""

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
    """Where a family keeps its attention: the path of the list of layers, and the attribute's name in a layer.

    documents: how documents and padding reach the slot: by "keywords" of their own, or only by "positions".
    """

    layers: str = "model.layers"
    name: str = "self_attn"
    documents: str = "keywords"


@dataclass(frozen=True)
class Shapes:
    """The attention of every layer: one shape, and the exceptions of single layers."""

    shape: Shape
    exceptions: dict[int, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Mapping[int, Shape]) -> "Shapes":
        """Made from the shape of each layer; the most common one becomes `shape`."""
        rule = max(shapes.values(), key=list(shapes.values()).count)
        usual = asdict(rule)
        found = {}
        for layer, shape in shapes.items():
            changes = {name: value for name, value in asdict(shape).items() if value != usual[name]}
            if changes:
                found[layer] = changes
        return cls(rule, found)

    def at(self, layer: int) -> Shape:
        """The shape of one layer."""
        return replace(self.shape, **self.exceptions.get(layer, {}))


@dataclass(frozen=True)
class Layout:
    """Which layer has which mixer: one letter a layer, and each letter's {"mixer": name, option: value ...}.

    meta_tokens: learned vectors in front of every document.
    """

    pattern: str
    mixers: dict[str, dict] = field(default_factory=dict)
    meta_tokens: int = 0

    @classmethod
    def over(cls, layers: int, pattern: str, mixers: dict[str, dict], meta_tokens: int = 0) -> "Layout":
        """A layout for `layers` layers, from a pattern that repeats over depth.

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
                raise ValueError(f"the mixer of {letter!r} is {options.get('mixer')!r}; it should be a mixer's name")
            check_options(options["mixer"], set(options) - {"mixer"}, f" ({letter})")
        named = {letter: _text_keys(options) for letter, options in mixers.items()}
        layout = cls((pattern * layers)[:layers], named, meta_tokens)
        for letter in mixers:
            layout._check_layers(letter)
        return layout

    def check(self) -> None:
        """Refuse unknown letters and mixers in a layout that was read from a file.

        Raises:
            ValueError: naming the letter.
        """
        if not re.fullmatch("[A-Z]+", self.pattern):
            raise ValueError(f"the layout's pattern {self.pattern[:60]!r} is not one capital letter a layer")
        for letter, options in self.mixers.items():
            if not re.fullmatch("[A-Z]", letter) or not isinstance(options.get("mixer"), str):
                raise ValueError(f"the layout names no mixer for {letter[:60]!r}")
            check_options(options["mixer"], set(options) - {"mixer"}, f" ({letter})")
        for letter in sorted(set(self.pattern) - set(self.mixers) - {KEEP}):
            raise ValueError(f"the layout's pattern uses {letter!r}, but no mixer is given for it")

    def mixer_of(self, layer: int) -> dict | None:
        """The mixer and options of a layer; None where attention is kept."""
        return self.mixers.get(self.pattern[layer])

    @property
    def converted(self) -> list[int]:
        """The layers that have a mixer."""
        return [layer for layer in range(len(self.pattern)) if self.mixer_of(layer) is not None]

    @property
    def groups(self) -> list[list[int]]:
        """The converted layers in groups that share parameters; the first layer of a group owns them.

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
        """For each layer with `share_kv`, the layer whose keys and values it reads: the nearest converted layer before it
        with a window of its own.

        Raises:
            ValueError: there is no such layer.
        """
        found: dict[int, int] = {}
        giver: int | None = None
        for layer in self.converted:
            options = self.mixers[self.pattern[layer]]
            if options.get("share_kv"):
                if giver is None:
                    raise ValueError(
                        f"layer {layer} ({self.pattern[layer]}) shares keys and values, but no layer before it has any"
                    )
                found[layer] = giver
            elif has_own_window(options["mixer"]):
                giver = layer
        return found

    def make(self, layer: int, shape: Shape) -> Mixer:
        """A new mixer for a layer.

        Raises:
            ValueError: the mixer refuses its options.
        """
        options = self.options_at(layer)
        return make_mixer(options.pop("mixer"), shape, options)

    def options_at(self, layer: int) -> dict:
        """The options of a converted layer, with the layer's own value of each option that is given by layer.

        An option that has no value for this layer is left out.
        """
        options = dict(self.mixers[self.pattern[layer]])
        for name, values in _by_layer(options).items():
            del options[name]
            found = values.get(str(layer), values.get("default"))
            options |= {} if found is None else {name: found}
        return options

    def _check_layers(self, letter: str) -> None:
        """Refuse an option given by layer that names a layer without this letter."""
        there = {str(layer) for layer, other in enumerate(self.pattern) if other == letter}
        for name, values in _by_layer(self.mixers[letter]).items():
            if wrong := sorted(set(values) - there - {"default"}):
                known = ", ".join(sorted(there, key=int))
                raise ValueError(f"{name} ({letter}) is given for {wrong[0]!r}; the layers of {letter} are {known}")


class StudentConfigMixin(SkeletonConfig):
    """Part of the student's config class, added to the skeleton's."""

    def to_dict(self) -> dict:
        """The config as a dictionary, without `auto_map` where its code is not saved with it.

        A config that was read from a portable folder has an `auto_map`, and may be saved elsewhere.
        """
        entries = super().to_dict()
        if not brings_code(self):
            entries.pop("auto_map", None)
        return entries


def _by_layer(options: dict) -> dict[str, dict]:
    """The options of a mixer that are given by layer: mappings from layers to values, `default` for all other layers."""
    names = mixer_class(options["mixer"]).layer_options
    return {name: value for name, value in options.items() if name in names and isinstance(value, dict)}


def _text_keys(options: dict) -> dict:
    """The options with layers as text, as JSON will store them."""
    by_layer = _by_layer(options).items()
    return options | {name: {str(layer): value for layer, value in values.items()} for name, values in by_layer}
