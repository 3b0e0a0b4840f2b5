"""The audit's rows as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.bench.report.reading import as_text, beside
from kvsieve.bench.report.tables import Cell, Table

Row = dict[str, Any]

FILE, KIND, VERSION = "audit.jsonl", "audit", 1
KINDS = ("begin", "end", "twice", "secret")
_CHAT = ("prompts", "first", "seed", "n", "batch", "attacks_each", "max_new_tokens",
         "data_sha256", "template", "dtype")  # fmt: skip
"""What rows of a chat model must share before they are compared."""


def read(folder: Path) -> list[Row]:
    """Return a folder's audit rows (none without the file); of one cell the latest.

    Raises:
        ResultsError: rows of another kind or version.
    """
    names = ("method", "budget", "recipe", "fix", "length", "seed", "n", "weights")
    return beside(folder, FILE, KIND, VERSION, names, ("model", *_CHAT))


def tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Return a table for the reference model, and one for each chat model and way of asking."""
    own = [row for row in rows if not is_chat(row)]
    found = [("The reference model", table(own))] if own else []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if is_chat(row):
            groups.setdefault(as_text([row["model"], *(row[n] for n in _CHAT)]), []).append(row)
    for same in groups.values():
        first = same[0]
        name = f"{first['model']}, {first['first']}, {first['n']} system prompts"
        found.append((name, chat_table(same)))
    return found


def is_chat(row: Row) -> bool:
    """Whether a row is of a chat model with system prompts."""
    return "attacks_each" in row


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


def chat_table(rows: Sequence[Row]) -> Table:
    """Return the same of a chat model, instructions by family."""
    families = sorted({kind.partition(":")[0] for row in rows for kind in row["instructions"]})
    most = max(len(row["order"]) for row in rows)
    columns = {"method": False, "fix": False, "budget": True, "of full": True}
    columns |= {"followed": True, "all of a prompt": True}
    columns |= dict.fromkeys((name.replace("_", " ") for name in families), True)
    columns |= {f"instruction {place}": True for place in range(1, most + 1)}
    columns |= {"told": True, "told if coaxed": True, "copied at once": True, "gain": True}
    columns |= {"slots of the defence": True, "of instructions": True}
    return Table(columns, [_chat_cells(row, rows, families, most) for row in rows])


def _chat_cells(row: Row, rows: Sequence[Row], families: Sequence[str], most: int) -> list[Cell]:
    share = row["cache"]["bytes_kept"] / row["cache"]["bytes_full"]
    leaks, gain = row["leaks"], _gain(row, rows)
    places = [place["score"] for place in row["order"]]
    return [
        Cell(row["method"]),
        Cell(row["fix"]),
        Cell(row["budget"] or "–", share),
        Cell(f"{share:.0%}", share),
        _number(obeyed(row)),
        _number(row["right"]["score"]),
        *(_number(_mean(row, family)) for family in families),
        *(_number(place) for place in [*places, *[None] * (most - len(places))]),
        _number(leaks["direct"]["score"]),
        _number(leaks["indirect"]["score"]),
        _number(max(leaks["direct"]["longest"], leaks["indirect"]["longest"])),
        Cell("–") if gain is None else Cell(f"{gain:+.2f}", gain),
        _number(row["kept"]["defence"]),
        _number(row["kept"]["instructions"]),
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
    """Return the share of instructions kept: the mean over their kinds, by how many of each."""
    found = _mean(row, "")
    assert found is not None, "there is an instruction"
    return found


def _mean(row: Row, family: str) -> float | None:
    found = [x for kind, x in row["instructions"].items() if kind.startswith(family)]
    total = sum(x.get("n", 1) for x in found)
    return sum(x["score"] * x.get("n", 1) for x in found) / total if total else None


def told(row: Row) -> float:
    """Return the mean share of secrets told, over the two ways of asking."""
    return sum(found["score"] for found in row["leaks"].values()) / len(row["leaks"])


def _number(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.2f}", value)
