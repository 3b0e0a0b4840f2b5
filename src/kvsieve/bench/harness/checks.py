"""What is found out about a model and its tokenizer before anything runs."""

from __future__ import annotations

import hashlib
from typing import Any

from kvsieve.errors import KVSieveError

_MARK = "kvsieve-mark"


class HarnessError(KVSieveError, ValueError):
    """A model, task or data file that a public benchmark can't be run with."""


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that the model has an embedding for every token of the tokenizer.

    Raises:
        HarnessError: it hasn't: the two don't belong together.
    """
    rows = model.get_input_embeddings().num_embeddings
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise HarnessError(
            f"The tokenizer knows token {highest} ({token!r}), but the model has {rows} "
            "embeddings: they don't belong together. Give the model the tokenizer that it was "
            "trained with."
        )


def check_template(tokenizer: Any, name: str) -> None:
    """Check that there is a chat template.

    Raises:
        HarnessError: there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise HarnessError(
            f"{name} has no chat template: use the instruction-tuned model (or leave out --chat, "
            "where there is one)."
        )


def template_hash(tokenizer: Any) -> str:
    """Return a short hash of the chat template, to tell versions of it apart in rows."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def end_tokens(model: Any, tokenizer: Any, chat: bool) -> list[int]:
    """Return the ids that end an answer: the model's, the tokenizer's and, with a chat template,
    the token by which the template itself ends an assistant's turn.

    Raises:
        HarnessError: there are none, so that answers would only end at their limit.
    """
    given = model.generation_config.eos_token_id
    found = [] if given is None else given if isinstance(given, list) else [given]
    found = [*found, tokenizer.eos_token_id, _turn_end(tokenizer) if chat else None]
    ends = sorted({token for token in found if token is not None})
    if not ends:
        raise HarnessError("Neither model nor tokenizer says which token ends an answer.")
    return ends


def _turn_end(tokenizer: Any) -> int | None:
    """Return the added token that the chat template puts right after an assistant's words."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = text.rpartition(_MARK)[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
