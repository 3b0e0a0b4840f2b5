"""One cell at a time: the method and the stock caches decode in turns."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from kvsieve.bench.models import build, prompt, sharing, weight_facts
from kvsieve.bench.plan import Group, Spec
from kvsieve.bench.remote import Peer, Remote, interval
from kvsieve.bench.rows import Row
from kvsieve.bench.timing import Step, quiet, summary, typical
from kvsieve.bench.variants import Sieve, Stock, Variant
from kvsieve.errors import KVSieveError

LONGEST = 128

Turns = dict[str, list[Step]]


class Bench:
    """A group's model (twice, on the same weights), its prompt and its stock caches."""

    def __init__(self, group: Group, peer: Peer | None) -> None:
        self.group, self.settings, self.peer = group, group.settings, peer
        shape, device = self.settings.shape, self.settings.device
        self.stock_model: Any = build(shape, group.dtype, device)
        self.model: Any = sharing(self.stock_model)
        self.prompt = prompt(shape, group.context, group.batch).to(device)
        self.anchors: dict[int, tuple[Stock, float]] = {}
        with quiet():
            # The first forwards of all are slow.
            for variant in (Stock(self.stock_model, self.prompt[:, :64]), self._first()):
                variant.prefill()
                variant.steps(2)
                variant.close()

    def _first(self) -> Sieve:
        return Sieve(self.model, self.prompt[:, :64], Spec(method="full").recipe())

    def cell(self, spec: Spec) -> Row:
        """Measure one cell; what a method or its peer refuses becomes the row's ``error``."""
        start = _device_bytes(self.settings.device)
        try:
            with quiet():
                facts: Row = self._measure(spec)
        except KVSieveError as error:
            facts = {"error": str(error)}
        if start is not None:
            facts["device_peak_bytes"] = torch.cuda.max_memory_allocated() - start
        gc.collect()
        return self._setting(spec) | facts

    def _setting(self, spec: Spec) -> Row:
        recipe = None if spec.engine == "stock" else spec.recipe()
        return {
            "slots": spec.slots(self.group.context),
            "schedule": None if recipe is None else str(recipe.schedule),
            "layout": None if recipe is None else recipe.layout,
            "model_shape": self.settings.shape.to_dict(),
            **weight_facts(self.model),
            "bytes_layer": self._full_bytes() // self.settings.shape.layers,
            "load": os.getloadavg()[0],
        }

    def _full_bytes(self) -> int:
        tokens = self.group.batch * self.group.context * self.settings.shape.layers
        return tokens * self.settings.shape.slot_bytes(self.group.dtype)

    def _measure(self, spec: Spec) -> Row:
        whole = self.group.context
        sides = {"stock": self._anchor(whole)}
        if spec.budget is not None:
            sides["short"] = self._anchor(spec.slots(whole))
        others: dict[str, Variant] = {name: stock for name, (stock, _) in sides.items()}
        if spec.engine == "stock":
            target, prefill = sides[spec.method]
            facts = _prefill_facts(target, prefill, sides["stock"][1]) | target.bytes()
            return facts | self._decode(others, spec.method, self.settings.steps)
        target = self._variant(spec)
        try:
            prefill = _prefill_facts(target, target.prefill(), sides["stock"][1])
            prefill |= target.bytes()
            steps = whole_intervals(self.settings.steps, interval(spec))
            return prefill | self._decode(others | {"target": target}, "target", steps)
        finally:
            target.close()

    def _anchor(self, length: int) -> tuple[Stock, float]:
        if length not in self.anchors:
            stock = Stock(self.stock_model, self.prompt[:, :length])
            self.anchors[length] = (stock, stock.prefill())
        self.anchors[length][0].rewind()
        return self.anchors[length]

    def _variant(self, spec: Spec) -> Variant:
        if spec.engine != "kvpress":
            return Sieve(self.model, self.prompt, spec.recipe())
        assert self.peer is not None, "kvpress cells need its process"
        self.peer.build(self.settings.shape, self.group.dtype, self.settings.device)
        return Remote(self.peer, spec, self.prompt, self._full_bytes())

    def _decode(self, variants: dict[str, Variant], name: str, steps: int) -> Row:
        for variant in variants.values():
            variant.steps(self.settings.warm_up)
        target = variants[name]
        warm = target.compress_seconds
        turns = self._turns(variants, name, steps)
        compressing = None if warm is None else (target.compress_seconds or 0.0) - warm
        spent = sum(step.seconds for step in turns[name])
        return {
            **self._speeds(turns, name),
            "decode_compress_seconds": compressing,
            "decode_compress_share": None if compressing is None else compressing / spent,
            **{f"end_{name}": held for name, held in target.bytes().items()},
        }

    def _turns(self, variants: dict[str, Variant], target: str, steps: int) -> Turns:
        """Decode in rounds: the target ``steps`` tokens in all, the others as set."""
        rounds = self.settings.rounds
        turns: Turns = {name: [] for name in variants}
        for turn in range(rounds):
            for name, variant in variants.items():
                total = steps if name == target else self.settings.steps
                count = (turn + 1) * total // rounds - turn * total // rounds
                turns[name] += variant.steps(count)
        return turns

    def _speeds(self, turns: Turns, name: str) -> Row:
        batch, own = self.group.batch, typical(turns[name])
        least = {side: min(step.seconds for step in steps) for side, steps in turns.items()}
        sides = {side: typical(turns[side]) for side in ("stock", "short") if side in turns}
        return {
            "tokens_per_second": batch / own,
            "tokens_per_second_best": batch / least[name],
            "step_seconds": summary(turns[name]),
            **{f"ratio_{side}": spent / own for side, spent in sides.items()},
            **{f"ratio_{side}_best": least[side] / least[name] for side in sides},
            **{f"{side}_tokens_per_second": batch / spent for side, spent in sides.items()},
        }


def _prefill_facts(target: Variant, seconds: float, stock: float) -> Row:
    compressing = target.compress_seconds
    return {
        "prefill_seconds": seconds,
        "prefill_ratio": seconds / stock,
        "prefill_compress_seconds": compressing,
        "prefill_compress_share": None if compressing is None else compressing / seconds,
    }


def whole_intervals(steps: int, every: int | None) -> int:
    """Return at least ``steps`` decode steps that make whole intervals of ``every``.

    Intervals above ``LONGEST`` are not waited for: those rows show no event.
    """
    return steps if every is None or every > LONGEST else -(-steps // every) * every


def _device_bytes(device: str) -> int | None:
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
