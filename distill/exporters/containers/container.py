"""The base class of containers: a transformers class that other engines run, and the exact rewrite of a student into it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from distill.exporters.engines import Preparation

if TYPE_CHECKING:
    from distill.exporters.source import Source


class Container:
    """Base class of the containers.

    name: the transformers class. line: what it holds, in one line. preparations: by engine, what its environment needs
    before it runs the container.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    preparations: ClassVar[Mapping[str, Preparation]] = {}

    def reasons(self, source: "Source") -> list[str]:
        """Return why the class cannot compute what the student computes; empty if the rewrite is exact.

        Each reason names what would have to change in the recipe, or what the class lacks of the teacher.
        """
        raise NotImplementedError

    def since(self, source: "Source") -> str | None:
        """Return the first transformers version whose class computes what the student computes; None if all supported do."""
        return None

    def engines(self, source: "Source") -> dict[str, str | None]:
        """Return, for each engine of `exporters.engines.ENGINES` but llama.cpp, why it does not run the container.

        The reason is None if the engine runs it.
        """
        raise NotImplementedError

    def gguf_reasons(self, source: "Source") -> list[str]:
        """Return what llama.cpp would leave out of the student that the container's config does not show.

        The architecture (`gguf_files`) checks the config.
        """
        return []

    def config(self, source: "Source") -> dict:
        """Return the entries of config.json, with model_type and architectures, without a dtype."""
        raise NotImplementedError

    def tensors(self, source: "Source", student: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the container's tensors by their names in files: all at once, or each made on access (`Rewrite`).

        Args:
            student: the student's tensors by name, in float32, adapters merged. A tied tensor is there once, as saved.

        Raises:
            ValueError: a tensor is missing, or has another shape than the config says.
        """
        raise NotImplementedError

    def files(self, source: "Source") -> dict[str, str]:
        """Return further files that an engine needs in the folder: text by file name."""
        return {}

    def name_inside(self, name: str) -> str:
        """Return the class's name of a tensor from its name in files; transformers renames some tensors on loading."""
        return name

    def float32(self, name: str) -> bool:
        """Whether a tensor stays in float32 in an export of any type: decays, and others that rounding would harm."""
        return False
