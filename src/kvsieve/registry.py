"""The table of methods: each method file registers one or more factories of recipes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from kvsieve.errors import RecipeError, UnknownMethod, choices
from kvsieve.presets import PRESETS

if TYPE_CHECKING:
    from kvsieve.compose import Recipe

Certainty = Literal[
    "paper and code", "code", "paper", "secondary description", "in the style of", "own"
]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method: where it comes from, and how to build its recipe.

    ``oracle``: what its scores are checked against besides the formula; ``wraps``: it takes
    another method's scorer.
    """

    name: str
    paper: str
    year: int | None
    arxiv: str | None
    certainty: Certainty
    factory: Callable[..., Recipe]
    oracle: str = "formula"
    engines: tuple[str, ...] = ("transformers",)
    chunk_invariant: bool = False
    wraps: bool = False

    @property
    def doc(self) -> str:
        """The method file's docstring: formula, symbols, what differs from the paper."""
        return inspect.getdoc(inspect.getmodule(self.factory)) or ""

    def options(self) -> Mapping[str, inspect.Parameter]:
        """Return the factory's own options with their defaults."""
        parameters = inspect.signature(self.factory).parameters
        return {n: p for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}

    def accepts(self, options: Mapping[str, Any]) -> set[str]:
        """Return the names of its own options and, if it wraps one, of the scorer asked for."""
        own = self.options()
        if not self.wraps:
            return set(own)
        inner = find(options.get("scorer", own["scorer"].default))
        return set(own) | inner.accepts({n: x for n, x in options.items() if n != "scorer"})

    def build(self, **options: Any) -> Recipe:
        """Build the recipe with the method's defaults, changed by ``options``.

        Raises:
            RecipeError: an option that the method doesn't have.
        """
        for option in options:
            if option not in self.options() and not self.wraps:
                raise RecipeError(
                    f"Method {self.name!r} has no option {option!r}. "
                    f"{choices(option, self.options())}"
                )
        return self.factory(**options)


_METHODS: dict[str, Method] = {}


def method(**facts: Any) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register the decorated factory under ``facts`` (the fields of ``Method``)."""

    def register(factory: Callable[..., Recipe]) -> Callable[..., Recipe]:
        entry = Method(factory=factory, **facts)
        _METHODS[entry.name] = entry
        return factory

    return register


@cache
def _load() -> None:
    import kvsieve.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def methods() -> dict[str, Method]:
    """Return every method by name, in the order of the names ("full" first)."""
    _load()
    return dict(sorted(_METHODS.items(), key=lambda item: (item[0] != "full", item[0])))


def find(name: str) -> Method:
    """Return a method; of a preset ("auto:...") the one behind it.

    Raises:
        UnknownMethod: no such name; the message has near matches.
    """
    known = methods()
    if name in PRESETS:
        return known[PRESETS[name].method]
    if name not in known:
        possible = [*known, *PRESETS]
        raise UnknownMethod(f"Unknown method {name!r}. {choices(str(name), possible)}")
    return known[name]
