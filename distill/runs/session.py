"""What a command works with, made once: device and precision, the teacher, the text, the held-out text."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from distill import processes
from distill.compat import forget_precision
from distill.errors import UserError
from distill.loading import load_teacher
from distill.memory import enough_memory, or_cpu
from distill.recipe import Recipe
from distill.stages import stages_of
from distill.text.by_document import DocumentWindows, selection_begins
from distill.text.heldout import Heldout
from distill.text.overlap import overlap
from distill.text.preparation import prepare
from distill.text.windows import Batch, Calibration, Windows
from teachers.teacher import Teacher

SHORTEST = 8  # tokens of a text that a recipe can ask for


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
        smaller = f"the teacher's size (choose a smaller one){or_cpu(accelerator.device)}"
        with enough_memory(f"loading {recipe.teacher}", smaller):
            teacher = load_teacher(recipe, accelerator.device)
        check_length(recipe, teacher)
        with accelerator.main_process_first():  # the others find the text prepared
            session = cls(recipe, accelerator, teacher, text_windows(recipe, teacher.tokenizer, "heldout"))
            if trains:
                _ = session.windows  # now, so that a mistake in the text shows before anything is written
        return session

    def with_recipe(self, recipe: Recipe) -> "Session":
        """The same teacher, text and device for another recipe on the same text."""
        other = replace(self, recipe=recipe)
        for name in ("windows", "overlap"):
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @cached_property
    def windows(self) -> Windows:
        """The training text."""
        return text_windows(self.recipe, self.teacher.tokenizer, "train")

    @cached_property
    def overlap(self) -> dict | None:
        """How much of the held-out text is training text (see `distill.text.overlap`); None where the latter is neither open
        nor prepared."""
        if "windows" not in vars(self):
            try:
                return overlap(text_windows(self.recipe, self.teacher.tokenizer, "train", make=False), self.heldout_windows)
            except UserError:  # its files are elsewhere by now
                return None
        return overlap(self.windows, self.heldout_windows)

    def heldout(self, tokens: int, length: int | None = None) -> Heldout:
        """So many held-out tokens of as many documents as can be, and the teacher's hidden states on them.

        Args:
            length: of the windows; the recipe's by default.

        Raises:
            UserError: none of them can be scored.
        """
        windows = self.heldout_windows
        last = selection_begins(windows.folder) if windows.count > 1 else None
        return self._heldout(DocumentWindows(windows.folder, length or windows.seq_len, last=last), tokens)

    def selection_text(self, tokens: int) -> Heldout:
        """As `heldout`, of the part that selections read and nothing else does.

        Raises:
            UserError: the text is too short to have such a part, or none of it can be scored.
        """
        windows = self.heldout_windows
        self.check_selection_text()
        first, probed = selection_begins(windows.folder), self._probed()[0] * windows.seq_len
        last = probed if probed >= first + windows.seq_len else None
        return self._heldout(DocumentWindows(windows.folder, windows.seq_len, first, last), tokens)

    def check_selection_text(self) -> None:
        """Refuse held-out text that has no part for a selection to read.

        Raises:
            UserError: giving its size.
        """
        windows = self.heldout_windows
        if windows.count < 2:
            raise UserError(
                f"the held-out text is {windows.meta['tokens']:,} tokens, one window of {windows.seq_len}: a selection "
                "needs text that its student is not judged by; name more under data.heldout, or shorter windows"
            )

    def probe_batch(self) -> Batch:
        """The fixed batch that checkpoints are checked on: the last of the held-out text."""
        return self.heldout_windows.batch(*self._probed()).to(self.teacher.device)

    def calibration(self, window: int) -> Calibration:
        """Training text from a window on, for closed-form work."""
        size = self.recipe.data.calibrated

        def batches(tokens: int):
            count = max(1, tokens // self.windows.seq_len)
            for offset in range(0, count, size):
                yield self.windows.batch(window + offset, min(size, count - offset)).to(self.accelerator.device)

        return batches

    def _probed(self) -> tuple[int, int]:
        """The first window of the probe batch, and how many."""
        windows = self.heldout_windows
        count = min(windows.count, max(1, self.recipe.evaluation.probe_tokens // windows.seq_len))
        return windows.count - count, count

    def _heldout(self, windows: DocumentWindows, tokens: int) -> Heldout:
        size = max(1, (4096 if self.teacher.device.type == "cpu" else 32_768) // windows.seq_len)
        batches, documents = zip(*windows.batches(tokens, size), strict=True)
        with self.accelerator.autocast():
            return Heldout.of(self.teacher, batches, self.heldout_windows.label_names, documents)


def make_accelerator(recipe: Recipe, project: Path | None) -> Accelerator:
    """accelerate's device and precision as the recipe asks.

    Raises:
        UserError: a GPU is asked for and there is none, or one process was started where several were asked for.
    """
    processes.check_launch()
    check_device(recipe)
    cuda = torch.cuda.is_available()
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


def check_device(recipe: Recipe) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; set device=auto, or see `distill doctor`")


def check_length(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse windows, and passkeys that a recipe asks for, that are longer than the teacher has positions for.

    Raises:
        UserError: naming the key and both lengths.
    """
    options, room = recipe.evaluation, teacher.positions(recipe.meta_tokens)
    if room is not None and room < SHORTEST:
        raise UserError(
            f"meta_tokens is {recipe.meta_tokens}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} "
            f"tokens, which leaves {max(room, 0)} for a text; make it {room + recipe.meta_tokens - SHORTEST} or less"
        )
    before = f" behind {recipe.meta_tokens} meta tokens" if recipe.meta_tokens else ""
    lengths = [("data.seq_len", recipe.data.seq_len), ("evaluation.seq_len", options.seq_len)]
    if "passkey" in options.model_fields_set:  # the usual ones are left out where they are too long
        lengths += [("evaluation.passkey", length) for length in options.passkey]
    for key, length in lengths:
        if room is not None and length and length > room:
            raise UserError(
                f"{key} is {length}{before}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} tokens; "
                f"make it {room} or less"
            )


def text_windows(recipe: Recipe, tokenizer, part: str, make: bool = True) -> Windows:
    """The training or held-out text in windows. make: whether to prepare it if need be; see `prepare`."""
    data = recipe.data
    sources = getattr(data, part)
    limit = data.limit if part == "train" else None
    if limit is None and any(source.hub or source.weight for source in sources):  # neither has an end worth waiting for
        limit = (
            _training_tokens(recipe) if part == "train" else 4 * (recipe.evaluation.final_tokens or recipe.evaluation.tokens)
        )
    options = {"separator": data.separator, "seed": recipe.seed, "limit": limit, "make": make}
    lower = f"data.longest_document (now {data.longest_document:,} bytes), and cut or leave out what is longer"
    with enough_memory(f"data.{part}: preparing the text", lower):
        folder = prepare(sources, tokenizer, where=f"data.{part}", longest=data.longest_document, **options)
    if part == "train":
        windows = Windows(folder, data.seq_len, recipe.seed, data.long_documents == "in_order")
    else:
        windows = Windows(folder, recipe.evaluation.seq_len or data.seq_len, None)
    _check_tokens(windows, tokenizer, f"data.{part}")
    return windows


def _check_tokens(windows: Windows, tokenizer, where: str) -> None:
    """Refuse text of which no token has a next one in its document (every loss and every KL of it would be 0), and tokens
    that the tokenizer does not have.

    Raises:
        UserError: naming the recipe's key.
    """
    if windows.lengths.max() < 2:
        raise UserError(
            f"{where}: no token of this text can be scored: each of its {len(windows.starts):,} documents is one token "
            "long, and what follows belongs to the next; name text with longer documents"
        )
    if (highest := windows.prepared.highest) > (last := max(tokenizer.get_vocab().values())):
        raise UserError(
            f"{where}: the prepared text in {windows.folder} has a token {highest}, but the tokenizer's last one is {last}; "
            "delete that folder, and the same command makes it again"
        )


def _training_tokens(recipe: Recipe) -> int:
    """What the stages read, each up to a batch more than it says."""
    data = recipe.data
    return sum(entry.options.tokens + entry.batch(data) * data.seq_len for entry in stages_of(recipe))
