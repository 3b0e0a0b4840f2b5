"""`kvsieve bench served`: is the model as right in vLLM as in Transformers?"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvsieve.cli import options as o
from kvsieve.cli.bench_serve import configs_of
from kvsieve.cli.guard import BadInput, Failed
from kvsieve.cli.output import console, table
from kvsieve.cli.serve import require_vllm
from kvsieve.cli.sweeps import Row, items
from kvsieve.errors import choices


def served(
    methods: Annotated[str, typer.Option(help="Methods, commas between.")] = "full,g-kv,keydiff",
    budget: Annotated[str, typer.Option(help="Slots per head.")] = "256",
    set_: o.Set = None,
    policy: Annotated[str, typer.Option(help="after-prompt or chunk.")] = "after-prompt",
    tasks: Annotated[
        str, typer.Option(help="Kinds of `kvsieve sample`.")
    ] = "reasoning,walk,retrieval",
    length: Annotated[int, typer.Option(help="Tokens of a document, or of a whole chain.")] = 512,
    n: Annotated[int, typer.Option(help="Prompts of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSONL file: rows are added as they finish.", show_default=False),
    ] = None,
    json: o.Json = False,
) -> None:
    """Ask the reference model's tasks in vLLM and in Transformers under the same recipe.

    Greedy, fp32, the same block columns: both should be right equally often, with the same tokens.
    """
    from kvsieve.bench import rows
    from kvsieve.bench.served import IDENTITY, KIND, VERSION, Plan, measure
    from kvsieve.reference import ADVERTISED

    asked = tuple(items(tasks))
    for task in asked:
        if task not in ADVERTISED:
            raise BadInput(f"--tasks {task!r}: unknown. {choices(task, ADVERTISED)}")
    if n < 1:
        raise BadInput(f"--n {n}: it must be 1 or more.")
    configs = configs_of(methods, budget, set_ or [], policy)
    require_vllm()
    plan = Plan(tasks=asked, length=length, n=n, seed=seed, threads=threads)
    known = {rows.key(row, IDENTITY): row for row in (rows.read(out, KIND, VERSION) if out else [])}

    def said(task: str, name: str) -> None:
        typer.echo(f"{task}: {name}", err=True)

    measured: list[Row] = []
    try:
        for row in measure(plan, configs, known.keys(), said):
            measured.append(row)
            if out:
                rows.append(out, row)
    except RuntimeError as error:
        raise Failed(str(error)) from error
    _show(measured or list(known.values()), json)


def _show(found: Sequence[Row], json: bool) -> None:
    if json:
        for row in found:
            typer.echo(jsonlib.dumps(row))
        return
    numbers = ("n", "vLLM", "Transformers", "same tokens", "compactions")
    made = table("task", "method", "budget", *numbers, right=numbers, whole=("task", "method"))
    for row in found:
        made.add_row(
            f"{row['task']} {row['length']}",
            row["method"],
            str((row["config"] or {}).get("budget", "–")),
            str(row["n"]),
            f"{row['vllm']['score']:.2f}",
            f"{row['transformers']['score']:.2f}",
            f"{row['same_tokens']} of {row['n']}",
            str(row["compactions"]),
        )
    console().print(made)
