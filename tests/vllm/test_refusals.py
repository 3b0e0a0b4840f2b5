"""Refused at start-up, before anything is served; and nothing is refused that wasn't asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from serving import engine, prompts, serve

from kvsieve.engines.vllm import compat, register
from kvsieve.errors import BudgetError, EngineError, RecipeError, UnsupportedSignal

GOOD = {"method": "keydiff", "budget": 64}


@pytest.mark.parametrize(
    ("config", "options", "error", "says"),
    [
        (GOOD, {"enable_prefix_caching": True}, EngineError, "--no-enable-prefix-caching"),
        ({"method": "keydiff", "budget": 31}, {}, BudgetError, "below one block of 32"),
        ({"method": "keydiff", "budget": "10%"}, {}, BudgetError, "Give slots per head"),
        ({"method": "adakv", "budget": 64}, {}, RecipeError, "Nearest possible recipe: snapkv"),
        ({"method": "h2o", "budget": 64}, {}, UnsupportedSignal, "attention sums"),
    ],
)  # fmt: skip
def test_refused(
    config: dict[str, Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says), engine(config, **options):
        pass


def saved(family: str, folder: Path, **changes: Any) -> str:
    """Write a tiny model's configuration; its weights are made up when it is loaded."""
    name, own = models.FAMILIES[family]
    config = getattr(transformers, name)(**(models.BASE | own | changes))
    stem = name.replace("TextConfig", "").replace("Config", "")
    config.architectures = [f"{stem}ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("mistral", {"sliding_window": 64, "head_dim": 32}, "sliding-window"),
        ("deepseek-v3", {}, "latent attention"),
    ],
)
def test_models_that_cannot_be_compressed(
    family: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path, **changes)
    with (
        pytest.raises(EngineError, match=says),
        engine(GOOD, model=model, load_format="dummy", skip_tokenizer_init=True),
    ):
        pass


def test_hooks_are_there_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_hooks()
    asked = {"vllm.v1.attention.backend:AttentionBackend.build_spec": ()}
    monkeypatch.setattr(compat, "_hooks", lambda: asked)
    with pytest.raises(EngineError, match=r"AttentionBackend\.build_spec"):
        compat.check_hooks()
    asked = {"vllm.v1.attention.backend:AttentionBackend.customize_spec": ("layer",)}
    monkeypatch.setattr(compat, "_hooks", lambda: asked)
    with pytest.raises(EngineError, match="takes no argument layer"):
        compat.check_hooks()


def test_registering_again_changes_nothing() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    register()
    before = GPUModelRunner.initialize_kv_cache
    register()
    assert GPUModelRunner.initialize_kv_cache is before


def test_an_unknown_vllm_is_left_alone_until_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__)
    compat.refuse_when_asked(EngineError("this is 0.99"))
    with engine(None) as llm:
        assert len(serve(llm, prompts([40]), 8).served[0].tokens) == 8
    with pytest.raises(EngineError, match=r"this is 0\.99"), engine(GOOD):
        pass


def test_a_refused_start_leaves_nothing_behind() -> None:
    with pytest.raises(BudgetError), engine({"method": "keydiff", "budget": 31}):
        pass
    with engine({"method": "keydiff", "budget": 96}) as llm:
        run = serve(llm, prompts([200]), 40)
    assert len(run.served[0].tokens) == 40 and torch.is_grad_enabled()
