"""The command line: `kvsieve run | compare | serve | calibrate | bench | report | ...`."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any, cast

import typer

import kvsieve
from kvsieve.cli.bench import bench
from kvsieve.cli.calibrate import calibrate
from kvsieve.cli.compare import compare
from kvsieve.cli.guard import Guarded, ending
from kvsieve.cli.methods import methods
from kvsieve.cli.recommend import recommend
from kvsieve.cli.report import report
from kvsieve.cli.run import run
from kvsieve.cli.sample import sample
from kvsieve.cli.serve import CONTEXT, serve
from kvsieve.cli.show import show

app = typer.Typer(
    cls=Guarded,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, compare, calibrate, sample, methods, show, report, recommend):
    app.command()(command)
app.command(context_settings=CONTEXT)(serve)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvsieve {kvsieve.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Make the KV cache of a language model smaller while it runs."""
    cast(Any, ctx.command).traceback = traceback
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Run the command line: the console script `kvsieve`."""
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with ending():
        app()
