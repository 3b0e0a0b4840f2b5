"""Make golden vectors for G-KV, R-KV, SnapKV and H2O by running microsoft/G-KV's torch scoring.

Run in the peer environment (``requirements.txt``), with a checkout of the peer outside this tree::

    .venv-peer/bin/python tests/peers/make_gkv_vectors.py --source DIR

The peer ships no licence file, so none of its code is kept here: it is imported from ``--source``,
driven with random tensors, and only numbers are written. Its redundancy term is a Triton kernel; it
runs here in Triton's interpreter on the CPU, in true fp32. What each tensor means and what the peer
computes step by step is in ``vectors/README.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

SEED = 20251
B, H, G, D = 2, 2, 2, 16
BUDGET, WINDOW, PROMPT, INTERVAL, EVENTS = 29, 8, 41, 13, 5
TOTAL = PROMPT + INTERVAL * (EVENTS - 1)
PAD = 6  # left padding of row 1 in the padded settings
SHORT = 24  # prompt of the settings whose prompt must fit the budget
MARGIN = 2e-6  # no decision of the peer may hang on less than this

BASE: dict[str, Any] = {"budget": BUDGET, "window_size": WINDOW, "kernel_size": 5}
GKV = {**BASE, "suppressing_redundancy": True, "mix_lambda": 0.5, "enable_score_cache": True}
RKV = {**BASE, "enable_pooling": True, "suppressing_redundancy": True, "mix_lambda": 0.1}
H2O = {**BASE, "window_size": 1, "enable_score_cache": True, "smooth_method": "sum"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of flags given to the peer, and how it is driven."""

    flags: dict[str, Any]
    prompt: int = PROMPT
    padded: bool = False
    initial_scores: bool = False
    ties: bool = False  # max-pooling alone makes equal scores: the kept set is top-k's choice
    dense_redundancy: bool = False


SETTINGS: dict[str, Setting] = {
    "gkv": Setting(flags={**GKV, "alpha": 0.8, "smooth_method": "max"}, dense_redundancy=True),
    "gkv_mean": Setting(flags={**GKV, "alpha": 0.8, "smooth_method": "mean"}),
    "gkv_pooled": Setting(flags={**GKV, "alpha": 0.8, "enable_pooling": True}),
    "gkv_unnormalised": Setting(flags={**GKV, "alpha": 0.8, "disable_norm": True}),
    "gkv_ratio": Setting(
        flags={**GKV, "alpha": 0.8, "compress_mode": "ratio", "compress_ratio": 0.5}
    ),
    "gkv_padded": Setting(flags={**GKV, "alpha": 0.8}, padded=True),
    "rkv": Setting(flags=RKV),
    "rkv_padded": Setting(flags=RKV, padded=True),
    "snapkv": Setting(flags={**BASE, "enable_pooling": True}, ties=True),
    "h2o": Setting(flags={**H2O, "alpha": 0.8}),
    "h2o_full": Setting(flags={**H2O, "alpha": 1.0}, prompt=SHORT, initial_scores=True),
}


@dataclass
class Recorder:
    """What the peer computed inside one event, in the order in which it did."""

    attention: list[Tensor] = field(default_factory=list)
    redundancy: list[Tensor] = field(default_factory=list)
    ranked: list[Tensor] = field(default_factory=list)
    gathered: list[Tensor] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)

    @contextmanager
    def watch(self, module: types.ModuleType) -> Iterator[None]:
        """Note, for the time of one call, what goes through the peer's helpers and its top-k."""

        def output(func: Callable[..., Tensor], into: list[Tensor]) -> Callable[..., Tensor]:
            def wrapped(*args: Any, **kwargs: Any) -> Tensor:
                result = func(*args, **kwargs)
                into.append(result.clone())
                return result

            return wrapped

        def first_input(func: Callable[..., Any], into: list[Tensor]) -> Callable[..., Any]:
            def wrapped(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                into.append(tensor.clone())
                return func(tensor, *args, **kwargs)

            return wrapped

        attention = output(module.compute_attention_scores, self.attention)
        redundancy = output(module.cal_similarity_triton, self.redundancy)
        with (
            mock.patch.object(module, "compute_attention_scores", attention),
            mock.patch.object(module, "cal_similarity_triton", redundancy),
            mock.patch.object(torch.Tensor, "topk", first_input(torch.Tensor.topk, self.ranked)),
            mock.patch.object(
                torch.Tensor, "gather", first_input(torch.Tensor.gather, self.gathered)
            ),
            mock.patch.object(F, "max_pool1d", first_input(F.max_pool1d, self.pooled)),
        ):
            yield

    def token_scores(self, flags: dict[str, Any]) -> Tensor:
        """The score before pooling and redundancy: what the peer would carry to the next event."""
        if flags.get("enable_score_cache"):
            return self.gathered[0]
        return self.pooled[0]


def load_peer(source: Path) -> types.ModuleType:
    """Import the peer's scoring module without running its package files (old Transformers)."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("gkv", "gkv.utils", "gkv.model", "gkv.model.compression"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("gkv.model.compression.score_based")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, G, N, D], and keys and values [B, H, N, D]; many keys are near duplicates."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres = normal(B, H, 12, D)
    which = torch.randint(12, (B, H, TOTAL, 1), generator=generator).expand(-1, -1, -1, D)
    keys = 0.5 * normal(B, H, 1, D) + centres.gather(2, which) + 0.4 * normal(B, H, TOTAL, D)
    scale = torch.exp(0.3 * normal(B, H, TOTAL, 1))
    queries = 1.2 * normal(B, H, G, TOTAL, D)
    return queries, keys * scale, normal(B, H, TOTAL, D)


def check_margins(recorder: Recorder, keys: Tensor, kept: int) -> None:
    """Refuse vectors in which rounding could change what is kept."""
    ranked = recorder.ranked[0].sort(dim=-1, descending=True).values
    gap = (ranked[..., kept - 1] - ranked[..., kept]).min().item()
    unit = F.normalize(keys.double(), dim=-1)
    near = ((unit @ unit.transpose(-1, -2)) - 0.5).abs().min().item()
    if gap < MARGIN or near < MARGIN:
        raise SystemExit(f"a tie within {MARGIN}: top-k gap {gap:.1e}, cosine gap {near:.1e}")


def take(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows [B, H, N, D] at positions [B, H, n]."""
    index = positions.long().unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1])
    return rows.gather(2, index)


def drive(peer: types.ModuleType, setting: Setting, data: tuple[Tensor, Tensor, Tensor]) -> dict:
    """Run the compression events of one setting, carrying the peer's state from one to the next."""
    queries, keys, values = data
    method = peer.ScoreBasedKV(**setting.flags)
    window = setting.flags["window_size"]
    mask = torch.ones(B, TOTAL, dtype=torch.long)
    if setting.padded:
        mask[1, :PAD] = 0
    out: dict[str, Tensor] = {}
    positions = torch.arange(setting.prompt).expand(B, H, -1).contiguous()
    scores: Tensor | None = None
    if setting.initial_scores:
        prompt = queries[:, :, :, : setting.prompt].reshape(B, H * G, setting.prompt, D)
        scores = method.initial_score_cache(keys[:, :, : setting.prompt], prompt, None)
        out["initial_score"] = scores.clone()
    first = 1 if setting.initial_scores else 0
    for event in range(first, EVENTS):
        now = setting.prompt + INTERVAL * event
        if now > TOTAL:
            break
        fresh = torch.arange(int(positions[0, 0, -1]) + 1, now).expand(B, H, -1)
        positions = torch.cat([positions, fresh], dim=2)
        recorder, name = Recorder(), f"event{event}"
        before, values_before = take(keys, positions), take(values, positions)
        out[f"{name}.slots"] = positions.to(torch.int32)
        if scores is not None:
            out[f"{name}.score_old"] = scores.clone()
        with torch.no_grad(), recorder.watch(peer):
            _, _, positions, scores = method.update_kv(
                key_states=before,
                query_states=queries[:, :, :, now - window : now].reshape(B, H * G, window, D),
                value_states=values_before,
                pos_ids_cache=positions,
                cur_len=now,
                attention_mask=mask[:, :now],
                unfinished_sequences=torch.ones(B, dtype=torch.long),
                score_cache=scores,
            )
        if not setting.ties:
            check_margins(recorder, before, positions.shape[-1] - window)
        out[f"{name}.local"] = recorder.attention[0].mean(dim=2)
        out[f"{name}.score"] = recorder.token_scores(setting.flags)
        out[f"{name}.final"] = recorder.ranked[0]
        out[f"{name}.kept"] = positions.to(torch.int32)
        if recorder.redundancy:
            out[f"{name}.redundancy"] = recorder.redundancy[0]
        if scores is not None:
            out[f"{name}.score_new"] = scores.clone()
        if setting.dense_redundancy:
            rows = [peer.cal_similarity_raw(before[b : b + 1]) for b in range(B)]
            out[f"{name}.redundancy_dense"] = torch.stack(rows)
    return out


def main() -> None:
    """Write ``gkv.safetensors`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of microsoft/G-KV")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = load_peer(args.source)
    data = inputs()
    tensors = {"query": data[0], "key": data[1]}
    for name, setting in SETTINGS.items():
        for key, tensor in drive(peer, setting, data).items():
            tensors[f"{name}.{key}"] = tensor.contiguous()
    meta = {
        "seed": SEED,
        "interval": INTERVAL,
        "pad_row1": PAD,
        "settings": {
            name: {"prompt": s.prompt, "padded": s.padded, "ties": s.ties, **s.flags}
            for name, s in SETTINGS.items()
        },
    }
    save_file(tensors, args.out / "gkv.safetensors", metadata={"parameters": json.dumps(meta)})


if __name__ == "__main__":
    main()
