"""`kvsieve report`: measured rows as one page, or as Markdown."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import size


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that `kvsieve bench quality` or `bench audit` wrote."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page: one HTML file.", show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="The tables as Markdown.", show_default=False)
    ] = None,
    speed: Annotated[
        Path | None,
        typer.Option(
            help="A file that `kvsieve bench speed --out` wrote; otherwise DIR/speed.jsonl, if "
            "there is one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a page that opens offline: quality against measured bytes, with plots and tables."""
    if output is None and markdown is None:
        raise BadInput("Say where to: -o report.html, --markdown results.md, or both.")
    if output is not None and markdown is not None and output.absolute() == markdown.absolute():
        raise BadInput(f"-o and --markdown both name {str(output)!r}.")
    if speed is not None and not speed.is_file():
        raise BadInput(f"--speed {str(speed)!r}: there is no such file.")
    if output is not None:
        _need_matplotlib()
    from kvsieve.bench.report import audits, others, public, traces
    from kvsieve.bench.report import speed as timed
    from kvsieve.bench.report.reading import read

    audit = audits.read(folder)
    kept = traces.read(folder)
    fidelity = others.read(folder)
    tasks = public.read(folder)
    timings = timed.read(speed or folder / timed.FILE)
    if speed is not None and not timings:
        raise BadInput(f"--speed {str(speed)!r} has no rows of `kvsieve bench speed`.")
    results = read(folder, optional=bool(audit or kept or fidelity or tasks or timings))
    for remark in results.remarks():
        typer.echo(remark, err=True)
    for path, kind in ((output, "page"), (markdown, "markdown")):
        if path is not None:
            made = import_module(f"kvsieve.bench.report.{kind}").render(
                results, audit, kept, fidelity, tasks, timings
            )
            _write(path, made.encode())


def _need_matplotlib() -> None:
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise BadInput(
            'The page\'s plots need matplotlib: pip install "kvsieve[report]". '
            "(--markdown alone works without.)"
        ) from error


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BadInput(f"Can't write {str(path)!r}: {error.strerror}.") from error
    typer.echo(f"Wrote {path} ({size(len(content))}).", err=True)
