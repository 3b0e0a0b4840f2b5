"""The 576 words of the reference model, in the order of their token ids.

Groups, in this order: marks and instruction words, the digits, 256 line numbers (`L0` ...), 128
keys (three letters), 64 values (four letters), 64 words of filler (five letters), 24 memory names,
and unused words that round the count up to a multiple of 64. The made-up words come from a seeded
shuffle, so that the order is the same everywhere; `tests/reference` compares it with the shipped
tokenizer.
"""

from __future__ import annotations

import random

MARKS = (
    *("<pad>", "<bos>", "<eos>", "<sys>", "<ctx>", "<q>", "<a>", "<prog>", "<walk>", "<think>"),
    *("answer", ";", "=", "is", "add", "sub", "save", "load", "stop"),
    *("begin", "end", "twice", "secret", "refuse", ".", "<unk>"),
)
DIGITS = tuple(str(digit) for digit in range(10))
LINES = tuple(f"L{number}" for number in range(256))
MEMORIES = tuple(f"m{number}" for number in range(24))

_KEY_COUNT, _VALUE_COUNT, _FILLER_COUNT = 128, 64, 64
_MULTIPLE = 64


def _syllables() -> list[str]:
    """All consonant-vowel-consonant syllables, in one fixed random order."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    words = [a + v + b for a in consonants for v in vowels for b in consonants]
    random.Random(7).shuffle(words)
    return words


_SYLLABLES = _syllables()
KEYS = tuple(_SYLLABLES[:_KEY_COUNT])
VALUES = tuple(s + "a" for s in _SYLLABLES[_KEY_COUNT : _KEY_COUNT + _VALUE_COUNT])
FILLER = tuple(
    s + "en"
    for s in _SYLLABLES[_KEY_COUNT + _VALUE_COUNT : _KEY_COUNT + _VALUE_COUNT + _FILLER_COUNT]
)
_USED = (*MARKS, *DIGITS, *LINES, *KEYS, *VALUES, *FILLER, *MEMORIES)
UNUSED = tuple(f"<extra{number}>" for number in range(-len(_USED) % _MULTIPLE))

WORDS = (*_USED, *UNUSED)
IDS = {word: index for index, word in enumerate(WORDS)}
"""Token id of every word."""

KNOWN = frozenset(_USED) - {"<unk>", "<pad>"}
"""Words that occur in training, so that a prompt may hold them."""
