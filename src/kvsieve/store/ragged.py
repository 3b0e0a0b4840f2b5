"""The ragged layout: every (row, head) has its own number of slots, packed in one flat table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.store.dense import SPARE_SHARE, SPARE_SLOTS
from kvsieve.store.rows import storage_bytes


class Ragged:
    """Segments of one flat table, one per (row, head), each with a little spare capacity.

    ``tables[name]`` is ``[N, ...]``; segment i = b H + h starts at ``starts[i]`` and holds
    ``counts[b, h]`` live slots. Padding and evicted slots are never stored.
    """

    dead = False

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}
        self.version = 0

    @classmethod
    def pack(cls, tables: dict[str, Tensor], index: Tensor, counts: Tensor) -> Ragged:
        """Build from ``tables[name] [B, H, S, ...]``, keeping ``index [B, H, N][: counts]``."""
        new = cls()
        B, H, N = index.shape
        S = next(iter(tables.values())).shape[2]
        inside = torch.arange(N) < counts[:, :, None]
        rows = (index.cpu() + (torch.arange(B * H) * S).view(B, H, 1))[inside]
        flat = {name: x.reshape(B * H * S, *x.shape[3:]) for name, x in tables.items()}
        new._lay_out(flat, rows, counts, 0)
        return new

    def _lay_out(self, flat: dict[str, Tensor], rows: Tensor, counts: Tensor, spare: int) -> None:
        """Copy the flat slots ``rows`` (ordered by segment) into fresh segments with spare room."""
        self.version += 1
        self.counts = counts.clone()
        lengths = counts.flatten()
        capacity = lengths + spare
        self.starts = torch.cat([lengths.new_zeros(1), capacity.cumsum(0)])
        target = flat_index(self.starts[:-1], lengths)
        total = int(self.starts[-1])
        for name, x in flat.items():
            # Zeros: padded views show the spare room, and 0 weight times NaN is NaN.
            table = x.new_zeros(total, *x.shape[1:])
            device = x.device
            table[target.to(device)] = x.index_select(0, rows.to(device))
            self.tables[name] = table

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        new: dict[str, Tensor],
        live: Tensor | None,
        added: Tensor,
    ) -> None:
        """Add the live ones of T slots to every segment: ``keys [B, H, T, D]``, ``live [B, T]``.

        ``added [B, 1]`` (CPU) counts them.
        """
        B, H, T = keys.shape[:3]
        inside = torch.ones(B, T, dtype=torch.bool) if live is None else live.cpu()
        added = added.expand(B, H)
        room = (self.starts[1:] - self.starts[:-1]).view(B, H) - self.counts
        if bool((room < added).any()):
            self._repack(int(added.max()))
        first = self.starts[:-1] + self.counts.flatten()
        target = flat_index(first, added.flatten()).to(keys.device)
        rows = inside[:, None].expand(B, H, T).to(keys.device)
        fresh = {"keys": keys, "values": values} | new
        for name, table in self.tables.items():
            x = fresh[name]
            x = x if x.shape[1] == H else x.expand(B, H, T)
            table[target] = x[rows].to(table.dtype)
        self.counts = self.counts + added

    def _repack(self, extra: int) -> None:
        rows = flat_index(self.starts[:-1], self.counts.flatten())
        mean = int(self.counts.sum()) // self.counts.numel()
        spare = extra + max(SPARE_SLOTS, mean // SPARE_SHARE)
        self._lay_out(dict(self.tables), rows, self.counts, spare)

    @property
    def size(self) -> int:
        """Slots of the longest segment: the width of padded views."""
        return int(self.counts.max())

    def get(self, name: str) -> Tensor:
        """Return keys, values or a column padded to ``[B, H, S, ...]`` (a copy)."""
        table = self.tables[name]
        B, H = self.counts.shape
        # Short segments are padded with whatever follows them: callers mask by `live`.
        rows = self.starts[:-1, None] + torch.arange(self.size)
        rows = rows.clamp_max(len(table) - 1)
        picked = table.index_select(0, rows.flatten().to(table.device))
        return picked.view(B, H, self.size, *table.shape[1:])

    def set(self, name: str, new: Tensor) -> None:
        """Replace a column by the live entries of ``new [B, H, S]``, or the keys of a 4-D one."""
        live = self.live().to(new.device)
        target = flat_index(self.starts[:-1], self.counts.flatten()).to(new.device)
        self.tables[name][target] = new[live].to(self.tables[name].dtype)

    def add_to_values(self, added: Tensor) -> None:
        """Add the live entries of ``added [B, H, S, Dv]`` to the values, in fp32."""
        self.set("values", self.get("values").float() + added)

    def live(self) -> Tensor:
        """Return bool ``[B, H, S]`` (CPU)."""
        return torch.arange(self.size) < self.counts[:, :, None]

    def keep(self, index: Tensor, counts: Tensor, spare: int) -> None:
        """Keep slots ``index [B, H, N]`` of which the first ``counts [B, H]`` stay."""
        inside = torch.arange(index.shape[-1]) < counts[:, :, None]
        begin = self.starts[:-1].view(*counts.shape, 1)
        self._lay_out(dict(self.tables), (index.cpu() + begin)[inside], counts, spare)

    def truncate(self, counts: Tensor) -> None:
        """Drop the slots appended after the segments held ``counts [B, H]``."""
        self.counts = counts.clone()

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        chosen = index.cpu()
        H = self.counts.shape[1]
        segments = (chosen[:, None] * H + torch.arange(H)).flatten()
        counts = self.counts.index_select(0, chosen)
        rows = flat_index(self.starts[segments], counts.flatten())
        self._lay_out(dict(self.tables), rows, counts, 0)

    def attend_one(self, query: Tensor, scale: float) -> Tensor:
        """Attention of one query per head, ``[B, H, G, D]`` -> ``[B, H, G, Dv]``.

        One small attention per segment reads exactly the stored slots.
        """
        B, H, G, _ = query.shape
        keys, values = self.tables["keys"], self.tables["values"]
        out = query.new_empty(B, H, G, values.shape[-1])
        starts, counts = self.starts.tolist(), self.counts.flatten().tolist()
        for i, count in enumerate(counts):
            b, h = divmod(i, H)
            span = slice(starts[i], starts[i] + count)
            out[b, h] = F.scaled_dot_product_attention(
                query[b, h][None, None],
                keys[span][None, None],
                values[span][None, None],
                scale=scale,
            )[0, 0]
        return out

    def tensors(self) -> list[Tensor]:
        """Return everything stored, for counting bytes."""
        return list(self.tables.values())

    def nbytes(self) -> int:
        """Bytes of the storages, spare capacity included."""
        return storage_bytes(self.tensors())


def flat_index(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the flat positions of segments: start, start + 1, ... for each, concatenated.

    ``starts [N]``, ``lengths [N]`` -> ``[sum of lengths]``.
    """
    ends = lengths.cumsum(0)
    offset = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return offset + torch.arange(int(lengths.sum()))
