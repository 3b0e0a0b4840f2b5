"""The GPU backends keep what the Transformers engine keeps, in vLLM's engine on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import transformers
from gpu_backends import instead
from replaying import replay, watching
from serving import VOCAB, engine, free_blocks, prompts, serve

from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.metrics import TALLY
from kvsieve.engines.vllm.settings import Settings

BLOCK = 16


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a model that an interpreter can be expected to run, and where it lies."""
    sizes = {"head_dim": 32, "vocab_size": VOCAB, "architectures": ["Qwen3ForCausalLM"]}
    config = transformers.Qwen3Config(**(models.BASE | sizes))
    model = transformers.Qwen3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    ("name", "config", "lengths", "tokens"),
    [
        (
            "flash",
            {"method": "g-kv", "budget": 32, "interval": 16, "window": 8},
            [60, 20, 35],
            50,
        ),
        (
            "triton",
            {"method": "keydiff", "budget": 16, "policy": "chunk", "schedule": "above:32"},
            [40, 17],
            18,
        ),
    ],
)
def test_replay(
    name: str, config: dict[str, Any], lengths: list[int], tokens: int, small: tuple[Any, Path]
) -> None:
    """With vacated blocks full of NaN; prompts come in parts."""
    model, folder = small
    settings = Settings.read({"kvsieve": config})
    assert settings is not None
    made = effective(settings.recipe, BLOCK, settings.policy)
    options = {"model": str(folder), "skip_tokenizer_init": True, "block_size": BLOCK}
    options |= {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 9, "max_model_len": 128}
    with (
        instead(name),
        engine({**config, "poison": True}, **options) as llm,
        watching(llm) as kept,
    ):
        whole = free_blocks(llm)
        run = serve(llm, prompts(lengths), tokens, {"detokenize": False})
        assert free_blocks(llm) == whole, "every block came back"
        assert TALLY.blocks_held == 0 and TALLY.blocks_freed > 0
    found = replay(model, made, run.served, kept)
    assert found.events > 0 and found.compared > len(lengths) * (tokens - 2)
    assert found.unequal == []
    assert found.logprob <= 1e-4
    assert any(count > 1 for one in run.served for n0, count in one.forwards if n0), "chunks"
    if name == "flash":
        assert sum(one.preempted for one in run.served) > 0
