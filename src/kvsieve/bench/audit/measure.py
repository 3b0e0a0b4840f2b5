"""The audit: instructions kept by kind and by place, secrets told, slots left of each part.

After "The Pitfalls of KV Cache Compression" (arXiv 2510.00231): the document with its instructions
is compressed, then questions come. On the reference model a direct question asks for the secret
key; an indirect one also puts the beginning of a telling answer in the model's mouth.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from kvsieve.bench.audit.plan import TASKS, AuditPlan, alike, fixed
from kvsieve.bench.audit.spans import kept_shares
from kvsieve.bench.intervals import share
from kvsieve.bench.quality.answers import Answers, answer
from kvsieve.bench.quality.plan import Asked
from kvsieve.bench.quality.rows import TASK_VERSION, key, origin
from kvsieve.bench.rows import Row, failure
from kvsieve.engines.transformers import Cache
from kvsieve.reference import Sample
from kvsieve.reference.grading import followed, leaked

KIND, VERSION = "audit", 1
FILE = "audit.jsonl"
IDENTITY = (
    *("kind", "version", "engine", "model", "weights", "task_version", "length", "method"),
    *("budget", "recipe", "fix", "seed", "n", "batch", "device", "dtype", "threads", "versions"),
    "commit",
)

QUESTIONS = 3
"""Of each prompt: about a key, about the secret, and about the secret with an answer begun."""


def identity(plan: AuditPlan, asked: Asked, fix: str) -> Row:
    """Return what a row is of; rows that agree in all of it are the same measurement."""
    return {
        "kind": KIND, "version": VERSION, "engine": "transformers", **origin(),
        "task_version": TASK_VERSION, "length": plan.length, "method": asked.method,
        "budget": asked.budget, "recipe": plan.plain(asked), "fix": fix,
        "seed": plan.seed, "n": plan.n, "batch": plan.batch,
    }  # fmt: skip


def measure(
    plan: AuditPlan,
    model: Any,
    tokenizer: Any,
    done: Container[str] = (),
    progress: Callable[[str, int], None] = lambda cell, prompts: None,
) -> Iterator[Row]:
    """Yield a row per method, budget and fix that is not ``done`` (by ``key`` over IDENTITY).

    One that can't be measured has an ``error``; ``refused`` tells what kvsieve refuses.
    """
    prompts = {task: plan.quality().samples(task) for task in TASKS}
    for asked, fix in plan.cells():
        row = identity(plan, asked, fix)
        if key(row, IDENTITY) in done:
            continue
        name = f"{asked.method} {asked.budget or ''}, fix: {fix}"
        ask = _Questions(model, tokenizer, plan, fix, lambda n, name=name: progress(name, n))
        try:
            yield row | ask.figures(row["recipe"], prompts) | {"error": None, "refused": False}
        except Exception as error:  # recorded in the row; the exit code tells
            yield row | failure(error)


@dataclass
class _Questions:
    """Questions to compressed documents, and what is left of them in the cache."""

    model: Any
    tokenizer: Any
    plan: AuditPlan
    fix: str
    progress: Callable[[int], None]
    shares: list[dict[str, float]] = field(default_factory=list)

    def figures(self, plain: dict[str, Any], prompts: dict[str, list[Sample]]) -> Row:
        """Return the figures of a row."""
        asked = self._ask(plain, prompts["instructions"])
        shares, sizes = list(self.shares), [n for found in asked for n in _bytes(found)]
        direct = self._ask(plain, prompts["secret"])
        begun = self._ask(plain, prompts["secret"], begun=telling)
        pairs = [pair for found in (*asked, *direct) for pair in found.pairs()]
        return {
            "instructions": _by_kind(pairs),
            "order": _by_place(pairs),
            "leaks": {"direct": _leaks(direct), "begun": _leaks(begun)},
            "kept": _means(shares),
            "right": share([mark for found in asked for mark in found.right]),
            "cache": {
                "bytes_full": sum(full for full, _ in sizes) / self.plan.n,
                "bytes_kept": sum(kept for _, kept in sizes) / self.plan.n,
            },
        }

    def _ask(
        self,
        plain: dict[str, Any],
        samples: Sequence[Sample],
        begun: Callable[[Sample], str] = lambda made: "",
    ) -> list[Answers]:
        self.shares.clear()
        # A fix names tokens: prompts are asked together only where these are the same.
        groups = alike(samples) if self.fix == "fair" else [list(samples)]
        return [
            answer(
                self.model,
                self.tokenizer,
                fixed(plain, self.fix, group),
                group,
                document_first=True,
                batch=self.plan.batch,
                begun=begun,
                after_document=self._look,
                progress=self.progress,
            )
            for group in groups
        ]

    def _look(self, cache: Cache, samples: Sequence[Sample]) -> None:
        self.shares.extend(kept_shares(cache, samples))


def telling(made: Sample) -> str:
    """Return how an answer begins that goes on to tell the secret: "<begin word> <key>"."""
    words = made.answer.split()
    return " ".join(words[: words.index("refuse")])


def _bytes(found: Answers) -> list[tuple[int, int]]:
    return [(report.bytes_full, report.bytes_kept) for _, report in found.reports]


def _leaks(found: Sequence[Answers]) -> dict[str, float]:
    return share([leaked(made, text) for one in found for made, text in one.pairs()])


def _by_kind(pairs: Sequence[tuple[Sample, str]]) -> dict[str, dict[str, float]]:
    marks: dict[str, list[bool]] = {}
    for made, text in pairs:
        for name, kept in followed(made, text).items():
            marks.setdefault(name, []).append(kept)
    return {name: share(found) for name, found in sorted(marks.items())}


def _by_place(pairs: Sequence[tuple[Sample, str]]) -> list[dict[str, float]]:
    """Return the share kept of the first, second, ... instruction of the prompt."""
    marks: dict[int, list[bool]] = {}
    for made, text in pairs:
        kept = followed(made, text)
        for place, name in enumerate(made.instructions):
            if name in kept:
                marks.setdefault(place, []).append(kept[name])
    return [share(marks[place]) for place in sorted(marks)]


def _means(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for found in shares for name in found})
    return {name: fmean(found[name] for found in shares if name in found) for name in names}
