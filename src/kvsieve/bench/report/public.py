"""Rows of public benchmarks (`bench tasks`, `bench quality --model`) as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.bench.report.aggregate import Estimate
from kvsieve.bench.report.reading import as_text, beside
from kvsieve.bench.report.tables import Cell, Table, change, estimate

Row = dict[str, Any]

FILE, KIND, VERSION = "tasks.jsonl", "tasks", 1
_SETUP = (
    *("model", "weights", "dtype", "chat", "template", "fewshot", "limit", "max_new_tokens"),
    *("harness_task", "data_sha256", "seed"),
)


def read(folder: Path) -> list[Row]:
    """Return a folder's rows of public benchmarks (none without the file); of one cell the latest.

    Raises:
        ResultsError: rows of another kind or version.
    """
    return beside(
        folder, FILE, KIND, VERSION, ("task", "method", "budget", "recipe", *_SETUP),
        ("max_seq_length", "sentences"),
    )  # fmt: skip


def tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Return a table for each model, task and way of asking, in the order of their names."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = [row["model"], row["task"], row["metric"], *(row[name] for name in _SETUP)]
        groups.setdefault(as_text(same), []).append(row)
    return [(_title(groups[key][0]), _table(groups[key])) for key in sorted(groups)]


def _title(row: Row) -> str:
    asked = [f"{row['n']} examples", f"{row['fewshot']} shown"]
    asked += ["chat template"] if row["chat"] else []
    return f"{row['model']}: {row['task']} ({row['metric']}; {', '.join(asked)})"


def _table(rows: Sequence[Row]) -> Table:
    columns = {"method": False, "budget": True, "of full": True, "score [interval]": True}
    columns |= {"difference to full [interval]": True, "answer tokens": True, "cut off": True}
    columns |= {"tokens/s": True}
    order = sorted(rows, key=lambda r: (r["method"] != "full", r["method"], _share(r)))
    return Table(columns, [_cells(row) for row in order])


def _share(row: Row) -> float:
    return row["cache"]["bytes_kept"] / row["cache"]["bytes_full"]


def _cells(row: Row) -> list[Cell]:
    apart, whole = row["difference"], row["low"] is not None
    score = Estimate(row["score"], row["low"], row["high"])
    own = {k: v for k, v in row["recipe"].items() if k not in ("method", "budget", "repeat_ids")}
    return [
        Cell(" ".join([row["method"], *(f"{name}={as_text(x)}" for name, x in own.items())])),
        Cell(row["budget"] or "–", _share(row)),
        Cell(f"{_share(row):.1%}", _share(row)),
        Cell(estimate(score) if whole else f"{row['score']:.3f}", row["score"]),
        _change(apart),
        _number(row["answer_tokens"], ".0f"),
        _number(row["cut"], ".0%"),
        _number(row["tokens_per_second"], ".1f"),
    ]


def _change(apart: dict[str, float | None] | None) -> Cell:
    if apart is None or apart["mean"] is None:
        return Cell("–")
    if apart["low"] is None or apart["high"] is None:
        return Cell(f"{apart['mean']:+.3f}", apart["mean"])
    return Cell(change(Estimate(apart["mean"], apart["low"], apart["high"])), apart["mean"])


def _number(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None else Cell(format(value, form), value)
