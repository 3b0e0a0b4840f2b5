"""How well something is found by where it stands in the document."""

from __future__ import annotations

from collections.abc import Sequence

from kvsieve.bench.intervals import wilson
from kvsieve.bench.report.aggregate import FULL, Point, Section
from kvsieve.bench.report.tables import Cell, Table, heading

PARTS = 5


def by_depth(sections: Sequence[Section]) -> list[tuple[str, Table]]:
    """Return a table for each section, length and budget whose rows tell depths.

    Columns are fifths of the document, from its start to its end; cells are shares right of the
    prompts whose answer stands there, of all seeds.
    """
    found = []
    for section in sections:
        for panel in section.panels:
            full = next((p for p in panel.points if p.method == FULL), None)
            for budget in dict.fromkeys(p.budget for p in panel.points if p.budget):
                points = [p for p in panel.points if p.budget == budget and _tells(p)]
                if points:
                    name = f"{heading(section)}, length {panel.length}, {budget} kept"
                    shown = [full, *points] if full is not None and _tells(full) else points
                    found.append((name, _table(shown)))
    return found


def _tells(point: Point) -> bool:
    return all(row.get("depth") for row in point.rows)


def _table(points: Sequence[Point]) -> Table:
    heads = [f"{100 * i // PARTS}–{100 * (i + 1) // PARTS} %" for i in range(PARTS)]
    columns = {"method": False, **dict.fromkeys(heads, True)}
    return Table(columns, [[Cell(p.label), *_cells(p)] for p in points])


def _cells(point: Point) -> list[Cell]:
    marks: list[list[int]] = [[] for _ in range(PARTS)]
    for row in point.rows:
        for depth, right in zip(row["depth"], row["right"], strict=True):
            marks[min(PARTS - 1, int(depth * PARTS))].append(right)
    return [_share(part) for part in marks]


def _share(marks: Sequence[int]) -> Cell:
    if not marks:
        return Cell("–")
    score = sum(marks) / len(marks)
    low, high = wilson(sum(marks), len(marks))
    return Cell(f"{score:.2f} [{low:.2f}, {high:.2f}] of {len(marks)}", score)
