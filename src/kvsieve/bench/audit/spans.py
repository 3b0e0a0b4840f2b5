"""Where the instructions of a document stand, and which share of them a cache still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from kvsieve.engines.transformers import Cache
from kvsieve.reference import Sample

Span = tuple[int, int]


def instruction_spans(made: Sample) -> dict[str, Span]:
    """Return the tokens of each instruction, ``start`` to ``end``, in their order."""
    words = (made.document or "").split()
    head = words[: words.index("<ctx>")]
    found, start = {}, head.index("<sys>") + 1
    for name in made.instructions:
        end = head.index(";", start) + 1
        assert head[start] == name, "instructions stand in their order"
        found[name] = (start, end)
        start = end
    return found


def system_span(made: Sample) -> Span:
    """Return the tokens before the document proper: start mark and all instructions."""
    return 0, (made.document or "").split().index("<ctx>") + 1


def kept_shares(cache: Cache, samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Return for each prompt the share of each instruction's slots that is left, and of the rest.

    A mean over layers and heads; "document" is everything after the instructions.
    """
    seen = cache.session.layers[0].store.seen
    return [
        shares(
            cache,
            row,
            {**instruction_spans(made), "document": (system_span(made)[1], int(seen[row]))},
        )
        for row, made in enumerate(samples)
    ]


def shares(cache: Cache, row: int, spans: Mapping[str, Span]) -> dict[str, float]:
    """Return the share of each span's slots that a row still holds, over layers and heads.

    Empty spans are left out.
    """
    stores = [layer.store for layer in cache.session.layers]
    return {name: _share(stores, row, span) for name, span in spans.items() if span[0] < span[1]}


def _share(stores: Sequence, row: int, span: Span) -> float:
    start, end = span
    shares = []
    for store in stores:
        position, heads = store["position"][row], store.counts.shape[1]
        inside = (position >= start) & (position < end)
        if store.live is not None:
            inside = inside & store.live[row]
        kept = inside.expand(heads, -1).sum(dtype=torch.float64)
        shares.append(float(kept) / (heads * (end - start)))
    return fmean(shares)
