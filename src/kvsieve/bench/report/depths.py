"""How well something is found by where it stands in the document, and by how long that is."""

from __future__ import annotations

from collections.abc import Sequence

from kvsieve.bench.intervals import wilson
from kvsieve.bench.report.aggregate import FULL, Point, Section, score
from kvsieve.bench.report.tables import Cell, Table, estimate, heading

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


def by_length(sections: Sequence[Section]) -> list[tuple[str, Table]]:
    """Return a table for each section and budget of several lengths: shares right, by length."""
    found = []
    for section in sections:
        lengths = [panel.length for panel in section.panels if panel.length is not None]
        points = {(n, p.budget, p.label): p for n, p in _points(section)}
        for budget in dict.fromkeys(b for _, b, _ in points if b is not None):
            names = dict.fromkeys(label for _, b, label in points if b == budget)
            cells = {
                name: [points.get((length, budget, name)) for length in lengths] for name in names
            }
            several = {
                name: some for name, some in cells.items() if len(some) - some.count(None) > 1
            }
            if several:
                columns = {"method": False, **{f"{length} tokens": True for length in lengths}}
                rows = [[Cell(name), *map(_score, some)] for name, some in several.items()]
                found.append((f"{heading(section)}, {budget} kept", Table(columns, rows)))
    return found


def _points(section: Section) -> list[tuple[int | None, Point]]:
    return [(panel.length, point) for panel in section.panels for point in panel.points]


def _score(point: Point | None) -> Cell:
    if point is None:
        return Cell("–")
    found = score(point.rows)
    return Cell(estimate(found), found.mean)


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
    right = sum(marks) / len(marks)
    low, high = wilson(sum(marks), len(marks))
    return Cell(f"{right:.2f} [{low:.2f}, {high:.2f}] of {len(marks)}", right)
