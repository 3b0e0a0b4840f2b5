"""Two workers, each with half of the heads, do together what one does alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
from replaying import replay, watching
from serving import BLOCK, Run, engine, free_blocks, prompts, serve
from test_replay import LENGTHS, TOLERANCE, configured

from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.metrics import TALLY
from kvsieve.engines.vllm.settings import Settings

CORES = sorted(os.sched_getaffinity(0))
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="two workers need two cores")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core for each worker: vLLM would give both to the first on a machine with one node."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[1]}")


def tally(worker: Any) -> dict[str, Any]:
    """Return the counters of a worker's process."""
    from kvsieve.engines.vllm.metrics import TALLY

    return TALLY.to_dict()


def served(config: dict[str, Any], reference: Any, **options: Any) -> Run:
    """Serve under two workers; check both against Transformers, pool and counters."""
    settings = Settings.read({"kvsieve": config})
    assert settings is not None
    made = effective(settings.recipe, BLOCK, settings.policy)
    with engine(config, **TWO, **options) as llm:
        whole = free_blocks(llm)
        with watching(llm) as kept:
            run = serve(llm, prompts(LENGTHS), 110)
        first, second = llm.collective_rpc(tally)
        assert free_blocks(llm) == whole and TALLY.blocks_held == 0
    assert first["compactions"] * 4 == len(kept.of), "layers"
    assert second["compactions"] == 0, "counted once"
    assert first["side_bytes"] > 0 and second["side_bytes"] > 0
    found = replay(reference, made, run.served, kept)
    assert found.events == len(kept.of) > 0 and found.unequal == []
    assert found.compared > 0 and found.logprob <= TOLERANCE
    return run


@pytest.mark.parametrize(
    "name",
    ["g-kv"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("random", "laprox", "expected-attention", "r-kv")
    ],
)
def test_two_workers_are_as_one(name: str, reference: Any) -> None:
    options = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 200}
    config = configured(name, "after-prompt")
    two = served(config, reference, **options)
    with engine(config, **options) as llm:
        one = serve(llm, prompts(LENGTHS), 110)
    for alone, shared in zip(one.served, two.served, strict=True):
        assert shared.tokens == alone.tokens
        assert shared.logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)


@pytest.mark.slow
def test_preempted_requests_too(reference: Any) -> None:
    run = served(
        configured("g-kv", "chunk"), reference, max_num_batched_tokens=128,
        num_gpu_blocks_override=22, max_model_len=448,
    )  # fmt: skip
    assert sum(one.preempted for one in run.served) > 0
