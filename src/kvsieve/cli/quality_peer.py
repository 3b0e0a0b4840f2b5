"""kvpress's part of `kvsieve bench quality`: its rows, and its scores beside ours."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.cli import cells
from kvsieve.cli.output import console, table
from kvsieve.cli.sweeps import Row

if TYPE_CHECKING:
    from kvsieve.bench.quality.plan import Plan


def peer_rows(plan: Plan, python: str, path: Path | None, json: bool) -> list[Row]:
    """Measure what kvpress has of a plan, under its own Python; return all of those rows.

    Raises:
        PeerError: that Python can't be started, or lacks kvpress.
    """
    import torch

    from kvsieve.bench.quality.rows import key, read
    from kvsieve.bench.quality_peer import sweep
    from kvsieve.bench.remote import Peer
    from kvsieve.reference import load

    with closing(Peer(python, torch.get_num_threads())) as peer:

        def measure(done: Any, note: Any) -> Any:
            model, tokenizer = load("float32", "cpu", plan.reference)
            return sweep.measure(plan, peer, tokenizer, model.config, done, note)

        known = read(path) if path else []
        return cells.gather(path, known, sweep.identities(plan, peer), key, measure, plan.n, json)


def print_beside(rows: list[Row]) -> None:
    """Print kvsieve's scores and kvpress's on the same prompts."""
    from kvsieve.bench.quality_peer.table import COLUMNS, side_by_side

    made = table(*COLUMNS, right=COLUMNS[4:], whole=("method",))
    for line in side_by_side(rows):
        made.add_row(*line)
    out = console()
    out.print("\nThe same prompts and slots in kvpress, which compresses once:")
    out.print(made)
