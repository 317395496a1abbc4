"""The arguments that several verbs of the command line share, with their shell completion."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from distill.ranges import PROCESSES


def _shipped(incomplete: str) -> list[str]:
    """For shell completion: shipped recipes whose names begin with `incomplete`."""
    from distill.shipped import shipped_folder

    return sorted(path.stem for path in shipped_folder().glob("*.yaml") if path.stem.startswith(incomplete))


def _recipes(incomplete: str) -> list[str]:
    """For shell completion: shipped recipes, YAML files and folders that begin with `incomplete`."""
    here = [path for path in sorted(Path().glob(f"{incomplete}*")) if not path.name.startswith(".")]
    folders = [f"{path}/" for path in here if path.is_dir()]
    return _shipped(incomplete) + [str(path) for path in here if path.suffix == ".yaml"] + folders


def names_of(table: Iterable[str]) -> Callable[[str], list[str]]:
    """For shell completion: the names of a table that begin with the typed text."""
    return lambda incomplete: [name for name in table if name.startswith(incomplete)]


ShippedArgument = Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=_shipped)]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.", autocompletion=_recipes)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, key.sub=value.", metavar="[KEY=VALUE]...")]
Gpus = Annotated[
    int | None, typer.Option(help="Run N processes with one GPU each.", metavar="N", callback=PROCESSES.option("--gpus"))
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON to a file; - prints only the JSON."),
]
