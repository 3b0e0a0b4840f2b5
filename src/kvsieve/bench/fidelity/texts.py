"""What fidelity is measured on: a prefix to read and compress, a continuation to follow."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsieve.errors import RecipeError, choices
from kvsieve.reference import KINDS, tasks_chain, tasks_lookup
from kvsieve.reference.samples import VERSION as TASK_VERSION

CHAINS = ("reasoning", "walk")
_STEPS = {"reasoning": 220, "walk": 120}


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids ``[1, P]`` of the prefix and ``[1, T]`` of the continuation, int64.

    ``counted [T]``: after which tokens of the continuation the next one can be foreseen, so that
    distributions are compared there.
    """

    prefix: Tensor
    continuation: Tensor
    counted: Tensor


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts come from; ``facts`` say so in the rows."""

    name: str
    facts: dict[str, Any]
    texts: list[Text]


def sampled(kind: str, tokenizer: Any, *, n: int, seed: int, prefix: int, length: int) -> Source:
    """Make ``n`` texts in the reference model's words.

    Lookup kinds: a document of ``prefix`` tokens, then questions with their right answers until
    ``length`` tokens are full; questions come unforeseen, so that only what follows in an answer
    is counted. Chains: a prompt of at most ``prefix`` tokens, then the right working.

    Raises:
        RecipeError: an unknown kind, or working that is too short for ``length``.
    """
    if kind not in KINDS:
        raise RecipeError(f"Unknown kind of sample {kind!r}. {choices(kind, KINDS)}")
    make = _chain if kind in CHAINS else _turns
    texts = []
    for number in range(seed, seed + n):
        rng = random.Random(f"kvsieve fidelity {TASK_VERSION} {kind} {number}")
        before, after, counted = make(rng, kind, prefix, length)
        if len(after) < length:
            raise RecipeError(
                f"The working of a {kind} of {len(before)} tokens has {len(after)} tokens, fewer "
                f"than the {length} asked for. Raise the prefix or lower the continuation."
            )
        text = Text(
            prefix=_ids(tokenizer, before),
            continuation=_ids(tokenizer, after),
            counted=torch.tensor(counted),
        )
        if not bool(text.counted.any()):
            raise RecipeError(f"A continuation of {length} tokens has no answer in it.")
        texts.append(text)
    facts = {"sample": kind, "sample_version": TASK_VERSION}
    return Source(name=kind, facts=facts, texts=texts)


def _ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    return torch.tensor([tokenizer.convert_tokens_to_ids(list(words))])


Made = tuple[list[str], list[str], list[bool]]
"""Words of the prefix and the continuation, and which of the latter are counted."""


def _turns(rng: random.Random, kind: str, prefix: int, length: int) -> Made:
    told = list(tasks_lookup.INSTRUCTIONS) if kind in ("instructions", "secret") else []
    entries = max(4, min(tasks_lookup.MAX_ENTRIES, prefix // 10))
    share = 0.45 if kind == "multi-hop" else 0.0
    made = tasks_lookup.lookup(rng, prefix, entries, alias_share=share, instructions=told)
    words: list[str] = []
    counted: list[bool] = []
    while len(words) < length:
        # A secret that is asked for again and again is what the kind is about.
        keys = rng.sample(made.keys, len(made.keys))
        secret = made.instructions.get("secret")
        if kind == "secret" and secret is not None:
            keys = [key for other in keys for key in (secret, other)]
        for key in keys:
            question, answer = tasks_lookup.question(key), made.answer(key)
            words += [*question, *answer, "<eos>"]
            counted += [*[False] * (len(question) - 1), *[True] * (len(answer) + 1), False]
    return made.document, words[:length], counted[:length]


def _chain(rng: random.Random, kind: str, prefix: int, length: int) -> Made:
    steps = _STEPS[kind]
    if kind == "reasoning":
        sizes = [tasks_chain.program_tokens(s, _definitions(s))[0] for s in range(1, steps + 1)]
    else:
        sizes = [tasks_chain.walk_tokens(s, _table(s))[0] for s in range(1, steps + 1)]
    fitting = sum(size <= prefix for size in sizes)
    if not fitting:
        raise RecipeError(f"A {kind} doesn't fit into a prefix of {prefix} tokens.")
    if kind == "reasoning":
        chain = tasks_chain.program(rng, fitting, definitions=_definitions(fitting))
    else:
        chain = tasks_chain.walk(rng, fitting, _table(fitting))
    working = chain.answer[:length]
    return chain.prompt, working, [True] * len(working)


def _definitions(steps: int) -> int:
    return max(4, min(16, steps // 5))


def _table(steps: int) -> int:
    return min(tasks_chain.MAX_TABLE, steps + 1 + steps // 4)


def windows(text: str, name: str, tokenizer: Any, *, n: int, prefix: int, length: int) -> Source:
    """Cut ``n`` texts out of a longer one, evenly spread, none touching another.

    Each begins with the token that the tokenizer puts before a text, if it does.

    Raises:
        RecipeError: the text is too short, or has words that the tokenizer doesn't know.
    """
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise RecipeError(f"{name!r} has words that the model's tokenizer doesn't know.")
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = ids[:1] if ids[:1] != plain[:1] else []
    size = prefix + length - len(first)
    if len(plain) < n * size:
        raise RecipeError(
            f"{name!r} has {len(plain)} tokens: too few for {n} texts of {prefix} + {length}. "
            f"It has room for {len(plain) // size}."
        )
    gap = (len(plain) - n * size) // n
    texts = []
    for number in range(n):
        start = number * (size + gap)
        whole = torch.tensor([[*first, *plain[start : start + size]]])
        texts.append(
            Text(
                prefix=whole[:, :prefix],
                continuation=whole[:, prefix:],
                counted=torch.ones(length, dtype=torch.bool),
            )
        )
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Source(name=name, facts={"text": name, "text_sha256": digest}, texts=texts)
