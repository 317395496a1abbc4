"""The description of a student that export targets check: its config, its layout, and the attention it was made from."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from students.config import Layout, Place, Shapes
from students.entry import from_dict
from students.model import PREFIX


@dataclass(frozen=True)
class Source:
    """A student without its weights.

    family: the teacher's model_type. config: the student's config, which is the teacher's with the entry `distill` added.
    shapes: the shape of the attention that each layer was made from.
    """

    family: str
    config: PretrainedConfig
    layout: Layout
    place: Place
    shapes: Shapes

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Source":
        """Build from a student's config.

        Raises:
            ValueError: its `distill` entry was written in another format, or is damaged.
        """
        return cls(config.model_type.removeprefix(PREFIX), config, *from_dict(config.distill))

    @classmethod
    def read(cls, folder: Path) -> "Source":
        """Build from a student's folder.

        Raises:
            ValueError, OSError: its config.json is missing or damaged.
        """
        return cls.of(AutoConfig.from_pretrained(folder))

    @property
    def kept(self) -> list[int]:
        """The layers that kept attention."""
        return [layer for layer in range(len(self.layout.pattern)) if self.layout.mixer_of(layer) is None]

    @property
    def kinds(self) -> set[str]:
        """The mixers of the layout, by name."""
        return {self.layout.mixers[self.layout.pattern[layer]]["mixer"] for layer in self.layout.converted}
