"""`kvsieve bench quality`: how often each method still answers right at each budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any

import typer

from kvsieve.cli import bench_options as g
from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table
from kvsieve.cli.quality_peer import peer_rows, print_beside
from kvsieve.cli.sweeps import Row

_GRID = "Grid"
BUDGETS = "5%,10%,25%,50%"
QUICK = {
    "tasks": ("retrieval", "instructions", "reasoning"),
    "budgets": ("25%",),
    "length": 256,
    "n": 8,
}


def quality(
    methods: s.Methods = "all",
    budgets: s.Budgets = BUDGETS,
    tasks: Annotated[
        str, typer.Option(help="Kinds of `kvsieve sample`, or all.", rich_help_panel=_GRID)
    ] = "all",
    settings: Annotated[
        str,
        typer.Option(
            help="query-aware, query-agnostic (chains: decode), or all.", rich_help_panel=_GRID
        ),
    ] = "all",
    length: s.Length = 1024,
    n: s.Number = 20,
    seed: s.Seed = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Three tasks of 256 tokens, 8 prompts each, at 25%: a first look."
        ),
    ] = False,
    batch: s.Batch = 10,
    threads: s.Threads = None,
    reference: s.Reference = None,
    peer_python: g.PeerPython = None,
    peer_only: g.PeerOnly = False,
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Answer the reference model's tasks under every method and budget, next to the full cache.

    Rows go to OUT/quality.jsonl; `kvsieve report OUT` makes a page of them. Exit code 1 if a cell
    failed; its row says why. Recipes that kvsieve refuses, such as a budget below what a method
    protects, are listed apart.
    """
    s.set_threads(threads)
    from kvsieve.bench.quality import rows as q
    from kvsieve.bench.quality.plan import SETTINGS, TASKS, Plan
    from kvsieve.bench.quality.sweep import measure
    from kvsieve.reference import load

    plan = Plan(
        methods=s.named_methods(methods),
        budgets=tuple(s.items(budgets)),
        tasks=TASKS if tasks == "all" else tuple(s.items(tasks)),
        settings=SETTINGS if settings == "all" else tuple(s.items(settings)),
        length=length,
        n=n,
        seed=seed,
        batch=batch,
        reference=reference,
    )
    if peer_only and peer_python is None:
        raise BadInput("--peer-only needs --peer-python: a Python that has kvpress.")
    if quick:
        if (tasks, budgets, length, n) != ("all", BUDGETS, 1024, 20):
            raise BadInput("--quick sets --tasks, --budgets, --length and --n: leave them out.")
        plan = dataclasses.replace(plan, **QUICK)  # type: ignore[arg-type]
    path = s.rows_file(out, q.FILE)
    wanted = [q.identity(plan, *cell, asked) for cell in plan.cells() for asked in plan.asked()]

    def measured(done: set[str], step: Any) -> Iterator[Row]:
        return measure(plan, *load(at=plan.reference), done, step)

    found: list[Row] = []
    if not peer_only:
        found = gather(path, q.read(path) if path else [], wanted, q.key, measured, plan.n, json)
    if not json:
        for _, group in groupby(found, lambda row: (row["task"], row["setting"])):
            _print(list(group))
    if peer_python is not None:
        theirs = peer_rows(plan, peer_python, path, json)
        if not json:
            print_beside([*found, *theirs])
        found += theirs
    s.tell(found, lambda row: f"{row['task']} {row['setting']}, {row['method']} {row['budget']}")


def _print(group: list[Row]) -> None:
    first = group[0]
    budgets = list(dict.fromkeys(row["budget"] for row in group if row["budget"] is not None))
    made = table("method", "full", *budgets, right=("full", *budgets), whole=("method",))
    for _, same in groupby(group, lambda row: (row["method"], _options(row))):
        scores = {row["budget"]: row for row in same}
        first_of = next(iter(scores.values()))
        cells = [_score(scores[b]) if b in scores else "" for b in (None, *budgets)]
        made.add_row(" ".join([first_of["method"], _options(first_of)]).strip(), *cells)
    out = console()
    length, n = first["length"], first["n"]
    out.print(f"\n{first['task']}, {first['setting']}: exact, {n} prompts of {length} tokens")
    out.print(made)


def _options(row: Row) -> str:
    """Return the options that were asked for, as in ``METHOD:OPTION=VALUE``."""
    common = {"method", "budget", *(("schedule", "recent") if row["setting"] == "decode" else ())}
    return " ".join(f"{k}={v}" for k, v in row["recipe"].items() if k not in common)


def _score(row: Row) -> str:
    if row["error"] is not None:
        return "refused" if row["refused"] else "failed"
    return f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
