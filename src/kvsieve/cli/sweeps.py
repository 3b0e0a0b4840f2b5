"""What sweeps over prompts share: options, rows on disk, what is said at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli.guard import BadInput, Failed

Row = dict[str, Any]

_GRID = "Grid"

Methods = Annotated[
    str,
    typer.Option(
        metavar="METHOD[:OPTION=VALUE],...",
        help="Names with commas between, or all.",
        rich_help_panel=_GRID,
    ),
]
Budgets = Annotated[str, typer.Option(help="Budgets, commas between.", rich_help_panel=_GRID)]
Length = Annotated[
    int, typer.Option(help="Tokens of a document, or of a whole chain.", rich_help_panel=_GRID)
]
Number = Annotated[int, typer.Option("--n", help="Prompts in a cell.", rich_help_panel=_GRID)]
Seed = Annotated[int, typer.Option(help="First seed of the prompts.", rich_help_panel=_GRID)]
Batch = Annotated[int, typer.Option(help="Prompts answered at once.")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; otherwise torch's own number.", show_default=False, min=1),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="A folder: rows are added as they finish, those it has are not made again.",
        show_default=False,
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="A checkpoint in the reference model's language, made by recipes/reference_model; "
        "otherwise the shipped one.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print rows on stdout, one JSON a line.")]


def items(text: str, option: str = "") -> list[str]:
    """Return the items of a list with commas.

    Raises:
        BadInput: there are none.
    """
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise BadInput(f"{option or 'A list'} is empty: give names with commas between.")
    return found


def named_methods(text: str) -> tuple[str, ...]:
    """Return the methods that are asked for."""
    from kvsieve.registry import methods

    return tuple(methods()) if text == "all" else tuple(items(text))


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads, if any number is asked for."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def rows_file(out: Path | None, name: str) -> Path | None:
    """Return the file of rows in the folder ``out``."""
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out {str(out)!r} is a file; give a folder.")
    return None if out is None else out / name


def append(path: Path, row: Row) -> None:
    """Add a row to a file.

    Raises:
        Failed: it can't be written; the rows before it are safe.
    """
    from kvsieve.bench import rows

    try:
        rows.append(path, row)
    except OSError as error:
        raise Failed(f"Can't write to {str(path)!r}: {error}. Finished rows are kept.") from error


def finished(row: Row) -> bool:
    """Whether a row need not be made again: measured, or refused for good."""
    return row["error"] is None or row["refused"]


def tell(found: Sequence[Row], name: Callable[[Row], str]) -> None:
    """Say what was refused and what failed.

    Raises:
        Failed: a cell failed.
    """
    refused = [row for row in found if row.get("refused")]
    failed = [row for row in found if not finished(row)]
    for words, some in (("refused", refused), ("failed", failed)):
        for row in some:
            typer.echo(f"{words}: {name(row)}: {row['error']}", err=True)
    if failed:
        raise Failed(f"{len(failed)} of {len(found)} cells failed; their rows say why.")
