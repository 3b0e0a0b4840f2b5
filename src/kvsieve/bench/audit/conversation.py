"""A chat model whose system prompt is compressed once, before the user's turn is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvsieve.bench.audit.places import Span
from kvsieve.bench.audit.system import SystemPrompt
from kvsieve.bench.harness.answering import Sieved
from kvsieve.bench.harness.checks import HarnessError
from kvsieve.engines.transformers import Cache


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A conversation up to the answer, as token ids; the first ``document`` are the system's.

    Spans are tokens.
    """

    ids: list[int]
    document: int
    defence: Span
    guard: Span
    directive: Span
    instructions: tuple[Span, ...]


def turn(tokenizer: Any, made: SystemPrompt, request: str) -> Turn:
    """Return the conversation of a system prompt and a request, through the chat template.

    Where the template has a switch for thinking, it is off. Token spans hold every token that has
    a part of the characters.

    Raises:
        HarnessError: the template takes no system prompt or changes it, or the tokenizer can't
            tell where its tokens stand.
    """
    text = _rendered(tokenizer, made.text, request)
    place = text.find(made.text)
    if place < 0:
        raise HarnessError("The chat template changes the system prompt: it can't be audited.")
    if not tokenizer.is_fast:
        raise HarnessError("The tokenizer can't tell where tokens stand: a fast one is needed.")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = coded["offset_mapping"]

    def tokens(span: Span) -> Span:
        start, end = place + span[0], place + span[1]
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    return Turn(
        ids=coded["input_ids"],
        document=tokens((0, len(made.text)))[1],
        defence=tokens(made.defence),
        guard=tokens(made.guard),
        directive=tokens(made.directive),
        instructions=tuple(tokens(span) for span in made.instructions),
    )


def _rendered(tokenizer: Any, system: str, request: str) -> str:
    from jinja2 import TemplateError

    said = [{"role": "system", "content": system}, {"role": "user", "content": request}]
    try:
        return tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except TemplateError as error:
        raise HarnessError(f"The chat template takes no system prompt: {error}") from error


Look = Callable[[Cache, Sequence[Turn]], None]


@dataclass(kw_only=True)
class Conversation(Sieved):
    """A model that reads a system prompt under a recipe, then answers the user."""

    @torch.no_grad()
    def answer(self, turns: Sequence[Turn], limit: int, look: Look) -> list[str]:
        """Return greedy answers of at most ``limit`` tokens; ``look`` sees the cache in between.

        Rows may be of unequal lengths.

        Raises:
            HarnessError: a conversation and its answer don't fit into the model's context.
        """
        for one in turns:
            self._check_room(len(one.ids), limit)
        first, mask = self._padded([one.ids[: one.document] for one in turns])
        rest, more = self._padded([one.ids[one.document :] for one in turns])
        with Cache(self.model, self.recipe) as cache:
            self._feed(cache, first, mask)
            look(cache, turns)
            ids = torch.cat([first, rest], 1)
            output = self.model.generate(
                ids,
                attention_mask=torch.cat([mask, more], 1),
                past_key_values=cache,
                max_new_tokens=limit,
                eos_token_id=self.ends,
                pad_token_id=self._pad(),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        rows = output[:, ids.shape[1] :].tolist()
        return [self._written(row, limit, ()).text for row in rows]
