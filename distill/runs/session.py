"""What a command works with, made once: device and precision, the teacher, the text, the held-out text."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from distill.compat import forget_precision
from distill.errors import UserError
from distill.loading import load_teacher
from distill.memory import enough_memory, ran_out
from distill.recipe import Recipe
from distill.stages import stages_of
from distill.text.heldout import Heldout
from distill.text.preparation import prepare
from distill.text.windows import Batch, Calibration, Windows
from teachers.source import cache_folder
from teachers.teacher import Teacher


@dataclass
class Session:
    """Teacher, text and device of one recipe. The training text is prepared when it is first asked for."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    heldout_windows: Windows

    @classmethod
    def open(cls, recipe: Recipe, project: Path | None = None, trains: bool = True) -> "Session":
        """Load and prepare everything; the training text only if `trains`.

        Raises:
            UserError: what the teacher, the text or the device refuses.
        """
        accelerator = make_accelerator(recipe, project)
        set_seed(recipe.seed)
        with enough_memory(f"loading {recipe.teacher}", "the teacher's size (choose a smaller one), or set device=cpu"):
            teacher = load_teacher(recipe, accelerator.device)
        check_length(recipe, teacher)
        with accelerator.main_process_first():
            session = cls(recipe, accelerator, teacher, text_windows(recipe, teacher.tokenizer, "heldout"))
            if trains:
                _ = session.windows  # now, so that a mistake in the text shows before anything is written
        return session

    def with_recipe(self, recipe: Recipe) -> "Session":
        """The same teacher, text and device for another recipe on the same text."""
        other = replace(self, recipe=recipe)
        if "windows" in vars(self):
            vars(other)["windows"] = self.windows
        return other

    @cached_property
    def windows(self) -> Windows:
        """The training text."""
        return text_windows(self.recipe, self.teacher.tokenizer, "train")

    def heldout(self, tokens: int) -> Heldout:
        """The first so many held-out tokens, and the teacher's hidden states on them."""
        with self.accelerator.autocast():
            return Heldout.of(self.teacher, self._heldout_batches(tokens), self.heldout_windows.label_names)

    def probe_batch(self) -> Batch:
        """The fixed batch that checkpoints are checked on: the last of the held-out text."""
        count = max(1, self.recipe.evaluation.probe_tokens // self.heldout_windows.seq_len)
        first = max(0, self.heldout_windows.count - count)
        return self.heldout_windows.batch(first, min(count, self.heldout_windows.count)).to(self.teacher.device)

    def calibration(self, window: int) -> Calibration:
        """Training text from a window on, for closed-form work."""
        size = self.recipe.data.micro_batch or self.recipe.data.batch

        def batches(tokens: int):
            count = max(1, tokens // self.windows.seq_len)
            for offset in range(0, count, size):
                yield self.windows.batch(window + offset, min(size, count - offset)).to(self.accelerator.device)

        return batches

    def _heldout_batches(self, tokens: int) -> list[Batch]:
        length = self.heldout_windows.seq_len
        count = min(math.ceil(tokens / length), self.heldout_windows.count)
        size = max(1, min(count, 4096 // length if self.teacher.device.type == "cpu" else 32_768 // length))
        return [self.heldout_windows.batch(first, min(size, count - first)) for first in range(0, count, size)]


def make_accelerator(recipe: Recipe, project: Path | None) -> Accelerator:
    """accelerate's device and precision as the recipe asks.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; set device=auto, or see `distill doctor`")
    on_gpu = cuda and recipe.device != "cpu"
    wide = recipe.precision == "float32" or (recipe.precision == "auto" and not on_gpu)
    if on_gpu and not wide:
        torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients go wrong where layouts change: students.kernels.attention
    forget_precision()  # another run of this process may have had another
    return Accelerator(
        mixed_precision="no" if wide else "bf16",
        cpu=not on_gpu,
        log_with=(recipe.trackers or None) if project else None,  # what only judges a run tells no tracker
        project_dir=project,
    )


def check_length(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse windows that are longer than the teacher has positions for.

    Raises:
        UserError: naming the key and both lengths.
    """
    known = teacher.positions
    meta, before = recipe.meta_tokens, f" behind {recipe.meta_tokens} meta tokens" if recipe.meta_tokens else ""
    for key, length in (("data.seq_len", recipe.data.seq_len), ("evaluation.seq_len", recipe.evaluation.seq_len)):
        if known and length and length + meta > known:
            raise UserError(
                f"{key} is {length}{before}, but {recipe.teacher} has positions for {known} tokens; "
                f"make it {known - meta} or less"
            )


def text_windows(recipe: Recipe, tokenizer, part: str) -> Windows:
    """The training or held-out text in windows."""
    data = recipe.data
    sources = getattr(data, part)
    limit = data.limit if part == "train" else None
    if limit is None and any(source.hub or source.weight for source in sources):  # neither has an end worth waiting for
        limit = (
            _training_tokens(recipe) if part == "train" else 4 * (recipe.evaluation.final_tokens or recipe.evaluation.tokens)
        )
    try:
        folder = prepare(sources, tokenizer, separator=data.separator, seed=recipe.seed, limit=limit, where=f"data.{part}")
    except (OSError, EOFError, StopIteration, RuntimeError, ValueError) as error:  # of full disks and of cut or odd files
        if ran_out(error):
            raise
        files = ", ".join(source.path or source.hub for source in sources)
        raise UserError(
            f"data.{part} could not be prepared from {files}: {error or 'a file is empty or ends early'}; the files must be "
            f"whole, and {cache_folder()} must have room (DISTILL_CACHE names another place)"
        ) from error
    if part == "train":
        return Windows(folder, data.seq_len, recipe.seed, data.long_documents == "in_order")
    return Windows(folder, recipe.evaluation.seq_len or data.seq_len, None)


def _training_tokens(recipe: Recipe) -> int:
    """What the stages read, each up to a batch more than it says."""
    data = recipe.data
    return sum(entry.options.tokens + entry.batch(data) * data.seq_len for entry in stages_of(recipe))
