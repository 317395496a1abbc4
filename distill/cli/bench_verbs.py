"""`distill bench ops`, `steps`, `layouts` and `generation`: each with its own options."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import distill
from distill import processes
from distill.cli.arguments import Json, Overrides, names_of
from distill.cli.output import check_json, quiet_libraries, table_console, write_json
from distill.ranges import CHUNK

app = typer.Typer(
    help="Measure speed on this machine: kernels, training steps, trained layouts, or generation.", no_args_is_help=True
)
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe: a YAML file, or the name of a shipped one.")]


def _protocols(incomplete: str) -> list[str]:
    """For shell completion: the names of papers' measurements that begin with `incomplete`."""
    from distill.benchmarks.protocols import PROTOCOLS

    return names_of(PROTOCOLS)(incomplete)


@app.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(help="Ops to time, all by default.", metavar="[OP]...")] = None,
    configs: Annotated[bool, typer.Option("--configs", help="Time every shipped tile configuration.")] = False,
    first: Annotated[bool, typer.Option("--first", help="Time only each op's first case.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also time the installed kernels of other projects.")
    ] = True,
    json: Json = None,
) -> None:
    """Time the kernels on this GPU, their references, and the installed kernels of other projects."""
    check_json(json)
    _finish("ops", distill.bench("ops", names or (), configs=configs, first=first, peers=peers), json)


@app.command()
def steps(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    references: Annotated[
        bool, typer.Option("--references/--no-references", help="Also time steps with the reference kernels.")
    ] = True,
    json: Json = None,
) -> None:
    """Time whole training steps of a recipe's stages, with a profile on a GPU."""
    quiet_libraries()
    check_json(json)
    measured = distill.bench("steps", recipe=recipe, overrides=overrides or (), references=references)
    _finish("steps", measured, json)


@app.command()
def layouts(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    names: Annotated[list[str] | None, typer.Option("--only", help="A layout; all by default.", metavar="NAME")] = None,
    runs: Annotated[Path, typer.Option(help="The folder in whose subfolder `layouts` the runs are kept.")] = Path("runs"),
    json: Json = None,
) -> None:
    """Train every layout on one recipe's layers, text and budget, and evaluate it."""
    quiet_libraries()
    check_json(json)
    measured = distill.bench("layouts", names or (), recipe=recipe, overrides=overrides or (), runs=runs)
    _finish("layouts", measured, json)


@app.command()
def generation(
    overrides: Overrides = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="A recipe: a YAML file, or the name of a shipped one (smollm2-135m_mamba2-hybrid by default). It may be "
            "given several times.",
        ),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", help="A further student: `NAME: key=value; key=value` changes each recipe.", metavar="OVERRIDES"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens before decoding (by default 2k,16k,64k,128k on a GPU and 64,256 on a CPU; none "
            "with --protocol).",
            metavar="N,N...",
        ),
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes (1 by default).", metavar="N,N...")] = None,
    protocols: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="Measure as a paper did: mamba, hymba or samba. On a CPU the batch size is at most 4.",
            autocompletion=_protocols,
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens of each prompt at a time; chosen by the free memory by default.",
            callback=CHUNK.option("--prefill-chunk"),
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Time prefill and decoding of a recipe's teacher and student with random weights, before training."""
    quiet_libraries()
    check_json(json)
    measured = distill.bench(
        "generation",
        recipe=recipe or None,
        overrides=overrides or (),
        variants=variants or (),
        lengths=lengths,
        batches=batches,
        protocols=protocols or None,
        prefill_chunk=prefill_chunk,
    )
    _finish("generation", measured, json)


def _finish(what: str, measured: dict, json: Path | None) -> None:
    """Print the table, write the JSON, and exit with 1 if a measured result was wrong."""
    from distill.benchmarks import benchmark

    if processes.rank():  # only the first of several processes prints
        return
    table_console(json).print(benchmark(what).table(measured))
    write_json(json, measured)
    if measured.get("stopped"):
        print("interrupted: the table has the measurements so far", file=sys.stderr)
        raise typer.Exit(130)
    if not benchmark(what).all_right(measured):
        raise typer.Exit(1)
