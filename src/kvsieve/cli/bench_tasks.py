"""`kvsieve bench tasks`: public benchmarks through lm-evaluation-harness, under each method."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli import cells, subjects
from kvsieve.cli import options as o
from kvsieve.cli import sweeps as s
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table

_DATA, _PROMPT = "Data", "Prompt"


Tasks = Annotated[
    str,
    typer.Option(
        help="gsm8k, math500, ifeval, longbench, ruler_4k (8k, ... 128k), or other names of "
        "lm-evaluation-harness; commas between.",
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
    measure_public(
        Public(
            tasks=tasks, model=model, methods=methods, budgets=budgets, data=data, limit=limit,
            fewshot=fewshot, chat=chat, max_new_tokens=max_new_tokens, batch=batch, dtype=dtype,
            device=device, seed=seed, threads=threads, out=out, json=json,
        )
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Public:
    """What was asked for on the command line."""

    tasks: str
    model: str | None
    methods: str
    budgets: str
    data: Path | None
    limit: int | None
    fewshot: int | None
    chat: bool
    max_new_tokens: int | None
    batch: int
    dtype: str
    device: str
    seed: int
    threads: int | None
    out: Path | None
    json: bool

    def check(self) -> None:
        """Check numbers, and that there is a model.

        Raises:
            BadInput: with the option.
        """
        counts = {
            "--limit": self.limit,
            "--max-new-tokens": self.max_new_tokens,
            "--batch": self.batch,
        }
        for option, count in counts.items():
            if count is not None and count < 1:
                raise BadInput(f"{option} {count}: it must be 1 or more.")
        if self.fewshot is not None and self.fewshot < 0:
            raise BadInput(f"--fewshot {self.fewshot}: it can't be negative.")
        if self.model is None:
            raise BadInput(
                "Public benchmarks are in English, which the reference model doesn't speak: name a "
                "--model."
            )


def measure_public(public: Public) -> None:
    """Run public benchmarks; rows go to OUT/tasks.jsonl.

    Tasks are loaded before the model: what the hub lacks is found out first.
    """
    s.set_threads(public.threads)
    from kvsieve.bench.harness import sweep as h
    from kvsieve.bench.harness.tasks import load
    from kvsieve.bench.quality.plan import every
    from kvsieve.bench.quality.rows import read

    public.check()
    asked = every(s.named_methods(public.methods), s.items(public.budgets, "--budgets"))
    path = s.rows_file(public.out, h.FILE)
    known = read(path, h.KIND, h.VERSION) if path else []
    opened = subjects.opened(str(public.model), public.dtype, public.device, public.chat)
    named = s.items(public.tasks, "--tasks")
    loaded = load(named, public.data, public.fewshot, opened.tokenizer)
    model = subjects.weights(opened)
    sweep = _sweep(public, opened, model, loaded, asked)
    sizes = (len(one.task.eval_docs) for one in loaded)
    prompts = max(min(public.limit or n, n) for n in sizes)

    def measure(done: Any, note: Any) -> Any:
        return h.measure(sweep, model, opened.tokenizer, opened.context, done, note)

    cells_of = sweep.identities()
    found = cells.gather(path, known, cells_of, h.key, measure, prompts, public.json)
    cells.finish(found, public.json, _show)


def _sweep(public: Public, opened: Any, model: Any, loaded: Any, asked: Any) -> Any:
    from kvsieve.bench.asked import adapted
    from kvsieve.bench.harness import checks
    from kvsieve.bench.harness import sweep as h
    from kvsieve.cli.settings import with_request

    chat = public.chat
    return h.Sweep(
        subject=subjects.subject(opened, model),
        tasks=loaded,
        asked=adapted(asked, lambda recipe: with_request(recipe, opened.tokenizer)),
        settings=h.Settings(
            chat=chat,
            template=checks.template_hash(opened.tokenizer) if chat else None,
            ends=checks.end_tokens(model, opened.tokenizer, chat),
            batch=public.batch,
            limit=public.limit,
            max_new_tokens=public.max_new_tokens,
            seed=public.seed,
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
