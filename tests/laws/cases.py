"""Every registered method at a toy scale, and a few combinations, as test cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from drawn import Drawn
from models import padded, prompt
from torch import Tensor

import kvsieve
from kvsieve import Recipe, registry

BUDGET = 12
LENGTHS = (40, 29, 9)  # the last row is below the budget until it has decoded for a while
STEPS = 7

# Options at the size of the toy prompts, for every method that has them.
SMALL = {"window": 4, "interval": 3, "future": 16, "chunk": 16, "sinks": 2, "kernel": 3}
SMALL |= {"lag": 4, "length": 4, "local": 5}
# Options that mean something else to other methods.
SMALL_OF: dict[str, dict[str, Any]] = {
    "conf-kv": {"least": 7, "slack": 1, "recent": 3, "low": 3.0, "high": 6.0, "margin": 0.0},
    "dbudgetkv": {"tolerance": 0.6, "whole": 1},
    "distinct-keys": {"recent": 4},
    "duo-attention": {"recent": 4, "stats": Drawn()},
    "hash-evict": {"recent": 3},
    "infinipot-v": {"frame": 2, "frames": 2},
    "q-filters": {"recent": 4, "stats": Drawn()},
    "threshold": {"threshold": -0.4, "delay": 3},
}
# Options that leave the choice to the cap, for methods that choose their budget.
AT_CAP: dict[str, dict[str, Any]] = {
    "conf-kv": {"least": 1.0},
    "dbudgetkv": {"whole": 9},
    "threshold": {"threshold": float("-inf")},
}


@dataclass(frozen=True)
class Case:
    """A method with options, by a name that pytest shows."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def recipe(self, budget: int | float | str = BUDGET) -> Recipe:
        """Build it; a method that removes nothing takes no budget."""
        if not self.compresses:
            return kvsieve.recipe(self.method, **self.options)
        return kvsieve.recipe(self.method, budget=budget, **self.options)

    def at_cap(self, budget: int | float | str) -> Recipe:
        """Build it so that the budget alone decides how much it keeps."""
        options = self.options | AT_CAP.get(self.method, {})
        return Case(self.name, self.method, options).recipe(budget)

    @property
    def compresses(self) -> bool:
        return registry.find(self.method).build(**self._own).compresses

    @property
    def _own(self) -> dict[str, Any]:
        common = ("schedule", "layout", "fair", "rerotate")
        return {k: v for k, v in self.options.items() if k not in common}

    @property
    def rerotates(self) -> bool:
        return self.compresses and self.recipe().rerotate

    @property
    def chunk_invariant(self) -> bool:
        return registry.find(self.method).chunk_invariant


def _case(method: str, name: str | None = None, **options: Any) -> Case:
    names = set(registry.find(method).options())
    if registry.find(method).wraps:
        inner = options.get("scorer") or registry.find(method).options()["scorer"].default
        names |= set(registry.find(inner).options())
    small = {key: value for key, value in SMALL.items() if key in names}
    return Case(name or method, method, small | SMALL_OF.get(method, {}) | options)


BOTH = "after-prefill|each-step"
CASES = [
    *(_case(name) for name in registry.methods()),
    _case("keydiff", "keydiff-fair", fair=((2, 9), (20, 26))),
    _case("snapkv", "snapkv-fair-each-step", fair=((0, 12),), schedule=BOTH),
    _case("adakv", "adakv-fair", fair=((3, 15),)),
    _case("adakv", "adakv-h2o", scorer="h2o"),
    _case("adakv", "adakv-keydiff", scorer="keydiff"),
    _case("adakv", "adakv-g-kv", scorer="g-kv"),
    _case("criticalkv", "criticalkv-h2o", scorer="h2o"),
    _case("criticalkv", "criticalkv-adakv", scorer="adakv", window=4, kernel=3),
    _case("adakv", "adakv-lagkv", scorer="lagkv", cross_scoring=True),
    _case("chunkkv", "chunkkv-h2o", scorer="h2o"),
    _case("chunkkv", "chunkkv-keydiff-ragged", scorer="keydiff", layout="ragged"),
    _case("chunkkv", "chunkkv-pyramidkv", scorer="pyramidkv"),
    _case("cur", "cur-sketched", sketch=6, schedule=BOTH),
    _case("h2o", "h2o-normalised", normalise=True),
    _case("h2o", "h2o-ragged", layout="ragged"),
    _case("kvzip", "kvzip-layer", scope="layer"),
    _case("laprox", "laprox-layer", scope="layer"),
    _case("laprox", "laprox-each-step", schedule=BOTH),
    _case("snapkv", "snapkv-each-step", schedule=BOTH),
    _case("adakv", "adakv-each-step", schedule=BOTH),
    _case("g-kv", "g-kv-each-step", schedule=BOTH),
    _case("pyramidkv", "pyramidkv-each-step", schedule=BOTH),
    _case("expected-attention", "expected-attention-each-step", schedule=BOTH),
    _case("expected-attention", "expected-attention-even", adaptive=False),
    _case("keydiff", "keydiff-decode-only", schedule="every:2"),
    _case("keydiff", "keydiff-mean", anchor="mean"),
    _case("distinct-keys", "distinct-keys-adaptive", adaptive=True),
    _case("distinct-keys", "distinct-keys-history", history=0.5),
    _case("laprox", "laprox-summed", gqa="sum_proj", pooled="score"),
    _case("rest-kv", "rest-kv-drift", beta=4.0),
    _case("rest-kv", "rest-kv-paper", form="paper", gqa="max"),
    _case("momentkv", "momentkv-each-step", schedule=BOTH),
    _case("momentkv", "momentkv-parts", summaries=3, residual="centre"),
    _case("momentkv", "momentkv-uncorrected", correct=False, rounds=3),
    _case("adakv", "adakv-momentkv", scorer="momentkv"),
    _case("cam", "cam-tova-ragged", scorer="tova", span=3, layout="ragged"),
    _case("g-kv", "g-kv-above", schedule="above:15"),
    _case("expected-attention", "expected-attention-calibrated", stats=Drawn()),
    _case("adakv", "adakv-q-filters", scorer="q-filters", recent=4, stats=Drawn()),
    _case("duo-attention", "duo-attention-each-step", schedule=BOTH),
    _case("finch", "finch-whole", chunk=0, normalise=False),
    _case("finch", "finch-asked", question=(5, 9, 3)),
    _case("finch", "finch-asked-still", question=(5, 9, 3), rerotate=False, chunk=5),
    _case("streaming-llm", "streaming-llm-rerotated", rerotate=True),
    _case("g-kv", "g-kv-rerotated", rerotate=True),
    _case("adakv", "adakv-rerotated", rerotate=True),
    _case("distinct-keys", "distinct-keys-rerotated", rerotate=True, schedule=BOTH),
    _case("adakv", "adakv-above", schedule="above:15", layout="ragged"),
    _case("dbudgetkv", "dbudgetkv-attention", order="attention", metric="full", whole=0),
    _case("threshold", "threshold-h2o", scorer="h2o", threshold=1.5),
    _case(
        "threshold",
        "threshold-adakv-each-step",
        scorer="adakv",
        threshold=0.06,
        window=4,
        kernel=3,
        schedule=BOTH,
    ),
    _case("infinipot-v", "infinipot-v-trigger", trigger=16, frame=1, frames=4, share=0.7),
    _case("hash-evict", "hash-evict-key-ragged", source="key", bits=30, layout="ragged"),
    _case("hash-evict", "hash-evict-each-step", schedule=BOTH),
    _case("snapkv", "snapkv-before-attend", schedule="after-prefill|before-attend"),
    _case("adakv", "adakv-before-attend", schedule="after-prefill|before-attend"),
    _case("conf-kv", "conf-kv-ragged", layout="ragged", top=0.0, mass=0.5, slack=0),
]
COMPRESSING = [case for case in CASES if case.compresses]

FAMILIES = ("llama", "qwen3")


def batch() -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[3, 40]`` of rows of unequal length, padded on the left."""
    return padded(rows())


def rows() -> list[Tensor]:
    """Return the batch's rows ``[1, n]`` by themselves."""
    return [prompt(n, seed) for seed, n in enumerate(LENGTHS)]
