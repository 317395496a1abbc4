"""A container's tensors by name, each made from the student's on access, so that one at a time is in memory."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class Rewrite(Mapping[str, Tensor]):
    """The mapping that a container's `tensors` returns.

    `finished` refuses a student with a tensor that no tensor of the container uses.
    """

    def __init__(self, student: Mapping[str, Tensor]) -> None:
        self._student, self._left = student, dict.fromkeys(student)
        self._made: dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]] = {}

    def put(self, name: str, *sources: str, make: Callable[..., Tensor] | None = None) -> None:
        """Define a tensor of the container by the student's tensors that it is made from.

        Args:
            name: its name in files. sources: the names of the student's tensors. make: makes it from these, in float32; None
                takes the one source unchanged.

        Raises:
            ValueError: the student has no such tensor.
        """
        for source in sources:
            if source not in self._student:
                raise ValueError(f"the student has no tensor {source}")
            self._left.pop(source, None)
        self._made[name] = (sources, make)

    def finished(self) -> "Rewrite":
        """Check that every tensor of the student is used, and return this mapping.

        Raises:
            ValueError: naming a tensor that is not used.
        """
        if self._left:
            raise ValueError(f"the student's tensor {next(iter(self._left))} has no place in the container")
        return self

    def __getitem__(self, name: str) -> Tensor:
        sources, make = self._made[name]
        tensors = [self._student[source] for source in sources]
        try:
            return tensors[0] if make is None else make(*tensors)
        except RuntimeError as error:  # raised by torch when sizes differ
            shapes = ", ".join(f"{source} {[*tensor.shape]}" for source, tensor in zip(sources, tensors, strict=True))
            raise ValueError(f"{name} cannot be made of {shapes}: their sizes do not fit config.json") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
