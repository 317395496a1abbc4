"""What a container is: a class of transformers that other software runs, and the exact rewrite of a student into it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from distill.exporters.source import Source


class Container:
    """Base of the containers.

    name: the transformers class. line: what it holds, in one line. since: the first version of transformers in which it is
    the same function as the student; None for every supported one.
    """

    name: ClassVar[str]
    line: ClassVar[str]

    def reasons(self, source: "Source") -> list[str]:
        """Why it is not the same function as such a student: each names what would have to change in the recipe, or what of
        the teacher has no place. Empty where the rewrite is exact."""
        raise NotImplementedError

    def since(self, source: "Source") -> str | None:
        """The first version of transformers in which it computes what the student computes."""
        return None

    def engines(self, source: "Source") -> dict[str, str | None]:
        """For each engine that reads the container itself, all of `exporters.engines.ENGINES` but llama.cpp, why it does not
        run it; None where it does."""
        raise NotImplementedError

    def gguf_reasons(self, source: "Source") -> list[str]:
        """What of such a student llama.cpp leaves out and the container's config does not show; the rest is its
        architecture's word (`gguf_files`)."""
        return []

    def config(self, source: "Source") -> dict:
        """The entries of config.json, model_type and architectures among them, without a dtype."""
        raise NotImplementedError

    def tensors(self, source: "Source", student: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The container's tensors by the names that files have: all at once, or each when it is asked for (`Rewrite`).

        Args:
            student: the student's tensors by name, in float32, adapters merged. Tied tensors stand once, as they were saved.

        Raises:
            ValueError: one is missing, or of another shape than the config says.
        """
        raise NotImplementedError

    def files(self, source: "Source") -> dict[str, str]:
        """Further files of the folder, text by name, that some engine asks for."""
        return {}

    def name_inside(self, name: str) -> str:
        """What the class calls a tensor that files have under this name; transformers renames some as it loads them."""
        return name

    def float32(self, name: str) -> bool:
        """Whether a tensor stays in float32 whatever type is asked for: decays, and what else loses by rounding."""
        return False
