"""`kvsieve bench kept`: which tokens of one document each method keeps."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from kvsieve.cli import sweeps as s
from kvsieve.cli.output import console, table
from kvsieve.cli.progress import prompts_bar


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
    known = {key(row, k.IDENTITY): row for row in rows if s.finished(row)}
    wanted = [key(k.identity(plan, a), k.IDENTITY) for a in plan.asked() if a.method != "full"]
    with prompts_bar(sum(name not in known for name in wanted)) as bar:
        for number, row in enumerate(k.measure(plan, *load(), set(known), bar.step), 1):
            bar.reached(number)
            if path:
                s.append(path, row)
            if json:
                typer.echo(jsonlib.dumps(row))
            known[key(row, k.IDENTITY)] = row
    found = [known[name] for name in wanted]
    if not json:
        made = table("method", "right", "entry kept", right=("entry kept",), whole=("method",))
        for row in found:
            if row["error"] is None:
                made.add_row(row["method"], "yes" if row["right"] else "no", _entry(row))
        console().print(made)
    s.tell(found, lambda row: f"{row['method']} {row['budget']}")


def _entry(row: s.Row) -> str:
    """Return the share of the asked entry's slots that are left, over layers and heads."""
    if row["asked"] is None:
        return "–"
    start, end = row["asked"]
    heads = [head for layer in row["layers"] for head in layer]
    held = sum(max(0, min(end, b) - max(start, a)) for head in heads for a, b in head)
    return f"{held / (len(heads) * (end - start)):.0%}"
