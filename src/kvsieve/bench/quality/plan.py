"""What to measure: tasks, settings, methods and budgets, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvsieve.bench.spec import parse_method
from kvsieve.budget import Budget
from kvsieve.compose import Recipe, recipe
from kvsieve.errors import BudgetError, RecipeError, choices
from kvsieve.reference import ADVERTISED, Sample
from kvsieve.reference.loader import check_checkpoint
from kvsieve.reference.sized import CHAINS, sized
from kvsieve.registry import find

TASKS = tuple(ADVERTISED)
SETTINGS = ("query-aware", "query-agnostic", "decode")
"""Where compression meets the task: with the question in the prompt, before the question is known,
or, for chains, while the answer is written."""

DECODE_INTERVAL, DECODE_RECENT = 16, 16
_AMPLE = 1 << 20


def settings_of(task: str) -> tuple[str, ...]:
    """Return the settings that a task has."""
    return ("decode",) if task in CHAINS else ("query-aware", "query-agnostic")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A method at a budget, with options; ``budget`` is None where nothing is removed."""

    method: str
    budget: str | None
    options: dict[str, Any] = field(default_factory=dict)

    def plain(self, setting: str, length: int) -> dict[str, Any]:
        """Return the recipe as plain values.

        While decoding, methods are compared at equal bytes: a share of the whole length becomes a
        number of slots, enforced at every 16th step, and the last 16 tokens stay at least.
        """
        plain = {"method": self.method, **self.options}
        if self.budget is None:
            return plain
        budget = Budget.parse(self.budget)
        if setting == "decode":
            if budget.kind == "fraction":
                budget = Budget("slots", max(1, int(budget.value * length + 1e-9)))
            plain.setdefault("schedule", f"every:{DECODE_INTERVAL}")
            plain.setdefault("recent", decode_recent(self.method, self.options))
        return plain | {"budget": budget.plain()}

    def recipe(self, setting: str, length: int) -> Recipe:
        """Build the recipe for a setting.

        Raises:
            RecipeError: the method can't be used that way, or not at that budget.
        """
        return Recipe.from_dict(self.plain(setting, length))


def decode_recent(method: str, options: dict[str, Any]) -> int | float:
    """Return how many last tokens stay while decoding, where nothing else is asked for.

    Raises:
        RecipeError: no such method or option.
    """
    own = recipe(method, budget=_AMPLE, **options).recent
    return own if isinstance(own, float) else max(own, DECODE_RECENT)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything with everything; the full cache always goes along.

    ``methods``: "name" or "name:option=value:..."; ``length``: tokens of a document, or of a whole
    chain; ``n``: prompts per cell, made from seeds ``seed``, ``seed + 1``, ...; ``batch``: prompts
    answered at once; ``reference``: a checkpoint in the reference model's language, else the
    shipped one.

    Raises:
        RecipeError: unknown tasks, settings, methods, options or budgets.
        ReferenceModelError: a length that a task can't have, or a folder without a checkpoint.
    """

    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS
    settings: tuple[str, ...] = SETTINGS
    length: int = 1024
    n: int = 20
    seed: int = 0
    batch: int = 10
    reference: Path | None = None

    def __post_init__(self) -> None:
        for given, possible, what in (
            (self.tasks, TASKS, "task"),
            (self.settings, SETTINGS, "setting"),
        ):
            for name in given:
                if name not in possible:
                    raise RecipeError(f"Unknown {what} {name!r}. {choices(name, possible)}")
        for name, value in (("n", self.n), ("batch", self.batch)):
            if value < 1:
                raise RecipeError(f"{name}={value}: it must be 1 or more.")
        if not self.cells():
            raise RecipeError("Nothing to measure: these tasks don't have these settings.")
        for task in self.tasks:
            sized(task, seed=self.seed, length=self.length)
        self.asked()
        if self.reference is not None:
            check_checkpoint(self.reference)

    def asked(self) -> list[Asked]:
        """Return every method at every budget, each once, the full cache first."""
        return every(self.methods, self.budgets)

    def cells(self) -> list[tuple[str, str]]:
        """Return pairs of task and setting."""
        return [(t, s) for t in self.tasks for s in settings_of(t) if s in self.settings]

    def samples(self, task: str) -> list[Sample]:
        """Return a task's prompts."""
        return [sized(task, seed=self.seed + i, length=self.length) for i in range(self.n)]


def every(names: Sequence[str], budgets: Sequence[str]) -> list[Asked]:
    """Return every method at every budget, each once, the full cache first.

    Raises:
        RecipeError: an unknown method, option or budget, or no budget where one is needed.
    """
    found = [Asked(method="full", budget=None)]
    for text in names:
        for asked in _at_budgets(*parse_method(text), budgets):
            if asked not in found:
                found.append(asked)
    return found


def _at_budgets(name: str, options: dict[str, Any], budgets: Sequence[str]) -> Iterable[Asked]:
    """Return a method at each budget; one that removes nothing has none.

    Raises:
        RecipeError: an unknown option, a wrong budget, none where one is needed.
    """
    if not find(name).build(**_own(name, options)).compresses:
        return [Asked(method=name, budget=None, options=options)]
    if not budgets:
        raise BudgetError(f"Method {name!r} needs a budget, as in --budgets 10%,25%.")
    recipe(name, budget=_AMPLE, **options)  # refuses unknown options, whatever the budget
    for budget in budgets:
        Budget.parse(budget)
    return [Asked(method=name, budget=budget, options=options) for budget in budgets]


def _own(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in options if key in find(name).accepts(options)}
