"""Where new tokens stand in their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Where T new tokens stand in their rows: the same for all layers of a forward.

    ``positions [B, T]`` int64; ``column [B, 1, T]`` the same as stored; ``seen [B]`` (CPU) the
    rows' lengths with them; ``added [B, 1]`` (CPU) how many of them are real.
    """

    positions: Tensor
    column: Tensor
    seen: Tensor
    added: Tensor

    @classmethod
    def of(cls, seen: Tensor, B: int, T: int, live: Tensor | None, device: torch.device) -> Arrival:
        """Work it out for rows that have ``seen [B]`` tokens (empty: none yet)."""
        if seen.numel() == 0:
            seen = torch.zeros(B, dtype=torch.int64)
        added = torch.full((B,), T) if live is None else live.sum(1).cpu()
        step = torch.arange(T, device=device) if live is None else live.long().cumsum(1) - 1
        positions = (seen.to(device)[:, None] + step).clamp_min(0)
        return cls(
            positions=positions,
            column=positions[:, None].int(),
            seen=seen + added,
            added=added[:, None],
        )
