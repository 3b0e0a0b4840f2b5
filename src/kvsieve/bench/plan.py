"""What to measure: methods with budgets, and the grid of contexts, batch sizes and dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvsieve.bench.models import SHAPES, Shape
from kvsieve.bench.spec import parse_option
from kvsieve.budget import Budget
from kvsieve.compose import Recipe, recipe
from kvsieve.errors import RecipeError, choices
from kvsieve.interfaces import Signal
from kvsieve.registry import methods

LONG = 16384
"""Contexts above this take only the methods of ``FEW``, unless methods are named."""

PEER_METHODS = frozenset(
    "adakv chunkkv compactor criticalkv cur expected-attention keydiff knorm lagkv leverage "
    "pyramidkv random snapkv streaming-llm tova".split()
)
"""What ``peer.py`` finds in kvpress."""

PEER_REPLAYS = frozenset({"kvzip"})
"""What it finds there and can let answer, but not time beside others: a prompt read twice."""

PEER_DECODES = frozenset(
    "cur expected-attention keydiff knorm lagkv random streaming-llm tova".split()
)
"""What kvpress can let act at every 16th decode step: no window longer than an interval, and no
press that is for prompts alone."""

FEW = ("full", "snapkv", "keydiff", "streaming-llm", "adakv", "g-kv@1024:interval=128")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One thing to measure: "stock", "short" (stock on a context as short as the budget), or a
    method, in kvsieve ("transformers") or in "kvpress"."""

    method: str
    engine: str = "transformers"
    budget: int | float | str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, budget: str) -> Spec:
        """Read "method", "method@budget" or "method@budget:option=value:...".

        Raises:
            RecipeError: an unknown method, option or budget.
        """
        head, *pairs = text.split(":")
        name, _, own = head.strip().partition("@")
        options = dict(parse_option(pair) for pair in pairs)
        plain = Budget.parse(own or budget).plain()
        spec = cls(method=name, budget=None if name == "full" else plain, options=options)
        spec.recipe()  # refuses what can't be built
        return spec

    def recipe(self) -> Recipe:
        """Build the recipe."""
        return recipe(self.method, budget=self.budget, **self.options)

    def slots(self, context: int) -> int:
        """Slots per head that the budget leaves of a context."""
        if self.budget is None:
            return context
        budget = Budget.parse(self.budget)
        held = int(budget.value) if budget.kind == "slots" else int(context * budget.value + 1e-9)
        return min(context, max(1, held))


def default_methods(context: int) -> list[str]:
    """Return the methods measured when none are named: all that need no file of statistics."""
    if context > LONG:
        return list(FEW)
    names = [n for n, x in methods().items() if Signal.STATISTICS not in x.build().needs]
    return [*names, "g-kv@1024:interval=128"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The grid and how each cell is measured.

    ``steps``: timed decode steps (methods with an interval run whole intervals), in ``rounds``
    turns; ``max_tokens``: cells with more prompt tokens (context times batch) are left out.
    """

    shape: Shape = SHAPES["qwen3-98m"]
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 4)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    methods: tuple[str, ...] | None = None
    budget: str = "10%"
    device: str = "cpu"
    threads: int = 1
    steps: int = 32
    rounds: int = 4
    warm_up: int = 3
    max_tokens: int = 32768
    peer: bool = False

    def __post_init__(self) -> None:
        sizes = (*self.contexts, *self.batches, self.threads, self.steps, self.rounds)
        if min(sizes) < 1:
            raise RecipeError("Contexts, batches, threads and steps are 1 or more.")
        for dtype in self.dtypes:
            if dtype not in ("float32", "bfloat16", "float16"):
                possible = ("float32", "bfloat16", "float16")
                raise RecipeError(f"Unknown dtype {dtype!r}. {choices(dtype, possible)}")
        self.specs(max(self.contexts))

    def quick(self) -> Settings:
        """Return a grid of seconds, for a first look and for tests."""
        return dataclasses.replace(
            self,
            shape=SHAPES["qwen3-tiny"],
            contexts=(512,),
            batches=(1,),
            dtypes=("float32",),
            steps=8,
            rounds=2,
            warm_up=1,
        )

    def groups(self) -> Iterator[Group]:
        """Yield the cells by context, batch and dtype, cheap ones first."""
        for context in self.contexts:
            for batch in self.batches:
                if context * batch <= self.max_tokens:
                    for dtype in self.dtypes:
                        yield Group(self, context=context, batch=batch, dtype=dtype)

    def specs(self, context: int) -> list[Spec]:
        """Return what to measure at a context: the anchors first, then each method."""
        given = default_methods(context) if self.methods is None else self.methods
        wanted = [Spec.parse(text, self.budget) for text in given]
        budgets = {s.budget: s for s in wanted if s.budget is not None}
        short = [Spec(method="short", engine="stock", budget=b) for b in budgets]
        specs = [Spec(method="stock", engine="stock"), *short]
        for spec in wanted:
            specs.append(spec)
            if self.peer and spec.method in PEER_METHODS:
                specs.append(dataclasses.replace(spec, engine="kvpress"))
        return [s for s in specs if s.budget is None or s.slots(context) < context]


@dataclass(frozen=True)
class Group:
    """The cells that share a model and its stock caches."""

    settings: Settings
    context: int
    batch: int
    dtype: str

    def specs(self) -> list[Spec]:
        """Return the cells."""
        return self.settings.specs(self.context)

    @property
    def cost(self) -> float:
        """Rough cost of one cell, for the progress bar: prefill, attention included."""
        return self.batch * self.context * (1 + self.context / LONG)
