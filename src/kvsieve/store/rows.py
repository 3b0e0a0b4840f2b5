"""Small operations on slot tables that both layouts use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def pick_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table [B, H, C, ...]`` at slots ``index [B, H, N]`` as ``[B, H, N, ...]``.

    One flat row copy: far faster than ``gather`` with an index per element.
    """
    B, H, C = table.shape[:3]
    start = torch.arange(B * H, device=index.device).view(B, H, 1) * C
    flat = table.reshape(B * H * C, *table.shape[3:])
    return flat.index_select(0, (index + start).flatten()).view(*index.shape, *table.shape[3:])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of the distinct storages behind ``tensors``."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
