"""vLLM's output is that of the Transformers engine under the same recipe, schedule and forwards."""

from __future__ import annotations

from typing import Any

import pytest
from replaying import replay, watching
from serving import BLOCK, engine, free_blocks, prompts, serve

from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.metrics import TALLY
from kvsieve.engines.vllm.settings import Settings

TOLERANCE = 1e-4

RECIPES: dict[str, dict[str, Any]] = {
    "knorm": {},
    "keydiff": {},
    "random": {},
    "streaming-llm": {},
    "snapkv": {"window": 16},
    "snapkv-decode": {"method": "snapkv", "window": 16, "schedule": "after-prefill|every:32"},
    "tova": {},
    "g-kv": {"interval": 64},
    "r-kv": {"interval": 32},
    "distinct-keys": {},
    "laprox": {"scope": "head", "schedule": "after-prefill|every:64"},
    "expected-attention": {"adaptive": False, "interval": 64, "future": 64},
}
PREFILL_ONLY = ("snapkv",)
QUICK = {("g-kv", "after-prompt"), ("g-kv", "chunk"), ("expected-attention", "after-prompt")}
"""What runs every time; `make test-vllm-all` runs the rest."""

LENGTHS = [40, 150, 300, 90, 210]


def configured(name: str, policy: str, **more: Any) -> dict[str, Any]:
    return {"method": name, "budget": 96, "policy": policy, "poison": True} | RECIPES[name] | more


def check(config: dict[str, Any], reference: Any, lengths: list[int], tokens: int, **options: Any):
    settings = Settings.read({"kvsieve": config})
    assert settings is not None
    made = effective(settings.recipe, BLOCK, settings.policy)
    with engine(config, **options) as llm:
        whole = free_blocks(llm)
        with watching(llm) as kept:
            run = serve(llm, prompts(lengths), tokens)
        assert free_blocks(llm) == whole, "every block came back"
        assert TALLY.blocks_held == 0 and TALLY.blocks_freed > 0
    found = replay(reference, made, run.served, kept)
    assert found.compared >= sum(len(one.tokens) for one in run.served) - len(lengths)
    assert found.events > 0, "something was compacted, and compared"
    assert found.unequal == []
    assert found.logprob <= TOLERANCE
    return run


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if (name, policy) in QUICK else pytest.mark.slow)
        for name in RECIPES
        for policy in ("after-prompt", "chunk")
        if policy == "after-prompt" or name not in PREFILL_ONLY
    ],
)
def test_every_method_keeps_the_same_slots(name: str, policy: str, reference: Any) -> None:
    run = check(
        configured(name, policy), reference, LENGTHS, 110, max_num_batched_tokens=256,
        num_gpu_blocks_override=200,
    )  # fmt: skip
    assert any(count > 1 for one in run.served for n0, count in one.forwards if n0), "chunks"


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("g-kv", "after-prompt"),
        ("keydiff", "chunk"),
        pytest.param("g-kv", "chunk", marks=pytest.mark.slow),
        pytest.param("keydiff", "after-prompt", marks=pytest.mark.slow),
    ],
)
def test_preempted_requests_too(name: str, policy: str, reference: Any) -> None:
    run = check(
        configured(name, policy), reference, [*LENGTHS, 60], 200, max_num_batched_tokens=128,
        num_gpu_blocks_override=26, max_model_len=640,
    )  # fmt: skip
    assert sum(one.preempted for one in run.served) > 0


@pytest.mark.slow
def test_after_prompt_gives_the_same_however_prompts_are_cut() -> None:
    outputs = []
    for size in (64, 512, 2048):
        with engine(configured("g-kv", "after-prompt"), max_num_batched_tokens=size) as llm:
            outputs.append([one.tokens for one in serve(llm, prompts(LENGTHS), 100).served])
    assert outputs[0] == outputs[1] == outputs[2]
