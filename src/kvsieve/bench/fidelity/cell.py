"""One cell: the same texts followed under one recipe, compared with the stock cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvsieve.bench.fidelity.figures import (
    agreement,
    divergence,
    loss,
    mean_where,
    relative_error,
    with_interval,
)
from kvsieve.bench.fidelity.texts import Text
from kvsieve.bench.fidelity.trace import Trace, compressed
from kvsieve.compose import Recipe
from kvsieve.report import Report

BINS = 8
"""Parts of the continuation that are shown by themselves."""


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How far one text's trace is from the stock cache's, per token fed.

    ``counted [T]``: see ``Text``; ``kl``, ``agreement`` ``[T]``; ``loss``, ``loss_full``
    ``[T - 1]`` of the text's own next tokens; ``outputs [T, L]``, ``attention [T, A]``.
    """

    counted: Tensor
    kl: Tensor
    agreement: Tensor
    loss: Tensor
    loss_full: Tensor
    outputs: Tensor
    attention: Tensor

    @classmethod
    def of(cls, full: Trace, other: Trace, text: Text) -> Apart:
        """Compare two traces of a text."""
        following = text.continuation[0, 1:]
        return cls(
            counted=text.counted,
            kl=divergence(full.logits, other.logits),
            agreement=agreement(full.logits, other.logits),
            loss=loss(other.logits[:-1], following),
            loss_full=loss(full.logits[:-1], following),
            outputs=relative_error(full.outputs, other.outputs),
            attention=relative_error(full.attention, other.attention),
        )


def figures(
    model: Any,
    recipe: Recipe,
    texts: Sequence[Text],
    full: Sequence[Trace],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Follow every text under a recipe and return a row's figures.

    Raises:
        BudgetError: the budget is too small for a prefix.
        EngineError, UnsupportedSignal: the model can't be compressed that way.
    """
    apart, reports = [], []
    for text, stock in zip(texts, full, strict=True):
        trace, report = compressed(model, text, recipe)
        apart.append(Apart.of(stock, trace, text))
        reports.append(report)
        progress()
    return {**_averages(apart), **_costs(reports)}


def _averages(apart: Sequence[Apart]) -> dict[str, Any]:
    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in apart])

    counted, kl, agreed = stacked("counted"), stacked("kl"), stacked("agreement")
    outputs, follow = stacked("outputs"), counted[:, :-1]
    return {
        "tokens": int(counted.sum()),
        "kl": with_interval(mean_where(kl, counted, 1)),
        "agreement": with_interval(mean_where(agreed, counted, 1)),
        "loss": _mean(stacked("loss"), follow),
        "loss_full": _mean(stacked("loss_full"), follow),
        "layer_error": outputs.mean((0, 1)).tolist(),
        "attention_error": stacked("attention").mean((0, 1)).tolist(),
        "bins": _bins(counted, kl, agreed, outputs[..., -1]),
    }


def _bins(counted: Tensor, kl: Tensor, agreed: Tensor, last: Tensor) -> list[dict[str, Any]]:
    """Return averages over equal parts of the continuation, ``[start, end)`` in tokens fed."""
    parts = torch.arange(kl.shape[1]).tensor_split(min(BINS, kl.shape[1]))
    return [
        {
            "start": int(part[0]),
            "end": int(part[-1]) + 1,
            "tokens": int(counted[:, part].sum()),
            "kl": _mean(kl[:, part], counted[:, part]),
            "agreement": _mean(agreed[:, part], counted[:, part]),
            "error": last[:, part].mean().item(),
        }
        for part in parts
    ]


def _mean(x: Tensor, where: Tensor) -> float | None:
    """Return the mean over the marked ones; None where there are none."""
    return mean_where(x.flatten(), where.flatten(), 0).item() if bool(where.any()) else None


def _costs(reports: Sequence[Report]) -> dict[str, Any]:
    return {
        "cache": {
            name: fmean(getattr(report, name) for report in reports)
            for name in ("bytes_full", "bytes_kept", "bytes_peak")
        },
        "seconds": {
            phase: fmean(report.seconds[phase] for report in reports)
            for phase in ("prefill", "decode", "compress")
        },
    }
