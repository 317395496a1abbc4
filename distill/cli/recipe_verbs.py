"""`distill recipes ls`, `show` and `cp`, and `distill schema`."""

from pathlib import Path
from typing import Annotated

import typer

import distill
from distill.cli.arguments import Json, ShippedArgument
from distill.cli.output import ALONE, say, table_console, write_json

app = typer.Typer(help="List, show and copy the recipes that come with the package.", no_args_is_help=True)


@app.command("ls")
def ls(json: Json = None) -> None:
    """List the shipped recipes."""
    from distill.shipped import recipes_table

    rows = distill.recipes()
    table_console(json).print(recipes_table(rows))
    write_json(json, rows)


@app.command("show")
def show(name: ShippedArgument) -> None:
    """Print a shipped recipe."""
    print(distill.recipe_text(name), end="")


@app.command("cp")
def cp(
    name: ShippedArgument,
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path("."),
) -> None:
    """Copy a shipped recipe, so that it can be changed, and the JSON schema with which editors check it."""
    say(distill.copy_recipe(name, target))


def schema() -> None:
    """Print the JSON schema of recipes: every key with its type, default, range and meaning."""
    write_json(ALONE, distill.recipe_schema())
