"""Rows of `kvsieve bench speed` as tables: decoding speed, what compressing costs, bytes kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from kvsieve.bench import rows as measured
from kvsieve.bench.quality.rows import read as read_rows
from kvsieve.bench.report.tables import Cell, Table
from kvsieve.bench.table import budget_text, disturbed, latest, method_text

Row = dict[str, Any]

FILE = "speed.jsonl"


def read(path: Path) -> list[Row]:
    """Return a file's measured rows, of one cell the latest (none without the file).

    Rows of the stock cache are left out: every other one has its ratio to it.

    Raises:
        RecipeError: rows of another kind or version.
    """
    found = latest(read_rows(path, measured.KIND, measured.VERSION))
    return [row for row in found if "error" not in row and row["engine"] != "stock"]


def tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Return a table for each model and machine, number format, context and batch."""
    found = []
    for _, group in groupby(sorted(rows, key=_order), _setup):
        some = list(group)
        first = some[0]
        title = (
            f"{first['context']} tokens, batch {first['batch']}, {first['dtype']}: "
            f"{first['model']}, {first['device']}, {first['cpu']}, {first['threads']} thread(s)"
        )
        columns = {"method": False, "budget": True, "bytes kept": True, "tokens/s": True}
        columns |= {"× stock": True, "× short": True, "prefill × stock": True}
        columns |= {"compressing in prefill": True, "in decoding": True}
        found.append((title, Table(columns, [_cells(row) for row in some])))
    return found


def _setup(row: Row) -> tuple[Any, ...]:
    machine = (row["model"], row["device"], row["cpu"], row["threads"])
    return (*machine, row["context"], row["batch"], row["dtype"] != "float32", row["dtype"])


def _order(row: Row) -> tuple[Any, ...]:
    name = ("", "") if row["method"] == "full" else (row["method"], method_text(row))
    return (*_setup(row), *name, str(row["budget"]))


def _cells(row: Row) -> list[Cell]:
    kept = row["bytes_kept"] / row["bytes_full"]
    mark = "~" if disturbed(row) else ""
    return [
        Cell(method_text(row)),
        Cell(budget_text(row["budget"]), kept),
        Cell(f"{kept:.1%}", kept),
        Cell(f"{mark}{row['tokens_per_second']:.1f}", row["tokens_per_second"]),
        _number(row.get("ratio_stock"), ".2f", mark),
        _number(row.get("ratio_short"), ".2f", mark),
        _number(row["prefill_ratio"], ".2f"),
        _number(row["prefill_compress_share"], ".1%"),
        _number(row["decode_compress_share"], ".1%"),
    ]


def _number(value: float | None, form: str, mark: str = "") -> Cell:
    return Cell("–") if value is None else Cell(f"{mark}{value:{form}}", value)
