"""Pictures of what methods keep: one document, every layer and head, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.bench.report.reading import beside
from kvsieve.bench.report.tables import Cell, Table

Row = dict[str, Any]

FILE, KIND, VERSION = "kept.jsonl", "kept", 1
_WIDE, _TALL, _GAP = 1000, 6, 3


def read(folder: Path) -> list[Row]:
    """Return a folder's rows of kept tokens (none without the file); of one cell the latest.

    Raises:
        ResultsError: rows of another kind or version.
    """
    names = ("method", "budget", "recipe", "task", "length", "seed", "weights")
    rows = beside(folder, FILE, KIND, VERSION, names)
    return sorted(rows, key=lambda row: (row["task"], row["length"], row["method"]))


def picture(row: Row) -> str:
    """Return an SVG element: positions from left to right, a line for each head, layers apart.

    A bar is a kept token; the shaded column is the entry that the question asks for.
    """
    length, layers = row["length"], row["layers"]
    scale = _WIDE / length
    parts, top = [], 0
    for heads in layers:
        for head in heads:
            bars = "".join(
                f"M{start * scale:.1f} {top}h{(end - start) * scale:.1f}v{_TALL}"
                f"H{start * scale:.1f}z"
                for start, end in head
            )
            parts.append(f'<path class="kept" d="{bars}"/>')
            top += _TALL + 1
        top += _GAP
    asked = ""
    if row["asked"] is not None:
        start, end = row["asked"]
        asked = (
            f'<rect class="asked" x="{start * scale:.1f}" y="0" '
            f'width="{(end - start) * scale:.1f}" height="{top}"/>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDE} {top}" preserveAspectRatio="none" aria-hidden="true">'
        f"{asked}{''.join(parts)}</svg>"
    )


def title(row: Row) -> str:
    """Return what a picture is of."""
    verdict = "right" if row["right"] else "wrong"
    options = {k: v for k, v in row["recipe"].items() if k not in ("method", "budget")}
    named = " ".join([row["method"], *(f"{k}={v}" for k, v in options.items())])
    return f"{named}, {row['budget']}: answered {verdict}"


def table(rows: Sequence[Row]) -> Table:
    """Return the share of each fifth of the document that is kept, and of the asked entry."""
    fifths = [f"{20 * i}–{20 * i + 20} %" for i in range(5)]
    columns = {"method": False, "answered": False, **dict.fromkeys(fifths, True)}
    columns["asked entry"] = True
    return Table(columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[Cell]:
    length = row["length"]
    spans = [[length * i // 5, length * (i + 1) // 5] for i in range(5)]
    shares = [share(row, span) for span in [*spans, row["asked"]]]
    shown = [Cell("–") if x is None else Cell(f"{x:.0%}", x) for x in shares]
    return [Cell(row["method"]), Cell("right" if row["right"] else "wrong"), *shown]


def share(row: Row, span: Sequence[int] | None) -> float | None:
    """Return the share of a span's slots that are left, over layers and heads."""
    if span is None:
        return None
    heads = [head for layer in row["layers"] for head in layer]
    held = sum(max(0, min(span[1], end) - max(span[0], start)) for h in heads for start, end in h)
    return held / (len(heads) * (span[1] - span[0]))
