"""The choice of what the processes of a run divide, by the sizes of a stage and the memory of a device."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from distill.memory import capacity
from distill.moments import bytes_a_parameter
from distill.recipe import Recipe
from distill.stages.stage import Stage, StageOptions
from distill.training.sharding import Sharding

MASTERS = 8  # bytes of a trained parameter: its float32 master and gradient
FILLED = 0.7  # share of memory for these, moments and the teacher; activations and gathered layers need the rest


@dataclass(frozen=True)
class Share:
    """What is divided, and the bytes of masters, gradients, moments and teacher weights.

    kind: "none", "student" or "all". held: the bytes on one process. whole: those without division. room: the bytes of a
    process's memory.
    """

    kind: str
    held: float
    whole: float
    room: float

    @property
    def reason(self) -> str:
        """The reason for the choice, in words."""
        sizes = (
            f"{self.whole / 2**30:.1f} GiB of teacher, masters, gradients and moments, {self.room / 2**30:.1f} GiB a device"
        )
        return f"{sizes}; each process holds {self.held / 2**30:.1f} GiB"


def bytes_of(trained: float, options: StageOptions) -> float:
    """The bytes of `trained` parameters of a stage: masters, gradients, and AdamW's two moments."""
    return (MASTERS + bytes_a_parameter(getattr(options, "optimizer", "adamw"))) * trained


def share(asked: str, world: int, masters: float, teacher: float, room: float) -> Share:
    """Choose what `world` processes divide.

    Args:
        asked: the recipe's `shard`. masters: bytes of the parameters that an end-to-end stage trains (`bytes_of`). teacher:
            bytes of its weights. room: bytes of a process's memory.
    """
    held = {"none": teacher + masters, "student": teacher + masters / world, "all": (teacher + masters) / world}
    kind = asked
    if world == 1:
        kind = "none"
    elif asked == "auto":
        kind = next((name for name in ("none", "student") if held[name] <= FILLED * room), "all")
    return Share(kind, held[kind], held["none"], room)


def room_of(device: torch.device, world: int) -> float:
    """The bytes of memory that one of `world` processes has: a whole GPU, or its share of the machine's memory."""
    return capacity(device) / (1 if device.type == "cuda" else world)


def share_of(recipe: Recipe, stage: Stage, accelerator: Accelerator) -> Share:
    """What the processes of a run divide in a prepared stage; layer-by-layer stages are not divided."""
    world, device = accelerator.num_processes, accelerator.device
    trained = sum(parameter.numel() for _, parameter in stage.trained().values())
    teacher = sum(parameter.numel() * parameter.element_size() for parameter in stage.teacher.model.parameters())
    asked = recipe.shard if stage.whole_student else "none"
    return share(asked, world, bytes_of(trained, stage.options), teacher, room_of(device, world))


def sharded(recipe: Recipe, stage: Stage, accelerator: Accelerator) -> Sharding | None:
    """Divide a stage's student over processes; None if every process holds it whole."""
    kind = share_of(recipe, stage, accelerator).kind
    if kind == "none":
        return None
    narrow = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    return Sharding(stage, accelerator.device, teacher_too=kind == "all", narrow=narrow)
