"""One cell answered by kvpress: the same prompts, token ids and slots as here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from kvsieve.bench.intervals import paired_difference
from kvsieve.bench.quality.answers import Answers
from kvsieve.bench.quality.plan import DECODE_INTERVAL
from kvsieve.bench.remote import Peer
from kvsieve.budget import Budget
from kvsieve.errors import RecipeError
from kvsieve.reference import Sample
from kvsieve.reference.grading import depth, right_prefix


def slots(budget: str | None, length: int, token_bytes: int) -> int:
    """Return the slots per head that a budget leaves of ``length`` tokens.

    ``token_bytes``: keys and values of one token over all heads and layers.

    Raises:
        RecipeError: bytes that don't hold one slot in each head.
    """
    if budget is None:
        return length
    asked = Budget.parse(budget)
    if asked.kind == "slots":
        held = int(asked.value)
    elif asked.kind == "fraction":
        held = max(1, int(length * asked.value + 1e-9))
    else:
        held = int(asked.value) // token_bytes
    if held < 1:
        raise RecipeError(f"A budget of {budget} doesn't hold one slot in each head.")
    return min(held, length)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the peer answered, graded as our own answers are, and what each prompt cost."""

    answers: Answers
    costs: list[dict[str, Any]] = field(default_factory=list)

    def figures(self, full: Answered) -> dict[str, Any]:
        """Return the figures of a row, beside those of the stock cache on the same prompts.

        What kvpress doesn't show, the peak and the seconds of compression, is None.
        """
        spent = sum(cost["seconds"]["decode"] for cost in self.costs)
        steps = sum(len(cost["tokens"]) - 1 for cost in self.costs)
        answers = self.answers
        return {
            "metric": "exact",
            **answers.score(),
            "prefix": fmean(right_prefix(made, text) for made, text in answers.pairs()),
            "details": answers.details(),
            "depth": [place for place in map(depth, answers.samples) if place is not None],
            "full": full.answers.score(),
            "difference": paired_difference(answers.right, full.answers.right),
            "cache": {
                "bytes_full": fmean(cost["bytes_full"] for cost in self.costs),
                "bytes_kept": fmean(cost["bytes_kept"] for cost in self.costs),
                "bytes_peak": None,
            },
            "seconds": {
                "prefill": fmean(cost["seconds"]["prefill"] for cost in self.costs),
                "decode": fmean(cost["seconds"]["decode"] for cost in self.costs),
                "compress": None,
            },
            "tokens_per_second": steps / spent if spent else None,
            "press": self.costs[0]["press"],
        }


@dataclass(kw_only=True)
class Asking:
    """A peer that is to hold the model in the folder ``at``; ``token_bytes``: see slots.

    ``ends``: ids that end an answer, once the model is open.
    """

    peer: Peer
    at: Path
    tokenizer: Any
    token_bytes: int
    ends: list[int] = field(default_factory=list)

    def open(self) -> None:
        """Have the model open, in a new process if the last one ended."""
        if not self.peer.alive:
            self.peer.restart()
            self.ends = []
        if not self.ends:
            told = self.peer.ask("open", folder=str(self.at), dtype="float32", device="cpu")
            self.ends = told["ends"]

    def answers(
        self,
        method: str | None,
        budget: str | None,
        samples: Sequence[Sample],
        setting: str,
        progress: Callable[[], None] = lambda: None,
        length: int | None = None,
    ) -> Answered:
        """Let the peer answer every sample greedily; ``method`` None: with the stock cache.

        With "query-agnostic" the document alone is read under the press, with "query-aware" the
        whole prompt; with "decode" the press acts while the answer is written, and a share of a
        budget is one of ``length`` tokens.

        Raises:
            PeerError: it failed there; the message is the peer's.
        """
        self.open()
        found = Answered(answers=Answers(samples=samples))
        for sample in samples:
            text, cost = self._answer(method, budget, sample, setting, length)
            found.answers.texts.append(text)
            found.costs.append(cost)
            progress()
        return found

    def _answer(
        self,
        method: str | None,
        budget: str | None,
        sample: Sample,
        setting: str,
        length: int | None,
    ) -> tuple[str, dict[str, Any]]:
        prompt = self._ids(sample.prompt)
        read = len(prompt)
        if setting == "query-agnostic":
            assert sample.document is not None, "only lookup tasks have this setting"
            read = len(self._ids(sample.document))
        cost = self.peer.ask(
            "answer",
            prompt=prompt,
            read=read,
            method=method,
            slots=slots(budget, length or read, self.token_bytes),
            interval=DECODE_INTERVAL if setting == "decode" else None,
            limit=sample.answer_tokens + 1,
            ends=self.ends,
            seed=sample.seed,
        )
        # The last token that came out has not been fed.
        seen = len(prompt) + len(cost["tokens"]) - 1
        text = self.tokenizer.decode(cost["tokens"], skip_special_tokens=True)
        return text, cost | {"bytes_full": seen * self.token_bytes}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
