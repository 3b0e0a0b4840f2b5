"""One generation under one recipe, streamed and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvsieve
from kvsieve.cli.guard import working
from kvsieve.compose import Recipe
from kvsieve.report import Report


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run wrote and what it cost."""

    text: str
    prompt_tokens: int
    new_tokens: int
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values of `kvsieve run --json`; a part of the public interface."""
        measured = self.report.to_dict()
        rows, chosen = measured["cache"]["slots"], measured["chosen"]
        return {
            "version": 1,
            "text": self.text,
            "method": self.report.method,
            "budget": self.report.budget,
            "chosen": chosen[0] if chosen else None,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.report.tokens_per_second,
            "seconds": measured["seconds"],
            "cache": {**measured["cache"], "slots": rows[0] if rows else []},
        }


class Streamer:
    """Receives token ids from `generate`; hands on each piece of text once it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self._ids: list[int] | None = None
        # Text up to `_done` is out; decoding starts a little before it, so that spaces come right.
        self._start = self._done = 0

    def put(self, ids: Tensor) -> None:
        """Take the prompt (first call) or new tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        piece = "" if after.endswith("\N{REPLACEMENT CHARACTER}") else after[len(before) :]
        if piece:
            self._start, self._done = self._done, len(self._ids)
        self.on_text(piece)

    def end(self) -> None:
        """Hand on what was held back."""
        ids = self._ids or []
        before = self._decode(ids[self._start : self._done])
        self.on_text(self._decode(ids[self._start :])[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def generate(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None],
) -> Outcome:
    """Generate once.

    Raises:
        EngineError, UnsupportedSignal: the model can't be compressed that way.
        BudgetError: the budget is too small for this prompt.
        Failed: it went wrong on the way.
    """
    run = kvsieve.attach(model, recipe)
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    with working(), run:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=Streamer(tokenizer, on_text),
            use_cache=True,
            pad_token_id=_pad(model),
            **_sampling(temperature),
        )
    new = output[0, ids.shape[1] :]
    return Outcome(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        report=run.report,
    )


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _pad(model: Any) -> int | None:
    config = model.generation_config
    end = config.eos_token_id
    if config.pad_token_id is not None:
        return config.pad_token_id
    return end[0] if isinstance(end, list) else end
