"""`kvsieve recommend`: the smallest cache that keeps quality, and the rows that say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsieve.cli import options as o
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, print_json, size, table

if TYPE_CHECKING:
    from kvsieve.bench.report.recommend import Advice, Candidate

_ROW = ("setting", "length", "seed", "n", "score", "low", "high", "difference", "cache", "commit")


def recommend(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `kvsieve bench quality` wrote.")
    ],
    task: Annotated[str, typer.Option(help="The task that is like yours.")],
    max_loss: Annotated[
        str, typer.Option(metavar="SHARE", help="What score may be lost to the full cache.")
    ] = "1%",
    setting: Annotated[
        str | None,
        typer.Option(help="One setting; otherwise all must hold.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where rows are of several models.", show_default=False)
    ] = None,
    json: o.Json = False,
) -> None:
    """Name the smallest cache whose paired difference to the full cache rules out a larger loss."""
    loss = _share(max_loss)
    from kvsieve.bench.report.reading import read
    from kvsieve.bench.report.recommend import recommend as advise

    results = read(folder)
    for remark in results.remarks():
        typer.echo(remark, err=True)
    advice = advise(results, task, loss, setting, model)
    if json:
        print_json(_as_json(advice, task, setting, loss))
    else:
        _print(advice, task, loss)


def _share(text: str) -> float:
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise BadInput(f"--max-loss {text!r}: give a share below 1, such as 1% or 0.01.")
    return value


def _print(advice: Advice, task: str, loss: float) -> None:
    say = console().print
    chosen, shown = advice.holds or advice.by_mean, f"{100 * loss:.4g}%"
    if advice.holds is not None:
        say(_choice(advice.holds))
        say(f"On {task}, its interval rules out a loss above {shown} in every setting asked for.")
        if advice.by_mean is not None:
            say(f"Smaller, but only by the mean: {_choice(advice.by_mean)}")
    elif chosen is not None:
        say(_choice(chosen))
        say(f"ONLY BY THE MEAN: no interval on {task} rules out a loss above {shown}.")
        say("More prompts make intervals narrower.")
    else:
        say(f"Nothing keeps the loss on {task} within {shown}: keep the full cache.")
        if advice.closest is not None:
            say(f"Closest: {_choice(advice.closest)}")
    for name, reason in advice.left_out.items():
        say(f"Not considered: {name} ({reason}).")
    rests_on = chosen or advice.closest
    if rests_on is not None:
        say(f"\nThe rows it rests on, of {advice.considered} methods and budgets considered:")
        say(_table(rests_on))


def _choice(candidate: Candidate) -> str:
    from kvsieve.bench.report.aggregate import share

    kept = size(round(candidate.bytes_kept))
    return f"{candidate.name}: {kept} kept on average, {share(candidate.rows):.1%} of full"


def _table(candidate: Candidate) -> Any:
    from kvsieve.bench.report import aggregate, tables

    columns = ("length", "seed", "n", "score", "full cache", "difference", "bytes kept")
    made = table("setting", *columns, right=columns, whole=("setting",))
    for setting, rows in candidate.settings.items():
        groups = [([row], row["length"] or "–", row["seed"]) for row in rows]
        for part, length, seed in [*groups, (rows, "all", "all")][: None if len(rows) > 1 else -1]:
            made.add_row(
                setting,
                str(length),
                str(seed),
                str(sum(row["n"] for row in part)),
                tables.estimate(aggregate.score(part)),
                tables.estimate(aggregate.full_score(part)),
                tables.change(aggregate.difference(part)),
                size(round(aggregate.average(part, "cache", "bytes_kept") or 0)),
            )
    return made


def _as_json(advice: Advice, task: str, setting: str | None, loss: float) -> dict[str, Any]:
    verdict = "holds" if advice.holds else "mean only" if advice.by_mean else "none"
    return {
        "version": 1,
        "task": task,
        "setting": setting,
        "max_loss": loss,
        "verdict": verdict,
        "choice": _object(advice.holds or advice.by_mean),
        "smaller_by_mean": _object(advice.by_mean if advice.holds else None),
        "closest": _object(advice.closest),
        "considered": advice.considered,
        "left_out": advice.left_out,
    }


def _object(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    from kvsieve.bench.report.aggregate import share

    first = candidate.rows[0]
    return {
        **{name: first[name] for name in ("method", "budget", "recipe", "model", "engine")},
        "bytes_kept": candidate.bytes_kept,
        "share": share(candidate.rows),
        "differences": {name: vars(found) for name, found in candidate.differences.items()},
        "rows": [{name: row[name] for name in _ROW} for row in candidate.rows],
    }
