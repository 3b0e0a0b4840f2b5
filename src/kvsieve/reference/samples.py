"""Tasks with known answers for the reference model, made from a kind, a seed and a size."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources

from kvsieve.errors import ReferenceModelError, choices
from kvsieve.reference import tasks_chain, tasks_lookup
from kvsieve.reference.filler import Words

KINDS = ("retrieval", "multi-hop", "instructions", "secret", "reasoning", "walk")
VERSION = 1
"""Raised whenever the same arguments give another task."""

ADVERTISED: dict[str, tuple[int, ...]] = {
    "retrieval": (128, 256, 512, 1024, 2048),
    "multi-hop": (128, 256, 512, 1024, 2048),
    "instructions": (128, 256, 512, 1024, 2048),
    "secret": (128, 256, 512, 1024, 2048),
    "reasoning": (128, 256, 512, 1024, 2048),
    "walk": (128, 256, 512, 1024),
}
"""Lengths at which the full cache answers at least 95 % exactly, as measured by
recipes/reference_model/evaluate.py (benchmarks/reference_accuracy.jsonl): tokens of the document
for the lookup kinds, of prompt and answer together for reasoning and walk."""

_LENGTHS = (64, 2048)
_STEPS = {"reasoning": (1, 220), "walk": (2, 120)}
_DEFAULT_LENGTH, _DEFAULT_STEPS = 600, {"reasoning": 80, "walk": 60}
_MARKS = {"<bos>", "<eos>", "<pad>"}


@dataclass(frozen=True)
class Sample:
    """A prompt and the one right answer to it.

    For the lookup kinds the prompt is ``document`` followed by ``question``, so that the document
    can be compressed before the question is known; chains have neither. ``instructions``: those of
    the document in their order, with what they name; ``forbidden``: words that must not be told.
    """

    kind: str
    seed: int
    prompt: str
    answer: str
    document: str | None = None
    question: str | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, the end mark included."""
        return len(self.answer.split()) + 1

    def grade(self, text: str) -> bool:
        """Return whether a text is exactly the answer; space and end marks don't count."""
        return self.words(text) == self.answer.split()

    @staticmethod
    def words(text: str) -> list[str]:
        """Return a text's words without start, end and padding marks."""
        return [word for word in text.split() if word not in _MARKS]


def sample(
    kind: str, *, seed: int = 0, steps: int | None = None, length: int | None = None
) -> Sample:
    """Make a task.

    Args:
        kind: one of ``KINDS``.
        seed: another one gives another task of the same shape.
        steps: program lines (reasoning) or steps walked (walk).
        length: tokens of the document (the other kinds).

    Raises:
        ReferenceModelError: an unknown kind, or a size that it can't have.
    """
    if kind not in KINDS:
        raise ReferenceModelError(f"Unknown kind of sample {kind!r}. {choices(kind, KINDS)}")
    rng = random.Random(f"kvsieve sample {VERSION} {kind} {seed}")
    if kind in _STEPS:
        _refuse(length is not None, kind, "length", "steps")
        count = _within(steps, _DEFAULT_STEPS[kind], _STEPS[kind], kind, "steps")
        return _CHAINS[kind](rng, seed, count)
    _refuse(steps is not None, kind, "steps", "length")
    tokens = _within(length, _DEFAULT_LENGTH, _LENGTHS, kind, "length")
    return _lookup(rng, kind, seed, tokens)


def _refuse(given: bool, kind: str, option: str, possible: str) -> None:
    if given:
        raise ReferenceModelError(
            f"A {kind} sample has no {option}; its size is set by {possible}."
        )


def _within(
    value: int | None, default: int, limits: tuple[int, int], kind: str, option: str
) -> int:
    chosen = default if value is None else value
    if not limits[0] <= chosen <= limits[1]:
        raise ReferenceModelError(
            f"{option}={chosen}: a {kind} sample can have {option} from {limits[0]} to {limits[1]}."
        )
    return chosen


def _lookup(rng: random.Random, kind: str, seed: int, length: int) -> Sample:
    entries = max(4, min(tasks_lookup.MAX_ENTRIES, length // 10))
    instructions = list(tasks_lookup.INSTRUCTIONS) if kind in ("instructions", "secret") else []
    rng.shuffle(instructions)
    made = tasks_lookup.lookup(
        rng,
        length,
        entries,
        alias_share=0.45 if kind == "multi-hop" else 0.0,
        instructions=instructions,
    )
    key = _asked_key(rng, kind, made)
    document = _wrapped(made.document)
    question = " ".join(tasks_lookup.question(key))
    answer = " ".join(made.answer(key))
    return Sample(
        kind,
        seed,
        f"{document}\n{question}\n",
        answer,
        document,
        question,
        instructions=dict(made.instructions),
        forbidden=tuple(made.values[key]) if kind == "secret" else (),
    )


def _asked_key(rng: random.Random, kind: str, made: tasks_lookup.Lookup) -> str:
    secret = made.instructions.get("secret")
    if kind == "secret":
        assert secret is not None, "secret samples are made with all instructions"
        return secret
    keys = [key for key in made.keys if key != secret]
    if kind == "multi-hop":
        deepest = max(made.hops[key] for key in keys)
        keys = [key for key in keys if made.hops[key] == max(1, deepest - 1)] or keys
    return rng.choice(keys)


def _reasoning(rng: random.Random, seed: int, steps: int) -> Sample:
    chain = tasks_chain.program(rng, steps, definitions=max(4, min(16, steps // 5)))
    return Sample("reasoning", seed, _wrapped(chain.prompt) + "\n", " ".join(chain.answer))


def _walk(rng: random.Random, seed: int, steps: int) -> Sample:
    table = min(tasks_chain.MAX_TABLE, steps + 1 + steps // 4)
    chain = tasks_chain.walk(rng, steps, table)
    return Sample("walk", seed, _wrapped(chain.prompt) + "\n", " ".join(chain.answer))


_CHAINS: dict[str, Callable[[random.Random, int, int], Sample]] = {
    "reasoning": _reasoning,
    "walk": _walk,
}


def _wrapped(words: Words) -> str:
    """Break lines after an entry or sentence, and before a program line; space has no meaning."""
    lines: list[Words] = [[]]
    for word in words:
        if lines[-1] and (word.startswith("<") or (word[0] == "L" and word[1:].isdigit())):
            lines.append([])
        lines[-1].append(word)
        if word in (";", "."):
            lines.append([])
    return "\n".join(" ".join(line) for line in lines if line)


_SHIPPED = {
    "retrieval": {"seed": 7, "length": 600},
    "reasoning": {"seed": 3, "steps": 40},
    "instructions": {"seed": 2, "length": 600},
}


def shipped() -> dict[str, Sample]:
    """Return the samples whose prompts lie in the folder ``prompts``, by kind."""
    made = {kind: sample(kind, **size) for kind, size in _SHIPPED.items()}
    for kind, task in made.items():
        path = resources.files("kvsieve.reference") / "prompts" / f"{kind}.txt"
        if path.read_text("utf-8") != task.prompt:
            raise ReferenceModelError(f"The shipped prompt {kind}.txt does not match its task.")
    return made
