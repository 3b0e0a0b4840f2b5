"""`kvsieve bench quality`: how often each method still answers right at each budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsieve.cli import bench_options as g
from kvsieve.cli import bench_tasks as t
from kvsieve.cli import options as o
from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table
from kvsieve.cli.quality_peer import peer_rows, print_beside
from kvsieve.cli.sweeps import Row

if TYPE_CHECKING:
    from kvsieve.bench.quality.plan import Plan

_GRID = "Grid"
BUDGETS, LENGTH, N = "5%,10%,25%,50%", 1024, 20
QUICK = {
    "tasks": ("retrieval", "instructions", "reasoning"),
    "budgets": ("25%",),
    "length": 256,
    "n": 8,
}


Tasks = Annotated[
    str,
    typer.Option(
        help="Kinds of `kvsieve sample`, or all. With --model: gsm8k, math500, ifeval, "
        "longbench, ruler_4k (8k, ... 128k), or other names of lm-evaluation-harness.",
        rich_help_panel=_GRID,
    ),
]
Settings = Annotated[
    str,
    typer.Option(
        help="query-aware, query-agnostic (chains: decode), or all.", rich_help_panel=_GRID
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Three tasks of 256 tokens, 8 prompts each, at 25%: a first look."
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        help="Prompts answered at once; otherwise 10, with --model 1.", show_default=False
    ),
]


def quality(
    methods: s.Methods = "all",
    budgets: s.Budgets = BUDGETS,
    tasks: Tasks = "all",
    settings: Settings = "all",
    length: s.Length = LENGTH,
    n: s.Number = N,
    seed: s.Seed = 0,
    quick: Quick = False,
    batch: Batch = None,
    threads: s.Threads = None,
    reference: s.Reference = None,
    peer_python: g.PeerPython = None,
    peer_only: g.PeerOnly = False,
    model: o.Model = None,
    data: t.Data = None,
    limit: t.Limit = None,
    fewshot: t.Fewshot = None,
    chat: o.Chat = False,
    max_new_tokens: t.MaxNewTokens = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Answer the reference model's tasks under every method and budget, next to the full cache.

    With --model, public benchmarks as `bench tasks` runs them (extra: kvsieve[harness]). Rows go to
    OUT/quality.jsonl (public ones: tasks.jsonl); `kvsieve report OUT` makes a page of them. Exit
    code 1 if a cell failed; its row says why. Recipes that kvsieve refuses, such as a budget below
    what a method protects, are listed apart.
    """
    own = {
        "--settings": settings != "all", "--length": length != LENGTH, "--n": n != N,
        "--quick": quick, "--peer-python": peer_python is not None,
        "--peer-only": peer_only, "--reference": reference is not None,
    }  # fmt: skip
    public = {
        "--data": data is not None, "--limit": limit is not None, "--chat": chat,
        "--fewshot": fewshot is not None, "--max-new-tokens": max_new_tokens is not None,
        "--dtype": dtype != "auto", "--device": device != "auto",
    }  # fmt: skip
    check_kind(s.items(tasks, "--tasks"), model, own, public)
    if model is not None:
        t.measure_public(
            t.Public(
                tasks=tasks, model=model, methods=methods, budgets=budgets, data=data, limit=limit,
                fewshot=fewshot, chat=chat, max_new_tokens=max_new_tokens, batch=batch or 1,
                dtype=dtype, device=device, seed=seed, threads=threads, out=out, json=json,
            )
        )  # fmt: skip
        return
    s.set_threads(threads)
    if quick and (tasks, budgets, length, n) != ("all", BUDGETS, LENGTH, N):
        raise BadInput("--quick sets --tasks, --budgets, --length and --n: leave them out.")
    plan = _plan(
        methods, budgets, tasks, settings,
        length=length, n=n, seed=seed, batch=batch, reference=reference,
    )  # fmt: skip
    if quick:
        plan = dataclasses.replace(plan, **QUICK)
    _measure_own(plan, peer_python, peer_only, out, json)


def _plan(
    methods: str,
    budgets: str,
    tasks: str,
    settings: str,
    *,
    length: int,
    n: int,
    seed: int,
    batch: int | None,
    reference: Path | None,
) -> Plan:
    from kvsieve.bench.quality.plan import SETTINGS, TASKS, Plan

    return Plan(
        methods=s.named_methods(methods),
        budgets=tuple(s.items(budgets)),
        tasks=TASKS if tasks == "all" else tuple(s.items(tasks)),
        settings=SETTINGS if settings == "all" else tuple(s.items(settings)),
        batch=10 if batch is None else batch,
        length=length,
        n=n,
        seed=seed,
        reference=reference,
    )


def _measure_own(
    plan: Plan, peer_python: str | None, peer_only: bool, out: Path | None, json: bool
) -> None:
    if peer_only and peer_python is None:
        raise BadInput("--peer-only needs --peer-python: a Python that has kvpress.")
    from kvsieve.bench.quality import rows as q
    from kvsieve.bench.quality.sweep import measure
    from kvsieve.reference import load

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


def check_kind(
    names: Sequence[str], model: str | None, own: Mapping[str, bool], public: Mapping[str, bool]
) -> None:
    """Check that tasks and options (those that were given) are for this kind of model.

    Raises:
        BadInput: the reference model's tasks with another model, or public ones without.
    """
    from kvsieve.bench.harness.local import LOCAL
    from kvsieve.bench.harness.ruler import parse
    from kvsieve.bench.quality.plan import TASKS

    foreign, given = (own, "leave it out with --model") if model else (public, "name a --model")
    for option in (option for option, asked in foreign.items() if asked):
        of = "the reference model's tasks" if model else "public benchmarks"
        raise BadInput(f"{option} is for {of}: {given}.")
    for name in names:
        if model is not None and name in (*TASKS, "all"):
            raise BadInput(
                f"--tasks {name}: the reference model's tasks are made of its own words, which "
                "other models don't know. With --model name public ones: gsm8k, math500, ifeval, "
                "longbench, ruler_4k, or others of lm-evaluation-harness."
            )
        if model is None and (name in LOCAL or name.startswith("longbench") or parse(name)):
            raise BadInput(
                f"--tasks {name}: public benchmarks are in English, which the reference model "
                "doesn't speak: name a --model."
            )


def _print(group: list[Row]) -> None:
    from kvsieve.bench.quality.rows import options_text

    first = group[0]
    budgets = list(dict.fromkeys(row["budget"] for row in group if row["budget"] is not None))
    made = table("method", "full", *budgets, right=("full", *budgets), whole=("method",))
    for _, same in groupby(group, lambda row: (row["method"], options_text(row))):
        scores = {row["budget"]: row for row in same}
        first_of = next(iter(scores.values()))
        cells = [_score(scores[b]) if b in scores else "" for b in (None, *budgets)]
        made.add_row(" ".join([first_of["method"], options_text(first_of)]).strip(), *cells)
    out = console()
    length, n = first["length"], first["n"]
    out.print(f"\n{first['task']}, {first['setting']}: exact, {n} prompts of {length} tokens")
    out.print(made)


def _score(row: Row) -> str:
    if row["error"] is not None:
        return "refused" if row["refused"] else "failed"
    return f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
