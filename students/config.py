"""A student's layout, and where it lives: under the key `distill` of the skeleton's own config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from students.mixers import check_options, has_own_window, make_mixer
from students.mixers.mixer import Mixer, Shape

KEEP = "A"  # the letter of a layer whose attention stays, unless a layout gives it a mixer
FORMAT = 2


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
        return cls((pattern * layers)[:layers], mixers, meta_tokens)

    def mixer_of(self, layer: int) -> dict | None:
        """The mixer and options of a layer; None where the attention stays."""
        return self.mixers.get(self.pattern[layer])

    @property
    def converted(self) -> list[int]:
        """The layers that have a mixer."""
        return [layer for layer in range(len(self.pattern)) if self.mixer_of(layer) is not None]

    @property
    def givers(self) -> dict[int, int]:
        """For each layer that shares keys and values, the layer whose they are: the nearest converted one before it whose
        attention has its own.

        Raises:
            ValueError: there is none before it.
        """
        found, giver = {}, None
        for layer in self.converted:
            options = self.mixer_of(layer)
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
        """A new mixer for a layer."""
        options = dict(self.mixer_of(layer))
        return make_mixer(options.pop("mixer"), shape, options)


def to_dict(layout: Layout, place: Place, shapes: Shapes) -> dict:
    """What config.json holds under `distill`."""
    attention = {**asdict(shapes.shape), "exceptions": {str(layer): changes for layer, changes in shapes.exceptions.items()}}
    return {"format": FORMAT, "layout": asdict(layout), "place": asdict(place), "attention": attention}


def from_dict(entry: dict) -> tuple[Layout, Place, Shapes]:
    """The reverse of `to_dict`.

    Raises:
        ValueError: the entry was written in another format.
    """
    if entry.get("format") != FORMAT:
        raise ValueError(f"config.json's `distill` entry has format {entry.get('format')!r}; this version reads {FORMAT}")
    attention = dict(entry["attention"])
    exceptions = {int(layer): changes for layer, changes in attention.pop("exceptions").items()}
    return Layout(**entry["layout"]), Place(**entry["place"]), Shapes(Shape(**attention), exceptions)
