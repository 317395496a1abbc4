"""Students in forms that other software loads. The table of export targets, and what is the same for all of them.

To add one: a file beside this one with a `Target`, and a line here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from distill.errors import UserError, nearest
from distill.exporters.engines import ENGINES
from distill.exporters.target import Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from distill.recipe import Recipe

EXPORTERS = {
    "gguf": "distill.exporters.gguf:Gguf",
    "native": "distill.exporters.native:Native",
    "portable": "distill.exporters.portable:Portable",
}


def target(name: str) -> Target:
    """A target of the table.

    Raises:
        UserError: there is none of that name.
    """
    if name not in EXPORTERS:
        loads = {"llama.cpp": "gguf"}.get(name.lower(), "native")
        of_engine = name.lower() in ENGINES
        hint = f"{name} loads the target {loads}" if of_engine else nearest(name, EXPORTERS)
        raise UserError(f"there is no export target {name!r}; {hint}")
    module, _, attribute = EXPORTERS[name].partition(":")
    return getattr(import_module(module), attribute)()


def help_lines() -> str:
    """Every target with its line, for `--help`."""
    return "; ".join(f"{name}: {target(name).line}" for name in EXPORTERS)


def check_targets(recipe: "Recipe", where: str) -> None:
    """Refuse targets that do not exist.

    Raises:
        UserError: naming the target and the nearest one.
    """
    for name in recipe.export:
        if name not in EXPORTERS:
            raise UserError(f"{where}: export: there is no target {name!r}; {nearest(name, EXPORTERS)}")


def check_writers(recipe: "Recipe") -> None:
    """Refuse targets that are written by packages which are not installed.

    Raises:
        UserError: naming the target, and the command that installs what it lacks.
    """
    for name in recipe.export:
        try:
            target(name).check_installed()
        except UserError as error:
            raise UserError(f"{recipe.name}: export: {name}: {error}; or leave {name} out of export") from error


def check_exports(recipe: "Recipe", student: "PretrainedConfig") -> None:
    """Refuse targets that cannot hold a student, before anything is trained.

    Args:
        student: its config.

    Raises:
        UserError: naming the target and why it refuses.
    """
    from distill.exporters.source import Source

    source = Source.of(student)
    for name in recipe.export:
        if reason := target(name).refuses(source):
            raise UserError(
                f"{recipe.name}: export: {name} cannot hold this student: {reason}; change that, or leave {name} out of "
                "export ('export=[portable]' holds every student)"
            )
