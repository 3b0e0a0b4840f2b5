"""Speed rows as Markdown: the full tables of docs/SPEED.md, the short ones of README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from kvsieve.bench.rows import Row
from kvsieve.bench.table import (
    budget_text,
    disturbed,
    kept_text,
    latest,
    method_text,
    peak_layers,
)

SHORT = ("full", "snapkv", "keydiff", "adakv", "streaming-llm", "g-kv")
"""The methods of README.md's tables."""

Pair = dict[str, Row]
"""One method's rows of one context and batch, by dtype."""


def full_tables(rows: Iterable[Row]) -> str:
    """Return every context and batch as a table under its own heading."""
    return "\n".join(f"## {title}\n\n{table}" for title, table in _tables(rows, COLUMNS))


def short_tables(rows: Iterable[Row]) -> str:
    """Return the tables of single prompts for the methods in ``SHORT``, fewer columns."""
    chosen = [row for row in rows if row["batch"] == 1 and row["method"] in SHORT]
    columns = {name: cell for name, cell in COLUMNS.items() if name not in _ONLY_FULL}
    return "\n".join(f"{title}:\n\n{table}" for title, table in _tables(chosen, columns))


def _tables(rows: Iterable[Row], columns: Columns) -> Iterator[tuple[str, str]]:
    kept = [row for row in latest(rows) if "error" not in row and row["engine"] != "stock"]
    kept.sort(key=_size)
    for (context, batch), group in groupby(kept, _size):
        yield f"{context} tokens, batch {batch}", _table(list(group), columns)


def _size(row: Row) -> tuple[int, int]:
    return row["context"], row["batch"]


def _table(rows: Sequence[Row], columns: Columns) -> str:
    pairs: dict[str, Pair] = {}
    for row in rows:
        name = f"{method_text(row)} | {budget_text(row['budget'])}"
        pairs.setdefault(name, {})[row["dtype"]] = row
    lines = [f"| method | budget | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, pair in sorted(pairs.items(), key=_order):
        lines.append(f"| {name} | {' | '.join(cell(pair) for cell in columns.values())} |")
    return "\n".join(lines) + "\n"


def _order(item: tuple[str, Pair]) -> tuple[str, str, bool]:
    first = next(iter(item[1].values()))
    lead = "" if first["method"] == "full" else first["method"]
    return lead, str(first["budget"]), first["engine"] == "kvpress"


def _ratio(dtype: str, name: str) -> Callable[[Pair], str]:
    def cell(pair: Pair) -> str:
        row = pair.get(dtype)
        if row is None or row.get(name) is None:
            return ""
        # Steps that something else on the machine disturbed say nothing about the method.
        return "~" if disturbed(row) else f"{row[name]:.2f}"

    return cell


def _share(name: str) -> Callable[[Pair], str]:
    def cell(pair: Pair) -> str:
        shares = [pair[d][name] for d in DTYPES if d in pair and pair[d].get(name) is not None]
        return " / ".join(f"{share:.1%}" for share in shares)

    return cell


def _kept(pair: Pair) -> str:
    return kept_text(next(iter(pair.values())))


def _peak(pair: Pair) -> str:
    row = next(iter(pair.values()))
    return "" if row["bytes_peak"] is None else f"{peak_layers(row):.2f}"


Columns = dict[str, Callable[[Pair], str]]

DTYPES = ("float32", "bfloat16")

COLUMNS: Columns = {
    "fp32 × stock": _ratio("float32", "ratio_stock"),
    "fp32 × short": _ratio("float32", "ratio_short"),
    "bf16 × stock": _ratio("bfloat16", "ratio_stock"),
    "bf16 × short": _ratio("bfloat16", "ratio_short"),
    "compressing in prefill (fp32 / bf16)": _share("prefill_compress_share"),
    "in decode (fp32 / bf16)": _share("decode_compress_share"),
    "bytes kept": _kept,
    "peak − kept, layers": _peak,
}

_ONLY_FULL = ("compressing in prefill (fp32 / bf16)", "peak − kept, layers")
