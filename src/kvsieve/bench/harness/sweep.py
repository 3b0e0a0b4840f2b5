"""The sweep: every task, method and budget as a cell, each a row when it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from kvsieve.bench import ledger
from kvsieve.bench.asked import recipe_of
from kvsieve.bench.fidelity.figures import with_interval
from kvsieve.bench.harness.answering import Sieved
from kvsieve.bench.harness.tasks import Loaded, Outcome, evaluate, library
from kvsieve.bench.intervals import paired_difference, wilson
from kvsieve.bench.ledger import Subject
from kvsieve.bench.quality.plan import Asked
from kvsieve.bench.rows import Row, failure
from kvsieve.compose import Recipe

KIND, VERSION = "tasks", 1
FILE = "tasks.jsonl"
FIGURES = frozenset(
    "n metric score low high values full difference scores answer_tokens cut cache seconds "
    "tokens_per_second error refused".split()
)

Score = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How prompts are put and answered.

    ``chat``: through the chat template (``template``: its hash); ``ends``: ids that end an answer;
    ``batch``: prompts at a time; ``limit``: first examples of each task (None: all);
    ``max_new_tokens``: of an answer (None: as the task says); ``part``: see ``Sieved``.
    """

    chat: bool
    template: str | None
    ends: list[int]
    batch: int = 1
    limit: int | None = None
    max_new_tokens: int | None = None
    part: int = 64
    seed: int = 0

    def facts(self) -> Row:
        """Return what the rows say of it."""
        return {
            "chat": self.chat,
            "template": self.template,
            "ends": self.ends,
            "batch": self.batch,
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "part": self.part,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: every task under every recipe, the full cache first."""

    subject: Subject
    tasks: Sequence[Loaded]
    asked: Sequence[Asked]
    settings: Settings

    def identity(self, task: Loaded, asked: Asked) -> Row:
        """Return what a row is of; rows that agree in all of it are the same measurement."""
        row = {
            "kind": KIND,
            "version": VERSION,
            "task": task.name,
            **task.facts,
            "fewshot": task.fewshot,
            **self.settings.facts(),
            **ledger.origin(self.subject, asked),
        }
        return row | {"versions": row["versions"] | _versions()}

    def identities(self) -> list[Row]:
        """Return the cells, in order."""
        return [self.identity(task, asked) for task in self.tasks for asked in self.asked]


def _versions() -> dict[str, str]:
    version = library("importlib.metadata").version
    names = {"lm_eval": "lm_eval", "math_verify": "math-verify", "datasets": "datasets"}
    return {name: version(package) for name, package in names.items()}


def key(row: Row) -> str:
    """Return a row's identity as text."""
    return ledger.key(row, FIGURES)


Progress = Callable[[str, int], None]
Ran = tuple[Outcome, Row]


def measure(
    sweep: Sweep,
    model: Any,
    tokenizer: Any,
    context: int | None,
    done: Container[str] = (),
    progress: Progress = lambda cell, prompts: None,
) -> Iterator[Row]:
    """Yield a row per cell that is not ``done`` (by ``key``).

    A cell that can't be measured has an ``error``; ``refused`` tells a recipe that kvsieve refuses
    from a failure. The full cache answers each task once more where its row is known: every row
    stands beside it. ``context``: tokens that the model takes; ``progress`` is told the cell and
    the prompts done since.
    """
    full = Asked(method="full", budget=None)
    for task in sweep.tasks:
        wanted = [(asked, sweep.identity(task, asked)) for asked in sweep.asked]
        wanted = [(asked, row) for asked, row in wanted if key(row) not in done]
        if not wanted:
            continue
        cell = _Cell(sweep, task, model, tokenizer, context, progress)
        beside = cell.run(full, told=wanted[0][0] == full)
        for asked, row in wanted:
            alone = asked == full or isinstance(beside, Exception)
            found = beside if alone else cell.run(asked, told=True)
            yield row | _figures(found, beside)


@dataclass
class _Cell:
    """A task, asked under one recipe after the other."""

    sweep: Sweep
    task: Loaded
    model: Any
    tokenizer: Any
    context: int | None
    progress: Progress

    def run(self, asked: Asked, told: bool) -> Ran | Exception:
        """Run the task; whatever goes wrong is returned."""
        shown = f"{self.task.name}: {asked.method} {asked.budget or ''}".rstrip()
        settings = self.sweep.settings
        try:
            sieved = self._sieved(recipe_of(asked))
            lm = library("kvsieve.bench.harness.lm").SieveLM(
                sieved,
                chat=settings.chat,
                batch=settings.batch,
                limit=settings.max_new_tokens,
                progress=lambda: self.progress(shown, int(told)),
            )
            return evaluate(lm, self.task, settings.limit, settings.chat), _costs(sieved)
        except Exception as error:  # recorded in the row; the exit code tells
            self.progress(shown, 0)
            return error

    def _sieved(self, built: Recipe) -> Sieved:
        settings = self.sweep.settings
        return Sieved(
            model=self.model,
            tokenizer=self.tokenizer,
            recipe=built,
            ends=settings.ends,
            context=self.context,
            part=settings.part,
            seed=settings.seed,
        )


def _figures(found: Ran | Exception, full: Ran | Exception) -> Row:
    for ran in (found, full):
        if isinstance(ran, Exception):
            return failure(ran)
    assert not isinstance(found, Exception) and not isinstance(full, Exception)
    outcome, costs = found
    return {
        "n": outcome.examples,
        "metric": outcome.metric,
        **_score(outcome),
        "full": _score(full[0]),
        "difference": _difference(outcome.values, full[0].values),
        "scores": outcome.scores,
        **costs,
        "error": None,
        "refused": False,
    }


def _score(outcome: Outcome) -> Score:
    """Return score, interval (Wilson for right or wrong, else bootstrap) and the values."""
    values, low, high = outcome.values, None, None
    if values is not None and _right_or_wrong(values):
        low, high = wilson(int(sum(values)), len(values))
    elif values is not None and math.isclose(fmean(values), outcome.score, abs_tol=1e-9):
        interval = with_interval(torch.tensor(values, dtype=torch.float64))
        low, high = interval["low"], interval["high"]
    return {"score": outcome.score, "low": low, "high": high, "values": values}


def _right_or_wrong(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _difference(values: list[float] | None, full: list[float] | None) -> Score | None:
    """Return the mean difference to the full cache on the same examples, with its interval."""
    if values is None or full is None:
        return None
    if _right_or_wrong([*values, *full]):
        return paired_difference([int(x) for x in values], [int(x) for x in full])
    apart = torch.tensor(values, dtype=torch.float64) - torch.tensor(full, dtype=torch.float64)
    return with_interval(apart)


def _costs(sieved: Sieved) -> Row:
    """Return bytes and seconds per prompt, averaged over all that ran, and how answers ended."""
    rows = sum(number for _, number in sieved.reports)
    written = sieved.written
    steps = sum(report.decode_steps * number for report, number in sieved.reports)
    spent = sum(report.seconds["decode"] for report, _ in sieved.reports)

    def per_prompt(figure: Callable[[Any], float]) -> float:
        return sum(figure(report) for report, _ in sieved.reports) / rows

    return {
        "answer_tokens": fmean(answer.tokens for answer in written) if written else None,
        "cut": fmean(answer.cut for answer in written) if written else None,
        "cache": {
            name: per_prompt(lambda report, name=name: getattr(report, name))
            for name in ("bytes_full", "bytes_kept", "bytes_peak")
        },
        "seconds": {
            phase: per_prompt(lambda report, phase=phase: report.seconds[phase])
            for phase in ("prefill", "decode", "compress")
        },
        "tokens_per_second": steps / spent if spent else None,
    }
