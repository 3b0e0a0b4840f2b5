"""`kvsieve show`: one method in full."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from kvsieve.catalogue import default_recipe
from kvsieve.cli.output import console
from kvsieve.cli.settings import REPEAT, defaults
from kvsieve.compose import Recipe
from kvsieve.interfaces import Signal
from kvsieve.registry import Method, find


def show(method: Annotated[str, typer.Argument(help="See `kvsieve methods`.")]) -> None:
    """Explain a method: its formula, its recipe, its options, what differs from the paper."""
    found = find(method)
    built = default_recipe(method)
    doc = found.doc.replace("``", "`")
    parts = [_heading(found), doc, f"Recipe\n{_lines(_recipe(built))}", _options(found)]
    if Signal.REPLAY in built.needs:
        parts.append(
            f"On a model given with --model, repeat_ids is filled with the tokens of {REPEAT!r}.\n"
            "The reference model has no such words, so there only the context itself is repeated."
        )
    console().print("\n\n".join(parts), soft_wrap=True)


def _heading(method: Method) -> str:
    paper = method.paper if method.year is None else f"{method.paper} ({method.year})"
    link = "" if method.arxiv is None else f", https://arxiv.org/abs/{method.arxiv}"
    known = f"known from: {method.certainty}; checked against: {method.oracle}"
    return f"{method.name}: {paper}{link}\n{known}"


def _options(method: Method) -> str:
    values = {key: repr(value) for key, value in defaults(method.name).items()}
    meaning = (inspect.getdoc(method.factory) or "").replace("``", "`")
    head = f"Options and their defaults (--set KEY=VALUE)\n  {meaning}"
    return f"{head}\n{_lines(values)}" if values else head


def _recipe(built: Recipe) -> dict[str, str]:
    if not built.compresses:
        return {"scorer": "none: every slot is kept, and no budget is taken"}
    summary = {} if built.summarise is None else {"summary": _part(built.summarise)}
    return {
        "scorer": _part(built.scorer),
        "allocator": _part(built.allocator),
        "compressor": _part(built.compressor),
        **summary,
        "schedule": str(built.schedule),
        "layout": built.layout,
        "budget per": built.scope.value + (", as a cap" if built.dynamic else ""),
        "protects": f"{built.sinks} first tokens, {_recent(built.recent)}",
        "needs": ", ".join(sorted(signal.value for signal in built.needs))
        or "nothing but the keys",
    }


def _part(part: Any) -> str:
    """Return a part as its class with its values."""
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    inside = ", ".join(f"{k}={getattr(v, 'value', v)!r}" for k, v in values.items())
    return f"{type(part).__name__}({inside})"


def _recent(recent: int | float) -> str:
    return (
        f"the last {recent:.0%} of the budget in" if isinstance(recent, float) else f"{recent} last"
    )


def _lines(pairs: dict[str, str]) -> str:
    width = max(len(key) for key in pairs)
    return "\n".join(f"  {key:<{width}}  {value}".rstrip() for key, value in pairs.items())
