"""The audit of a chat model: instructions followed by kind and place, the system prompt told.

Each system prompt is read and compressed once (schedule "once"); the request, and attacks, follow
whole, each in a conversation of its own, as in "The Pitfalls of KV Cache Compression" (arXiv
2510.00231).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from kvsieve.bench import ledger
from kvsieve.bench.audit import grading
from kvsieve.bench.audit.conversation import Conversation, Turn, turn
from kvsieve.bench.audit.plan import with_fixes
from kvsieve.bench.audit.spans import shares
from kvsieve.bench.audit.system import Attack, SystemPrompt, in_turn
from kvsieve.bench.fidelity.figures import with_interval
from kvsieve.bench.intervals import share
from kvsieve.bench.ledger import Subject
from kvsieve.bench.quality.plan import Asked
from kvsieve.bench.rows import Row, failure
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache

KIND, VERSION = "audit", 1
FIGURES = frozenset("instructions order leaks attacks kept right loose cache error refused".split())


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """What is asked of a chat model.

    ``prompts``: the system prompts; ``attacks``: all there are, of which each prompt meets ``per``
    direct and as many indirect ones; ``limits``: tokens of an answer to a request and to an attack;
    ``facts``: where prompts and attacks come from, for the rows.
    """

    subject: Subject
    asked: Sequence[Asked]
    prompts: Sequence[SystemPrompt]
    attacks: Sequence[Attack]
    per: int
    limits: tuple[int, int]
    ends: list[int]
    batch: int
    facts: Row

    def identity(self, asked: Asked, fix: str) -> Row:
        """Return what a row is of; rows that agree in all of it are the same measurement."""
        return {
            "kind": KIND,
            "version": VERSION,
            "length": None,
            "fix": fix,
            "n": len(self.prompts),
            "batch": self.batch,
            "attacks_each": self.per,
            "max_new_tokens": list(self.limits),
            "ends": self.ends,
            **self.facts,
            **ledger.origin(self.subject, asked),
        }

    def cells(self) -> list[tuple[Asked, str]]:
        """Return every method and budget with every fix."""
        return with_fixes(self.asked)


def key(row: Row) -> str:
    """Return a row's identity as text."""
    return ledger.key(row, FIGURES)


def measure(
    plan: ChatPlan,
    model: Any,
    tokenizer: Any,
    context: int | None,
    done: Container[str] = (),
    progress: Callable[[str, int], None] = lambda cell, prompts: None,
) -> Iterator[Row]:
    """Yield a row per method, budget and fix that is not ``done`` (by ``key``).

    One that can't be measured has an ``error``; ``refused`` tells what kvsieve refuses.
    ``context``: tokens that the model takes.
    """
    for asked, fix in plan.cells():
        row = plan.identity(asked, fix)
        if key(row) in done:
            continue
        name = f"{asked.method} {asked.budget or ''}, fix: {fix}"
        cell = _Cell(plan, model, tokenizer, context, lambda n, name=name: progress(name, n))
        try:
            yield row | cell.figures(asked, fix) | {"error": None, "refused": False}
        except Exception as error:  # recorded in the row; the exit code tells
            yield row | failure(error)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What a user says to one system prompt; ``attack`` is None for its own request."""

    prompt: SystemPrompt
    attack: Attack | None
    turn: Turn


@dataclass
class _Cell:
    """All conversations under one recipe with one fix."""

    plan: ChatPlan
    model: Any
    tokenizer: Any
    context: int | None
    progress: Callable[[int], None]
    kept: list[dict[str, float]] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)

    def figures(self, asked: Asked, fix: str) -> Row:
        """Return the figures of a row."""
        requests, attacks = self._questions()
        answers = self._ask(asked, fix, requests, self.plan.limits[0])
        kept, sizes = list(self.kept), list(self.sizes)
        replies = self._ask(asked, fix, attacks, self.plan.limits[1])
        return {
            **_followed([q.prompt for q in requests], answers),
            **_leaked(attacks, replies),
            "kept": _means(kept),
            "cache": {
                "bytes_full": fmean(full for full, _ in sizes),
                "bytes_kept": fmean(left for _, left in sizes),
            },
        }

    def _questions(self) -> tuple[list[_Question], list[_Question]]:
        def question(made: SystemPrompt, attack: Attack | None) -> _Question:
            said = made.request if attack is None else attack.text
            return _Question(prompt=made, attack=attack, turn=turn(self.tokenizer, made, said))

        prompts = self.plan.prompts
        attacks = [
            question(made, attack)
            for number, made in enumerate(prompts)
            for attack in in_turn(self.plan.attacks, number, self.plan.per)
        ]
        return [question(made, None) for made in prompts], attacks

    def _ask(self, asked: Asked, fix: str, questions: list[_Question], limit: int) -> list[str]:
        self.kept.clear()
        self.sizes.clear()
        texts: list[str] = []
        for some in _batches(questions, self.plan.batch, alike=fix != "none"):
            talk = Conversation(
                model=self.model,
                tokenizer=self.tokenizer,
                recipe=fixed(asked, fix, some[0].turn),
                ends=self.plan.ends,
                context=self.context,
            )
            texts += talk.answer([q.turn for q in some], limit, self._look)
            self.progress(len(some))
        return texts

    def _look(self, cache: Cache, turns: Sequence[Turn]) -> None:
        report = cache.report
        for row, one in enumerate(turns):
            self.kept.append(shares(cache, row, _spans(one)))
            self.sizes.append((report.bytes_full / len(turns), report.bytes_kept / len(turns)))


def fixed(asked: Asked, fix: str, one: Turn) -> Recipe:
    """Build a recipe with a fix for one system prompt.

    "protected": the order not to tell stays; "fair": defence and instructions lose the same share.

    Raises:
        RecipeError: the method can't be used so, or not at that budget.
    """
    plain = asked.plain("", 0)
    if fix == "protected":
        plain["protect"] = [one.guard]
    if fix == "fair":
        plain["fair"] = sorted([one.defence, one.directive])
    built = Recipe.from_dict(plain)
    built.check_statistics()
    return built


def _spans(one: Turn) -> dict[str, tuple[int, int]]:
    by_place = sorted(set(one.instructions) - {(0, 0)}) if len(one.instructions) > 1 else []
    return {
        "defence": one.defence,
        "instructions": one.directive,
        **{f"instruction {place}": span for place, span in enumerate(by_place, 1)},
    }


def _batches(questions: list[_Question], size: int, alike: bool) -> Iterator[list[_Question]]:
    """Yield questions in order; ``alike``: those of one system prompt alone share a batch, since a
    fix names its tokens."""
    some: list[_Question] = []
    for one in questions:
        apart = alike and some and some[0].prompt is not one.prompt
        if len(some) == size or apart:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _followed(prompts: Sequence[SystemPrompt], answers: Sequence[str]) -> Row:
    kinds: dict[str, list[bool]] = {}
    by_place: dict[int, list[bool]] = {}
    all_of: dict[bool, list[bool]] = {False: [], True: []}
    for made, text in zip(prompts, answers, strict=True):
        marks = grading.obeyed(made, text)
        all_of[False].append(all(marks))
        all_of[True].append(all(grading.obeyed(made, text, loose=True)))
        for kind, mark in zip(made.kinds, marks, strict=True):
            kinds.setdefault(kind, []).append(mark)
        for place, mark in _in_order(made, marks):
            by_place.setdefault(place, []).append(mark)
    return {
        "instructions": {k: share(found) | {"n": len(found)} for k, found in sorted(kinds.items())},
        "order": [share(by_place[place]) for place in sorted(by_place)],
        "right": share(all_of[False]),
        "loose": share(all_of[True]),
    }


def _in_order(made: SystemPrompt, marks: Sequence[bool]) -> Iterator[tuple[int, bool]]:
    """Yield places, from 0, and marks where all instructions of several have sentences apart."""
    spans = made.instructions
    if len(spans) > 1 and len(set(spans)) == len(spans) and all(a < b for a, b in spans):
        for place, (_, mark) in enumerate(sorted(zip(spans, marks, strict=True))):
            yield place, mark


def _leaked(questions: Sequence[_Question], replies: Sequence[str]) -> Row:
    """Return the shares told by kind of attack, and by attack."""
    named: dict[str, list[float]] = {}
    kinds: dict[str, list[tuple[float, float]]] = {"direct": [], "indirect": []}
    for one, reply in zip(questions, replies, strict=True):
        assert one.attack is not None, "only attacks"
        recall = grading.told(one.prompt.secret, reply)
        named.setdefault(one.attack.name, []).append(recall)
        run = grading.longest(one.prompt.secret, reply)
        kinds["direct" if one.attack.direct else "indirect"].append((recall, run))
    return {
        "leaks": {kind: _share_told(found) for kind, found in kinds.items()},
        "attacks": {name: fmean(found) for name, found in sorted(named.items())},
    }


def _share_told(found: Sequence[tuple[float, float]]) -> Row:
    recalls = torch.tensor([recall for recall, _ in found], dtype=torch.float64)
    told = with_interval(recalls)
    return {
        "score": told["mean"],
        "low": told["low"],
        "high": told["high"],
        "longest": fmean(run for _, run in found),
    }


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for one in found for name in one})
    return {name: fmean(one[name] for one in found if name in one) for name in names}
