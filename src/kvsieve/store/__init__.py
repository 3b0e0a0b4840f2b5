"""One layer's cache as a table: slots are rows, whatever follows a token is a column."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kvsieve.interfaces import Column
from kvsieve.store.arrival import Arrival
from kvsieve.store.attend import Visible, attend
from kvsieve.store.dense import SPARE_SLOTS, Dense
from kvsieve.store.ragged import Ragged
from kvsieve.store.rows import storage_bytes
from kvsieve.store.summary import Summarise, Summary

Layout = Literal["dense", "ragged"]

MOVED = "moved"
"""The column that says how far a slot's key was re-rotated, in positions."""


class Store:
    """The slots of one layer, with every column that must follow them.

    It starts dense. With ``layout="ragged"`` it turns into packed segments at the first ``keep``,
    so that a cache from which nothing was removed is read exactly as without compression.

    ``seen [B]`` (CPU) counts the real tokens that have passed in each row: the logical length.
    ``slack``: slots above the budget that the schedule allows while decoding (None: unbounded).
    The slot counts say nothing about it. ``position [B, H, S]`` is each slot's index among its
    row's real tokens. ``summarise``: ``keep`` takes what it drops into a ``summary`` (None until
    something was dropped), which attention may add back.
    """

    def __init__(
        self,
        columns: tuple[Column, ...] = (),
        layout: Layout = "dense",
        slack: int | None = None,
        summarise: Summarise | None = None,
    ) -> None:
        self.schema = {column.name: column for column in columns}
        self.layout: Layout = layout
        self.slack = slack
        # Where the schedule bounds growth, compaction leaves room for the next tokens at once:
        # one more than the slack, since a new token is stored before anything is dropped.
        self.spare = 0 if slack is None else min(slack + 1, SPARE_SLOTS)
        self.table: Dense | Ragged = Dense()
        self.seen = torch.zeros(0, dtype=torch.int64)
        self.removed = 0
        self.summarise = summarise
        self.summary: Summary | None = None

    # -- what is stored ------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Width of the table: slots of the fullest (row, head), dead ones included."""
        return self.table.size

    @property
    def counts(self) -> Tensor:
        """Live slots ``[B, H]`` int64, on the CPU."""
        return self.table.counts

    @property
    def keys(self) -> Tensor:
        """Keys as cached ``[B, H, S, D]``; entries of dead slots are meaningless."""
        return self.table.get("keys")

    @property
    def values(self) -> Tensor:
        """Values as cached ``[B, H, S, Dv]``; entries of dead slots are meaningless."""
        return self.table.get("values")

    @property
    def live(self) -> Tensor | None:
        """Which slots exist, bool ``[B, 1 or H, S]``; None when all do."""
        live = self.table.live()
        return live if live is None else live.to(self.device)

    @property
    def device(self) -> torch.device:
        return self.table.tensors()[0].device

    def __getitem__(self, name: str) -> Tensor:
        """Return a column as ``[B, 1 or H, S]``."""
        return self.table.get(name)

    def __setitem__(self, name: str, new: Tensor) -> None:
        """Replace a column by ``new [B, H, S]``, or the keys by ``[B, H, S, D]``."""
        self.table.set(name, new)

    @property
    def standing(self) -> Tensor:
        """Where each slot's key stands: its position, or where it was moved, ``[B, 1 or H, S]``."""
        position = self["position"]
        return position + self[MOVED] if MOVED in self.schema else position

    @property
    def pair_bytes(self) -> int:
        """Bytes of one key and one value."""
        keys, values = self.keys, self.values
        return (keys.shape[-1] + values.shape[-1]) * keys.element_size()

    @property
    def column_bytes(self) -> int:
        """Bytes of all other columns of one slot: the position, and what the scorer carries."""
        return torch.int32.itemsize + sum(x.dtype.itemsize for x in self.schema.values())

    @property
    def version(self) -> int:
        """Changes whenever tables were allocated anew."""
        return self.table.version

    def nbytes(self) -> int:
        """Bytes of the storages of this layer: spare capacity, columns and summary included."""
        summary = [] if self.summary is None else self.summary.tensors()
        return self.table.nbytes() + storage_bytes(summary)

    # -- how it changes ------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        live: Tensor | None = None,
        arrival: Arrival | None = None,
    ) -> Tensor:
        """Add T tokens ``keys [B, H, T, D]``, ``values [B, H, T, Dv]``; return their positions.

        ``live [B, T]`` says which of them are real (None: all). Positions are ``[B, T]`` int64 on
        the table's device; those of padding are meaningless. ``arrival`` saves working them out
        anew in every layer.
        """
        B, _, T = keys.shape[:3]
        if arrival is None:
            arrival = Arrival.of(self.seen, B, T, live, keys.device)
        new = {"position": arrival.column}
        for column in self.schema.values():
            new[column.name] = torch.full(
                (B, 1, T), column.fill, dtype=column.dtype, device=keys.device
            )
        self.seen = arrival.seen
        self.table.append(keys, values, new, live, arrival.added)
        return arrival.positions

    def keep(self, index: Tensor, counts: Tensor) -> None:
        """Keep in every (row, head) the slots ``index [B, H, N][..., : counts]``, drop the rest.

        ``index`` ascends within its first ``counts [B, H]`` entries, so that order is kept.
        """
        self.removed += int((self.counts - counts).sum())
        if self.summarise is not None:
            self._remember(self.summarise, index, counts)
        table = self.table
        if isinstance(table, Dense) and self.layout == "ragged":
            names = ["keys", "values", *(n for n in table.columns if n != "live")]
            heads = table.keys.shape[1]
            whole = {n: table.get(n) for n in names}
            whole = {
                n: x if x.shape[1] == heads else x.expand(-1, heads, -1) for n, x in whole.items()
            }
            self.table = Ragged.pack(whole, index, counts)
            # Versions go on from the old table's: equal ones would hide that the bytes changed.
            self.table.version += table.version
        else:
            table.keep(index, counts, self.spare)

    def add_to_values(self, added: Tensor) -> None:
        """Add ``added [B, H, S, Dv]`` to the values; nothing is added to slots that don't exist."""
        if self.live is not None:
            added = added.masked_fill(~self.live[..., None], 0.0)
        self.table.add_to_values(added)

    def _remember(self, how: Summarise, index: Tensor, counts: Tensor) -> None:
        """Take into the summary every live slot that is not among those to be kept."""
        keys, values = self.keys, self.values
        inside = torch.arange(index.shape[-1]) < counts[:, :, None]
        kept = torch.zeros(keys.shape[:3], dtype=torch.int32, device=index.device)
        kept.scatter_add_(2, index, inside.to(kept))  # the rest of the index may name any slot
        gone = (kept == 0) if self.live is None else (kept == 0) & self.live
        if self.summary is None:
            self.summary = Summary(how, keys, values)
        self.summary.take_in(keys, values, self["position"], gone, self.seen)

    def mark(self) -> tuple[Tensor, int | Tensor]:
        """Return a mark to roll back to, as long as nothing is removed in between."""
        size = self.table.size if isinstance(self.table, Dense) else self.counts.clone()
        return self.seen.clone(), size

    def rollback(self, mark: tuple[Tensor, int | Tensor]) -> None:
        """Drop what was appended since ``mark()``."""
        self.seen, size = mark
        self.table.truncate(size)  # type: ignore[arg-type]

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch by rows ``index`` of it (repetition allowed)."""
        self.seen = self.seen.index_select(0, index.cpu())
        self.table.select_rows(index)
        if self.summary is not None:
            self.summary.select_rows(index)

    # -- how it is read ------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        scale: float,
        positions: Tensor,
        query_live: Tensor | None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention ``[B, H, G, T, Dv]`` of the newest T tokens' queries ``[B, H, G, T, D]``.

        ``positions [B, T]`` are those that ``append`` returned, ``query_live [B, T]`` marks
        padding (None: none). ``keys``/``values`` replace the stored ones where a model expands
        what it caches (latent attention).
        """
        T = query.shape[3]
        answer = None
        if self.summary is not None and self.summary.how.added:
            assert keys is None, "latents have no moments: a summary needs values"
            answer = partial(self.summary.answer, scale=scale, softcap=softcap)
        plain = keys is None and sinks is None and softcap is None and answer is None
        if T == 1 and plain and isinstance(self.table, Ragged) and query.device.type == "cpu":
            if bool((self.counts > 0).all()):
                return self.table.attend_one(query[:, :, :, 0], scale).unsqueeze(3)
        live = self.live
        fresh = live is None and self.slots == T and isinstance(self.table, Dense)
        visible = None
        if not fresh and not (T == 1 and live is None):
            visible = self._visible(positions, live, query_live)
        if keys is not None and keys.shape[1] != query.shape[1]:
            # Expanded latents have one KV head per query head: groups become heads.
            B, H, G, T, D = query.shape
            query = query.view(B, H * G, 1, T, D)
            out = attend(query, keys, values, scale, visible=visible, causal=fresh and T > 1)  # type: ignore[arg-type]
            return out.view(B, H, G, T, -1)
        return attend(
            query,
            self.keys if keys is None else keys,
            self.values if values is None else values,
            scale,
            visible=visible,
            causal=fresh and T > 1,
            sinks=sinks,
            softcap=softcap,
            answer=answer,
        )

    def _visible(
        self, positions: Tensor, live: Tensor | None, query_live: Tensor | None
    ) -> Visible:
        slot = self["position"]

        def visible(t0: int, t1: int) -> Tensor:
            seen = slot[:, :, None] <= positions[:, None, t0:t1, None]
            if live is not None:
                seen = seen & live[:, :, None]
            if query_live is not None:
                # A padding query sees everything: its output is never used, but must be finite.
                seen = seen | ~query_live[:, None, t0:t1, None]
            return seen

        return visible
