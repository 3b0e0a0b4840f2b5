"""The Transformers engine fed exactly as vLLM was, and what both kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from running import positions_of
from serving import Served, number

import kvsieve
from kvsieve.engines.vllm.effective import Effective


@dataclass
class Kept:
    """Positions that vLLM kept after a forward: ``(request, n0, n1, layer) -> [H][slots]``."""

    of: dict[tuple[int, int, int, int], list[list[int]]] = field(default_factory=dict)
    original: Any = None


HERE = Kept()
"""What this process, which may be a worker of its own, has kept."""


def begin(worker: Any) -> None:
    """Write down what every compaction in a worker's process keeps."""
    from kvsieve.engines.vllm.beside import Beside

    HERE.of, HERE.original = {}, Beside.keep
    context = worker.vllm_config.compilation_config.static_forward_context
    ordinal = {id(layer.impl.sieve.beside): i for i, layer in enumerate(context.values())}

    def keep(self: Any, event: Any, store: Any) -> None:
        HERE.original(self, event, store)
        key = (number(event.row.key), event.row.n0, event.row.n1, ordinal[id(self)])
        HERE.of[key] = self.requests[event.row.key].columns["position"][0].tolist()

    Beside.keep = keep  # type: ignore[method-assign]


def end(worker: Any) -> dict[tuple[int, int, int, int], list[list[int]]]:
    """Return what was written down, and write no more."""
    from kvsieve.engines.vllm.beside import Beside

    Beside.keep = HERE.original  # type: ignore[method-assign]
    return HERE.of


@contextmanager
def watching(llm: Any) -> Iterator[Kept]:
    """Write down what every compaction of an engine keeps, the heads of all its workers."""
    kept = Kept()
    llm.collective_rpc(begin)
    try:
        yield kept
    finally:
        shares = llm.collective_rpc(end)
        assert all(share.keys() == shares[0].keys() for share in shares), "all at the same time"
        kept.of = {key: [row for share in shares for row in share[key]] for key in shares[0]}


@dataclass
class Difference:
    """Between two engines: compactions that disagree, and the largest of log-probabilities.

    Below -10, where fp32 has no more digits to give, a difference counts by the tenth of its size.
    """

    logprob: float = 0.0
    compared: int = 0
    events: int = 0
    unequal: list[tuple[int, int, int, int]] = field(default_factory=list)


@torch.no_grad()
def replay(model: Any, made: Effective | None, served: list[Served], kept: Kept) -> Difference:
    """Feed each request to the Transformers engine in the same forwards, teacher-forced."""
    found = Difference()
    recipe = kvsieve.recipe("full") if made is None else made.recipe
    for index, one in enumerate(served):
        done = 0  # what a preempted request reads again was said before
        whole = one.prompt + one.tokens
        for life in _lives(one.forwards):
            with kvsieve.Cache(model, recipe, prompt_length=len(one.prompt)) as cache:
                for n0, count in life:
                    n = n0 + count
                    ids = torch.tensor([whole[n0:n]])
                    place = torch.arange(n0, n)[None]
                    logits = model(
                        ids, position_ids=place, past_key_values=cache, use_cache=True
                    ).logits[0, -1]
                    _compare_kept(found, cache, kept, (index, n0, n))
                    if max(len(one.prompt), done + 1) <= n < len(whole):
                        done = n
                        theirs = one.logprobs[n - len(one.prompt)]
                        ours = float(logits.log_softmax(-1)[whole[n]])
                        found.logprob = max(found.logprob, abs(ours - theirs) / max(1, -ours / 10))
                        found.compared += 1
    return found


def _lives(forwards: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut the forwards where a preempted request starts again."""
    lives: list[list[tuple[int, int]]] = []
    for n0, count in forwards:
        if n0 == 0:
            lives.append([])
        lives[-1].append((n0, count))
    return lives


def _compare_kept(found: Difference, cache: Any, kept: Kept, forward: tuple[int, int, int]) -> None:
    for ordinal, layer in enumerate(cache.session.layers):
        theirs = kept.of.get((*forward, ordinal))
        if theirs is None:
            continue
        found.events += 1
        if positions_of(layer.store)[0] != theirs:
            found.unequal.append((*forward, ordinal))
