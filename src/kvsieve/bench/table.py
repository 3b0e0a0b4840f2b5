"""Speed rows as a table: every ratio is taken within one cell, or between cells against stock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from kvsieve.bench.rows import Row

_TWIN = {"adakv": "snapkv"}
"""The dense method with as many slots in all as a ragged one's."""

NOISY = 1.3

LEGEND = (
    "x stock, x short: decoding speed over the stock cache's, over the stock cache's of a context "
    "as short as the budget, measured in turns. x dense: a ragged method over its dense twin, "
    "x kvpress: over kvpress, both by way of x stock. compressing: share of prefill and of "
    "decoding. peak: most bytes held minus bytes kept, in full layers. ~: something else "
    "kept the machine busy, the median step took over 1.3 times the least."
)


def render(rows: Iterable[Row]) -> Group:
    """Return a table per context, batch size and dtype."""
    parts: list[Table | Text] = []
    for _, group in groupby(sorted(latest(rows), key=_group), _group):
        parts += _section(list(group))
    return Group(*parts, Text(LEGEND, style="dim"))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of every cell."""
    return list({_cell(row): row for row in rows}.values())


def _group(row: Row) -> tuple[str, str, int, int, bool]:
    half = row["dtype"] != "float32"
    return (_where(row), row["model"], row["context"], row["batch"], half)


def _where(row: Row) -> str:
    return f"{row['device']}, {row['cpu']}, {row['threads']} thread(s)"


def _cell(row: Row) -> str:
    same = ("engine", "method", "budget", "options", "steps")
    return json.dumps([_group(row), row["dtype"], [row[name] for name in same]], sort_keys=True)


def _section(rows: Sequence[Row]) -> Iterator[Table | Text]:
    first = rows[0]
    size = decimal(first["parameter_bytes"])
    title = (
        f"{first['context']} tokens, batch {first['batch']}, {first['dtype']}: {first['model']} "
        f"({first['parameters'] / 1e6:.1f}M parameters, {size}), {_where(first)}"
    )
    yield Text(title, style="bold")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, justify in (("method", "left"), ("budget", "left"), *((c, "right") for c in COLUMNS)):
        table.add_column(name, justify=justify, no_wrap=name not in ("method",))  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*_lines(row, rows))
    yield table


def _lines(row: Row, rows: Sequence[Row]) -> Iterator[str]:
    yield _name(row)
    yield budget_text(row["budget"])
    if "error" in row:
        yield "failed"
        return
    for figure in COLUMNS.values():
        yield figure(row, rows)


def _name(row: Row) -> str:
    return method_text(row) + (f": {row['error']}" if "error" in row else "")


def method_text(row: Row) -> str:
    """Return the method with its options, and whose it is if not ours."""
    options = "".join(f" {name}={value}" for name, value in row["options"].items())
    return ("kvpress " if row["engine"] == "kvpress" else "") + row["method"] + options


def budget_text(budget: int | float | str | None) -> str:
    """Return a budget as it was given: a share, or slots."""
    return "–" if budget is None else f"{budget:.0%}" if isinstance(budget, float) else str(budget)


def _peer(row: Row, rows: Sequence[Row]) -> str:
    same = ("method", "budget", "options")
    wanted = [row[name] for name in same]
    found = (r for r in rows if r["engine"] == "kvpress" and [r[n] for n in same] == wanted)
    return _over(row, next(found, None)) if row["engine"] == "transformers" else "–"


def _twin(row: Row, rows: Sequence[Row]) -> str:
    found = (
        r
        for r in rows
        if r["engine"] == "transformers"
        and r["method"] == _TWIN.get(row["method"])
        and r["budget"] == row["budget"]
    )
    return _over(row, next(found, None)) if row["engine"] == "transformers" else "–"


def _over(row: Row, other: Row | None) -> str:
    if other is None or "error" in other:
        return "–"
    return f"{row['ratio_stock'] / other['ratio_stock']:.2f}"


def _number(name: str, form: str) -> Callable[[Row, Sequence[Row]], str]:
    def figure(row: Row, rows: Sequence[Row]) -> str:
        value = row.get(name)
        return "–" if value is None else format(value, form)

    return figure


def _rate(row: Row, rows: Sequence[Row]) -> str:
    return f"{'~' if disturbed(row) else ''}{row['tokens_per_second']:.1f}"


def disturbed(row: Row) -> bool:
    """Return whether something else kept the machine busy while a row was measured."""
    steps = row["step_seconds"]
    return steps["median"] > NOISY * steps["min"]


def _kept(row: Row, rows: Sequence[Row]) -> str:
    return kept_text(row)


def kept_text(row: Row) -> str:
    """Return the bytes kept as a share of the stock cache's."""
    return f"{row['bytes_kept'] / row['bytes_full']:.1%}"


def _peak(row: Row, rows: Sequence[Row]) -> str:
    return "–" if row["bytes_peak"] is None else f"{peak_layers(row):.2f}"


def peak_layers(row: Row) -> float:
    """Return the most bytes held minus the bytes kept, in full layers."""
    return (row["bytes_peak"] - row["bytes_kept"]) / row["bytes_layer"]


COLUMNS: dict[str, Callable[[Row, Sequence[Row]], str]] = {
    "prefill s": _number("prefill_seconds", ".2f"),
    "x stock prefill": _number("prefill_ratio", ".2f"),
    "compressing": _number("prefill_compress_share", ".1%"),
    "tokens/s": _rate,
    "best": _number("tokens_per_second_best", ".1f"),
    "x stock": _number("ratio_stock", ".2f"),
    "x short": _number("ratio_short", ".2f"),
    "x dense": _twin,
    "x kvpress": _peer,
    "compressing ": _number("decode_compress_share", ".1%"),
    "kept": _kept,
    "peak": _peak,
}
