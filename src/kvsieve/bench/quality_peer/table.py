"""kvsieve's methods beside the same methods in kvpress, from rows of the same sweep."""

from __future__ import annotations

from collections.abc import Iterable

from kvsieve.bench.intervals import paired_difference
from kvsieve.bench.quality.rows import options_text
from kvsieve.bench.rows import Row

_PROMPTS = ("task", "task_version", "setting", "length", "seed", "n", "weights")
_SAME = (*_PROMPTS, "method", "budget")


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return kvsieve's and kvpress's rows of the same cells, in the order of kvsieve's.

    Of several rows of a cell the last counts; cells that failed on either side are left out.
    """
    sides: dict[str, dict[str, Row]] = {"transformers": {}, "kvpress": {}}
    for row in rows:
        if row["error"] is None and row["engine"] in sides:
            sides[row["engine"]][str([row[name] for name in _SAME])] = row
    ours, theirs = sides["transformers"], sides["kvpress"]
    return [(row, theirs[cell]) for cell, row in ours.items() if cell in theirs]


COLUMNS = (
    *("task", "setting", "method", "budget", "kvsieve", "kvpress", "difference", "bytes kept"),
)


def side_by_side(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return a table of ``COLUMNS``: both scores, their paired difference, bytes that each kept."""
    return [_cells(ours, theirs) for ours, theirs in pairs(rows)]


def markdown(rows: Iterable[Row]) -> str:
    """Return that table as Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *side_by_side(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


BEST = (*("task", "setting", "budget", "best of kvsieve", "score"),)
BEST += ("best of kvpress", "score there", "difference")


def best_of_both(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return a table of ``BEST``: the best recipe on either side, in each cell that both answered.

    Of equals the one that keeps fewer bytes counts. The difference is paired; it is that of two
    winners, picked on the same prompts, so that both scores are flattered.
    """
    sides: dict[str, dict[str, dict[str, Row]]] = {"transformers": {}, "kvpress": {}}
    for row in rows:
        if row["error"] is None and row["engine"] in sides and row["budget"] is not None:
            cell = str([row[name] for name in (*_PROMPTS, "budget")])
            recipe = str([row["method"], row["recipe"]])
            sides[row["engine"]].setdefault(cell, {})[recipe] = row
    ours, theirs = sides["transformers"], sides["kvpress"]
    both = [(_best(ours[cell]), _best(theirs[cell])) for cell in ours if cell in theirs]
    return sorted(_best_cells(mine, other) for mine, other in both)


def _best(recipes: dict[str, Row]) -> Row:
    return max(recipes.values(), key=lambda row: (row["score"], -row["cache"]["bytes_kept"]))


def _best_cells(ours: Row, theirs: Row) -> tuple[str, ...]:
    apart = paired_difference(ours["right"], theirs["right"])
    return (
        *(ours["task"], ours["setting"], ours["budget"]),
        *(_name(ours), f"{ours['score']:.2f}", theirs["method"], f"{theirs['score']:.2f}"),
        f"{apart['mean']:+.2f} ({apart['low']:+.2f} to {apart['high']:+.2f})",
    )


def _name(row: Row) -> str:
    return f"{row['method']} {options_text(row)}".strip()


def _cells(ours: Row, theirs: Row) -> tuple[str, ...]:
    apart = paired_difference(ours["right"], theirs["right"])
    return (
        ours["task"],
        ours["setting"],
        ours["method"],
        ours["budget"] or "–",
        f"{ours['score']:.2f}",
        f"{theirs['score']:.2f}",
        f"{apart['mean']:+.2f} ({apart['low']:+.2f} to {apart['high']:+.2f})",
        f"{_kept(ours)} / {_kept(theirs)}",
    )


def _kept(row: Row) -> str:
    return f"{row['cache']['bytes_kept'] / row['cache']['bytes_full']:.0%}"
