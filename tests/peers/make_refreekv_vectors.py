"""Make golden vectors for DBudgetKV by running the stopping rule of Patrick-Ni/ReFreeKV.

Run in the peer environment (``requirements.txt``), with a checkout of the peer outside this tree::

    .venv-peer/bin/python tests/peers/make_refreekv_vectors.py --source DIR

Only ``last_token_attn`` of the peer's ``modified_models/dynamic_metrics.py`` is called, with random
queries and keys, a row at a time; only numbers are written. The orders of removal are those that
its StreamingLLM and H2O clusters hand it. What each tensor means is in ``vectors/README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SEED = 20261
B, N, D = 3, 61, 8
SINKS, WINDOW = 4, 8
MARGIN = 1e-4  # no decision of the peer may hang on less of the norm than this

SETTINGS: dict[str, dict[str, Any]] = {
    f"{order}_{tau}": {"order": order, "tolerance": tau}
    for order in ("position", "attention")
    for tau in (0.01, 0.05, 0.2, 0.6)
}


def load_peer(source: Path) -> types.ModuleType:
    """Import the file of the stopping rule alone: its package patches old Transformers."""
    path = source / "modified_models" / "dynamic_metrics.py"
    spec = importlib.util.spec_from_file_location("dynamic_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> dict[str, Tensor]:
    """Queries and keys of both orders: grouped heads by position, single ones by attention.

    The peer ranks for every query head; only heads that share nothing can be compared there.
    """
    made = torch.Generator().manual_seed(SEED)
    out = {}
    for order, (H, G) in {"position": (2, 2), "attention": (3, 1)}.items():
        out[f"{order}.key"] = torch.randn(B, H, N, D, generator=made)
        sharp = torch.tensor([0.5, 2.0, 4.0]).view(B, 1, 1, 1, 1)
        out[f"{order}.query"] = torch.randn(B, H, G, N, D, generator=made) * sharp
    return out


def weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the last W queries, ``[Hq, W, N]``; ``query``, ``key [Hq, N, D]``."""
    logits = query[:, -WINDOW:] @ key.transpose(-1, -2) / D**0.5
    future = torch.arange(N) > torch.arange(N - WINDOW, N)[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def removal_order(order: str, attention: Tensor) -> Tensor:
    """What the peer's clusters hand over, ``[Hq, candidates]``, the first to go first."""
    if order == "position":
        return torch.arange(SINKS, N).expand(len(attention), -1)
    seen = attention.sum(1)[:, SINKS : N - WINDOW]
    return seen.topk(seen.shape[-1], dim=-1).indices.flip(-1) + SINKS


def check_margin(attention: Tensor, position: Tensor, tolerance: float) -> None:
    """Refuse vectors in which rounding could change where the peer stops."""
    last = attention[:, -1].double().gather(1, position).square()
    norm = last.flip(-1).cumsum(-1).flip(-1).sqrt().mean(0)
    gap = float(((norm[0] - norm) / norm[0] - tolerance).abs().min())
    if gap < MARGIN:
        raise SystemExit(f"a cut within {MARGIN} of the tolerance: {gap:.1e}")


def drive(peer: types.ModuleType, data: dict[str, Tensor], order: str, tolerance: float) -> Any:
    """Return how many candidates go, ``[B]``, and what stays of each query head."""
    key, query = data[f"{order}.key"], data[f"{order}.query"]
    _, H, G, _, _ = query.shape
    stops, kept = [], torch.zeros(B, H * G, N, dtype=torch.bool)
    for b in range(B):
        attention = weights(query[b].flatten(0, 1), key[b].repeat_interleave(G, 0))
        position = removal_order(order, attention)
        check_margin(attention, position, tolerance)
        left, stop = peer.last_token_attn(attention[:, -1], position, tolerance, True)
        kept[b] = True
        kept[b].scatter_(1, position, False)
        kept[b].scatter_(1, left, True)
        stops.append(int(stop))
    return torch.tensor(stops), kept


def main() -> None:
    """Write ``refreekv.safetensors`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of the peer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer, data = load_peer(args.source), inputs()
    tensors = dict(data)
    for name, setting in SETTINGS.items():
        stop, kept = drive(peer, data, **setting)
        tensors |= {f"{name}.stop": stop, f"{name}.kept": kept}
    header = {"seed": SEED, "sinks": SINKS, "window": WINDOW, "settings": SETTINGS}
    path = args.out / "refreekv.safetensors"
    save_file(tensors, path, metadata={"parameters": json.dumps(header)})


if __name__ == "__main__":
    main()
