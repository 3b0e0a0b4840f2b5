"""A task of any kind by its length in tokens."""

from __future__ import annotations

from kvsieve.reference.samples import Sample, sample

CHAINS = ("reasoning", "walk")


def sized(kind: str, *, seed: int, length: int) -> Sample:
    """Make the task of a kind that comes closest to a length without exceeding it.

    ``length``: tokens of the document; for chains, of prompt and answer together.

    Raises:
        ReferenceModelError: an unknown kind, or a length that it can't have.
    """
    if kind not in CHAINS:
        return sample(kind, seed=seed, length=length)
    steps = min(length // 9, 220) if kind == "reasoning" else length // 10
    made = sample(kind, seed=seed, steps=steps)
    while len(made.prompt.split()) + made.answer_tokens > length:
        steps -= 1
        made = sample(kind, seed=seed, steps=steps)
    return made
