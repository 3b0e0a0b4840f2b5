"""The reference model: small, but it retrieves and reasons; its tasks have known answers.

    model, tokenizer = kvsieve.reference.load()
    task = kvsieve.reference.sample("reasoning", steps=80, seed=3)
    task.prompt, task.answer, task.grade(generated_text)

It ships inside the package, so that everything can be tried and measured offline. Its language has
576 words (see ``vocabulary``); nothing else means anything to it.
"""

from __future__ import annotations

from kvsieve.reference.loader import MAX_TOKENS, check_prompt, load
from kvsieve.reference.samples import ADVERTISED, KINDS, Sample, sample, shipped

__all__ = [
    "ADVERTISED",
    "KINDS",
    "MAX_TOKENS",
    "Sample",
    "check_prompt",
    "load",
    "sample",
    "shipped",
]
