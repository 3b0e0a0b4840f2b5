"""`kvsieve bench kept`: which tokens of one document each method keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.output import console, table


def kept(
    methods: s.Methods = "all",
    budget: Annotated[str, typer.Option(help="One budget for all.")] = "10%",
    task: Annotated[str, typer.Option(help="A kind of `kvsieve sample` with a document.")] = (
        "retrieval"
    ),
    length: s.Length = 1024,
    seed: s.Seed = 0,
    threads: s.Threads = None,
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Compress one document by every method and note what is left in each layer and head.

    Rows go to OUT/kept.jsonl; `kvsieve report OUT` draws them.
    """
    s.set_threads(threads)
    from kvsieve.bench import kept as k
    from kvsieve.bench.quality.rows import key, read
    from kvsieve.reference import load

    plan = k.plan_of(task, s.named_methods(methods), budget, length, seed)
    path = s.rows_file(out, k.FILE)
    rows = read(path, k.KIND, k.VERSION) if path else []

    def keyed(row: s.Row) -> str:
        return key(row, k.IDENTITY)

    def measured(done: set[str], step: Any) -> Iterator[s.Row]:
        return k.measure(plan, *load(), done, step)

    wanted = [k.identity(plan, asked) for asked in plan.asked() if asked.method != "full"]
    found = gather(path, rows, wanted, keyed, measured, 1, json)
    if not json:
        made = table("method", "right", "entry kept", right=("entry kept",), whole=("method",))
        for row in found:
            if row["error"] is None:
                made.add_row(row["method"], "yes" if row["right"] else "no", _entry(row))
        console().print(made)
    s.tell(found, lambda row: f"{row['method']} {row['budget']}")


def _entry(row: s.Row) -> str:
    from kvsieve.bench.report.traces import share

    left = share(row, row["asked"])
    return "–" if left is None else f"{left:.0%}"
