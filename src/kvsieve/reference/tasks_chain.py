"""Chain-of-thought tasks: the model writes its working, one line a step, then the answer.

Program: definitions `gal 6 ;`, then numbered lines on an accumulator modulo 10 that starts at 0.
`L90 save m3` keeps the accumulator under a name, `L95 load m3` (or add, sub) uses it again. The
working repeats each line with the number it used and the new accumulator: `L87 sub gal 6 = 0`.
A saved number stands nowhere but in the working, and may be needed much later.

Walk: a shuffled table `rok val 7 ;` (from, to, digit), walked from a start key to the entry
`key stop ;`. The working adds the digits up: `rok val 7 = 3`. Every step needs a table entry that
nothing before has pointed at.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvsieve.reference.filler import Words, mix
from kvsieve.reference.vocabulary import DIGITS, KEYS, LINES, MEMORIES

MAX_LINES = len(LINES) - 2
MAX_TABLE = len(KEYS)
_SAVE, _RECALL = 0.12, 0.18
"""Chance of a program line to save the accumulator, and to use a saved number."""


@dataclass(frozen=True)
class Chain:
    """A prompt (from <bos> to <think>) and the right working and answer (without <eos>)."""

    prompt: Words
    answer: Words


@dataclass
class _Machine:
    """The accumulator and what was saved, while a program is made up."""

    definitions: dict[str, int]
    free: list[str]
    saved: dict[str, int] = field(default_factory=dict)
    accumulator: int = 0

    def step(self, rng: random.Random) -> tuple[Words, Words]:
        """Make one program line up; return it and its working, both without the line number."""
        draw = rng.random()
        if draw < _SAVE and self.free:
            name, operation = self.free.pop(), "save"
            number = self.saved[name] = self.accumulator
        elif draw < _SAVE + _RECALL and self.saved:
            name = rng.choice(list(self.saved))
            operation, number = rng.choice(("add", "sub", "load")), self.saved[name]
        else:
            name = rng.choice(list(self.definitions))
            operation, number = rng.choice(("add", "sub")), self.definitions[name]
        self._apply(operation, number)
        line = [operation, name]
        return line, [*line, DIGITS[number], "=", DIGITS[self.accumulator]]

    def _apply(self, operation: str, number: int) -> None:
        if operation == "add":
            self.accumulator = (self.accumulator + number) % 10
        elif operation == "sub":
            self.accumulator = (self.accumulator - number) % 10
        else:
            self.accumulator = number


def program_tokens(steps: int, definitions: int) -> tuple[int, int]:
    """Tokens of a program's prompt without filler, and of its answer with <eos>."""
    return 2 + 3 * definitions + 1 + 3 * steps + 2 + 1, 6 * steps + 5


def program(rng: random.Random, steps: int, definitions: int, filler: int = 0) -> Chain:
    """Make a program of `steps` lines over `definitions` names, `filler` tokens among these."""
    names = rng.sample(KEYS, definitions)
    numbers = {name: rng.randrange(10) for name in names}
    memories = rng.sample(MEMORIES, min(len(MEMORIES), max(1, steps // 8)))
    machine = _Machine(numbers, memories)
    first = rng.randrange(len(LINES) - steps - 1)
    lines: Words = []
    answer: Words = []
    for number in range(first, first + steps):
        line, working = machine.step(rng)
        lines += [LINES[number], *line]
        answer += [LINES[number], *working]
    last = [LINES[first + steps], "stop"]
    stated = mix(rng, [[name, DIGITS[numbers[name]], ";"] for name in names], filler)
    prompt = ["<bos>", "<ctx>", *stated, "<prog>", *lines, *last, "<think>"]
    return Chain(prompt, [*answer, *last, "answer", DIGITS[machine.accumulator]])


def walk_tokens(steps: int, table: int) -> tuple[int, int]:
    """Tokens of a walk's prompt without filler, and of its answer with <eos>."""
    return 2 + 4 * table - 1 + 3, 5 * steps + 5


def walk(rng: random.Random, steps: int, table: int, filler: int = 0) -> Chain:
    """Make a walk of `steps` steps through a larger `table`, `filler` tokens among its entries."""
    keys = rng.sample(KEYS, table)
    digits = [rng.randrange(10) for _ in keys]
    route = keys[: steps + 1]
    entries = [
        [here, there, DIGITS[digit], ";"]
        for here, there, digit in zip(route, route[1:], digits, strict=False)
    ]
    entries.append([route[-1], "stop", ";"])
    for key, digit in zip(keys[steps + 1 :], digits[steps + 1 :], strict=True):
        entries.append([key, rng.choice(keys), DIGITS[digit], ";"])
    rng.shuffle(entries)
    answer: Words = []
    total = 0
    for here, there, digit in zip(route, route[1:], digits, strict=False):
        total = (total + digit) % 10
        answer += [here, there, DIGITS[digit], "=", DIGITS[total]]
    prompt = ["<bos>", "<ctx>", *mix(rng, entries, filler), "<walk>", keys[0], "<think>"]
    return Chain(prompt, [*answer, route[-1], "stop", "answer", DIGITS[total]])
