"""`kvsieve bench tasks`: public benchmarks through lm-evaluation-harness, under each method."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli import cells
from kvsieve.cli import options as o
from kvsieve.cli import sweeps as s
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table

_DATA, _PROMPT = "Data", "Prompt"


Tasks = Annotated[
    str,
    typer.Option(
        help="gsm8k, math500, ifeval, or names of lm-evaluation-harness; commas between.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="A folder with gsm8k_test.jsonl, math500.jsonl, ifeval.jsonl: no hub is asked for "
        "those.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Only the first examples of each task.", show_default=False, rich_help_panel=_DATA
    ),
]
Fewshot = Annotated[
    int | None,
    typer.Option(
        help="Examples in the prompt; otherwise as the task says.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of an answer; otherwise as the task says, else 512.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of sampling, where a task samples.")]


def tasks(
    tasks: Tasks,
    model: o.Model = None,
    methods: s.Methods = "all",
    budgets: s.Budgets = "25%,50%",
    data: Data = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    chat: o.Chat = False,
    max_new_tokens: MaxNewTokens = None,
    batch: s.Batch = 1,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    seed: Seed = 0,
    threads: s.Threads = None,
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Run public benchmarks under every method and budget, next to the full cache.

    Needs the extra: pip install 'kvsieve[harness]'. Rows go to OUT/tasks.jsonl. Exit code 1 if a
    cell failed; its row says why.
    """
    s.set_threads(threads)
    from kvsieve.bench.harness import sweep as h
    from kvsieve.bench.harness.tasks import load
    from kvsieve.bench.quality.plan import every
    from kvsieve.bench.quality.rows import read

    counts = {"--limit": limit, "--max-new-tokens": max_new_tokens, "--batch": batch}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise BadInput(f"{option} {count}: it must be 1 or more.")
    if fewshot is not None and fewshot < 0:
        raise BadInput(f"--fewshot {fewshot}: it can't be negative.")
    if model is None:
        raise BadInput(
            "Public benchmarks are in English, which the reference model doesn't speak: name a "
            "--model."
        )
    asked = every(s.named_methods(methods), s.items(budgets, "--budgets"))
    path = s.rows_file(out, h.FILE)
    known = read(path, h.KIND, h.VERSION) if path else []
    loaded = load(s.items(tasks, "--tasks"), data, fewshot)
    opened, weights = _open(model, dtype, device, chat)
    sweep = _sweep(
        opened, weights, model, loaded, asked,
        chat=chat, batch=batch, limit=limit, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    prompts = max(min(limit or n, n) for n in (len(one.task.eval_docs) for one in loaded))

    def measure(done: Any, note: Any) -> Any:
        return h.measure(sweep, weights, opened.tokenizer, opened.context, done, note)

    found = cells.gather(path, known, sweep.identities(), h.key, measure, prompts, json)
    cells.finish(found, json, _show)


def _open(name: str, dtype: str, device: str, chat: bool) -> tuple[Any, Any]:
    """Load a model, and check that it and its tokenizer can be asked."""
    from kvsieve.bench.harness import checks
    from kvsieve.cli.models import Choice

    opened = Choice.read(name, dtype, device).open()
    if chat:
        checks.check_template(opened.tokenizer, opened.name)
    model = opened.weights()
    checks.check_vocabulary(model, opened.tokenizer)
    return opened, model


def _sweep(
    opened: Any, model: Any, name: str, loaded: Any, asked: Any, *, chat: bool, **settings: Any
) -> Any:
    from kvsieve.bench.asked import adapted
    from kvsieve.bench.harness import checks
    from kvsieve.bench.harness import sweep as h
    from kvsieve.bench.ledger import Subject
    from kvsieve.cli.settings import with_request

    folder = Path(name) if Path(name).is_dir() else None
    return h.Sweep(
        subject=Subject.of(opened.name, model, folder),
        tasks=loaded,
        asked=adapted(asked, lambda recipe: with_request(recipe, opened.tokenizer)),
        settings=h.Settings(
            chat=chat,
            template=checks.template_hash(opened.tokenizer) if chat else None,
            ends=checks.end_tokens(model, opened.tokenizer, chat),
            **settings,
        ),
    )


_NUMBERS = ("score", "to full", "tokens", "cut", "kept", "tok/s")


def _show(found: list[Any]) -> None:
    for name, group in groupby(found, lambda row: row["task"]):
        rows = list(group)
        made = table("method", "budget", *_NUMBERS, right=_NUMBERS, whole=("method",))
        for row in rows:
            made.add_row(row["method"], row["budget"] or "–", *_cells(row))
        ran = next((row for row in rows if row["error"] is None), None)
        out = console()
        out.print(f"\n{name}: {ran['metric']}, {ran['n']} examples" if ran else f"\n{name}")
        out.print(made)


def _cells(row: Any) -> list[str]:
    if row["error"] is not None:
        return [cells.verdict(row), *[""] * (len(_NUMBERS) - 1)]
    cache, difference = row["cache"], row["difference"]
    interval = "" if row["low"] is None else f" ({row['low']:.3f}-{row['high']:.3f})"
    return [
        f"{row['score']:.3f}{interval}",
        "–" if difference is None else f"{difference['mean']:+.3f}",
        "–" if row["answer_tokens"] is None else f"{row['answer_tokens']:.0f}",
        "–" if row["cut"] is None else f"{row['cut']:.0%}",
        f"{cache['bytes_kept'] / cache['bytes_full']:.1%}",
        "–" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}",
    ]
