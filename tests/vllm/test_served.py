"""What the reference model answers in vLLM is what it answers in Transformers, right or wrong."""

from __future__ import annotations

from typing import Any

import pytest

from kvsieve.bench.served import Plan, measure


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reasoning", "walk", "retrieval"])
def test_as_right_as_in_transformers(task: str) -> None:
    config: dict[str, Any] = {"method": "g-kv", "budget": 128, "interval": 64}
    plan = Plan(tasks=(task,), length=256, n=20)
    full, compressed = measure(plan, {"full": None, "g-kv": config})
    assert full["vllm"]["score"] >= 0.95 and full["compactions"] == 0
    assert compressed["compactions"] >= 20
    for row in (full, compressed):
        assert row["vllm"]["right"] == row["transformers"]["right"]
        assert row["same_tokens"] >= 18 and row["preemptions"] == 0
