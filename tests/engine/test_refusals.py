"""What can't work is refused by a clear message, and the model works normally afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import build, prompt, tiny

import kvsieve
from kvsieve import Recipe
from kvsieve.errors import BudgetError, EngineError, RecipeError, UnsupportedSignal

pytestmark = pytest.mark.oldest


def recipe(name: str = "snapkv", **options: Any) -> Recipe:
    small = {"window": 4, "kernel": 3} if name == "snapkv" else {}
    return kvsieve.recipe(name, **({"budget": 12} | small | options))


@pytest.fixture
def model() -> Iterator[Any]:
    """The shared Llama, checked to be as before afterwards."""
    model, ids = tiny("llama"), prompt(20)
    before = model.generate(ids, max_new_tokens=3, do_sample=False)
    yield model
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), before)


def run(model: Any, under: Recipe | None = None, **how: Any) -> Any:
    options = {"max_new_tokens": 9, "do_sample": False} | how
    with kvsieve.attach(model, recipe() if under is None else under):
        return model.generate(prompt(30), **options)


# -- ways of generating


def test_assisted_decoding(model: Any) -> None:
    with pytest.raises(EngineError, match="assistant_model, prompt_lookup_num_tokens"):
        run(model, assistant_model=build("llama", seed=1))


def test_prompt_lookup(model: Any) -> None:
    repeated = prompt(10).repeat(1, 3)
    with (
        kvsieve.attach(model, recipe()),
        pytest.raises(EngineError, match="take tokens back out of the cache"),
    ):
        # Some releases compare with the end token, so that there has to be one.
        model.generate(
            repeated, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=0
        )


@pytest.mark.parametrize(("kind", "name"), [("static", "StaticCache"), ("offloaded", "Dynamic")])
def test_other_caches(model: Any, kind: str, name: str) -> None:
    with pytest.raises(EngineError, match=f"A {name}.* can't be compressed.*cache_implementation"):
        run(model, cache_implementation=kind)


@torch.no_grad()
def test_quantized_cache(model: Any) -> None:
    from transformers.cache_utils import DynamicCache

    class QuantizedCache(DynamicCache):
        """Stands for the stock one, which needs an optional package."""

    cache = QuantizedCache(config=model.config)
    with (
        kvsieve.attach(model, recipe()),
        pytest.raises(EngineError, match="A QuantizedCache can't be compressed"),
    ):
        model(prompt(30), past_key_values=cache)


def test_continuous_batching(model: Any) -> None:
    with (
        kvsieve.attach(model, recipe()),
        pytest.raises((EngineError, ValueError), match=r"kvsieve.*(not supported|is not)"),
    ):
        model.generate_batch([prompt(20)[0].tolist()])


def test_nothing_ran_without_a_cache(model: Any) -> None:
    with kvsieve.attach(model, recipe()) as attached:
        out = model.generate(prompt(30), max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(out, model.generate(prompt(30), max_new_tokens=3, do_sample=False))
    with pytest.raises(EngineError, match=r"Nothing ran under this recipe.*use_cache=True"):
        _ = attached.report
    with kvsieve.Cache(model, recipe()) as cache:
        with pytest.raises(EngineError, match="Nothing has passed through this cache yet"):
            _ = cache.report


# -- models


def test_compiled_models(model: Any) -> None:
    compiled = torch.compile(build("llama"), backend="eager")
    with pytest.raises(EngineError, match=r"compiled with torch\.compile"):
        kvsieve.attach(compiled, recipe())
    in_place = build("llama")
    in_place.compile(backend="eager")
    with pytest.raises(EngineError, match=r"compiled with torch\.compile"):
        kvsieve.Cache(in_place, recipe())


def test_encoder_decoders() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(EngineError, match="encoder-decoder; kvsieve compresses decoder-only"):
        kvsieve.attach(T5ForConditionalGeneration(config), recipe())


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "llama", None])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(EngineError, match="is not a Transformers model that generates text"):
        kvsieve.attach(thing, recipe())


def test_a_model_without_its_head(model: Any) -> None:
    with pytest.raises(EngineError, match="LlamaModel is not a Transformers model that generates"):
        kvsieve.attach(model.model, recipe())


def test_models_of_sliding_windows_only() -> None:
    with pytest.raises(EngineError, match=r"no full-attention layer.*nothing to compress"):
        kvsieve.attach(build("mistral", sliding_window=8), recipe())


@pytest.mark.parametrize("name", ["laprox", "expected-attention", "criticalkv"])
def test_latents_show_no_values(name: str) -> None:
    with pytest.raises(UnsupportedSignal, match=f"'{name}' needs .*can't show"):
        kvsieve.attach(tiny("deepseek-v3"), kvsieve.recipe(name, budget=40))


def test_replay_with_sliding_layers() -> None:
    with pytest.raises(UnsupportedSignal, match=r"replay.*sliding or recurrent layers"):
        kvsieve.attach(tiny("gemma3"), kvsieve.recipe("kvzip", budget=12))


def test_replay_without_token_ids(model: Any) -> None:
    with (
        torch.no_grad(),
        kvsieve.attach(model, kvsieve.recipe("kvzip", budget=12)),
        pytest.raises(UnsupportedSignal, match="needs token ids"),
    ):
        model.generate(inputs_embeds=torch.randn(1, 30, 64), max_new_tokens=2)


def test_rotations_that_change_with_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = build("llama", rope_parameters=scaling)
    with pytest.raises(UnsupportedSignal, match=r"pre-rotation queries.*can't be undone"):
        kvsieve.attach(dynamic, kvsieve.recipe("expected-attention", budget=12))


def test_nan_scores() -> None:
    broken = build("llama")
    broken.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match="'knorm' gave NaN scores"):
        run(broken, recipe("knorm"))
    assert broken.config._attn_implementation == "sdpa"


# -- inputs


@torch.no_grad()
def test_prepared_masks(model: Any) -> None:
    mask = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    with (
        kvsieve.attach(model, recipe()),
        pytest.raises(EngineError, match=r"\[rows, tokens\].*4-D"),
    ):
        model(prompt(30), attention_mask=mask)


def test_gradients() -> None:
    trained = build("llama").requires_grad_(True)
    with (
        kvsieve.attach(trained, recipe()),
        pytest.raises(EngineError, match=r"runs with gradients.*no_grad"),
    ):
        trained(prompt(30))


@torch.no_grad()
def test_dropout() -> None:
    training = build("llama", attention_dropout=0.5).train()
    with (
        kvsieve.attach(training, recipe()),
        pytest.raises(EngineError, match=r"dropout is on.*model\.eval"),
    ):
        training(prompt(30))


@torch.no_grad()
def test_another_batch_in_the_same_cache(model: Any) -> None:
    with kvsieve.Cache(model, recipe()) as cache:
        model(prompt(30), past_key_values=cache)
        with pytest.raises(EngineError, match=r"holds 1 row\(s\), but 2 came in"):
            model(prompt(30).repeat(2, 1), past_key_values=cache)


@torch.no_grad()
def test_a_protected_prompt_that_fills_the_budget(model: Any) -> None:
    under = recipe("streaming-llm", budget=0.2, protect=[(0, 20)])
    with (
        kvsieve.attach(model, under),
        pytest.raises(BudgetError, match="no room beside what is protected"),
    ):
        model(prompt(30))


def test_bytes_too_small_are_refused_before_anything_runs(model: Any) -> None:
    with pytest.raises(BudgetError, match=r"1KiB is too small.*The least.*bytes"):
        kvsieve.attach(model, recipe("h2o", budget="1KiB"))


# -- caches and runs


@torch.no_grad()
def test_a_cache_of_another_model(model: Any) -> None:
    other, deeper = build("qwen3"), build("llama", num_hidden_layers=3)
    message = "closed run, or to another model|built for another model"
    with kvsieve.Cache(other, recipe()) as cache, pytest.raises(EngineError, match=message):
        model(prompt(30), past_key_values=cache)
    with (
        kvsieve.attach(model, recipe()),
        kvsieve.Cache(deeper, recipe()) as cache,
        pytest.raises(EngineError, match=message),
    ):
        model(prompt(30), past_key_values=cache)


@torch.no_grad()
def test_a_closed_cache(model: Any) -> None:
    with kvsieve.Cache(model, recipe()) as cache:
        model(prompt(30), past_key_values=cache)
        held = cache.report
    cache.close()  # once more does no harm
    with pytest.raises(EngineError, match="closed run, or to another model"):
        model(prompt(1), past_key_values=cache)
    assert cache.report.slots == held.slots, "what it held can still be read"


def test_a_closed_run(model: Any) -> None:
    attached = kvsieve.attach(model, recipe())
    with attached:
        out = model.generate(prompt(30), max_new_tokens=2)
    assert out.shape == (1, 32)
    with pytest.raises(EngineError, match="This run is closed"), attached:
        pass
    assert attached.report.removed


@torch.no_grad()
def test_a_cache_that_was_filled_before(model: Any) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(prompt(30), past_key_values=cache)
    with (
        kvsieve.attach(model, recipe()),
        pytest.raises(EngineError, match="filled without kvsieve"),
    ):
        model(prompt(1), past_key_values=cache)
    assert model(prompt(1), past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_after_a_failed_forward(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with kvsieve.Cache(model, recipe()) as cache:
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(prompt(30), past_key_values=cache)
        hook.remove()
        with pytest.raises(EngineError, match=r"earlier forward.*Start again with a new cache"):
            model(prompt(1), past_key_values=cache)
    with kvsieve.Cache(model, recipe()) as cache:
        assert model(prompt(30), past_key_values=cache).logits.isfinite().all()
