"""A container's tensors by name, each made from the student's when it is asked for, so that one at a time is in memory."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class Rewrite(Mapping[str, Tensor]):
    """What a container's `tensors` gives back.

    Every tensor of the student has to go somewhere: `finished` refuses one that went nowhere.
    """

    def __init__(self, student: Mapping[str, Tensor]) -> None:
        self._student, self._left = student, dict.fromkeys(student)
        self._made: dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]] = {}

    def put(self, name: str, *sources: str, make: Callable[..., Tensor] | None = None) -> None:
        """Let a tensor of the container be made of some of the student's.

        Args:
            name: its name in files. sources: the student's, by name. make: of these, in float32; None for the one as it is.

        Raises:
            ValueError: the student has no such tensor.
        """
        for source in sources:
            if source not in self._student:
                raise ValueError(f"the student has no tensor {source}")
            self._left.pop(source, None)
        self._made[name] = (sources, make)

    def finished(self) -> "Rewrite":
        """Itself, once every tensor is put.

        Raises:
            ValueError: one of the student's has no place in it.
        """
        if self._left:
            raise ValueError(f"the student's tensor {next(iter(self._left))} has no place in the container")
        return self

    def __getitem__(self, name: str) -> Tensor:
        sources, make = self._made[name]
        tensors = [self._student[source] for source in sources]
        try:
            return tensors[0] if make is None else make(*tensors)
        except RuntimeError as error:  # of torch, on sizes
            shapes = ", ".join(f"{source} {[*tensor.shape]}" for source, tensor in zip(sources, tensors, strict=True))
            raise ValueError(f"{name} cannot be made of {shapes}: their sizes do not fit config.json") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
