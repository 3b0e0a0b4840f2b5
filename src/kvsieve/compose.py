"""A recipe: the parts, the budget, and what is protected, checked together."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsieve.allocators import Dynamic, TopK, Uniform
from kvsieve.budget import Budget, Geometry
from kvsieve.checks import check
from kvsieve.compressors import Evict
from kvsieve.errors import BudgetError, RecipeError, UnsupportedLayout, choices
from kvsieve.interfaces import (
    Allocator,
    Column,
    Compressor,
    Moment,
    Schedule,
    Scope,
    Scorer,
    Signal,
)
from kvsieve.presets import expanded
from kvsieve.registry import find
from kvsieve.rerotation import COLUMN
from kvsieve.schedules import parse_schedule
from kvsieve.shares import RetrievalHeads, Shares
from kvsieve.statistics import Statistics, needed
from kvsieve.store import Layout
from kvsieve.store.summary import Summarise


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Scorer -> Allocator -> Compressor, when the Schedule says so, on a Store.

    ``sinks``: first tokens of each row that stay; ``recent``: last tokens that stay, a number or
    (as a float) a share of the budget; ``protect``: spans ``(start, end)`` of token indices that
    stay, e.g. a system prompt. Protected slots count against the budget. ``fair``: spans that lose
    the same share of their tokens as the rest (see ``kvsieve.fairness``). ``ratio``: a budget in
    slots grows with the row, to that share of what it has seen at least. ``summarise``: tables keep
    a summary of what they drop. ``rerotate``: kept keys move up to one another, as if what was
    removed had never been there. A recipe without a scorer never compresses.
    """

    method: str
    scorer: Scorer | None = None
    allocator: Allocator = field(default_factory=Uniform)
    compressor: Compressor = field(default_factory=Evict)
    schedule: Schedule | None = None
    budget: Budget | None = None
    layout: Layout = "dense"
    sinks: int = 0
    recent: int | float = 0
    protect: tuple[tuple[int, int], ...] = ()
    fair: tuple[tuple[int, int], ...] = ()
    ratio: float = 0.0
    summarise: Summarise | None = None
    rerotate: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        if self.budget is not None and self.budget.kind == "slots":
            self.check_room(int(self.budget.value))

    @property
    def compresses(self) -> bool:
        return self.scorer is not None

    @property
    def dynamic(self) -> bool:
        """Whether the method chooses how much it keeps, the budget being a cap."""
        return isinstance(self.allocator, Dynamic)

    @property
    def acts_before(self) -> bool:
        """Whether decode steps compress between storing a token and attending."""
        return self.schedule is not None and self.schedule.moment is Moment.BEFORE_ATTEND

    @property
    def scope(self) -> Scope:
        return self.allocator.scope

    @property
    def needs(self) -> frozenset[Signal]:
        """Everything that the parts need an engine to show."""
        if self.scorer is None:
            return frozenset()
        own = {Signal.QUERY_WINDOW} if self.scorer.window else set()
        own |= {Signal.BEFORE_ATTEND} if self.acts_before else set()
        own |= {Signal.VALUES} if self.summarise is not None else set()
        own |= {Signal.REROTATION} if self.rerotate else set()
        own |= self.allocator.needs if isinstance(self.allocator, Dynamic) else set()
        return self.scorer.needs | self.compressor.needs | own

    @property
    def columns(self) -> tuple[Column, ...]:
        """What tables carry for the parts."""
        own = () if self.scorer is None else self.scorer.columns
        return (*own, COLUMN) if self.rerotate and self.compresses else own

    @property
    def even(self) -> bool:
        """Whether it has scores, and gives every head the same number of slots, by itself."""
        alike = not self.uneven and not self.dynamic and self.scope is Scope.HEAD
        return self.compresses and alike

    @property
    def uneven(self) -> bool:
        """Whether heads of a layer may keep unequal numbers of slots."""
        allocator = self.allocator
        if isinstance(allocator, Dynamic):
            return allocator.uneven
        return isinstance(allocator, TopK | Shares | RetrievalHeads)

    @property
    def statistics(self) -> Statistics | None:
        """What was measured of the model beforehand, if the scorer was given it."""
        return getattr(self.scorer, "statistics", None)

    def check_statistics(self) -> None:
        """Check that statistics of the model are there, if they are needed.

        Raises:
            UnsupportedSignal: they aren't; says how they are made.
        """
        if Signal.STATISTICS in self.needs:
            needed(self.statistics, self.method)

    def recent_slots(self, budget: int) -> int:
        """Return how many recent tokens are protected within a budget of that many slots."""
        recent = int(self.recent * budget) if isinstance(self.recent, float) else self.recent
        # A token that has not attended yet is to see itself at least.
        return max(recent, 1) if self.acts_before else recent

    def budgets(self, lengths: Tensor, geometry: Geometry) -> Tensor:
        """Return slots per head of rows that have seen ``lengths`` tokens (both ``[B]`` int64).

        Raises:
            BudgetError: bytes that don't hold one slot per head.
        """
        assert self.budget is not None, "a recipe that compresses has a budget"
        grown = (lengths.double() * self.ratio + 1e-9).floor().to(lengths.dtype)
        return torch.maximum(self.budget.slots(lengths, geometry), grown)

    def check_room(self, budget: int, length: int | None = None) -> None:
        """Check that a budget leaves room beside what is protected, in a row of ``length`` tokens.

        Raises:
            BudgetError: sinks, recent tokens and protected spans fill the budget, or a method
                that chooses its budget can't keep to this cap.
        """
        if self.scorer is None:
            return
        if isinstance(self.allocator, Dynamic):
            self.allocator.check(budget)
        recent = self.recent_slots(budget)
        spans = sum(end - start for start, end in self.protect)
        held = self.sinks + recent + spans
        if length is not None:
            if length <= budget:
                return
            held = self._protected(length, recent)
        if held >= budget:
            raise BudgetError(
                f"A budget of {budget} slots per head leaves no room beside what is protected: "
                f"{self.sinks} sinks, {recent} recent tokens, {spans} in protected spans. "
                f"Use a budget above {held} slots, or protect less "
                f"(options sinks, recent, protect{', window' if self.scorer.window else ''})."
            )

    def _protected(self, length: int, recent: int) -> int:
        inside = set(range(min(self.sinks, length))) | set(range(max(0, length - recent), length))
        for start, end in self.protect:
            inside |= set(range(start, min(end, length)))
        return len(inside)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which ``from_dict`` builds the same recipe."""
        plain: dict[str, Any] = {"method": self.method}
        if self.budget is not None:
            plain["budget"] = self.budget.plain()
        return plain | {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in self.options.items()
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Build a recipe from ``to_dict``'s form.

        Raises:
            RecipeError: no method named, or an option that doesn't exist.
        """
        options = dict(plain)
        if "method" not in options:
            raise RecipeError(f"A recipe needs a 'method'; got {sorted(options)}.")
        return recipe(options.pop("method"), **options)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Build a recipe from a TOML file of the same keys."""
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"Can't read the recipe {str(path)!r}: {error}") from error


COMMON = ("schedule", "layout", "sinks", "recent", "protect", "fair", "rerotate")


def recipe(
    name: str, *, budget: int | float | str | Budget | None = None, **options: Any
) -> Recipe:
    """Build a method's recipe.

    Args:
        name: a method of ``kvsieve methods``, or a preset ("auto:reasoning").
        budget: slots per head (int), fraction kept (float or "10%") or bytes ("2GiB"). For methods
            that choose how much they keep it is a cap, and may be left out.
        options: the method's own options, and for every method ``schedule``, ``layout``,
            ``sinks``, ``recent``, ``protect``, ``fair``, ``rerotate``.

    Raises:
        UnknownMethod: no such method (with near matches).
        BudgetError: a missing or impossible budget.
        RecipeError: an unknown option or a value it can't have.
    """
    name, options = expanded(name, options)
    found = find(name)
    for option in options:
        if option not in COMMON and option not in found.options() and not found.wraps:
            possible = [*found.options(), *COMMON]
            raise RecipeError(
                f"Method {name!r} has no option {option!r}. {choices(option, possible)}"
            )
    own_names = found.accepts(options)
    common = {key: options[key] for key in COMMON if key in options and key not in own_names}
    own = {key: value for key, value in options.items() if key not in common}
    built = found.build(**own)
    if not built.compresses:
        if budget is not None:
            raise BudgetError(f"Method {name!r} removes nothing and takes no budget.")
        return dataclasses.replace(built, options=options)
    if budget is None and built.dynamic:
        budget = 1.0
    if budget is None:
        raise BudgetError(
            f"Method {name!r} needs a budget: slots (1024), a fraction kept (0.1 or '10%') "
            "or bytes ('2GiB')."
        )
    return _finish(built, Budget.parse(budget), common, options)


def _finish(
    built: Recipe, budget: Budget, common: dict[str, Any], options: dict[str, Any]
) -> Recipe:
    if "schedule" in common:
        common["schedule"] = parse_schedule(common["schedule"])
    for name in ("protect", "fair"):
        if name in common:
            common[name] = _spans(name, common[name])
    layout = common.pop("layout", built.layout)
    finished = dataclasses.replace(built, budget=budget, layout=layout, options=options, **common)
    if finished.uneven and layout == "dense" and "layout" in options:
        raise UnsupportedLayout(
            f"{built.method!r} gives heads unequal numbers of slots, which a dense layout can't "
            "free. Use layout='ragged', or a method that treats heads alike."
        )
    return finished


def _spans(name: str, given: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(start), int(end)) for start, end in given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{name}={given!r}: give a list of spans (start, end) of token indices."
        ) from error
