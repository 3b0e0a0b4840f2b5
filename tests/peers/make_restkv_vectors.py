"""Make golden vectors for ReST-KV by running the scoring of an-yongqi/rest-kv.

Run in the peer environment (``requirements.txt``), with a checkout of the peer outside this tree::

    .venv-peer/bin/python tests/peers/make_restkv_vectors.py --source DIR

Only the peer's ``restkv/restkv_utils.py`` is imported, driven with random tensors, a row at a time
(it takes the drift of its first row for all); only numbers are written. What each tensor means is
in ``vectors/README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

SEED = 20254
B, H, G, N, D, C = 2, 2, 2, 61, 8, 24
WINDOW, BUDGET = 8, 20
MARGIN = 1e-5  # relative: no decision of the peer may hang on less than this

BASE: dict[str, Any] = {"window_size": WINDOW, "max_capacity_prompt": BUDGET, "kernel_size": 5}
BASE |= {"pooling": "adaptive", "use_wo": True, "use_ema": True, "alpha": 0.3, "scale": 2000}
SETTINGS: dict[str, dict[str, Any]] = {
    "after": {"metric_mode": "after"},
    "after_drift": {"metric_mode": "after", "scale": 0.77, "kernel_size": 1},
    "after_values": {"metric_mode": "after", "use_wo": False, "alpha": 0.6},
    "after_squared": {"metric_mode": "after", "tau": 2},
    "before": {"metric_mode": "before"},
    "before_drift": {"metric_mode": "before", "scale": 1.3},
}


def load_peer(source: Path) -> types.ModuleType:
    """Import the peer's scoring file alone: its package patches old Transformers."""
    path = source / "restkv" / "restkv_utils.py"
    spec = importlib.util.spec_from_file_location("restkv_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> dict[str, Tensor]:
    """Queries that look at earlier and earlier keys, and everything else at random."""
    made = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    key = normal(B, H, N, D)
    query = normal(B, H, G, N, D)
    pace = (
        torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, H, G, 1)
        * torch.tensor([1.0, -0.6])[:, None, None, None]
    )
    place = (
        (30 - 3 * pace * (torch.arange(N) - N + 5)).round().long().clamp(0, N - 1)
    )  # [B, H, G, N]
    looked = key[:, :, None].expand(-1, -1, G, -1, -1)
    index = place[..., None].expand(-1, -1, -1, -1, D)
    return {
        "query": query + 0.8 * looked.gather(3, index),
        "key": key,
        "value": normal(B, H, N, D),
        "w_o": normal(C, H * G * D) / D**0.5,
    }


def check_margins(score: Tensor) -> None:
    """Refuse vectors in which rounding could change what is kept."""
    ranked = score.sort(dim=-1, descending=True).values
    last, next_ = ranked[..., BUDGET - WINDOW - 1], ranked[..., BUDGET - WINDOW]
    gap = float(((last - next_) / last).min())
    if gap < MARGIN:
        raise SystemExit(f"a tie within {MARGIN}: {gap:.1e}")


def drive(peer: types.ModuleType, flags: dict[str, Any], data: dict[str, Tensor]) -> Tensor:
    """Return what the peer ranks, ``[B, H, G, N - W]``."""
    ranked: list[Tensor] = []
    topk = Tensor.topk

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranked.append(tensor.clone())
        return topk(tensor, *args, **kwargs)

    method = peer.RestKVCluster(**flags)
    for b in range(B):
        key, value = (data[x][b : b + 1].repeat_interleave(G, 1) for x in ("key", "value"))
        query = data["query"][b : b + 1].reshape(1, H * G, N, D)
        with torch.no_grad(), mock.patch.object(Tensor, "topk", noted):
            method.update_kv(key, query, value, None, G, data["w_o"])
    assert len(ranked) == B
    return torch.cat(ranked).view(B, H, G, N - WINDOW)


def main() -> None:
    """Write ``restkv.safetensors`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of the peer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer, data = load_peer(args.source), inputs()
    tensors = dict(data)
    for name, flags in SETTINGS.items():
        tensors[f"{name}.score"] = drive(peer, BASE | flags, data).contiguous()
        check_margins(tensors[f"{name}.score"])
        check_margins(tensors[f"{name}.score"].mean(2))
    header = {"seed": SEED, "settings": {name: BASE | flags for name, flags in SETTINGS.items()}}
    save_file(tensors, args.out / "restkv.safetensors", metadata={"parameters": json.dumps(header)})


if __name__ == "__main__":
    main()
