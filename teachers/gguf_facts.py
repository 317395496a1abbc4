"""What a GGUF file says, entry by entry, each held against the type and the range that it should have."""

from pathlib import Path
from typing import Any

import torch

from teachers.config_bounds import Rule, kind, shown

# Entries that describe a model without changing what it computes.
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}


class Facts:
    """A file's entries and the shapes of its tensors, by name; remembers which entries were asked for.

    Names of entries are given without the architecture that they begin with in the file.
    """

    def __init__(self, reader: Any, path: Path) -> None:
        """reader: a gguf.GGUFReader.

        Raises:
            ValueError: the file does not say what model it holds.
        """
        self.path, self._fields = path, reader.fields
        self._asked: set[str] = set()
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.taken: set[str] = set()  # tensors that became part of the config
        self.architecture = self.general("general.architecture", kind("text", str))
        if self.architecture is None:
            raise ValueError("it does not say general.architecture")

    def general(self, name: str, rule: Rule | None = None) -> Any:
        """An entry by its whole name, None where there is none.

        Raises:
            ValueError: it breaks a rule, naming the entry, its value and the rule.
        """
        value = self._fields[name].contents() if name in self._fields else None
        if value is not None and rule is not None and (wanted := rule(value)) is not None:
            raise ValueError(f"{self.path}: {name} is {shown(value)}; it should be {wanted}: download it again")
        return value

    def names(self, start: str) -> list[str]:
        """The whole names of the entries that begin so."""
        return [name for name in self._fields if name.startswith(start)]

    def get(self, name: str, default: Any = None, rule: Rule | None = None, single: bool = True) -> Any:
        """An entry of the model, `default` where there is none.

        Args:
            single: whether there is one value for all layers; a list of them is refused.

        Raises:
            ValueError: it breaks the rule, or differs from layer to layer.
        """
        self._asked.add(name)
        whole_name = f"{self.architecture}.{name}"
        if single and whole_name in self._fields and isinstance(self.general(whole_name), list):
            raise ValueError(f"{self.path}: {whole_name} differs from layer to layer, which is not supported")
        found = self.general(whole_name, rule)
        return default if found is None else found

    def need(self, name: str, rule: Rule) -> Any:
        """An entry that must be there.

        Raises:
            ValueError: it is not, or see `get`.
        """
        found = self.get(name, rule=rule)
        if found is None:
            raise ValueError(f"{self.path} does not say {self.architecture}.{name}")
        return found

    def rows(self, tensor: str) -> int:
        """Output features of a tensor.

        Raises:
            ValueError: it is not there.
        """
        if tensor not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {tensor}")
        return int(self.tensors[tensor].shape[-1])

    def count(self, name: str) -> int:
        """How many values a list has, by its whole name, without reading them."""
        return len(self._fields[name].data) if name in self._fields else 0

    def vector(self, tensor: str) -> torch.Tensor | None:
        """A tensor of factors that belongs to the config, None where there is none.

        Raises:
            ValueError: it holds something else than one row of positive numbers.
        """
        if tensor not in self.tensors:
            return None
        self.taken.add(tensor)
        found = self.tensors[tensor]
        plain = found.tensor_type.name in ("F32", "F16") and len(found.shape) == 1
        values = torch.tensor(found.data.copy(), dtype=torch.float32) if plain else torch.zeros(1)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"{self.path}: {tensor} should be one row of positive numbers; download it again")
        return values

    def unread(self) -> list[str]:
        """Entries of the model that nobody asked for and that may matter."""
        start = f"{self.architecture}."
        names = {name.removeprefix(start) for name in self._fields if name.startswith(start)}
        return sorted(start + name for name in names - self._asked - HARMLESS)
