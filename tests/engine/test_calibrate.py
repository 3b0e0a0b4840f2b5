"""Measuring real models: what is read off them, and which models it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt, tiny
from running import skip_refused
from torch import Tensor

import kvsieve
from kvsieve.errors import EngineError, RecipeError, UnsupportedSignal
from kvsieve.statistics import TENSORS, Statistics

pytestmark = pytest.mark.oldest
SINKS, PASSAGES = 3, [prompt(40), prompt(23, 1)[0], prompt(17, 2)[0].tolist()]


def measure(model: Any, **sizes: int) -> Statistics:
    return kvsieve.calibrate(model, PASSAGES, **({"sinks": SINKS, "first": 2, "recent": 4} | sizes))


@pytest.fixture(scope="module")
def stats() -> Statistics:
    return measure(tiny("llama"))


@torch.no_grad()
def projected(model: Any) -> list[Tensor]:
    """What each layer's query projection gave, behind the sinks: queries before rotation."""
    out: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, x, i=i: out[i].append(x[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    for passage in PASSAGES:
        model(torch.as_tensor(passage).view(1, -1))
    for hook in hooks:
        hook.remove()
    return [torch.cat([x[SINKS:] for x in layer]).view(-1, 2, 2, 16) for layer in out]


def test_moments_are_those_of_the_projected_queries(stats: Statistics) -> None:
    for i, queries in enumerate(projected(tiny("llama"))):
        assert len(queries) == 40 + 23 + 17 - 3 * SINKS
        torch.testing.assert_close(
            stats.tensors["query_mean"][i], queries.mean(0), rtol=1e-4, atol=1e-4
        )
        for h in range(2):
            for g in range(2):
                want = torch.cov(queries[:, h, g].T)
                torch.testing.assert_close(
                    stats.tensors["query_covariance"][i, h, g], want, rtol=1e-4, atol=1e-4
                )


def test_everything_is_there_and_the_model_is_left_as_it_was(stats: Statistics) -> None:
    model = tiny("llama")
    assert set(stats.tensors) == set(TENSORS)
    for name, tensor in stats.tensors.items():
        assert stats.identity is not None and tensor.shape == stats.identity.shape(name)
        assert bool(tensor.isfinite().all()) and tensor.dtype is torch.float32
    assert stats.facts == {"tokens": 80, "passages": 3, "sinks": 3, "first": 2, "recent": 4}
    assert model.config._attn_implementation == "sdpa" and not model.model._forward_hooks
    told: list[int] = []
    kvsieve.calibrate(model, PASSAGES, on_passage=told.append)
    assert told == [40, 63, 80]


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "qwen3-next"])
def test_only_layers_that_are_compressed_are_measured(family: str) -> None:
    skip_refused(family)
    got = measure(tiny(family))
    recipe = kvsieve.recipe("q-filters", budget=12, recent=4, stats=got)
    assert len(got.tensors["query_filter"]) == recipe.statistics.identity.layers < 4  # type: ignore
    with kvsieve.attach(tiny(family), recipe) as run:
        tiny(family).generate(prompt(30), max_new_tokens=3, do_sample=False)
    assert run.report.removed


@pytest.mark.parametrize("name", ["q-filters", "duo-attention", "expected-attention"])
def test_the_file_serves_its_model_in_any_dtype(
    name: str, stats: Statistics, tmp_path: Path
) -> None:
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    small = {"recent": 4} if name != "expected-attention" else {"future": 8}
    small |= {"sinks": 2} if name != "q-filters" else {}
    recipe = kvsieve.recipe(name, budget=12, stats=path, **small)
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama").to(dtype)
        with kvsieve.attach(model, recipe) as run:
            model.generate(prompt(40), max_new_tokens=3, do_sample=False)
        assert run.report.removed
        assert sum(sum(heads) for heads in run.report.slots[0]) <= 4 * (12 + 3)


@pytest.mark.parametrize("name", ["q-filters", "duo-attention", "expected-attention"])
def test_it_is_refused_for_other_models(name: str, stats: Statistics) -> None:
    recipe = kvsieve.recipe(name, budget=600, stats=stats)
    for other in (tiny("qwen3"), build("llama", seed=1), build("llama", num_hidden_layers=3)):
        for enter in (kvsieve.attach, kvsieve.Cache):
            with pytest.raises(UnsupportedSignal, match=r"another model.*kvsieve calibrate"):
                enter(other, recipe)
    slightly = build("llama")
    slightly.model.layers[1].self_attn.o_proj.weight *= 1.05
    with pytest.raises(UnsupportedSignal, match="with other weights"):
        kvsieve.attach(slightly, recipe)


@pytest.mark.parametrize("name", ["q-filters", "duo-attention"])
def test_methods_that_lack_it_name_the_command(name: str) -> None:
    with pytest.raises(UnsupportedSignal, match=f"'{name}' needs statistics.*`kvsieve calibrate"):
        kvsieve.attach(tiny("llama"), kvsieve.recipe(name, budget=600))


def test_a_pattern_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.tsv"
    path.write_text("0.1\t0.9\n", "utf-8")
    recipe = kvsieve.recipe("duo-attention", budget=12, sinks=2, recent=4, pattern=path)
    with pytest.raises(UnsupportedSignal, match=r"head_gate \[1, 2\].*takes \[2, 2\]"):
        kvsieve.attach(tiny("llama"), recipe)
    path.write_text("0.1\t0.9\n0.2\t0\n", "utf-8")
    recipe = kvsieve.recipe("duo-attention", budget=12, sinks=2, recent=4, pattern=path)
    with kvsieve.attach(tiny("llama"), recipe) as run:
        tiny("llama").generate(prompt(30), max_new_tokens=1, do_sample=False)
    assert run.report.slots == [[[6, 30], [6, 6]]]


def test_models_that_cannot_be_measured() -> None:
    with pytest.raises(UnsupportedSignal, match=r"'calibrate' needs .*latents"):
        measure(tiny("deepseek-v3"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedSignal, match="'calibrate' needs pre-rotation queries"):
        measure(build("llama", rope_parameters=dynamic))
    with pytest.raises(UnsupportedSignal, match="caches latents"):
        kvsieve.attach(
            tiny("deepseek-v3"),
            kvsieve.recipe("q-filters", budget=99, stats=measure(tiny("llama"))),
        )


def test_passages_that_are_none() -> None:
    with pytest.raises(RecipeError, match="passage 2 has no tokens"):
        kvsieve.calibrate(tiny("llama"), [prompt(9), []])
    with pytest.raises(RecipeError, match="too few to measure"):
        kvsieve.calibrate(tiny("llama"), [])
    with pytest.raises(EngineError, match="not a Transformers model"):
        kvsieve.calibrate(torch.nn.Linear(2, 2), PASSAGES)
