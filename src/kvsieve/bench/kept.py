"""Which tokens of one document each method keeps, in every layer and head."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from torch import Tensor

from kvsieve.bench.quality.answers import answer
from kvsieve.bench.quality.plan import Asked, Plan
from kvsieve.bench.quality.rows import TASK_VERSION, key, origin
from kvsieve.bench.rows import Row, failure
from kvsieve.engines.transformers import Cache
from kvsieve.reference import Sample
from kvsieve.reference.grading import asked_span

KIND, VERSION = "kept", 1
FILE = "kept.jsonl"
IDENTITY = (
    *("kind", "version", "engine", "model", "weights", "task", "task_version", "length", "seed"),
    *("method", "budget", "recipe", "device", "dtype", "threads", "versions", "commit"),
)

Runs = list[list[int]]
"""Kept tokens as ``[start, end]`` spans of positions, in order."""


def plan_of(task: str, methods: Sequence[str], budget: str, length: int, seed: int) -> Plan:
    """Return a plan of one prompt.

    Raises:
        RecipeError: an unknown task, method or option, or no budget.
        ReferenceModelError: a length that the task can't have.
    """
    return Plan(
        methods=tuple(methods),
        budgets=(budget,),
        tasks=(task,),
        settings=("query-agnostic",),
        length=length,
        n=1,
        seed=seed,
    )


def identity(plan: Plan, asked: Asked) -> Row:
    """Return what a row is of."""
    return {
        "kind": KIND, "version": VERSION, "engine": "transformers", **origin(),
        "task": plan.tasks[0], "task_version": TASK_VERSION, "length": plan.length,
        "seed": plan.seed, "method": asked.method, "budget": asked.budget,
        "recipe": asked.plain("query-agnostic", plan.length),
    }  # fmt: skip


def measure(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    done: Container[str] = (),
    progress: Callable[[str, int], None] = lambda name, prompts: None,
) -> Iterator[Row]:
    """Yield a row per method that is not ``done`` (by ``key`` over IDENTITY).

    ``layers[layer][head]`` are the kept spans; ``asked``: the span that answers the question, where
    it is one; ``right``: whether the question was answered.
    """
    (sample,) = plan.samples(plan.tasks[0])
    for asked in plan.asked():
        row = identity(plan, asked)
        if asked.method == "full" or key(row, IDENTITY) in done:
            continue
        progress(asked.method, 0)
        try:
            figures = _figures(model, tokenizer, asked, plan, sample)
            yield row | figures | {"error": None, "refused": False}
        except Exception as error:  # recorded in the row; the exit code tells
            yield row | failure(error)


def _figures(model: Any, tokenizer: Any, asked: Asked, plan: Plan, sample: Sample) -> Row:
    layers: list[list[Runs]] = []

    def look(cache: Cache, samples: Sequence[Sample]) -> None:
        layers.extend(kept_runs(cache))

    recipe = asked.recipe("query-agnostic", plan.length)
    found = answer(
        model, tokenizer, recipe, [sample], document_first=True, after_document=look
    )  # fmt: skip
    return {"layers": layers, "asked": asked_span(sample), "right": bool(found.right[0])}


def kept_runs(cache: Cache, row: int = 0) -> list[list[Runs]]:
    """Return the kept positions of a row, ``[layer][head]`` as spans."""
    found = []
    for layer in cache.session.layers:
        store, heads = layer.store, layer.store.counts.shape[1]
        position = store["position"][row].expand(heads, -1)
        live = None if store.live is None else store.live[row].expand(heads, -1)
        found.append(
            [runs(position[h] if live is None else position[h][live[h]]) for h in range(heads)]
        )
    return found


def runs(positions: Tensor) -> Runs:
    """Return whole numbers ``[N]`` as spans ``[start, end]``, ends not included."""
    found: Runs = []
    for position in sorted(map(int, positions.tolist())):
        if found and found[-1][1] == position:
            found[-1][1] = position + 1
        else:
            found.append([position, position + 1])
    return found
