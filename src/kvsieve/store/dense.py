"""The dense layout: ``[B, H, capacity, D]`` with spare capacity, so that a token costs no copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.store.rows import pick_rows, storage_bytes

SPARE_SLOTS = 32
SPARE_SHARE = 16
"""Room for new tokens: at least 32 slots, or a 16th of what is held."""


class Dense:
    """Same number of slots in every (row, head); slots that a row doesn't have are dead.

    ``keys [B, H, C, D]`` and ``values [B, H, C, Dv]`` hold ``size`` <= C slots. A column is
    ``[B, 1, C]`` while it is the same for all heads, ``[B, H, C]`` after heads kept other slots.
    ``counts [B, H]`` (CPU) are the live slots; ``dead`` tells whether any slot is not live.
    """

    def __init__(self) -> None:
        self.size = 0
        self.columns: dict[str, Tensor] = {}
        self.dead = False
        self.version = 0

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        new: dict[str, Tensor],
        live: Tensor | None,
        added: Tensor,
    ) -> None:
        """Add T slots: ``keys [B, H, T, D]``, columns ``[B, 1, T]``, ``live [B, T]`` or None.

        ``added [B, 1]`` (CPU) counts the live ones.
        """
        T = keys.shape[2]
        if live is not None and not self.dead:
            self._start_live_column(keys)
        if self.dead:
            whole = torch.ones(keys.shape[0], 1, T, dtype=torch.bool, device=keys.device)
            new = new | {"live": whole if live is None else live[:, None]}
        if self.size == 0:
            self.version += 1
            self.keys, self.values = owned(keys), owned(values)
            self.columns = {name: owned(x) for name, x in new.items()}
            self.counts = torch.zeros(keys.shape[:2], dtype=torch.int64)
        else:
            self._reserve(T)
            span = slice(self.size, self.size + T)
            self.keys[:, :, span] = keys
            self.values[:, :, span] = values
            for name, column in self.columns.items():
                column[:, :, span] = new[name]
        self.size += T
        self.counts += added

    def _start_live_column(self, keys: Tensor) -> None:
        self.dead = True
        self.version += 1
        if self.size:
            shape = (keys.shape[0], 1, self.keys.shape[2])
            self.columns["live"] = torch.ones(shape, dtype=torch.bool, device=keys.device)

    def _reserve(self, extra: int) -> None:
        needed = self.size + extra
        if needed <= self.keys.shape[2]:
            return
        # Geometric growth: few copies, little waste.
        spare = max(SPARE_SLOTS, needed // SPARE_SHARE)
        self.version += 1
        self.keys = grown(self.keys, self.size, needed + spare)
        self.values = grown(self.values, self.size, needed + spare)
        self.columns = {n: grown(x, self.size, needed + spare) for n, x in self.columns.items()}

    def get(self, name: str) -> Tensor:
        """Return keys, values or a column as ``[B, H or 1, S, ...]`` (a view)."""
        whole = getattr(self, name) if name in ("keys", "values") else self.columns[name]
        return whole[:, :, : self.size]

    def set(self, name: str, new: Tensor) -> None:
        """Replace a column by ``new [B, H, S]``, or the keys by ``[B, H, S, D]``."""
        if name == "keys":
            self.keys[:, :, : self.size] = new
            return
        column = self.columns[name]
        if column.shape[1] != new.shape[1]:
            column = column.expand(-1, new.shape[1], -1).contiguous()
            self.columns[name] = column
        column[:, :, : self.size] = new

    def add_to_values(self, added: Tensor) -> None:
        """Add ``added [B, H, S, Dv]`` to the values, in fp32."""
        held = self.values[:, :, : self.size]
        held.copy_(held.float() + added)

    def live(self) -> Tensor | None:
        """Return bool ``[B, 1 or H, S]``, or None when every slot is live."""
        return self.get("live") if self.dead else None

    def keep(self, index: Tensor, counts: Tensor, spare: int) -> None:
        """Keep slots ``index [B, H, N]`` of which the first ``counts [B, H]`` are live."""
        B, H, N = index.shape
        whole = {"keys": self.keys, "values": self.values}
        for name, column in self.columns.items():
            if name != "live":
                whole[name] = column.expand(B, H, -1)
        # Spare room is picked too (the last slot again): one copy instead of two.
        index = F.pad(index, (0, spare), mode="replicate") if N else index.new_zeros(B, H, spare)
        kept = {name: pick_rows(x, index) for name, x in whole.items()}
        self.version += 1
        self.keys, self.values = kept.pop("keys"), kept.pop("values")
        self.size, self.columns, self.counts = N, kept, counts.clone()
        self.dead = bool((counts < N).any())
        if self.dead:
            slots = torch.arange(N + spare, device=index.device)
            self.columns["live"] = slots < counts.to(index.device)[:, :, None]

    def truncate(self, size: int) -> None:
        """Drop the slots appended after there were ``size`` of them."""
        live = self.live()
        if live is None:
            self.counts -= self.size - size
        else:
            self.counts = self.counts - live[:, :, size:].sum(-1).cpu()
        self.size = size

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them (beam search, batch selection)."""
        self.version += 1
        self.keys = self.keys.index_select(0, index)
        self.values = self.values.index_select(0, index)
        self.columns = {n: x.index_select(0, index) for n, x in self.columns.items()}
        self.counts = self.counts.index_select(0, index.cpu())

    def tensors(self) -> list[Tensor]:
        """Return everything stored, for counting bytes."""
        return [self.keys, self.values, *self.columns.values()] if self.columns else []

    def nbytes(self) -> int:
        """Bytes of the storages, spare capacity included."""
        return storage_bytes(self.tensors())


def owned(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and alone in its storage (a view would hold more than it shows)."""
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if alone else x.clone(memory_format=torch.contiguous_format)


def grown(x: Tensor, size: int, capacity: int) -> Tensor:
    """Copy the first ``size`` slots of ``x [B, H, C, ...]`` into a table of ``capacity`` slots."""
    new = x.new_empty(*x.shape[:2], capacity, *x.shape[3:])
    new[:, :, :size] = x[:, :, :size]
    return new
