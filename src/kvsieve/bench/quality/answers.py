"""Answers to a task's prompts under one recipe, several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvsieve.bench.intervals import paired_difference, share
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache
from kvsieve.reference import Sample
from kvsieve.reference.grading import depth, followed, leaked, right_prefix
from kvsieve.report import Report

AfterDocument = Callable[[Cache, Sequence[Sample]], None]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came out: the text for every prompt, and the report of every batch with its size."""

    samples: Sequence[Sample]
    texts: list[str] = field(default_factory=list)
    reports: list[tuple[int, Report]] = field(default_factory=list)

    @property
    def right(self) -> list[int]:
        """Which answers are exactly right, as 1 and 0."""
        return [int(made.grade(text)) for made, text in self.pairs()]

    def pairs(self) -> Iterator[tuple[Sample, str]]:
        """Yield prompts with their answers."""
        return zip(self.samples, self.texts, strict=True)

    def score(self) -> dict[str, Any]:
        """Return the share right with its interval, and which were."""
        return {**share(self.right), "right": self.right}

    def figures(self, full: Answers) -> dict[str, Any]:
        """Return the figures of a row, beside those of the full cache on the same prompts."""
        sizes = ("bytes_full", "bytes_kept", "bytes_peak")
        phases = ("prefill", "decode", "compress")
        return {
            "metric": "exact",
            **self.score(),
            "prefix": fmean(right_prefix(made, text) for made, text in self.pairs()),
            "details": self.details(),
            "depth": [place for place in map(depth, self.samples) if place is not None],
            "full": full.score(),
            "difference": paired_difference(self.right, full.right),
            "cache": {name: self._per_prompt(lambda r, n=name: getattr(r, n)) for name in sizes},
            "seconds": {name: self._per_prompt(lambda r, n=name: r.seconds[n]) for name in phases},
            "tokens_per_second": self._rate(),
        }

    def details(self) -> dict[str, float]:
        """Return the share of answers that keep each instruction, and that tell a secret."""
        marks: dict[str, list[bool]] = {}
        for made, text in self.pairs():
            for name, kept in followed(made, text).items():
                marks.setdefault(name, []).append(kept)
            if made.forbidden:
                marks.setdefault("leaked", []).append(leaked(made, text))
        return {name: fmean(found) for name, found in sorted(marks.items())}

    def _per_prompt(self, figure: Callable[[Report], float]) -> float:
        return sum(figure(report) for _, report in self.reports) / len(self.samples)

    def _rate(self) -> float | None:
        """Return decoded tokens of all prompts of a batch per second."""
        spent = sum(report.seconds["decode"] for _, report in self.reports)
        return sum(n * report.decode_steps for n, report in self.reports) / spent if spent else None


def answer(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    samples: Sequence[Sample],
    *,
    document_first: bool = False,
    batch: int = 1,
    begun: Callable[[Sample], str] = lambda made: "",
    after_document: AfterDocument = lambda cache, samples: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Answer every sample greedily under a recipe, ``batch`` of them at once.

    ``document_first``: the document is read and compressed before the question comes, which is a
    later turn under the same recipe; ``after_document`` may then look at the cache. ``begun``: the
    beginning of the answer that is put in the model's mouth. ``progress``: told how many prompts
    were answered since it was last called.

    Raises:
        BudgetError: the budget is too small for a prompt.
        EngineError, UnsupportedSignal: the model can't be compressed that way.
    """
    found = Answers(samples=samples)
    for start in range(0, len(samples), batch):
        some = samples[start : start + batch]
        with Cache(model, recipe) as cache:
            if document_first:
                _read(model, tokenizer, cache, some)
                after_document(cache, some)
            found.texts.extend(_generate(model, tokenizer, cache, some, begun))
            found.reports.append((len(some), cache.report))
        progress(len(some))
    return found


@torch.no_grad()
def _read(model: Any, tokenizer: Any, cache: Cache, samples: Sequence[Sample]) -> None:
    documents = [made.document for made in samples]
    assert all(documents), "only lookup tasks have a document"
    tails = {len(tokenizer(made.prompt).input_ids) - len(tokenizer(made.document).input_ids)
             for made in samples}  # fmt: skip
    assert len(tails) == 1, "questions of one length, so that padding stays on the left"
    ids, mask = _padded(model, tokenizer, documents)
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    samples: Sequence[Sample],
    begun: Callable[[Sample], str],
) -> list[str]:
    ids, mask = _padded(model, tokenizer, [made.prompt + begun(made) for made in samples])
    output = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max(made.answer_tokens for made in samples) + 1,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [
        f"{begun(made)} {tokenizer.decode(row, skip_special_tokens=True)}"
        for made, row in zip(samples, output[:, ids.shape[1] :], strict=True)
    ]


def _padded(model: Any, tokenizer: Any, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    made = tokenizer(
        list(texts), return_tensors="pt", padding=True, padding_side="left",
        add_special_tokens=False,
    )  # fmt: skip
    return made.input_ids.to(model.device), made.attention_mask.to(model.device)
