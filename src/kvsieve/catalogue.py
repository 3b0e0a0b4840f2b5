"""What each method is and needs, read from its recipe: for `kvsieve methods` and the documents.

`python -m kvsieve.catalogue [FOLDER]` rewrites what stands between `<!-- methods -->` and
`<!-- /methods -->` in README.md and docs/METHODS.md of a checkout and, between `speed` markers,
the tables of README.md and docs/SPEED.md by the rows in benchmarks/speed.jsonl; between `results`
markers, those of docs/RESULTS.md by the rows in benchmarks/results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsieve.compose import Recipe, recipe
from kvsieve.registry import Method, find, methods

SHORT = ("name", "paper", "year", "phase", "scope", "needs")
FULL = (*SHORT, "layout", "certainty", "oracle", "engines")
SPEED_ROWS, RESULTS = "benchmarks/speed.jsonl", "benchmarks/results"


def catalogue() -> list[dict[str, Any]]:
    """Return one entry of plain values per method, in the order of `registry.methods`."""
    return [_entry(method, default_recipe(method.name)) for method in methods().values()]


def default_recipe(name: str) -> Recipe:
    """Return a method's recipe with its defaults, under some budget where it takes one."""
    return recipe(name, budget="50%" if find(name).build().compresses else None)


def _entry(method: Method, built: Recipe) -> dict[str, Any]:
    return {
        "name": method.name,
        "paper": method.paper,
        "arxiv": method.arxiv,
        "year": method.year,
        "phases": list(built.schedule.phases) if built.schedule is not None else [],
        "scope": built.scope.value if built.compresses else None,
        "needs": sorted(signal.value for signal in built.needs),
        "layout": built.layout,
        "engines": list(method.engines),
        "certainty": method.certainty,
        "oracle": method.oracle,
    }


def methods_table(columns: Sequence[str] = FULL) -> str:
    """Return the methods as a Markdown table of those columns (of `FULL`)."""
    rows = [_cells(entry) for entry in catalogue()]
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(entry: dict[str, Any]) -> dict[str, str]:
    paper, arxiv = entry["paper"], entry["arxiv"]
    return {
        "name": f"`{entry['name']}`",
        "paper": paper if arxiv is None else f"[{paper}](https://arxiv.org/abs/{arxiv})",
        "year": str(entry["year"] or "–"),
        "phase": ", ".join(entry["phases"]) or "–",
        "scope": entry["scope"] or "–",
        "needs": ", ".join(entry["needs"]) or "–",
        "layout": entry["layout"],
        "certainty": entry["certainty"],
        "oracle": entry["oracle"],
        "engines": ", ".join(entry["engines"]),
    }


def refreshed(text: str, name: str, table: str) -> str:
    """Return a document with what its markers ``name`` enclose replaced (none: as it is)."""
    marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}{table}{found[2]}", text)


def _speed(root: Path, short: bool) -> str:
    from kvsieve.bench import markdown, rows

    found = rows.read(root / SPEED_ROWS)
    return markdown.short_tables(found) if short else markdown.full_tables(found)


def _results(root: Path) -> str:
    from kvsieve.bench.report import audits, markdown, others, reading, traces

    folder = root / RESULTS
    found = (read(folder) for read in (audits.read, traces.read, others.read))
    return markdown.overview(reading.read(folder), *found)


DOCUMENTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {
        "methods": lambda root: methods_table(SHORT),
        "speed": lambda root: _speed(root, short=True),
    },
    "docs/METHODS.md": {"methods": lambda root: methods_table(FULL)},
    "docs/SPEED.md": {"speed": lambda root: _speed(root, short=False)},
    "docs/RESULTS.md": {"results": _results},
}
"""The tables of each document, by the names of their markers, made for a checkout."""


def document(root: Path, name: str) -> str:
    """Return a checkout's document as it should read, by the registry and the committed rows."""
    text = (root / name).read_text("utf-8")
    for marker, table in DOCUMENTS[name].items():
        text = refreshed(text, marker, table(root))
    return text


def refresh(root: Path) -> list[Path]:
    """Rewrite the tables of a checkout's documents; return the files that changed."""
    changed = []
    for name in DOCUMENTS:
        path = root / name
        if path.is_file():
            after = document(root, name)
            if after != path.read_text("utf-8"):
                path.write_text(after, "utf-8")
                changed.append(path)
    return changed


if __name__ == "__main__":
    for file in refresh(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        sys.stdout.write(f"{file}\n")
