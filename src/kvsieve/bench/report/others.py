"""kvpress beside kvsieve, and fidelity without a task, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.bench.quality_peer.table import BEST, COLUMNS, best_of_both, side_by_side
from kvsieve.bench.report.reading import Results, beside
from kvsieve.bench.report.tables import Cell, Table

Row = dict[str, Any]

FILE, KIND, VERSION = "fidelity.jsonl", "fidelity", 1


def peers(results: Results) -> Table | None:
    """Return both scores of every cell that kvpress answered, too; None: it answered none."""
    return _text(COLUMNS, side_by_side(results.rows))


def winners(results: Results) -> Table | None:
    """Return the best recipe of kvsieve and of kvpress in every cell that both answered."""
    return _text(BEST, best_of_both(results.rows))


def _text(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table | None:
    if not lines:
        return None
    return Table(dict.fromkeys(columns, False), [[Cell(text) for text in line] for line in lines])


def read(folder: Path) -> list[Row]:
    """Return a folder's fidelity rows (none without the file); of one cell the latest.

    Raises:
        ResultsError: rows of another kind or version.
    """
    names = ("method", "budget", "recipe", "prefix", "continuation", "n", "seed", "weights")
    rows = beside(folder, FILE, KIND, VERSION, (*names, "model"), ("sample", "text"))
    return sorted(rows, key=lambda row: (_source(row), row["method"], row["cache"]["bytes_kept"]))


def fidelity(rows: Sequence[Row]) -> Table:
    """Return divergence from the full cache's next-token distributions, and errors by layer."""
    columns = {"text": False, "method": False, "budget": True, "of full": True}
    columns |= {"KL [interval]": True, "same first choice": True, "last layer's error": True}
    columns |= {"KL at the start": True, "at the end": True}
    return Table(columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[Cell]:
    share = row["cache"]["bytes_kept"] / row["cache"]["bytes_full"]
    kl, told = row["kl"], [part["kl"] for part in row["bins"] if part["tokens"]]
    return [
        Cell(_source(row)),
        Cell(row["method"]),
        Cell(row["budget"] or "–", share),
        Cell(f"{share:.0%}", share),
        Cell(f"{kl['mean']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]", kl["mean"]),
        Cell(f"{row['agreement']['mean']:.3f}", row["agreement"]["mean"]),
        Cell(f"{row['layer_error'][-1]:.3f}", row["layer_error"][-1]),
        Cell(f"{told[0]:.3f}", told[0]),
        Cell(f"{told[-1]:.3f}", told[-1]),
    ]


def _source(row: Row) -> str:
    return row.get("sample") or row.get("text") or "–"
