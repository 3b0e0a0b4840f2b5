"""What a recipe becomes in vLLM: budget and interval in whole blocks, or a refusal that says why.

Scheduler and workers evaluate one function of the cached length (``kvsieve.columns``), and a block
holds all heads of a layer, of all layers. So every head keeps the same number of slots, known in
advance; which slots they are is up to the recipe's scorer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from kvsieve.allocators import TopK, Uniform
from kvsieve.budget import Budget
from kvsieve.columns import Columns, ColumnSchedule, Policy
from kvsieve.compose import Recipe
from kvsieve.errors import BudgetError, RecipeError, UnsupportedSignal
from kvsieve.interfaces import Schedule, Signal
from kvsieve.registry import find, methods
from kvsieve.schedules import Above, AfterPrefill, EachStep, Either, Every

ENGINE = "vllm"

SHOWN = frozenset({Signal.QUERY_WINDOW, Signal.VALUES, Signal.PRE_ROPE, Signal.W_O})
"""What the plugin can show a scorer, given a model that has it."""

_WHY_NOT = {
    Signal.ATTENTION_SUMS: "vLLM's kernels don't give the attention of every query",
    Signal.REPLAY: "vLLM can't repeat a prompt to its own cache",
    Signal.REROTATION: "vLLM stores keys at the positions of their tokens",
    Signal.STATISTICS: "a model's workers are not given a file of its statistics so far",
    Signal.LOGITS: "logits are made after all layers have attended, often on another worker",
    Signal.BEFORE_ATTEND: "vLLM's kernels store a token and attend in one call",
}

NEAREST = {
    "adakv": "snapkv",
    "compactor": "leverage",
    "distinct-keys": "distinct-keys with adaptive=False and history=0",
    "expected-attention": "expected-attention with adaptive=False",
    "h2o": "tova or g-kv",
    "kvzip": "expected-attention with adaptive=False",
    "laprox": "laprox with scope='head'",
    "pyramidkv": "snapkv",
    "simlayerkv": "streaming-llm",
}
"""The nearest recipe that vLLM can honour."""


@dataclass(frozen=True, kw_only=True)
class Effective:
    """A recipe as vLLM runs it; the Transformers engine runs ``recipe`` just the same.

    ``columns``: when and how much; ``notes``: what was rounded, in words.
    """

    recipe: Recipe
    columns: Columns
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        c = self.columns
        after = f", then every {c.interval} tokens" if c.decode else ", not while decoding"
        said = f" ({'; '.join(self.notes)})" if self.notes else ""
        return (
            f"{self.recipe.method}: keeps {c.budget} slots per head = {c.kept} blocks of "
            f"{c.block}; policy {c.policy}{after}{said}"
        )


def effective(recipe: Recipe, block: int, policy: Policy = "after-prompt") -> Effective:
    """Return what ``recipe`` becomes with blocks of ``block`` slots.

    Raises:
        RecipeError: it can't be honoured; says why, and names the nearest that can.
        UnsupportedSignal: its scorer needs what vLLM can't show.
        BudgetError: not in slots, below one block, or filled by what is protected.
    """
    check(recipe)
    budget, notes = _budget(recipe, block)
    interval, decode, said = _interval(recipe.schedule, budget, block)
    if policy == "chunk" and not decode:
        raise RecipeError(
            f"policy='chunk' compresses while decoding, too; {recipe.method!r} with the schedule "
            f"{recipe.schedule} does not. Add e.g. schedule='after-prefill|every:{block}', or use "
            "policy='after-prompt'."
        )
    columns = Columns(block=block, budget=budget, interval=interval, policy=policy, decode=decode)
    rounded = dataclasses.replace(
        recipe, budget=Budget("slots", budget), schedule=ColumnSchedule(columns)
    )
    return Effective(recipe=rounded, columns=columns, notes=notes + said)


def check(recipe: Recipe) -> None:
    """Refuse recipes that vLLM can't honour whatever the model.

    Raises:
        RecipeError, UnsupportedSignal: see ``effective``.
    """
    for signal in sorted(recipe.needs - SHOWN, key=lambda s: s.value):
        raise UnsupportedSignal(
            f"Method {recipe.method!r} needs {signal.value}, which can't be had in vLLM: "
            f"{_WHY_NOT[signal]}. {_nearest(recipe)}"
        )
    if not isinstance(recipe.allocator, Uniform):
        uneven = "heads" if isinstance(recipe.allocator, TopK) else "layers"
        raise RecipeError(
            f"Method {recipe.method!r} gives {uneven} unequal numbers of slots (scope "
            f"{recipe.scope.value!r}); a block of vLLM holds all heads, and is freed for all "
            f"layers at once. {_nearest(recipe)}"
        )
    if recipe.layout != "dense":
        raise RecipeError(f"layout={recipe.layout!r}: vLLM has its own layout. Leave it out.")
    if ENGINE not in find(recipe.method).engines:
        raise RecipeError(
            f"Method {recipe.method!r} has not been checked in vLLM. {_nearest(recipe)}"
        )


def _nearest(recipe: Recipe) -> str:
    able = ", ".join(name for name, entry in methods().items() if ENGINE in entry.engines)
    near = NEAREST.get(recipe.method)
    hint = f"Nearest possible recipe: {near}. " if near else ""
    return f"{hint}Methods that run in vLLM: {able}."


def _budget(recipe: Recipe, block: int) -> tuple[int, tuple[str, ...]]:
    budget = recipe.budget
    assert budget is not None, "a recipe that compresses has a budget"
    if budget.kind != "slots":
        raise BudgetError(
            f"A budget of {budget} depends on how long a request gets, which vLLM's scheduler "
            f"can't follow. Give slots per head, e.g. budget={16 * block}."
        )
    asked = int(budget.value)
    slots = asked // block * block
    if slots == 0:
        raise BudgetError(
            f"A budget of {asked} slots is below one block of {block}. Use a budget of {block} or "
            "more, or a smaller --block-size."
        )
    recipe.check_room(slots)
    return slots, (f"budget {asked} rounded down to whole blocks",) if slots != asked else ()


def _interval(
    schedule: Schedule | None, budget: int, block: int
) -> tuple[int, bool, tuple[str, ...]]:
    """Return the interval in tokens, whether decoding is compressed, and what was rounded."""
    parts = _parts(schedule)
    if not any(isinstance(part, AfterPrefill | Above) for part in parts):
        raise RecipeError(
            f"The schedule {schedule} leaves the prompt whole; in vLLM the budget holds from the "
            "end of the prompt on. Add 'after-prefill|'."
        )
    asked = [tokens for part in parts if (tokens := _tokens(part, budget)) is not None]
    if not asked:
        return block, False, ()
    interval = max(block, -(-min(asked) // block) * block)
    said = f"interval {min(asked)} rounded up to whole blocks: {interval}"
    return interval, True, (said,) if interval != min(asked) else ()


def _parts(schedule: Schedule | None) -> list[Schedule]:
    if isinstance(schedule, Either):
        return [*_parts(schedule.first), *_parts(schedule.second)]
    return [] if schedule is None else [schedule]


def _tokens(part: Schedule, budget: int) -> int | None:
    """Return a schedule's interval in tokens while decoding; None: it doesn't act there."""
    if isinstance(part, Every):
        return part.interval
    if isinstance(part, EachStep):
        return 1
    if isinstance(part, Above):
        if part.cap < budget:
            raise RecipeError(f"The schedule {part} is due below the budget of {budget} slots.")
        return max(1, part.cap - budget)
    if isinstance(part, AfterPrefill):
        return None
    raise RecipeError(
        f"The schedule {part} is none that vLLM's scheduler can follow. Possible: after-prefill, "
        "each-step, every:N, above:N, joined by '|'."
    )
