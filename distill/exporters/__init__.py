"""Export targets: the table of the forms in which other software loads a student, and the checks that they share.

To add a target, write a file next to this one with a `Target`, and add a line to `EXPORTERS`.
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
    """Return the export target of that name.

    Raises:
        UserError: no target has that name.
    """
    if name not in EXPORTERS:
        loads = {"llama.cpp": "gguf"}.get(name.lower(), "native")
        of_engine = name.lower() in ENGINES
        hint = f"{name} loads the target {loads}" if of_engine else nearest(name, EXPORTERS)
        raise UserError(f"there is no export target {name!r}; {hint}")
    module, _, attribute = EXPORTERS[name].partition(":")
    return getattr(import_module(module), attribute)()


def help_lines() -> str:
    """Return every target's name and one-line description, for `--help`."""
    return "; ".join(f"{name}: {target(name).line}" for name in EXPORTERS)


def check_targets(recipe: "Recipe", where: str) -> None:
    """Refuse a recipe whose `export` names a target that does not exist.

    Raises:
        UserError: naming the target and the nearest one.
    """
    for name in recipe.export:
        if name not in EXPORTERS:
            raise UserError(f"{where}: export: there is no target {name!r}; {nearest(name, EXPORTERS)}")


def check_writers(recipe: "Recipe") -> None:
    """Refuse a recipe with an export target whose packages are not installed.

    Raises:
        UserError: naming the target, and the command that installs the missing package.
    """
    for name in recipe.export:
        try:
            target(name).check_installed()
        except UserError as error:
            raise UserError(f"{recipe.name}: export: {name}: {error}; or leave {name} out of export") from error


def check_exports(recipe: "Recipe", student: "PretrainedConfig") -> None:
    """Refuse a recipe with an export target that cannot hold the student. Called before anything is trained.

    Args:
        student: the student's config.

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
