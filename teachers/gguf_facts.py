"""The entries and tensors of a GGUF file; each entry is checked against its type and range when it is read."""

from pathlib import Path
from typing import Any

import torch

from teachers.config_bounds import Rule, kind, shown

# Entries that describe a model without changing what it computes.
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}


class Facts:
    """A file's entries and tensors by name, with a record of the entries that were read.

    In the file, names of the model's entries begin with the architecture; `get` and `need` take them without it.
    """

    def __init__(self, reader: Any, path: Path) -> None:
        """reader: a gguf.GGUFReader.

        Raises:
            ValueError: the file has no entry general.architecture.
        """
        self.path, self._fields = path, reader.fields
        self._asked: set[str] = set()
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.taken: set[str] = set()  # tensors that became part of the config
        self.architecture = self.general("general.architecture", kind("text", str))
        if self.architecture is None:
            raise ValueError("it does not say general.architecture")

    def general(self, name: str, rule: Rule | None = None) -> Any:
        """Returns an entry by its full name; None if there is none.

        Raises:
            ValueError: the entry breaks the rule; names the entry, its value and the rule.
        """
        value = self._fields[name].contents() if name in self._fields else None
        if value is not None and rule is not None and (wanted := rule(value)) is not None:
            raise ValueError(f"{self.path}: {name} is {shown(value)}; it should be {wanted}: download it again")
        return value

    def names(self, start: str) -> list[str]:
        """Returns the full names of the entries that begin with `start`."""
        return [name for name in self._fields if name.startswith(start)]

    def get(self, name: str, default: Any = None, rule: Rule | None = None, single: bool = True) -> Any:
        """Returns an entry of the model, or `default` if there is none.

        Args:
            single: whether the entry must have one value for all layers; then a list is refused.

        Raises:
            ValueError: the entry breaks the rule, or differs from layer to layer.
        """
        self._asked.add(name)
        whole_name = f"{self.architecture}.{name}"
        if single and whole_name in self._fields and isinstance(self.general(whole_name), list):
            raise ValueError(f"{self.path}: {whole_name} differs from layer to layer, which is not supported")
        found = self.general(whole_name, rule)
        return default if found is None else found

    def need(self, name: str, rule: Rule) -> Any:
        """Returns an entry of the model that must be there.

        Raises:
            ValueError: there is no such entry, or see `get`.
        """
        found = self.get(name, rule=rule)
        if found is None:
            raise ValueError(f"{self.path} does not say {self.architecture}.{name}")
        return found

    def rows(self, tensor: str) -> int:
        """Returns the number of output features of a tensor.

        Raises:
            ValueError: the file has no such tensor.
        """
        if tensor not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {tensor}")
        return int(self.tensors[tensor].shape[-1])

    def count(self, name: str) -> int:
        """Returns the number of values of a list by its full name, without reading them; 0 if there is no such entry."""
        return len(self._fields[name].data) if name in self._fields else 0

    def vector(self, tensor: str) -> torch.Tensor | None:
        """Returns a tensor of factors that becomes part of the config; None if there is none.

        Raises:
            ValueError: the tensor is not one row of positive numbers.
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
        """Returns the model's entries that were not read and may change what it computes."""
        start = f"{self.architecture}."
        names = {name.removeprefix(start) for name in self._fields if name.startswith(start)}
        return sorted(start + name for name in names - self._asked - HARMLESS)
