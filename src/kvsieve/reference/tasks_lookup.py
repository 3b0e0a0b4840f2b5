"""Lookup tasks: a document of entries, then questions about single keys.

An entry is `fov rona kuza ;` (a key and its two values) or `sef is fov ;` (an alias, answered with
the whole chain: `sef is fov rona kuza`). Instructions may come first:

    begin W     every answer starts with the word W
    end W       every answer ends with the word W
    twice       an answer that states values states them twice
    secret K    asked for the key K, the answer is `K refuse` (begin and end still hold)

`question` and `Lookup.answer` give one turn; a document may be asked any number of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvsieve.reference.filler import Words, mix
from kvsieve.reference.vocabulary import KEYS, VALUES

INSTRUCTIONS = ("begin", "end", "twice", "secret")
MAX_ENTRIES = len(KEYS) - 8
MAX_HOPS = 4
ENTRY_TOKENS = 4
QUESTION_TOKENS = 3


@dataclass(frozen=True)
class Lookup:
    """A document and everything that is needed to answer questions about it.

    `document` starts with <bos>; `keys` are the keys that may be asked for; `hops` counts the
    aliases between a key and its values.
    """

    document: Words
    keys: Words
    values: dict[str, Words]
    aliases: dict[str, str]
    hops: dict[str, int]
    instructions: dict[str, str]

    def answer(self, key: str) -> Words:
        """The right answer to the question about `key`, without <eos>."""
        said = self.instructions
        if key == said.get("secret"):
            core = [key, "refuse"]
        else:
            core = self._statement(key)
            core = [*core, ";", *core] if "twice" in said else core
        first = [said["begin"]] if "begin" in said else []
        last = [said["end"]] if "end" in said else []
        return [*first, *core, *last]

    def _statement(self, key: str) -> Words:
        statement = [key]
        while key in self.aliases:
            key = self.aliases[key]
            statement += ["is", key]
        return [*statement, *self.values[key]]


def question(key: str) -> Words:
    """The words that ask for `key`."""
    return ["<q>", key, "<a>"]


def lookup(
    rng: random.Random,
    length: int,
    entries: int,
    *,
    alias_share: float = 0.0,
    instructions: Sequence[str] = (),
) -> Lookup:
    """Make a document of `length` tokens (more only where its entries alone need more).

    `alias_share` is the chance of an entry to be an alias of an earlier key (never of the secret,
    at most `MAX_HOPS` in a row); `instructions` are names from `INSTRUCTIONS`, in their order.
    """
    keys = rng.sample(KEYS, entries)
    said = {name: _argument(rng, name, keys) for name in instructions}
    values: dict[str, Words] = {}
    aliases: dict[str, str] = {}
    hops: dict[str, int] = {}
    stated: list[Words] = []
    for position, key in enumerate(keys):
        target = rng.choice(keys[:position]) if position and rng.random() < alias_share else None
        if target is not None and hops[target] < MAX_HOPS and target != said.get("secret"):
            aliases[key], hops[key] = target, hops[target] + 1
            stated.append([key, "is", target, ";"])
        else:
            values[key], hops[key] = [rng.choice(VALUES), rng.choice(VALUES)], 0
            stated.append([key, *values[key], ";"])
    rng.shuffle(stated)
    head = _head(said)
    spare = length - len(head) - sum(len(entry) for entry in stated)
    return Lookup([*head, *mix(rng, stated, spare)], keys, values, aliases, hops, said)


def _argument(rng: random.Random, instruction: str, keys: Words) -> str:
    """What follows the name of an instruction; empty where nothing does."""
    if instruction == "secret":
        return rng.choice(keys)
    return "" if instruction == "twice" else rng.choice(VALUES)


def _head(said: dict[str, str]) -> Words:
    if not said:
        return ["<bos>", "<ctx>"]
    stated = [word for name, word in said.items() for word in (name, word, ";") if word]
    return ["<bos>", "<sys>", *stated, "<ctx>"]
