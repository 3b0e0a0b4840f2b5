"""A method with options, in one word: "g-kv:interval=128"."""

from __future__ import annotations

import json
from typing import Any

from kvsieve.errors import RecipeError
from kvsieve.registry import find


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read "method" or "method:option=value:...".

    Raises:
        UnknownMethod: no such method.
        RecipeError: an option without a value.
    """
    name, *pairs = text.strip().split(":")
    if name == "auto" and pairs:  # a preset's name has a colon
        name = f"{name}:{pairs.pop(0)}"
    find(name)
    return name, dict(parse_option(pair) for pair in pairs)


def parse_option(text: str) -> tuple[str, Any]:
    """Read "option=value"; a value that is JSON (a number, true) is taken as such.

    Raises:
        RecipeError: no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{text!r} is no option. Write method@budget:option=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
