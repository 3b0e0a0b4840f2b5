"""Scores and kept sets of kvpress 0.5.5, method by method.

The value that kvpress writes into protected slots (the largest score plus one) is a convention of
its own, so that only scores of the other slots are compared; kept sets are compared whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.allocators import Pyramid
from kvsieve.compressors import Evict
from kvsieve.interfaces import Round
from kvsieve.methods.kvzip import Reconstruction
from kvsieve.scoring import projected_l1, standardise
from kvsieve.sketch import leverage
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store
from kvsieve.store.rope import unrotate

from .recorded import kept, kvpress_layers, load, positions_of, prefilled, score

S, HALF, QUARTER = 96, 48, 24
MODELS = ["kvpress_llama", "kvpress_qwen3"]

EXPECTED = {"sinks": 4, "future": 512, "epsilon": 0.0, "adaptive": False}
SNAPKV = {"window": 16, "kernel": 5, "pooling": "avg"}

# case -> method, its options, the slots whose scores are compared
PRESSES: dict[str, tuple[str, dict[str, Any], slice | None]] = {
    "knorm": ("knorm", {}, slice(0, S)),
    "streaming_llm": ("streaming-llm", {"sinks": 4}, None),  # kvpress scores 0 and 1
    "observed_attention": ("h2o", {"normalise": True, "recent": 0}, slice(0, S)),
    "tova": ("tova", {}, slice(0, S - 1)),
    "snapkv": ("snapkv", SNAPKV, slice(0, S - 16)),
    "keydiff": ("keydiff", {}, slice(0, S)),
    "expected": ("expected-attention", EXPECTED, slice(4, S)),
    "expected_eps": ("expected-attention", EXPECTED | {"epsilon": 1e-2}, slice(4, S)),
    "expected_nocov": ("expected-attention", EXPECTED | {"covariance": False}, slice(4, S)),
    "expected_novnorm": ("expected-attention", EXPECTED | {"value_norm": False}, slice(4, S)),
    "expected_nocov_novnorm": (
        "expected-attention",
        EXPECTED | {"covariance": False, "value_norm": False},
        slice(4, S),
    ),
    "lagkv": ("lagkv", {"sinks": 4, "lag": 16}, slice(4, 4 + 4 * 16)),
    "lagkv_cross": ("lagkv", {"lag": 16, "cross_scoring": True}, slice(4, 4 + 4 * 16)),
    "lagkv_short": ("lagkv", {"sinks": 4, "lag": 128}, None),  # the most recent, by another scale
    "cur": ("cur", {"sinks": 4, "local": 16}, slice(4, S)),
    "cur_ragged": ("cur", {"sinks": 4, "local": 20}, slice(4, S)),
    "cur_avg_global": ("cur", {"local": 0, "combine": "average"}, slice(4, S)),
    "expected_one_future": ("expected-attention", EXPECTED | {"future": 1}, slice(4, S)),
}


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", PRESSES)
def test_press(case: str, model: str) -> None:
    method, options, slots = PRESSES[case]
    recipe = kvsieve.recipe(method, budget=HALF, **options)
    tensors, layers = load(model)[0], kvpress_layers(model)
    if slots is not None:
        for layer, want in zip(layers, tensors[f"{case}.score"], strict=True):
            assert_near(score(recipe, layer)[..., slots], want[..., slots])
    assert torch.equal(kept(recipe, layers), tensors[f"{case}.kept"])


def test_every_recorded_case_of_a_method_we_have_is_compared() -> None:
    ours = {*PRESSES, *WRAPPED, *CRITICAL, *CHUNKED, *COMPACTOR}
    assert set(load("kvpress_llama")[1]["cases"]) == ours


WRAPPED = {
    "adakv_snapkv": ({"scorer": "snapkv"} | SNAPKV, HALF),
    "adakv_snapkv_75": ({"scorer": "snapkv"} | SNAPKV, QUARTER),
    "adakv_knorm": ({"scorer": "knorm"}, HALF),
    "adakv_knorm_75": ({"scorer": "knorm"}, QUARTER),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", WRAPPED)
def test_adakv(case: str, model: str) -> None:
    options, budget = WRAPPED[case]
    recipe = kvsieve.recipe("adakv", budget=budget, floor=0.2, **options)
    tensors, layers = load(model)[0], kvpress_layers(model)
    scored = S if options["scorer"] == "knorm" else S - 16
    for layer, want in zip(layers, tensors[f"{case}.base_score"], strict=True):
        assert_near(score(recipe, layer)[..., :scored], want[..., :scored])
    want = tensors[f"{case}.kept"]
    assert torch.equal(kept(recipe, layers), want)
    assert len(set(want.sum(-1).flatten().tolist())) > 1  # heads do share unevenly


CHUNKED = {
    "chunkkv_knorm": {"scorer": "knorm", "length": 20},
    "chunkkv_knorm_75": {"scorer": "knorm", "length": 8},
    "chunkkv_snapkv": {"scorer": "snapkv", "length": 16} | SNAPKV,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CHUNKED)
def test_chunkkv(case: str, model: str) -> None:
    """kvpress keeps a number of chunks; as many slots as they hold are the budget here."""
    tensors, layers = load(model)[0], kvpress_layers(model)
    for layer, base, want in zip(
        layers, tensors[f"{case}.base_score"], tensors[f"{case}.kept"], strict=True
    ):
        for b in range(2):
            budget = int(want[b, 0].sum())
            recipe = kvsieve.recipe("chunkkv", budget=budget, **CHUNKED[case])
            scored = S if CHUNKED[case]["scorer"] == "knorm" else S - 16
            assert_near(score(recipe, layer)[b, :, :scored], base[b, :, :scored])
            assert torch.equal(kept(recipe, [layer.row(b)])[0, 0], want[b])


COMPACTOR = {"compactor": 0.35, "compactor_attention": 0.0}


@pytest.mark.parametrize("model", MODELS)
def test_compactor_without_leverage(model: str) -> None:
    recipe = kvsieve.recipe("compactor", budget=HALF, chunk=28, blend=0.0)
    tensors, layers = load(model)[0], kvpress_layers(model)
    for layer, want in zip(layers, tensors["compactor_attention.score"], strict=True):
        assert_near(score(recipe, layer)[..., 8 : S - 4], want[..., 8 : S - 4])
    assert torch.equal(kept(recipe, layers), tensors["compactor_attention.kept"])


@pytest.mark.parametrize("model", MODELS)
def test_compactor_with_the_peer_s_sketch(model: str) -> None:
    attention = kvsieve.recipe("compactor", budget=HALF, chunk=28, blend=0.0)
    tensors, position = load(model)[0], torch.arange(S)
    inside = ((position >= 8) & (position < S - 4))[None, None]
    for layer, want in zip(kvpress_layers(model), tensors["compactor.score"], strict=True):
        assert layer.info.rotary is not None
        keys = unrotate(layer.key, *layer.info.rotary(position[None, None]))
        lever = standardise(
            leverage(keys, inside, tensors["compactor.sketch"]), inside, dim=(1, 2), correction=1
        )
        got = 0.35 * lever + score(attention, layer)
        assert_near(got[..., 8 : S - 4], want[..., 8 : S - 4])


CRITICAL = {
    "criticalkv_snapkv": ("criticalkv", HALF),
    "criticalkv_snapkv_75": ("criticalkv", QUARTER),
    "critical_adakv_snapkv": ("adakv", HALF),
    "critical_adakv_snapkv_75": ("adakv", QUARTER),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CRITICAL)
def test_criticalkv_alone_and_under_adakv(case: str, model: str) -> None:
    method, budget = CRITICAL[case]
    options = dict(SNAPKV) if method == "criticalkv" else SNAPKV | {"scorer": "criticalkv"}
    recipe = kvsieve.recipe(method, budget=budget, **options)
    tensors, layers = load(model)[0], kvpress_layers(model)
    for layer, want in zip(layers, tensors[f"{case}.base_score"], strict=True):
        assert_near(score(recipe, layer)[..., : S - 16], want[..., : S - 16])
    want = tensors[f"{case}.kept"]
    assert torch.equal(kept(recipe, layers), want)
    # kvpress does not protect the window in the second stage; here it keeps it all the same.
    assert bool(want[..., S - 16 :].all())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", ["criticalkv_snapkv", "criticalkv_snapkv_75"])
def test_criticalkv_second_stage_scores(case: str, model: str) -> None:
    recipe = kvsieve.recipe("criticalkv", budget=HALF, **SNAPKV)
    tensors = load(model)[0]
    for i, layer in enumerate(kvpress_layers(model)):
        base, want = tensors[f"{case}.base_score"][i], tensors[f"{case}.score"][i]
        weighted = (base + 1e-4) * projected_l1(*prefilled(recipe, layer))
        second = want < 1e30  # the first stage is written as the largest float
        torch.testing.assert_close(weighted[second], want[second], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("case", range(4))
def test_threshold_eviction(case: int, kind: str) -> None:
    tensors, header = load("kvpress_dms")
    scorer, threshold, delay = header["cases"][case]
    recipe = kvsieve.recipe("threshold", scorer=scorer, threshold=threshold, delay=delay)
    want = tensors[f"{kind}.case{case}.kept"]
    assert torch.equal(kept(recipe, kvpress_layers(f"kvpress_{kind}")), want)
    assert 0.02 < want.float().mean() < 0.99


@pytest.mark.parametrize("model", MODELS)
def test_pyramidkv_scores_as_snapkv(model: str) -> None:
    recipe = kvsieve.recipe("pyramidkv", budget=HALF, **SNAPKV)
    for layer, want in zip(kvpress_layers(model), load(model)[0]["snapkv.score"], strict=True):
        assert_near(score(recipe, layer)[..., : S - 16], want[..., : S - 16])


def our_lengths(budget: int, window: int, beta: float) -> list[int]:
    round = Round(
        budgets=torch.tensor([budget]),
        layers=(0, 1, 2, 3),
        layer_count=4,
        live=[torch.tensor([[S, S]])] * 4,
        window=window,
    )
    counts = Pyramid(beta=beta).allocate([torch.zeros(1, 2, S)] * 4, round)
    return [int(count[0, 0]) for count in counts]


@pytest.mark.parametrize("case", range(5))
def test_pyramidkv_lengths(case: int) -> None:
    """kvpress's pyramid stands on nothing and includes the window; ours stands on the window.

    So ours at budget x + W, less W, is kvpress's at budget x, up to the rounding: kvpress rounds
    each layer by itself (and x too where a fraction of the prompt is no whole number), ours adds
    up exactly. And kvpress falls back to equal layers where its smallest layer is below W.
    """
    tensors, header = load("kvpress_pyramidkv")
    options = header["cases"][case]
    window, beta = options["window_size"], options["beta"]
    x = round(S * (1 - options["compression_ratio"]))
    peer = tensors[f"case{case}.lengths"].tolist()
    got = our_lengths(x + window, window, beta)
    assert sum(got) == 4 * (x + window)
    if case == 1:
        assert peer == [29, 29, 29, 29]
        assert got == sorted(got, reverse=True) and len(set(got)) == 4
    else:
        assert all(abs(n - window - m) <= 1 for n, m in zip(got, peer, strict=True))


@pytest.mark.parametrize("case", range(5))
def test_pyramidkv_kept_sets_at_the_peer_s_lengths(case: int) -> None:
    tensors = load("kvpress_pyramidkv")[0]
    for layer in range(4):
        scores, want = tensors[f"case{case}.score"][layer], tensors[f"case{case}.kept"][layer]
        store = Store()
        positions = store.append(torch.zeros(2, 2, S, 1), torch.zeros(2, 2, S, 1))
        step = Step(
            layer=LayerInfo(ordinal=layer),
            query=torch.zeros(2, 2, 1, S, 1),
            scale=1.0,
            positions=positions,
        )
        counts = torch.full((2, 2), int(tensors[f"case{case}.lengths"][layer]))
        Evict().compress(step, store, scores, counts)
        assert torch.equal(positions_of(store, S), want)


# -- KVzip -------------------------------------------------------------------------------------


def replayed(run: str, recipe: kvsieve.Recipe) -> list[tuple[Step, Store, Tensor]]:
    """Feed the recorded queries and keys of each chunk; return the layers with their scores."""
    tensors = load("kvpress_kvzip")[0]
    scorer = recipe.scorer
    assert isinstance(scorer, Reconstruction)
    out = []
    for i in range(2):
        info = LayerInfo(ordinal=i)
        store = Store(scorer.columns, layout="ragged")
        store.append(tensors[f"layer{i}.key"], tensors[f"layer{i}.value"])
        step = None
        for j, span in enumerate(tensors[f"{run}.spans"].long()):
            query = tensors[f"{run}.chunk{j}.layer{i}.query"]
            key = tensors[f"{run}.chunk{j}.layer{i}.key"]
            mark = store.mark()
            positions = store.append(key, torch.zeros_like(key))
            step = Step(
                layer=info, query=query, scale=0.25, positions=positions, replayed=span[None]
            )
            scorer.observe(step, store)
            store.rollback(mark)
        assert step is not None
        out.append((step, store, scorer.score(step, store).clone()))
    return out


@pytest.mark.parametrize(
    ("case", "run", "scope"),
    [
        ("plain", "plain", "model"),
        ("chat", "chat", "model"),
        ("chat_layerwise", "chat", "layer"),
    ],
)
def test_kvzip_replay_scores_and_kept_sets(case: str, run: str, scope: str) -> None:
    tensors = load("kvpress_kvzip")[0]
    recipe = kvsieve.recipe("kvzip", budget=HALF, sinks=4, scope=scope)
    layers = replayed(run, recipe)
    for (_, _, got), want in zip(layers, tensors[f"{case}.replay_score"], strict=True):
        assert_near(got, want)
    protected = [got.index_fill(2, torch.arange(4), torch.inf) for _, _, got in layers]
    together = [protected] if scope == "model" else [[x] for x in protected]
    counts = []
    for scores in together:
        round = Round(
            budgets=torch.tensor([HALF]),
            layers=(0, 1)[: len(scores)],
            layer_count=2,
            live=[torch.tensor([[S, S]])] * len(scores),
        )
        counts += recipe.allocator.allocate(scores, round)
    for (step, store, _), scores, count in zip(layers, protected, counts, strict=True):
        recipe.compressor.compress(step, store, scores, count)
    got = torch.stack([positions_of(store, S) for _, store, _ in layers])
    assert torch.equal(got, tensors[f"{case}.kept"])


def test_kvzip_end_to_end_on_the_recorded_model() -> None:
    """The request of kvpress's `plain` run is the first nine fed tokens: prompt and newline."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = load("kvpress_kvzip")[0]
    weights, header = load("tiny_llama")
    config = {k: v for k, v in header["config"].items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    fed = tensors["plain.chunk0.fed"].tolist()
    assert fed[9:] == tensors["ids"][0].tolist()
    recipe = kvsieve.recipe("kvzip", budget=HALF, sinks=4, repeat_ids=fed[:9])
    with kvsieve.Cache(model, recipe) as cache, torch.no_grad():
        model(input_ids=tensors["ids"].long(), past_key_values=cache)
        got = torch.stack([positions_of(x.store, S) for x in cache.session.layers])
        assert cache.session.removed == 2 * 2 * HALF
        for x, want, mask in zip(
            cache.session.layers, tensors["plain.replay_score"], got, strict=True
        ):
            column = x.store["reconstruction"]
            live = (
                torch.ones_like(column, dtype=torch.bool) if x.store.live is None else x.store.live
            )
            assert_near(column[live], want[mask])
    assert torch.equal(got, tensors["plain.kept"])
