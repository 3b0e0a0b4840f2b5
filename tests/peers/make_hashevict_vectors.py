"""Make golden vectors for HashEvict by running the cache of minghui-liu/cold-compress.

Run in the peer environment (``requirements.txt``), with a checkout of the peer outside this tree::

    .venv-peer/bin/python tests/peers/make_hashevict_vectors.py --source DIR

Only the peer's ``cache.py`` (and what it imports of its own) is imported: class ``KVCacheLSH``, fed
with random keys; only numbers are written. What each tensor means is in ``vectors/README.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

H, N, D = 2, 38, 16
PROMPT, SLOTS, SINKS, RECENT = 21, 24, 3, 5
SETTINGS = {"bits64": 64, "bits16": 16}
WITHOUT_TIES = ("bits64",)
TRIES = 4000


class Tied(Exception):
    """Two slots are equally far: which of them goes is the peer's slot order."""


def load_peer(source: Path) -> types.ModuleType:
    """Import the peer's cache."""
    sys.path.insert(0, str(source))
    return importlib.import_module("cache")


def candidates(pos: Tensor, t: int) -> Tensor:
    """Which slots ``pos [H, M]`` may go when token t comes: neither sinks nor recent."""
    return (pos >= SINKS) & (pos < t - RECENT)


def drive(peer: types.ModuleType, bits: int, seed: int, ties: bool) -> dict[str, Tensor]:
    """Feed a prompt at once, then token by token; note distances and what is held after each."""
    made = torch.Generator().manual_seed(seed)
    key = torch.randn(1, H, N, D, generator=made)
    cache = peer.KVCacheLSH(
        1, H, D, dtype=torch.float32, max_cache_length=SLOTS, max_seq_length=N, cache_bits=None,
        global_tokens=SINKS, recent_window=RECENT, lsh_dim=bits,
    )  # fmt: skip
    cache.random_proj_matrix = torch.randn(D, bits, generator=made)
    seen: list[Tensor] = []
    measure = cache._hamming_dist

    def noted(x: Tensor, y: Tensor) -> Tensor:
        seen.append(measure(x, y)[0].clone())
        return measure(x, y)

    cache._hamming_dist = noted
    prompt = key[:, :, :PROMPT]
    cache.update_kv(torch.arange(PROMPT), prompt, prompt, True)
    cache.update_state(torch.arange(PROMPT), prompt, prompt, True, None)
    distance, before, after = [], [], []
    for t in range(PROMPT, N):
        new, pos = key[:, :, t : t + 1], cache.pos[0].clone()
        cache.update_kv(torch.tensor([t]), new, new, False)
        far = seen[-1].masked_fill(~candidates(pos, t), -1)
        if not ties and bool((pos >= 0).all()):
            if bool(((far == far.amax(-1, keepdim=True)).sum(-1) > 1).any()):
                raise Tied
        order = pos.masked_fill(pos < 0, N).argsort(-1)  # by age; empty slots last
        distance.append(seen[-1].gather(1, order))
        before.append(pos.gather(1, order))
        after.append(cache.pos[0].sort(-1).values)
    return {
        "key": key,
        "projection": cache.random_proj_matrix,
        "distance": torch.stack(distance),
        "before": torch.stack(before),
        "after": torch.stack(after),
    }


def without_ties(peer: types.ModuleType, bits: int) -> tuple[int, dict[str, Tensor]]:
    """Return the first seed under which no two slots are equally far when one of them goes."""
    for seed in range(TRIES):
        try:
            return seed, drive(peer, bits, seed, ties=False)
        except Tied:
            continue
    raise SystemExit(f"ties under each of {TRIES} seeds")


def main() -> None:
    """Write ``hashevict.safetensors`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of the peer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer, tensors, seeds = load_peer(args.source), {}, {}
    for name, bits in SETTINGS.items():
        if name in WITHOUT_TIES:
            seeds[name], found = without_ties(peer, bits)
        else:
            seeds[name], found = 0, drive(peer, bits, 0, ties=True)
        tensors |= {f"{name}.{key}": x.contiguous() for key, x in found.items()}
    header = {"seeds": seeds, "prompt": PROMPT, "slots": SLOTS, "sinks": SINKS, "recent": RECENT}
    header |= {"settings": SETTINGS}
    path = args.out / "hashevict.safetensors"
    save_file(tensors, path, metadata={"parameters": json.dumps(header)})


if __name__ == "__main__":
    main()
