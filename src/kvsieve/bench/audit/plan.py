"""What is audited: methods and budgets, as they are and with each fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.bench.audit.spans import Span, instruction_spans, system_span
from kvsieve.bench.quality.plan import Asked, Plan
from kvsieve.compose import Recipe
from kvsieve.reference import Sample

FIXES = ("none", "protected", "fair")
"""As the method is; instructions are protected; each instruction loses no larger a share of its
tokens than the document does."""

TASKS = ("instructions", "secret")


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """Methods, budgets and prompts; the full cache always goes along.

    Raises:
        RecipeError: unknown methods, options or budgets.
        ReferenceModelError: a length that a document can't have.
    """

    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    length: int = 512
    n: int = 40
    seed: int = 0
    batch: int = 10

    def __post_init__(self) -> None:
        self.quality()

    def quality(self) -> Plan:
        """Return the same as a plan of the two tasks."""
        return Plan(
            methods=self.methods,
            budgets=self.budgets,
            tasks=TASKS,
            settings=("query-agnostic",),
            length=self.length,
            n=self.n,
            seed=self.seed,
            batch=self.batch,
        )

    def cells(self) -> list[tuple[Asked, str]]:
        """Return every method and budget with every fix; the full cache needs none."""
        return with_fixes(self.quality().asked())

    def plain(self, asked: Asked) -> dict[str, Any]:
        """Return the recipe as plain values, without the spans, which differ by prompt."""
        return asked.plain("query-agnostic", self.length)


def with_fixes(asked: Sequence[Asked]) -> list[tuple[Asked, str]]:
    """Return every method and budget with every fix; what removes nothing needs none."""
    return [(one, fix) for one in asked for fix in (FIXES if one.budget else FIXES[:1])]


def fixed(plain: dict[str, Any], fix: str, samples: Sequence[Sample]) -> Recipe:
    """Build a recipe with a fix for prompts whose instructions stand at the same places.

    Raises:
        RecipeError: the method can't be used so, or not at that budget.
    """
    if fix == "protected":
        return Recipe.from_dict(plain | {"protect": [system_span(samples[0])]})
    if fix == "fair":
        return Recipe.from_dict(plain | {"fair": list(instruction_spans(samples[0]).values())})
    return Recipe.from_dict(plain)


def alike(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return prompts in groups whose instructions stand at the same places."""
    groups: dict[tuple[Span, ...], list[Sample]] = {}
    for made in samples:
        groups.setdefault(tuple(instruction_spans(made).values()), []).append(made)
    return list(groups.values())
