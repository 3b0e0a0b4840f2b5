"""Re-rotated keys: side by side in front of what comes next, as if nothing else had been there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.support import FULL, PARTIAL, Layer, Run, draw, turned
from models import build, padded, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import kvsieve
from kvsieve.errors import RecipeError, UnsupportedSignal
from kvsieve.keys import unrotated_keys
from kvsieve.step import Step

pytestmark = pytest.mark.oldest


def recipe(name: str = "knorm", budget: int | float = 6, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe(name, budget=budget, rerotate=True, **options)


def check(run: Run, layer: Layer, angles: tuple[float, ...], seen: list[int]) -> None:
    """Compare every live key with the un-rotated one, turned to its new place."""
    store = run.store()
    keys, moved = store.keys, store["moved"]
    live = (
        torch.ones(keys.shape[:3]).bool()
        if store.live is None
        else store.live.expand(keys.shape[:3])
    )
    for b, row in enumerate(run.kept()):
        first = 0 if layer.live is None else int((~layer.live[b]).sum())
        for h, held in enumerate(row):
            got = keys[b, h][live[b, h]]
            for j, i in enumerate(held):
                place = seen[b] - len(held) + j
                original = layer.keys[b, h, first + i].tolist()
                want = turned(turned(original, -i, angles), place, angles)
                torch.testing.assert_close(got[j], torch.tensor(want), rtol=1e-5, atol=1e-5)
                assert int(moved.expand(keys.shape[:3])[b, h][live[b, h]][j]) == place - i


@pytest.mark.parametrize("angles", [FULL, PARTIAL])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_keys_move_up_to_one_another(angles: tuple[float, ...], layout: str) -> None:
    layer = draw(S=14, padding=(0, 3), angles=angles)
    check(Run(recipe(layout=layout), layer), layer, angles, [14, 11])


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_they_move_on_at_later_events(layout: str) -> None:
    layer = draw(S=20, padding=(0, 3), angles=FULL, seed=1)
    run = Run(recipe(layout=layout, interval=2), layer.part(0, 14))
    for t in range(14, 18):
        run.feed(layer.part(t, t + 1))
    check(run, layer, FULL, [18, 15])


def test_heads_of_unequal_length_end_at_the_same_place() -> None:
    layer = draw(S=20, padding=(0, 5), angles=FULL, seed=2)
    layer.values[:, 1] *= 30
    run = Run(recipe("expected-attention", sinks=1, future=4), layer)
    assert len({len(head) for row in run.kept() for head in row}) > 1
    check(run, layer, FULL, [20, 15])


def test_a_row_that_keeps_everything_is_not_touched() -> None:
    layer = draw(S=14, padding=(0, 9), angles=FULL, seed=3)
    store = Run(recipe(), layer).store()
    assert torch.equal(store.keys[1, :, :5], layer.keys[1, :, 9:])
    assert bool((store["moved"][1, :, :5] == 0).all())


def test_scaled_rotations_are_not_scaled_twice() -> None:
    """YaRN's tables have a length other than 1."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    scaling |= {"original_max_position_embeddings": 32}
    model = build("llama", rope_parameters=scaling)
    with kvsieve.Cache(model, recipe(budget=12)) as cache, torch.no_grad():
        model(prompt(40), past_key_values=cache)
        norms = [layer.store.keys.norm(dim=-1) for layer in cache.session.layers]
    with kvsieve.Cache(model, kvsieve.recipe("knorm", budget=12)) as plain, torch.no_grad():
        model(prompt(40), past_key_values=plain)
        for layer, got in zip(plain.session.layers, norms, strict=True):
            torch.testing.assert_close(got, layer.store.keys.norm(dim=-1))


# -- on a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_the_same_as_counting_positions_inside_the_cache(family: str) -> None:
    """One layer, whose keys depend on nothing else: a stock cache of the kept tokens alone."""
    model, ids = build(family, num_hidden_layers=1), prompt(40)
    token = prompt(60)[:, -3:]
    with kvsieve.Cache(model, recipe("streaming-llm", budget=12)) as cache:
        model(ids, past_key_values=cache)
        got = model(token, past_key_values=cache).logits
    # Tokens side by side are what is kept of any text whose other tokens are left out.
    kept = torch.cat([ids[:, :4], ids[:, -8:]], 1)
    stock = DynamicCache(config=model.config)
    model(kept, past_key_values=stock)
    want = model(token, past_key_values=stock, position_ids=torch.arange(12, 15)[None]).logits
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-4, atol=1e-4)
    with kvsieve.Cache(model, kvsieve.recipe("streaming-llm", budget=12)) as cache:
        model(ids, past_key_values=cache)
        unmoved = model(token, past_key_values=cache).logits
    assert (unmoved[:, 0] - want[:, 0]).abs().max() > 1e-2


@torch.no_grad()
def test_positions_that_count_padding_make_no_difference() -> None:
    """Some callers give positions that begin behind the padding, others positions that don't."""
    model = tiny("llama")
    ids, mask = padded([prompt(40), prompt(29, 1)])
    results = []
    for place in (None, (mask.cumsum(1) - 1).clamp_min(0)):
        with kvsieve.Cache(model, recipe("keydiff", budget=12)) as cache:
            out = model(ids, attention_mask=mask, position_ids=place, past_key_values=cache)
            results.append(out.logits[:, -1])
            assert cache.report.removed
            check = [layer.store["moved"] for layer in cache.session.layers]
            results.append(torch.stack(check).float())
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[1], results[3])


def test_what_keys_stand_for_can_still_be_read() -> None:
    """A method that un-rotates cached keys finds the same keys after they have moved."""
    layer = draw(B=1, S=14, angles=FULL, seed=4)

    def plain(made: kvsieve.Recipe) -> Tensor:
        store = Run(made, layer).store()
        step = Step(
            layer=layer.info(), query=layer.queries, scale=1.0, positions=store.seen[:, None]
        )
        return unrotated_keys(step, store)

    moved, unmoved = plain(recipe()), plain(kvsieve.recipe("knorm", budget=6))
    torch.testing.assert_close(moved, unmoved, rtol=1e-5, atol=1e-5)


# -- where it can't hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["knorm", "finch"])
def test_latents_and_changing_rotations_are_refused_by_name(name: str) -> None:
    small = {"window": 2} if name == "finch" else {}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for model in (tiny("deepseek-v3"), build("llama", rope_parameters=dynamic)):
        with pytest.raises(UnsupportedSignal, match=f"'{name}' needs re-rotation of keys.*rotary"):
            kvsieve.attach(model, recipe(name, **small))
        kvsieve.attach(model, kvsieve.recipe(name, budget=6, rerotate=False, **small))


@pytest.mark.parametrize(
    ("name", "what"), [("momentkv", "a summary of keys"), ("hash-evict", "the code of each key")]
)
def test_what_was_made_from_keys_where_they_stood_is_refused_by_name(name: str, what: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' remembers {what}.*Leave rerotate out"):
        recipe(name, budget=600)


def test_models_without_rotary_positions_are_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(UnsupportedSignal, match=r"re-rotation of keys.*no rotary positions"):
        kvsieve.attach(model, recipe())
