"""`kvsieve bench audit`: which instructions are forgotten, and whether a secret is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvsieve.cli import audit_chat as c
from kvsieve.cli import options as o
from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table
from kvsieve.cli.sweeps import Row

LENGTH = 512


def audit(
    methods: s.Methods = "snapkv,h2o,streaming-llm,keydiff",
    budgets: s.Budgets = "10%,25%,50%",
    length: s.Length = LENGTH,
    n: s.Number = 40,
    seed: s.Seed = 0,
    batch: s.Batch = 10,
    threads: s.Threads = None,
    model: o.Model = None,
    data: c.Data = None,
    prompts: c.Prompts = c.FILE,
    order: c.Order = c.ORDER,
    attacks: c.Attacks = 1,
    max_new_tokens: c.MaxNewTokens = c.LIMIT,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Compress documents that begin with instructions, then ask: what is still obeyed?

    Every method is measured as it is, with its instructions protected, and with fair eviction
    (arXiv 2510.00231). With --model, any chat model: system prompts of System-IFEval, checked as
    IFEval does, and attacks that want the prompt told. Needs the extra: pip install
    'kvsieve[harness]'. Rows go to OUT/audit.jsonl; `kvsieve report OUT` shows them.
    """
    s.set_threads(threads)
    if model is not None:
        if length != LENGTH:
            raise BadInput("--length is for the reference model's documents: leave it out.")
        c.audit_chat(
            c.Wanted(
                model=model, data=data, prompts=prompts, order=order, attacks=attacks,
                max_new_tokens=max_new_tokens, dtype=dtype, device=device, methods=methods,
                budgets=budgets, n=n, seed=seed, batch=batch, out=out, json=json,
            )
        )  # fmt: skip
        return
    if (data, prompts, order, attacks, max_new_tokens) != (None, c.FILE, c.ORDER, 1, c.LIMIT):
        raise BadInput(
            "--data, --prompts, --order, --attacks and --max-new-tokens go with a chat model: name "
            "a --model."
        )
    if (dtype, device) != ("auto", "auto"):
        raise BadInput("--dtype and --device go with a --model: the reference runs on the CPU.")
    _audit_reference(methods, budgets, length, n, seed, batch, out, json)


def _audit_reference(
    methods: str,
    budgets: str,
    length: int,
    n: int,
    seed: int,
    batch: int,
    out: Path | None,
    json: bool,
) -> None:
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
