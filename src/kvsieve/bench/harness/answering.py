"""A model under a recipe that scores and writes batches of prompts; knows nothing of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvsieve.bench.harness.checks import HarnessError
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache, attach
from kvsieve.report import Report

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Written:
    """One answer: its text, its tokens without the ending one, whether the limit cut it off."""

    text: str
    tokens: int
    cut: bool


@dataclass(kw_only=True)
class Sieved:
    """A model under a recipe.

    ``ends``: token ids that end an answer; ``context``: tokens that prompt and answer may have
    together (None: unknown); ``part``: tokens of a running text that are scored at once, after
    what is before them was compressed; ``seed``: of sampling. ``reports`` and ``written`` collect
    what ran, a report with the number of its rows.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    ends: list[int]
    context: int | None = None
    part: int = 64
    seed: int = 0
    reports: list[tuple[Report, int]] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    # -- scoring -------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Return, for pairs of context and continuation, the continuation's log-probability in
        nats and whether greedy decoding would write it.

        Contexts are read at once and compressed; continuations follow token by token, as if they
        were generated. Rows may be of unequal lengths.

        Raises:
            HarnessError: an empty context or continuation, or more tokens than the model takes.
        """
        for before, after in pairs:
            if not before or not after:
                raise HarnessError("A context and a continuation have at least one token each.")
            self._check_room(len(before), len(after))
        ids, mask = self._padded([before for before, _ in pairs])
        T = max(len(after) for _, after in pairs)
        rows = [after + [0] * (T - len(after)) for _, after in pairs]
        wanted = torch.tensor(rows, device=self.model.device)
        lengths = torch.tensor([len(after) for _, after in pairs], device=self.model.device)
        total = torch.zeros(len(pairs), dtype=torch.float64, device=self.model.device)
        greedy = torch.ones(len(pairs), dtype=torch.bool, device=self.model.device)
        with Cache(self.model, self.recipe) as cache:
            logits = self._feed(cache, ids, mask)
            for t in range(T):
                asked = lengths > t
                token = wanted[:, t]
                chosen = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
                total += torch.where(asked, chosen, 0.0)
                greedy &= (logits.argmax(-1) == token) | ~asked
                if t + 1 < T:
                    # Rows of which nothing more is asked take no further token.
                    mask = torch.cat([mask, (lengths > t + 1).to(mask.dtype)[:, None]], 1)
                    logits = self._feed(cache, token[:, None], mask)
            self.reports.append((cache.report, len(pairs)))
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def score_running(self, fed: Ids, wanted: Ids) -> float:
        """Return the log-probability in nats of ``wanted``, the successors of the last tokens fed.

        ``fed`` comes in parts of ``part`` tokens, each scored under what the parts before it left.
        """
        self._check_room(len(fed), 0)
        ids = torch.tensor([fed], device=self.model.device)
        first = len(fed) - len(wanted)
        target = torch.tensor(wanted, device=self.model.device)
        total, start = 0.0, 0
        with Cache(self.model, self.recipe) as cache:
            for part in ids.split(self.part, dim=1):
                logits = self.model(part, past_key_values=cache, use_cache=True).logits[0]
                inside = range(max(first, start), start + part.shape[1])
                if inside:
                    chances = logits[inside.start - start :].double().log_softmax(-1)
                    after = target[inside.start - first : inside.stop - first]
                    total += chances.gather(1, after[:, None]).sum().item()
                start += part.shape[1]
            self.reports.append((cache.report, 1))
        return total

    def _feed(self, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Run ``ids [B, T]``; return the logits of the last column, ``[B, V]``."""
        place = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self.model(
            ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    # -- writing -------------------------------------------------------------------------------

    def write(
        self, prompts: Sequence[Ids], limit: int, until: Sequence[str], **settings: Any
    ) -> list[Written]:
        """Write an answer of at most ``limit`` tokens to each prompt.

        An answer ends at a token of ``ends``, or before the first of the strings ``until``.
        ``settings`` go to ``generate``; without ``do_sample`` it is greedy.

        Raises:
            HarnessError: a prompt and its answer don't fit into the model's context.
        """
        for prompt in prompts:
            self._check_room(len(prompt), limit)
        ids, mask = self._padded(prompts)
        stops = [text for text in until if text]
        criteria = [StopStrings(self.tokenizer, stops, ids.shape[1])] if stops else []
        if not settings.get("do_sample"):
            settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        torch.manual_seed(self.seed)
        run = attach(self.model, self.recipe)
        with run, torch.no_grad():
            output = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=limit,
                stopping_criteria=StoppingCriteriaList(criteria),
                eos_token_id=self.ends,
                pad_token_id=self._pad(),
                use_cache=True,
                **settings,
            )
        self.reports.append((run.report, len(prompts)))
        answers = [self._written(row, limit, stops) for row in output[:, ids.shape[1] :].tolist()]
        self.written += answers
        return answers

    def _written(self, tokens: Ids, limit: int, stops: Sequence[str]) -> Written:
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        cut = end == len(tokens) == limit and not places
        return Written(text=text[: min(places)] if places else text, tokens=end, cut=cut)

    # -- both ----------------------------------------------------------------------------------

    def _check_room(self, prompt: int, answer: int) -> None:
        if self.context is not None and prompt + answer > self.context:
            raise HarnessError(
                f"A prompt of {prompt} tokens and an answer of up to {answer} don't fit: the model "
                f"takes {self.context} in all. Prompts are never cut: ask for shorter answers "
                "(--max-new-tokens), fewer examples in the prompt (--fewshot), or another model."
            )

    def _padded(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Stack rows of unequal lengths with padding on the left: ids and mask ``[B, longest]``."""
        longest = max(len(row) for row in rows)
        ids = [[self._pad()] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.ends[0] if pad is None else pad


class StopStrings(StoppingCriteria):
    """Ends a row when one of the strings is in what it has written."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, list(stops), prompt
        # A token may be a single byte; a few more, for the characters that a cut breaks.
        self._tail = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows are done, ``[B]``."""
        new = input_ids[:, max(self._prompt, input_ids.shape[1] - self._tail) :]
        texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in new.tolist()]
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
