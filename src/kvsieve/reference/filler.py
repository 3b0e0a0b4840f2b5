"""Sentences that carry no information, and the mixing of them with what a task has to say."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvsieve.reference.vocabulary import FILLER

Words = list[str]

_RECURRING = 0.6
"""Share of the sentences that come from the recurring ones."""


def _sentence(rng: random.Random, words: int) -> Words:
    """A sentence of `words` words and a full stop; a few words are frequent, as in a language."""
    ranks = [min(int(rng.expovariate(1 / 14)), len(FILLER) - 1) for _ in range(words)]
    return [*(FILLER[rank] for rank in ranks), "."]


def _recurring_sentences() -> list[Words]:
    rng = random.Random(11)
    return [_sentence(rng, rng.randint(5, 9)) for _ in range(24)]


_SENTENCES = _recurring_sentences()


def sentences(rng: random.Random, tokens: int) -> list[Words]:
    """Sentences of exactly `tokens` tokens together; the last one is cut short where it must be."""
    found: list[Words] = []
    left = tokens
    while left > 0:
        if rng.random() < _RECURRING:
            sentence = rng.choice(_SENTENCES)
        else:
            sentence = _sentence(rng, rng.randint(4, 9))
        if len(sentence) > left:
            sentence = [*sentence[: left - 1], "."]
        found.append(sentence)
        left -= len(sentence)
    return found


def mix(rng: random.Random, entries: Sequence[Words], tokens: int) -> Words:
    """Return the entries in their order, with `tokens` tokens of filler spread between them.

    An entry never splits a sentence. Nothing is added where `tokens` <= 0.
    """
    gaps: list[Words] = [[] for _ in range(len(entries) + 1)]
    for sentence in sentences(rng, tokens):
        gaps[rng.randrange(len(gaps))].extend(sentence)
    mixed = list(gaps[0])
    for entry, gap in zip(entries, gaps[1:], strict=True):
        mixed += [*entry, *gap]
    return mixed
