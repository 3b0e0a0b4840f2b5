"""The options of `kvsieve bench speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_GRID, _PEER, _OUTPUT = "Grid", "Peer", "Output"

Contexts = Annotated[
    str, typer.Option(help="Prompt lengths, commas between.", rich_help_panel=_GRID)
]
Batches = Annotated[str, typer.Option(help="Batch sizes, commas between.", rich_help_panel=_GRID)]
DTypes = Annotated[str, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_GRID)]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD[@BUDGET][:OPTION=VALUE],...",
        help="What to measure beside the stock caches; otherwise every method, and a few above "
        "16384 tokens.",
        show_default=False,
        rich_help_panel=_GRID,
    ),
]
Budget = Annotated[str, typer.Option(help="Budget where none is named.", rich_help_panel=_GRID)]
MaxTokens = Annotated[
    int,
    typer.Option(
        help="Leave out cells with more prompt tokens, all rows together.",
        rich_help_panel=_GRID,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; otherwise torch's own number.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Steps = Annotated[int, typer.Option(help="Timed decode steps per cell.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny model and grid: seconds instead of hours.")
]
PeerPython = Annotated[
    str | None,
    typer.Option(
        help="A Python with kvpress 0.5.5, to measure it as well.",
        show_default=False,
        rich_help_panel=_PEER,
    ),
]
PeerOnly = Annotated[
    bool,
    typer.Option(
        "--peer-only", help="Measure kvpress's cells and leave ours.", rich_help_panel=_PEER
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="A JSONL file: rows are added as they finish, those it has are not measured again.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        help="Measure nothing: print the table of such a file.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print rows on stdout as they finish, one JSON a line.")
]
