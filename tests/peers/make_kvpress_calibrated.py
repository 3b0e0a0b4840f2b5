"""Make golden vectors of kvpress's presses that need statistics, or that move keys.

Run in the peer environment (``requirements.txt``)::

    .venv-peer/bin/python tests/peers/make_kvpress_calibrated.py

The models, prompts and layer inputs are those of ``make_kvpress_vectors.py``, whose files hold
them; here only what these presses made of them is written, to ``vectors/kvpress_calibrated_*``.
What is loaded from a hub by their users (statistics, filters, head scores) is given by hand.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import kvpress
import make_kvpress_vectors as base
import numpy as np
import torch
from kvpress.presses import expected_attention_with_stats as with_stats
from torch import Tensor
from transformers import BatchEncoding, DynamicCache, PreTrainedModel

B, S, H, D, G, L = base.B, base.S, base.H, base.D, base.G, 2
WINDOW = 12
DUO: dict[str, Any] = {"sink_size": 4, "recent_size": 16}


class Texts:
    """Stands for the data set: token ids, written out as text."""

    def __init__(self, ids: Tensor) -> None:
        self.rows = [{"chapter": " ".join(map(str, row.tolist()))} for row in ids]

    def map(self, change: Callable[[dict[str, str]], dict[str, str]]) -> Texts:
        self.rows = [change(row) for row in self.rows]
        return self

    def __getitem__(self, column: str) -> list[str]:
        return [row[column] for row in self.rows]


def tokenize(text: str, **_: Any) -> BatchEncoding:
    """Read token ids back from their text."""
    return BatchEncoding({"input_ids": torch.tensor([[int(x) for x in text.split()]])})


def statistics(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """kvpress's own means [L, H*G, D] and covariances of queries, each row of ids a sample."""
    with (
        mock.patch.object(with_stats, "load_dataset", lambda *_, **__: Texts(ids)),
        mock.patch.object(with_stats.AutoTokenizer, "from_pretrained", lambda _: tokenize),
    ):
        _, mean, spread = with_stats.collect_queries(model, "", len(ids), 10**6, n_sink=4)
    return mean, spread


def expected(mean: Tensor | None, spread: Tensor | None, **options: Any) -> Any:
    """Expected attention, by the prompt's own moments or by given ones."""
    if mean is None:
        return kvpress.ExpectedAttentionPress(**options)
    press = with_stats.ExpectedAttentionStatsPress(**options)
    press.mu, press.cov = mean, spread
    return press


def q_filter(filters: Tensor) -> Any:
    """Q-filters that need no hub."""
    press = kvpress.QFilterPress(compression_ratio=0.5)
    press.q_filters, press.post_init_from_model = filters, lambda _: None
    return press


def duo(scores: Tensor, ratio: float) -> Any:
    """DuoAttention whose head scores need no hub."""
    press = kvpress.DuoAttentionPress(head_compression_ratio=ratio)
    pattern = (DUO["sink_size"], DUO["recent_size"], np.array(scores.tolist()))
    press.load_attention_pattern = lambda _: pattern
    return press


@torch.no_grad()
def moved(model: PreTrainedModel, press: Any, ids: Tensor, values: list[Tensor]) -> dict:
    """Prefill one row under a press that moves keys; kept sets are read from the values."""
    answers = base.tap(press if hasattr(press, "score") else press.press)
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    kept = [base.kept_mask(v, layer.values) for v, layer in zip(values, cache.layers, strict=True)]
    keys = torch.stack([layer.keys for layer in cache.layers])
    return {"score": torch.stack(answers), "kept": torch.stack(kept), "keys": keys}


def finch(model: PreTrainedModel, row: Tensor, values: list[Tensor], **options: Any) -> dict:
    """FINCH on one row, a delimiter that it drops again put in front of the question."""
    unused = sorted(set(range(base.SHAPE["vocab_size"])) - set(row.tolist()))[0]
    press = kvpress.FinchPress(**options)
    press.delimiter_token_id = unused
    cut = len(row) - WINDOW
    return moved(
        model, press, torch.cat([row[:cut], torch.tensor([unused]), row[cut:]])[None], values
    )


FINCH: dict[str, dict[str, Any]] = {
    "finch": {"compression_ratio": 0.5},
    "finch_75": {"compression_ratio": 0.75},
    "finch_plain": {"compression_ratio": 0.5, "normalize_scores": False},
    "finch_chunks": {"compression_ratio": 0.5, "chunk_length": 48},
}


def make(kind: str, out: Path) -> None:
    """Everything on one model."""
    model, ids = base.build(kind, L), base.prompt(B)
    model.set_attn_implementation("sdpa")
    inputs, full = base.layer_inputs(model, ids)
    mean, spread = statistics(model, ids)
    drawn = torch.Generator().manual_seed(base.SEED)
    filters = torch.randn(L, H, D, generator=drawn)
    gates = torch.rand(L, H, generator=drawn)
    tensors = {"query_mean": mean, "query_covariance": spread, "filters": filters, "gates": gates}
    eps = {"epsilon": 1e-2, "n_sink": 4, "n_future_positions": 512}
    presses: dict[str, Callable[[], Any]] = {
        "stats": lambda: expected(mean, spread, compression_ratio=0.5),
        "stats_nocov": lambda: expected(mean, spread, compression_ratio=0.5, use_covariance=False),
        "adakv_stats": lambda: kvpress.AdaKVPress(
            expected(mean, spread, compression_ratio=0.5, **eps)
        ),
        "adakv_expected": lambda: kvpress.AdaKVPress(
            expected(None, None, compression_ratio=0.5, **eps)
        ),
        "adakv_expected_75": lambda: kvpress.AdaKVPress(
            expected(None, None, compression_ratio=0.75, **eps)
        ),
        "qfilter": lambda: q_filter(filters),
    }
    for name, press in presses.items():
        got = base.run(model, press(), ids, full)
        base.check_margin(name, got)
        tensors |= {f"{name}.{key}": value for key, value in got.items()}
    for ratio in (0.25, 0.5, 0.75):
        got = base.run(model, duo(gates, ratio), ids, full)
        tensors[f"duo_{int(ratio * 100)}.kept"] = got["kept"]
    rows = [[inputs[f"layer{i}.value"][b : b + 1] for i in range(L)] for b in range(B)]
    for name, options in FINCH.items():
        runs = [finch(model, ids[b], rows[b], **options) for b in range(B)]
        got = {key: torch.cat([x[key] for x in runs], dim=1) for key in runs[0]}
        if "chunk_length" not in options:
            base.check_margin(name, got)
        tensors |= {f"{name}.{key}": value for key, value in got.items()}
    runs = [
        moved(model, kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)), ids[b : b + 1], rows[b])
        for b in range(B)
    ]
    tensors |= {f"rerotated.{k}": torch.cat([x[k] for x in runs], dim=1) for k in runs[0]}
    base.write(
        out / f"kvpress_calibrated_{kind}.safetensors",
        tensors,
        {"finch": FINCH, "window": WINDOW, "duo": DUO},
    )


def main() -> None:
    """Write the vectors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for kind in base.KIND:
        make(kind, args.out)


if __name__ == "__main__":
    main()
