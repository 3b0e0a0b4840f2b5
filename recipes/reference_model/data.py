"""Training rows: documents of the package's task generators, with the loss on the answers only.

Every row is one whole document of exactly the row's length (padded at the end), so that no mask is
needed. A lookup document is asked as many questions as fit. A batch depends on nothing but the
course, the seed and its step, hence a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvsieve.reference import tasks_chain, tasks_lookup
from kvsieve.reference.filler import Words
from kvsieve.reference.vocabulary import IDS

Row = tuple[Words, list[float]]
"""The words of a document, and the weight of each in the loss (0 outside the answers)."""


@dataclass(frozen=True)
class Course:
    """What a training run sees.

    `phases` holds (share of the steps at which it begins, weight of each row length); `tasks` the
    weight of each task; `full` the share of lookup documents that nearly fill their row, so that
    few questions follow; `first` the weight in the loss of the words of a first answer.
    """

    phases: tuple[tuple[float, dict[int, float]], ...]
    tasks: dict[str, float]
    full: float
    first: float


# Short rows stay to the end: without them the model unlearns short chains. The longest rows are a
# little longer than a prompt of 2048 tokens, for the answer that follows it.
_ALL_LENGTHS: dict[int, float] = {128: 3, 256: 3, 512: 5, 1024: 6, 2080: 7}

COURSES = {
    "whole": Course(
        phases=(
            (0.00, {128: 1}),
            (0.14, {128: 1, 256: 1}),
            (0.26, {256: 1, 512: 1}),
            (0.38, {256: 1, 512: 1, 1024: 1}),
            (0.54, _ALL_LENGTHS),
        ),
        tasks={"retrieval": 1, "multi-hop": 1.2, "instructions": 2, "reasoning": 2, "walk": 1.8},
        full=0.3,
        first=1.0,
    ),
    # For half the steps: looking up is learned on 128 tokens, in the first 1.5 million of them.
    "short": Course(
        phases=(
            (0.00, {128: 1}),
            (0.35, {128: 1, 256: 1}),
            (0.55, {256: 1, 512: 1}),
            (0.75, {128: 1, 256: 1, 512: 1, 1024: 2}),
        ),
        tasks={"retrieval": 1, "multi-hop": 1.2, "instructions": 2, "reasoning": 1, "walk": 1.8},
        full=0.5,
        first=2.0,
    ),
    # Later answers can copy their form from earlier ones, so "whole" teaches little about giving
    # the first answer by the instructions alone; that is what this one is about.
    "first-answers": Course(
        phases=((0.00, _ALL_LENGTHS),),
        tasks={"retrieval": 1, "multi-hop": 1.2, "instructions": 3, "reasoning": 2, "walk": 1.5},
        full=0.7,
        first=8.0,
    ),
}


def length_at(course: Course, share: float, rng: random.Random) -> int:
    """Draw the row length for a step at this share (in [0, 1)) of the training."""
    weights = [lengths for begin, lengths in course.phases if share >= begin][-1]
    return rng.choices(list(weights), list(weights.values()))[0]


def batch(
    course: Course, seed: int, step: int, share: float, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [rows, length] (int64) and loss weights [rows, length] (fp32) of one step.

    rows = tokens // length, at least 1.
    """
    rng = random.Random(f"reference model {seed} {step}")
    length = length_at(course, share, rng)
    names = list(course.tasks)
    tasks = rng.choices(names, list(course.tasks.values()), k=max(1, tokens // length))
    rows = [_padded(make_row(rng, course, task, length), length) for task in tasks]
    ids = torch.tensor([[IDS[word] for word in words] for words, _ in rows])
    return ids, torch.tensor([weights for _, weights in rows])


def make_row(rng: random.Random, course: Course, task: str, length: int) -> Row:
    """Make a document of a task, of at most `length` tokens."""
    while True:
        row = _ROWS[task](rng, course, length)
        if len(row[0]) <= length and any(row[1]):
            return row


def _padded(row: Row, length: int) -> Row:
    spare = length - len(row[0])
    return [*row[0], *["<pad>"] * spare], [*row[1], *[0.0] * spare]


def _entries(rng: random.Random, length: int) -> int:
    """Number of entries: half of the documents uniform, half with fewer more likely."""
    most = max(2, min(tasks_lookup.MAX_ENTRIES, length // 5))
    return max(2, round(most ** rng.random())) if rng.random() < 0.5 else rng.randint(2, most)


def _document_length(rng: random.Random, course: Course, length: int) -> int:
    """Some documents leave room for many questions; the others fill the row but for a few."""
    if rng.random() < 1 - course.full:
        return max(24, int(length * rng.uniform(0.35, 0.75)))
    return max(24, int((length - 32) * rng.uniform(0.75, 1.0)))


def _lookup(
    rng: random.Random, course: Course, length: int, alias_share: float, instructions: Words
) -> Row:
    tokens = _document_length(rng, course, length)
    document = tasks_lookup.lookup(
        rng, tokens, _entries(rng, tokens), alias_share=alias_share, instructions=instructions
    )
    return _asked(rng, document, length, course.first)


def _asked(rng: random.Random, document: tasks_lookup.Lookup, length: int, first: float) -> Row:
    """Ask for every key in random order, again and again, until the row is full."""
    words, weights = list(document.document), [0.0] * len(document.document)
    order: Words = []
    while True:
        order = order or _order(rng, document)
        key = order.pop()
        asked, answer = tasks_lookup.question(key), [*document.answer(key), "<eos>"]
        if len(words) + len(asked) + len(answer) > length:
            return words, weights
        weight = 1.0 if any(weights) else first
        words += [*asked, *answer]
        weights += [0.0] * len(asked) + [weight] * len(answer)


def _order(rng: random.Random, document: tasks_lookup.Lookup) -> Words:
    """All keys shuffled (last is asked first); the secret often comes early as well."""
    order = rng.sample(document.keys, len(document.keys))
    secret = document.instructions.get("secret")
    if secret is not None and rng.random() < 0.6:
        order.insert(len(order) - rng.randrange(3), secret)
    return order


def _retrieval(rng: random.Random, course: Course, length: int) -> Row:
    return _lookup(rng, course, length, 0.0, [])


def _multi_hop(rng: random.Random, course: Course, length: int) -> Row:
    return _lookup(rng, course, length, 0.45, [])


def _instructions(rng: random.Random, course: Course, length: int) -> Row:
    chosen = [name for name in tasks_lookup.INSTRUCTIONS if rng.random() < 0.7]
    rng.shuffle(chosen)
    return _lookup(
        rng, course, length, rng.choice((0.0, 0.0, 0.2)), chosen if rng.random() < 0.9 else []
    )


def _reasoning(rng: random.Random, course: Course, length: int) -> Row:
    definitions = rng.randint(2, max(2, min(32, length // 16)))
    filler = rng.choice((0, 0, rng.randint(0, length // 3)))
    steps = min(tasks_chain.MAX_LINES, (length - 11 - 3 * definitions - filler) // 9)
    if rng.random() < 0.15:
        steps = rng.randint(1, max(1, steps))
    return _chained(tasks_chain.program(rng, max(1, steps), definitions, filler))


def _walk(rng: random.Random, course: Course, length: int) -> Row:
    share = rng.uniform(0.3, 1.0)
    table = min(tasks_chain.MAX_TABLE, max(3, int((length - 9) / (4 + 5 * share))))
    steps = max(1, int(share * (table - 1)))
    spare = max(0, length - sum(tasks_chain.walk_tokens(steps, table)))
    return _chained(tasks_chain.walk(rng, steps, table, rng.choice((0, rng.randint(0, spare)))))


def _chained(chain: tasks_chain.Chain) -> Row:
    answer = [*chain.answer, "<eos>"]
    return [*chain.prompt, *answer], [0.0] * len(chain.prompt) + [1.0] * len(answer)


_ROWS: dict[str, Callable[[random.Random, Course, int], Row]] = {
    "retrieval": _retrieval,
    "multi-hop": _multi_hop,
    "instructions": _instructions,
    "reasoning": _reasoning,
    "walk": _walk,
}
