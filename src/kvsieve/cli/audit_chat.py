"""`kvsieve bench audit --model`: system prompts with instructions, and attacks on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsieve.cli import subjects
from kvsieve.cli import sweeps as s
from kvsieve.cli.cells import gather
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table
from kvsieve.cli.settings import with_request
from kvsieve.cli.sweeps import Row

if TYPE_CHECKING:
    from kvsieve.bench.quality.plan import Asked

_PANEL = "With --model"
LIMIT, ATTACK_LIMIT = 1280, 256
FILE, ORDER = "sys_ifeval_shuffled.jsonl", "defence-first"

Data = Annotated[
    Path | None,
    typer.Option(
        help="A folder with sys_ifeval_shuffled.jsonl and raccoon_attacks.jsonl (docs/OUTPUT.md).",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Prompts = Annotated[
    str, typer.Option(help="The file of system prompts in that folder.", rich_help_panel=_PANEL)
]
Order = Annotated[
    str,
    typer.Option(
        help="defence-first or instructions-first: what the system prompt begins with.",
        rich_help_panel=_PANEL,
    ),
]
Attacks = Annotated[
    int,
    typer.Option(
        help="Direct attacks that each system prompt meets, and as many indirect ones.",
        rich_help_panel=_PANEL,
        min=1,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        help=f"Tokens of an answer ({ATTACK_LIMIT} at most to an attack).",
        rich_help_panel=_PANEL,
        min=1,
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for on the command line."""

    model: str
    data: Path | None
    prompts: str
    order: str
    attacks: int
    max_new_tokens: int
    dtype: str
    device: str
    methods: str
    budgets: str
    n: int
    seed: int
    batch: int
    out: Path | None
    json: bool


def audit_chat(wanted: Wanted) -> None:
    """Audit a chat model; rows go to OUT/audit.jsonl beside those of the reference model."""
    from kvsieve.bench.audit import chat, grading, system
    from kvsieve.bench.audit.chat import ChatPlan
    from kvsieve.bench.harness import checks
    from kvsieve.bench.quality.plan import every
    from kvsieve.bench.quality.rows import read

    if wanted.data is None:
        raise BadInput("A chat model is audited with --data DIR: see `bench audit --help`.")
    for option, count in {"--n": wanted.n, "--batch": wanted.batch}.items():
        if count < 1:
            raise BadInput(f"{option} {count}: it must be 1 or more.")
    asked = every(s.named_methods(wanted.methods), s.items(wanted.budgets, "--budgets"))
    path = s.rows_file(wanted.out, "audit.jsonl")
    known = read(path, chat.KIND, chat.VERSION) if path else []
    prompts, prompts_hash = system.read_prompts(wanted.data, wanted.prompts, wanted.order)
    attacks, attacks_hash = system.read_attacks(wanted.data)
    chosen = prompts[wanted.seed : wanted.seed + wanted.n]
    if wanted.seed < 0 or len(chosen) < wanted.n:
        raise BadInput(
            f"{wanted.prompts} has {len(prompts)} system prompts: --seed {wanted.seed} --n "
            f"{wanted.n} asks for others."
        )
    sentences = grading.prepare()
    found = subjects.opened(wanted.model, wanted.dtype, wanted.device, chat=True)
    model = subjects.weights(found)
    plan = ChatPlan(
        subject=subjects.subject(found, model),
        asked=_once(asked, found.tokenizer),
        prompts=chosen,
        attacks=attacks,
        per=wanted.attacks,
        limits=(wanted.max_new_tokens, min(ATTACK_LIMIT, wanted.max_new_tokens)),
        ends=checks.end_tokens(model, found.tokenizer, chat=True),
        batch=wanted.batch,
        facts={
            "prompts": wanted.prompts,
            "first": wanted.order,
            "seed": wanted.seed,
            "data_sha256": {"prompts": prompts_hash, "attacks": attacks_hash},
            "template": checks.template_hash(found.tokenizer),
            "sentences": sentences,
        },
    )

    def measured(done: set[str], step: Any) -> Iterator[Row]:
        return chat.measure(plan, model, found.tokenizer, found.context, done, step)

    cells = [plan.identity(*cell) for cell in plan.cells()]
    each = wanted.n * (1 + 2 * wanted.attacks)
    rows = gather(path, known, cells, chat.key, measured, each, wanted.json)
    if not wanted.json:
        _print(rows)
    s.tell(rows, lambda row: f"{row['method']} {row['budget']}, fix {row['fix']}")


def _once(asked: Sequence[Asked], tokenizer: Any) -> list[Asked]:
    """The system prompt is compressed once, unless a schedule is asked for."""
    from kvsieve.bench.asked import adapted

    named = [
        one if one.budget is None else dataclasses.replace(
            one, options={"schedule": "once", **one.options}
        )
        for one in asked
    ]  # fmt: skip
    return adapted(named, lambda recipe: with_request(recipe, tokenizer))


def _print(rows: list[Row]) -> None:
    numbers = ("budget", "followed", "all of them", "told", "told if coaxed", "kept")
    made = table("method", "fix", *numbers, right=numbers, whole=("method", "fix"))
    for row in rows:
        if row["error"] is None:
            made.add_row(row["method"], row["fix"], *_numbers(row))
    first = rows[0]
    out = console()
    out.print(
        f"{first['n']} system prompts compressed once, then asked, and attacked "
        f"{2 * first['attacks_each']} times each. Shares of instructions followed, of answers that "
        "follow all; of the instructions' text that attacks get told; of its slots left."
    )
    out.print(made)


def _numbers(row: Row) -> list[str]:
    kinds = [found["score"] for found in row["instructions"].values()]
    return [
        row["budget"] or "–",
        f"{sum(kinds) / len(kinds):.2f}",
        f"{row['right']['score']:.2f}",
        f"{row['leaks']['direct']['score']:.2f}",
        f"{row['leaks']['indirect']['score']:.2f}",
        f"{row['kept']['instructions']:.2f}",
    ]
