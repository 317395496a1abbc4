"""Metrics for accelerate's trackers: one tracker run for each student or twin, with steps counted over all stages."""

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from distill.errors import UserError, reason_of
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.stages import stages_of
from distill.training.trainer import steps_of

IN_EXTRA = ("tensorboard", "wandb", "trackio")  # trackers that distill-hybrids[trackers] installs


def check(recipe: Recipe) -> None:
    """Refuse trackers whose package is not installed; accelerate would skip them without a message.

    Raises:
        UserError: naming the tracker and what to install.
    """
    here = {str(tracker) for tracker in get_available_trackers()}
    for name in recipe.trackers:
        if name not in here:
            package = f"pip install {name.replace('_', '-')}"
            install = "pip install 'distill-hybrids[trackers]'" if name in IN_EXTRA else package
            raise UserError(f"trackers: {name} is not installed here; {install}, or leave it out")


def start(accelerator: Accelerator, recipe: Recipe, folder: RunDir, steps: int) -> None:
    """Begin or continue the tracker run of a student or twin.

    Args:
        folder: the run folder; trackers that write files use its `trackers/`. steps: optimizer steps of the recipe so far.

    Raises:
        UserError: a tracker does not start, for instance without an account or a network.
    """
    finish(accelerator)
    if not recipe.trackers:
        return
    files = folder.path / "trackers"
    files.mkdir(parents=True, exist_ok=True)
    accelerator.project_configuration.logging_dir = str(files)
    twin = folder.path.name == "twin"
    name = f"{folder.path.parent.name}-twin" if twin else folder.path.name
    told = {"name": name, "config": {"fingerprint": recipe.fingerprint}}
    arguments = {
        "tensorboard": {"purge_step": steps + 1},  # steps after the checkpoint are logged again
        "wandb": {**told, "id": name, "dir": str(files), "resume": "allow" if steps else None},
        "trackio": {**told, "resume": "allow" if steps else "never"},
    }
    try:
        accelerator.init_trackers(recipe.name, init_kwargs={key: arguments.get(key, {}) for key in recipe.trackers})
    except Exception as error:  # each service raises its own errors
        accelerator.trackers = []  # a tracker that did not start cannot be finished
        raise UserError(f"trackers: {', '.join(recipe.trackers)} cannot start: {reason_of(error)}") from error


def finish(accelerator: Accelerator) -> None:
    """Let trackers write their pending data, and end their runs."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def steps_before(recipe: Recipe, index: int) -> int:
    """The optimizer steps of all stages before stage `index`: the offset of its steps on a tracker's axis."""
    data = recipe.data
    entries = [entry for entry in stages_of(recipe)[:index] if entry.kind.trains]
    return sum(steps_of(entry.options.tokens, entry.batch(data), entry.seq_len(data)) for entry in entries)
