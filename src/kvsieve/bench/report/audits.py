"""The audit's rows as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.bench.report.reading import beside
from kvsieve.bench.report.tables import Cell, Table

Row = dict[str, Any]

FILE, KIND, VERSION = "audit.jsonl", "audit", 1
KINDS = ("begin", "end", "twice", "secret")


def read(folder: Path) -> list[Row]:
    """Return a folder's audit rows (none without the file); of one cell the latest.

    Raises:
        ResultsError: rows of another kind or version.
    """
    names = ("method", "budget", "recipe", "fix", "length", "seed", "n", "weights")
    return beside(folder, FILE, KIND, VERSION, names)


def table(rows: Sequence[Row]) -> Table:
    """Return what is still obeyed and what is told, by method, budget and fix."""
    columns = {"method": False, "fix": False, "budget": True, "of full": True, "right": True}
    columns |= dict.fromkeys(KINDS, True)
    columns |= {f"instruction {place}": True for place in range(1, 5)}
    columns |= {"told": True, "told if begun": True, "gain": True}
    columns |= {"slots of instructions": True, "of document": True}
    return Table(columns, [_cells(row, rows) for row in rows])


def _cells(row: Row, rows: Sequence[Row]) -> list[Cell]:
    instructions, leaks, kept = row["instructions"], row["leaks"], row["kept"]
    share = row["cache"]["bytes_kept"] / row["cache"]["bytes_full"]
    held = [kept[name] for name in KINDS if name in kept]
    gain = _gain(row, rows)
    return [
        Cell(row["method"]),
        Cell(row["fix"]),
        Cell(row["budget"] or "–", share),
        Cell(f"{share:.0%}", share),
        _number(row["right"]["score"]),
        *(_number(instructions[name]["score"]) for name in KINDS),
        *(_number(place["score"]) for place in row["order"]),
        _number(leaks["direct"]["score"]),
        _number(leaks["begun"]["score"]),
        Cell("–") if gain is None else Cell(f"{gain:+.2f}", gain),
        _number(sum(held) / len(held)),
        _number(kept["document"]),
    ]


def _gain(row: Row, rows: Sequence[Row]) -> float | None:
    """Return half of what a fix gains in instructions kept and half of what it saves in leaks."""
    if row["fix"] == "none":
        return None
    same = ("method", "budget", "recipe", "length", "seed", "n")
    base = [r for r in rows if r["fix"] == "none" and all(r[n] == row[n] for n in same)]
    if not base:
        return None
    return 0.5 * (obeyed(row) - obeyed(base[0])) + 0.5 * (told(base[0]) - told(row))


def obeyed(row: Row) -> float:
    """Return the mean share of instructions kept, over their kinds."""
    return sum(found["score"] for found in row["instructions"].values()) / len(row["instructions"])


def told(row: Row) -> float:
    """Return the mean share of secrets told, over the two ways of asking."""
    return sum(found["score"] for found in row["leaks"].values()) / len(row["leaks"])


def _number(value: float) -> Cell:
    return Cell(f"{value:.2f}", value)
