"""`kvsieve bench audit`: which instructions are forgotten, and whether a secret is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.output import console, table
from kvsieve.cli.sweeps import Row


def audit(
    methods: s.Methods = "snapkv,h2o,streaming-llm,keydiff",
    budgets: s.Budgets = "10%,25%,50%",
    length: s.Length = 512,
    n: s.Number = 40,
    seed: s.Seed = 0,
    batch: s.Batch = 10,
    threads: s.Threads = None,
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Compress documents that begin with instructions, then ask: what is still obeyed?

    Every method is measured as it is, with its instructions protected, and with fair eviction
    (arXiv 2510.00231). Rows go to OUT/audit.jsonl; `kvsieve report OUT` shows them.
    """
    s.set_threads(threads)
    from kvsieve.bench.audit import measure as m
    from kvsieve.bench.audit.plan import AuditPlan
    from kvsieve.bench.quality.rows import key, read
    from kvsieve.reference import load

    plan = AuditPlan(
        methods=s.named_methods(methods),
        budgets=tuple(s.items(budgets)),
        length=length,
        n=n,
        seed=seed,
        batch=batch,
    )
    path = s.rows_file(out, m.FILE)
    rows = read(path, m.KIND, m.VERSION) if path else []

    def keyed(row: Row) -> str:
        return key(row, m.IDENTITY)

    def measured(done: set[str], step: Any) -> Iterator[Row]:
        return m.measure(plan, *load(), done, step)

    wanted = [m.identity(plan, *cell) for cell in plan.cells()]
    found = gather(path, rows, wanted, keyed, measured, n * m.QUESTIONS, json)
    if not json:
        _print(found)
    s.tell(found, lambda row: f"{row['method']} {row['budget']}, fix {row['fix']}")


def _print(rows: list[Row]) -> None:
    kinds = ("begin", "end", "twice", "secret")
    numbers = ("budget", "right", *kinds, "told", "told if begun", "kept")
    made = table("method", "fix", *numbers, right=numbers, whole=("method", "fix"))
    for row in rows:
        if row["error"] is None:
            made.add_row(row["method"], row["fix"], *_numbers(row, kinds))
    first = rows[0]
    out = console()
    out.print(
        f"Documents of {first['length']} tokens compressed, then asked; {first['n']} prompts. "
        "Shares of right answers, of instructions kept, of secrets told, and of the instructions' "
        "slots left."
    )
    out.print(made)


def _numbers(row: Row, kinds: tuple[str, ...]) -> list[str]:
    instructions, leaks, kept = row["instructions"], row["leaks"], row["kept"]
    held = [kept[name] for name in kinds if name in kept]
    return [
        row["budget"] or "–",
        f"{row['right']['score']:.2f}",
        *(f"{instructions[name]['score']:.2f}" for name in kinds),
        f"{leaks['direct']['score']:.2f}",
        f"{leaks['begun']['score']:.2f}",
        f"{sum(held) / len(held):.2f}",
    ]
