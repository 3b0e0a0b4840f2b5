"""Ten families of models under the same recipes: no family needs code of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, LATENT, padded, prompt, tiny
from running import decode, row_of, skip_refused
from torch import Tensor

import kvsieve
from kvsieve import Recipe

pytestmark = pytest.mark.oldest

STEPS = 6
BUDGET = 12
RECIPES = {
    "snapkv": {"window": 4, "kernel": 3},
    "streaming-llm": {},
    "keydiff": {"interval": 2},
    "h2o": {},
    "hash-evict": {"sinks": 2, "recent": 3, "schedule": "after-prefill|each-step"},
    "conf-kv": {"sinks": 2, "recent": 3, "window": 4, "least": 6, "low": 3.0, "slack": 0},
}
FORCED = torch.cat([prompt(50, seed)[:, -STEPS:] for seed in (0, 1)])


families = pytest.mark.parametrize("family", FAMILIES)


def recipe(name: str, family: str) -> Recipe:
    options: dict[str, Any] = dict(RECIPES[name])
    if name == "hash-evict" and family in LATENT:
        options["source"] = "key"  # queries and latents are not of one kind
    elif name == "hash-evict":
        options["schedule"] = "after-prefill|before-attend"
    return kvsieve.recipe(name, budget=BUDGET, **options)


def pair() -> tuple[list[Tensor], Tensor, Tensor]:
    rows = [prompt(40, 0), prompt(27, 1)]
    return rows, *padded(rows)


@families
def test_full_equals_stock(family: str) -> None:
    skip_refused(family)
    model, (rows, ids, mask) = tiny(family), pair()
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    # A hybrid's recurrent layers are not padding-proof everywhere: only what is ours is compared.
    inputs = [(ids, mask)] if family != "qwen3-next" else [(rows[0], torch.ones_like(rows[0]))]
    for tokens, real in inputs:
        stock = model.generate(tokens, attention_mask=real, **options)
        with kvsieve.attach(model, kvsieve.recipe("full")) as run:
            ours = model.generate(tokens, attention_mask=real, **options)
        assert torch.equal(stock.sequences, ours.sequences)
        for a, b in zip(stock.logits, ours.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert run.report.removed == 0


@families
@pytest.mark.parametrize("name", RECIPES)
def test_padded_row_equals_the_row_alone(family: str, name: str) -> None:
    skip_refused(family)
    model, (rows, ids, mask) = tiny(family), pair()
    together = decode(model, recipe(name, family), ids, mask, steps=STEPS, forced=FORCED)
    for b, row in enumerate(rows):
        alone = decode(model, recipe(name, family), row, steps=STEPS, forced=FORCED[b : b + 1])
        assert [row_of(held, b) for held in together.held] == alone.held
        for x, y in zip(together.logits, alone.logits, strict=True):
            assert x[b].argmax() == y[0].argmax()
            torch.testing.assert_close(x[b], y[0], rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("name", RECIPES)
def test_slots_and_bytes_shrink(family: str, name: str) -> None:
    skip_refused(family)
    model = tiny(family)
    full = decode(model, kvsieve.recipe("full"), prompt(40), steps=STEPS, forced=FORCED[:1])
    trace = decode(model, recipe(name, family), prompt(40), steps=STEPS, forced=FORCED[:1])
    layers, heads = trace.counts[0].shape[::2]
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert layers == types.count("full_attention")
    if family not in LATENT:
        assert heads == config.num_key_value_heads
    assert int(trace.counts[0].max()) == BUDGET
    slack = {"snapkv": STEPS, "keydiff": 1}.get(name, 0)
    assert max(int(count.max()) for count in trace.counts) <= BUDGET + slack
    report = trace.report
    assert torch.tensor(report.slots).transpose(0, 1).equal(trace.counts[-1])
    assert report.seen == [40 + STEPS]
    assert report.bytes_kept < full.report.bytes_kept
    assert report.bytes_full == full.report.bytes_full
    difference = (trace.logits[-1] - full.logits[-1]).abs().max()
    assert difference > 1e-2, "removed slots were to change the logits"
