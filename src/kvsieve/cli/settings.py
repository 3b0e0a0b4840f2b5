"""From the command line's text to recipes: `--set`, `--protect`, `--recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvsieve
from kvsieve.budget import Budget
from kvsieve.cli.guard import BadInput
from kvsieve.compose import COMMON, Recipe
from kvsieve.errors import choices
from kvsieve.interfaces import Signal
from kvsieve.registry import find

_COMMON_DEFAULTS = {"sinks": 0, "recent": 0.0, "rerotate": False}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def split(given: Sequence[str]) -> dict[str, str]:
    """Read KEY=VALUE pairs."""
    pairs = {}
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not value:
            raise BadInput(f"--set {text}: write it as KEY=VALUE, e.g. --set window=16.")
        pairs[key.replace("-", "_")] = value
    return pairs


def spans(given: Sequence[str]) -> list[tuple[int, int]]:
    """Read START:END pairs."""
    found = []
    for text in given:
        start, _, end = text.partition(":")
        if not start.strip().isdecimal() or not end.strip().isdecimal():
            raise BadInput(f"--protect {text}: write it as START:END, e.g. --protect 0:50.")
        found.append((int(start), int(end)))
    return found


def defaults(method: str, scorer: str | None = None) -> dict[str, Any]:
    """Return a method's options with their defaults, those of the method it wraps included."""
    found = find(method)
    own = {key: parameter.default for key, parameter in found.options().items()}
    if not found.wraps:
        return own
    inner = scorer or own["scorer"]
    return own | {k: v for k, v in defaults(inner).items() if k not in own}


def typed(method: str, pairs: dict[str, str]) -> dict[str, Any]:
    """Give each value the type of its option's default; unknown options stay text.

    Raises:
        UnknownMethod: the method, or the one it is to wrap.
        BadInput: a value of another type.
    """
    known = _COMMON_DEFAULTS | defaults(method, pairs.get("scorer"))
    return {key: _value(method, key, text, known.get(key)) for key, text in pairs.items()}


def _value(method: str, key: str, text: str, default: Any) -> Any:
    readers = {bool: ("true or false", _boolean), int: ("a whole number", int)}
    readers |= {float: ("a number", _number), tuple: ("whole numbers such as 1,2", _numbers)}
    if key in ("protect", "fair"):
        return spans(text.split(","))
    if type(default) not in readers:
        return text
    kind, read = readers[type(default)]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise BadInput(f"Option {key!r} of {method!r} takes {kind}, not {text!r}.") from None


def _boolean(text: str) -> bool:
    return _WORDS[text.lower()]


def _number(text: str) -> int | float:
    """A whole number stays one: `recent` counts tokens, or is a share of the budget."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def single(
    method: str | None, budget: str | None, pairs: Sequence[str], protect: Sequence[str]
) -> Recipe:
    """Build the recipe of `--method`."""
    if method is None:
        raise BadInput("Name a --method (`kvsieve methods` lists them), or a --recipe file.")
    options = typed(method, split(pairs))
    if protect:
        options["protect"] = spans(protect)
    built = kvsieve.recipe(method, budget=budget, **options)
    built.check_statistics()
    return built


def asked(
    file: Path | None,
    method: str | None,
    budget: str | None,
    pairs: Sequence[str],
    protect: Sequence[str],
) -> Recipe:
    """Build the recipe of `--recipe`, or of the other options."""
    if file is not None:
        return from_file(file, method, budget, pairs, protect)
    return single(method, budget, pairs, protect)


def from_file(path: Path, *others: object) -> Recipe:
    """Build the recipe of `--recipe`, which says everything itself."""
    if any(others):
        raise BadInput("A --recipe file holds method, budget and options: give it alone.")
    built = Recipe.from_toml(path)
    built.check_statistics()
    return built


def several(
    methods: str, budget: str | None, pairs: Sequence[str], protect: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what `kvsieve.recipe` takes, for each of `--methods`; "full" comes first.

    An option goes to every method that has it, `METHOD.KEY=VALUE` to one.

    Raises:
        BadInput: no methods, a budget missing, an option that none of them has.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise BadInput("--methods is empty: name some, e.g. --methods full,random,g-kv.")
    names = list(dict.fromkeys(["full", *names]))
    wanted: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in split(pairs).items():
        for name, own in _targets(key, names):
            wanted[name][own] = value
    asked = {name: typed(name, options) for name, options in wanted.items()}
    for name in names:
        built = find(name).build(**_scorer(asked[name]))
        if built.compresses:
            _complete(asked[name], name, budget, protect, capped=built.dynamic)
    return asked


def _scorer(options: dict[str, Any]) -> dict[str, Any]:
    return {"scorer": options["scorer"]} if "scorer" in options else {}


def _complete(
    options: dict[str, Any],
    name: str,
    budget: str | None,
    protect: Sequence[str],
    capped: bool,
) -> None:
    if budget is not None:
        options["budget"] = Budget.parse(budget)
    elif not capped:
        raise BadInput(f"Method {name!r} needs a --budget: slots, a share (10%) or bytes (2GiB).")
    if protect:
        options["protect"] = spans(protect)


def _targets(key: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return which methods an option of `compare` is for, and its name there."""
    name, dot, own = key.rpartition(".")
    if dot:
        name = name.replace("_", "-")
        if name not in names:
            raise BadInput(f"--set {key}: no such method here. {choices(name, names)}")
        return [(name, own)]
    having = [n for n in names if n != "full" and (key in COMMON or key in defaults(n))]
    if not having:
        possible = {option for n in names for option in defaults(n)} | set(COMMON)
        raise BadInput(f"None of these methods has an option {key!r}. {choices(key, possible)}")
    return [(n, key) for n in having]


def with_request(recipe: Recipe, tokenizer: Any) -> Recipe:
    """Give a method that repeats the prompt its request, in the tokens of the user's model."""
    asks = "repeat_ids" in find(recipe.method).accepts(recipe.options)
    if not asks or Signal.REPLAY not in recipe.needs or "repeat_ids" in recipe.options:
        return recipe
    request = tokenizer.encode(REPEAT, add_special_tokens=False)
    options = {**recipe.options, "repeat_ids": tuple(request)}
    return kvsieve.recipe(recipe.method, budget=recipe.budget, **options)


REPEAT = "\n\nRepeat the previous context exactly."
"""What KVzip asks a model before its context is fed again."""
