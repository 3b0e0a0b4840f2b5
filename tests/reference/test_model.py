"""The shipped model: it loads offline, answers fresh tasks, and its card tells the truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsieve import reference
from kvsieve.errors import ReferenceModelError
from kvsieve.reference.loader import folder

ROWS = Path(__file__).parents[2] / "benchmarks" / "reference_accuracy.jsonl"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference.load()


@pytest.mark.parametrize("kind", reference.KINDS)
def test_it_answers_fresh_tasks(kind: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    size = {"steps": 12} if kind in ("reasoning", "walk") else {"length": 200}
    right = 0
    for seed in range(100, 104):
        task = reference.sample(kind, seed=seed, **size)
        ids = tokenizer(task.prompt, return_tensors="pt").input_ids
        assert ids.shape[1] == len(task.prompt.split())
        out = model.generate(ids, max_new_tokens=task.answer_tokens + 4)
        right += task.grade(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert right == 4


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model, _ = reference.load("bfloat16")
    assert capfd.readouterr() == ("", "")
    assert model.dtype is torch.bfloat16 and not model.training


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ReferenceModelError, match="Possible: bfloat16, float32"):
        reference.load("float61")


def test_advertised_lengths_are_those_measured() -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    shipped = hashlib.sha256((folder() / "model.safetensors").read_bytes()).hexdigest()[:16]
    newest = {(r["family"], r["length"]): r for r in rows if r.get("weights") == shipped}
    for family, lengths in reference.ADVERTISED.items():
        assert lengths, family
        for length in lengths:
            row = newest[family, length]
            assert row["n"] >= 100 and row["exact"] >= 0.95, row
