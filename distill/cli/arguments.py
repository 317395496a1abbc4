"""The arguments that several verbs of the command line share, and what a shell completes them with."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from distill.ranges import PROCESSES


def _shipped(incomplete: str) -> list[str]:
    """For shell completion: shipped recipes whose names begin so."""
    from distill.shipped import shipped_folder

    return sorted(path.stem for path in shipped_folder().glob("*.yaml") if path.stem.startswith(incomplete))


def _recipes(incomplete: str) -> list[str]:
    """For shell completion: shipped recipes, and YAML files and folders that begin so."""
    here = [path for path in sorted(Path().glob(f"{incomplete}*")) if not path.name.startswith(".")]
    folders = [f"{path}/" for path in here if path.is_dir()]
    return _shipped(incomplete) + [str(path) for path in here if path.suffix == ".yaml"] + folders


def names_of(table: Iterable[str]) -> Callable[[str], list[str]]:
    """For shell completion: the names of a table that begin so."""
    return lambda incomplete: [name for name in table if name.startswith(incomplete)]


ShippedArgument = Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=_shipped)]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.", autocompletion=_recipes)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, key.sub=value.", metavar="[KEY=VALUE]...")]
Gpus = Annotated[
    int | None, typer.Option(help="In so many processes, with a GPU each.", metavar="N", callback=PROCESSES.option("--gpus"))
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write this as JSON to a file; - prints the JSON alone."),
]
