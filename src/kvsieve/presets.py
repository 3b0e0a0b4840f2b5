"""Recipes by purpose: "auto:..." names the method that did best there, by docs/RESULTS.md.

Measured on the reference model, whose tasks are small: a model of your own may prefer another one,
and `kvsieve bench quality` and `bench tasks` tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method with options, and what it is for."""

    method: str
    purpose: str
    options: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {
    "auto:prompt": Preset(
        method="r-kv",
        purpose="a long prompt that ends with its question",
    ),
    "auto:document": Preset(
        method="distinct-keys",
        purpose="a long document that is asked about later",
    ),
    "auto:reasoning": Preset(
        method="distinct-keys",
        purpose="long chains of thought",
        options={"history": 1.0},
    ),
    "auto:instructions": Preset(
        method="distinct-keys",
        purpose="several instructions that all have to hold",
    ),
}


def expanded(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the method behind a name, and a preset's options with those given over them."""
    preset = PRESETS.get(name)
    if preset is None:
        return name, dict(options)
    return preset.method, {**preset.options, **options}
