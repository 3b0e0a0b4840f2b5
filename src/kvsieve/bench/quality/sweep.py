"""The sweep: every task, setting, method and budget as a cell, each a row when it is done."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

from kvsieve.bench.quality.answers import Answers, answer
from kvsieve.bench.quality.plan import Asked, Plan
from kvsieve.bench.quality.rows import identity, key
from kvsieve.bench.rows import Row, failure
from kvsieve.compose import recipe
from kvsieve.reference import Sample

Progress = Callable[[str, int], None]


def measure(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    done: Container[str] = (),
    progress: Progress = lambda cell, prompts: None,
) -> Iterator[Row]:
    """Yield a row per cell that is not ``done`` (by ``key``).

    A cell that can't be measured has an ``error``; ``refused`` tells a recipe that kvsieve refuses
    (a budget below what the method protects) from a failure. ``progress`` is told the cell and the
    prompts answered since.
    """
    for task, setting in plan.cells():
        wanted = [(asked, identity(plan, task, setting, asked)) for asked in plan.asked()]
        wanted = [(asked, row) for asked, row in wanted if key(row) not in done]
        if wanted:
            cell = _Cell(plan, model, tokenizer, plan.samples(task), setting, progress)
            for asked, row in wanted:
                cell.name = f"{task} {setting}: {asked.method} {asked.budget or ''}".rstrip()
                yield row | cell.figures(asked)


@dataclass
class _Cell:
    """The same prompts for every method, and the full cache's answers to them."""

    plan: Plan
    model: Any
    tokenizer: Any
    samples: list[Sample]
    setting: str
    progress: Progress
    name: str = ""
    full: Answers | None = None

    def figures(self, asked: Asked) -> Row:
        """Measure; whatever goes wrong becomes the row's error, and the sweep goes on."""
        try:
            if self.full is None:
                told = asked.method == "full"
                self.full = self._answer(recipe("full"), told)
            found = self.full
            if asked.method != "full":
                found = self._answer(asked.recipe(self.setting, self.plan.length), True)
            return {**found.figures(self.full), "error": None, "refused": False}
        except Exception as error:  # recorded in the row; the exit code tells
            self.progress(self.name, 0)
            return failure(error)

    def _answer(self, built: Any, told: bool) -> Answers:
        return answer(
            self.model,
            self.tokenizer,
            built,
            self.samples,
            document_first=self.setting == "query-agnostic",
            batch=self.plan.batch,
            progress=lambda done: self.progress(self.name, done if told else 0),
        )
