"""What one layer shows in one forward: its queries, where they stand, and how they attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvsieve.errors import UnsupportedSignal
from kvsieve.interfaces import Scope
from kvsieve.moments import QueryMoments
from kvsieve.queries import QueryWindow, newest, pick_queries
from kvsieve.store import Store
from kvsieve.store.attend import query_blocks
from kvsieve.store.rope import rotate, unrotate

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps positions ``[...]`` to ``cos, sin [..., R]`` in fp32."""


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What an engine knows about one attention layer.

    ``output_projection()`` returns ``[H, G, Dv, C]``; ``rotary`` gives the model's own rotation
    tables. Either is None where the model has no such thing. ``heads``, ``pair_bytes`` (one key and
    one value), ``query_bytes`` (one token's queries) and ``sizes`` (numbers in a key and in a
    value) let budgets in bytes be checked before anything runs. ``first_head``: the layer's number
    of the first head here, where several workers share a layer.
    """

    ordinal: int
    heads: int | None = None
    first_head: int = 0
    pair_bytes: int | None = None
    query_bytes: int | None = None
    sizes: tuple[int, int] | None = None
    output_projection: Callable[[], Tensor] | None = None
    rotary: Rotary | None = None
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def gram(self, summed: bool = False) -> Tensor:
        """Return ``W_O W_O^T`` per query head, ``[H, G, Dv, Dv]`` in fp32, made once.

        ``summed``: of the sum of a group's matrices instead, ``[H, 1, Dv, Dv]``.

        Raises:
            UnsupportedSignal: the attention module has no output matrix that is known.
        """

        def make() -> Tensor:
            w_o = self.w_o().detach().float()
            w_o = w_o.sum(1, keepdim=True) if summed else w_o
            return w_o @ w_o.transpose(-1, -2)

        return self.once("summed gram" if summed else "gram", make)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make()`` gave when it was first asked for by that name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def root(self) -> Tensor:
        """Return R ``[H, G, Dv, K]`` with ``||x R|| = ||x W_O||``, K <= Dv, in fp32, made once.

        From the QR decomposition of ``W_O^T``: lengths and distances after the projection are
        those of vectors no longer than a value.
        """

        def make() -> Tensor:
            w_o = self.w_o().detach().float()
            upper = torch.linalg.qr(w_o.transpose(-1, -2), mode="r").R
            return upper.transpose(-1, -2).contiguous()

        return self.once("root", make)

    def w_o(self) -> Tensor:
        """Return the output projection ``[H, G, Dv, C]``.

        Raises:
            UnsupportedSignal: the attention module has no output matrix that is known.
        """
        if self.output_projection is None:
            raise UnsupportedSignal("This layer shows no output projection.")
        return self.output_projection()


@dataclass(kw_only=True)
class Step:
    """One layer in one forward.

    ``query [B, H, G, T, D]`` after rotation; ``positions [B, T]`` among each row's real tokens;
    ``live [B, T]`` marks padding (None: none); ``keys [B, Hq, S, D]`` replaces the stored keys
    where a model expands what it caches, with one KV head per query head; ``offset [B]`` is
    rotary position minus ``positions``. ``replay`` is True while a prompt is being repeated: then
    ``replayed [B, 2]`` gives the span of positions that this forward repeats. ``earlier``: in a
    prompt part, the remembered queries ``[B, H, G, N, D]`` of forwards before it, their positions
    ``[B, N]`` and which of them are valid; None: none are remembered. ``budgets [B]`` (CPU): mean
    slots per head that each row may keep, known while a layer is scored.
    """

    layer: LayerInfo
    query: Tensor
    scale: float
    positions: Tensor
    live: Tensor | None = None
    prefill: bool = False
    keys: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    offset: Tensor | None = None
    recent: QueryWindow | None = None
    earlier: tuple[Tensor, Tensor, Tensor] | None = None
    moments: QueryMoments | None = None
    replayed: Tensor | None = None
    budgets: Tensor | None = None
    _windows: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def replay(self) -> bool:
        return self.replayed is not None

    def waiting(self, scope: Scope) -> Step:
        """Return this step as it waits for a decision of ``scope``.

        Where that takes the whole model, queries and expanded keys are let go: those of a prompt
        would add up over the layers to more than the cache itself.
        """
        if scope is not Scope.MODEL:
            return self
        none = self.query[:, :, :, :0].clone()
        return replace(self, query=none, keys=None, recent=None, _windows={})

    def window(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last ``size`` real queries of each row, those of earlier forwards included.

        ``(queries [B, H, G, W, D], positions [B, W], valid [B, W])`` with W <= size.
        """
        if size not in self._windows:
            self._windows[size] = self._window(size)
        return self._windows[size]

    def _window(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        # A row with padding may bring fewer queries than it seems.
        short = self.query.shape[3] < size or self.live is not None
        if self.recent is not None and short and size <= self.recent.window:
            return self._newest_of_ring(size)
        return newest(self.query, self.positions, self.live, size)

    def _newest_of_ring(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        ring = self.recent
        assert ring is not None, "called without a query window"
        if ring.queries.shape[3] <= size:
            return ring.queries, ring.positions, ring.valid
        order = ring.positions.masked_fill(~ring.valid, -1).argsort(dim=1, descending=True)[
            :, :size
        ]
        return (
            pick_queries(ring.queries, order),
            ring.positions.gather(1, order),
            ring.valid.gather(1, order),
        )

    def attention(self, store: Store, size: int | None = None) -> Tensor:
        """Return attention weights in fp32, ``[B, H, G, W, S]``, of the last ``size`` queries.

        ``size=None`` takes all queries of this forward: only for short ones. The softmax spans all
        slots a query may see; rows of queries that are not valid are zero.
        """
        if size is None:
            live = self.live
            valid = torch.ones_like(self.positions, dtype=torch.bool) if live is None else live
            return self.weights(store, self.query, self.positions, valid)
        return self.weights(store, *self.window(size))

    def weights(
        self,
        store: Store,
        queries: Tensor,
        positions: Tensor,
        valid: Tensor,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Return the attention weights ``[B, H, G, W, S]`` of given queries, in fp32.

        ``allowed [B, 1 or H, S]`` further limits the slots over which the softmax goes.
        """
        logits = self._logits(store, queries)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        seen = store["position"][:, :, None] <= positions[:, None, :, None]  # [B, 1|H, W, S]
        live = store.live
        if live is not None:
            seen = seen & live[:, :, None]
        if allowed is not None:
            seen = seen & allowed[:, :, None]
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        if self.sinks is not None:
            extra = self.sinks.float()[None, :, :, None, None].expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        # A query that is padding may see nothing at all: its softmax is undefined, not small.
        return weights.masked_fill(~valid[:, None, None, :, None], 0.0)

    def _logits(self, store: Store, queries: Tensor) -> Tensor:
        keys = store.keys if self.keys is None else self.keys
        B, H, G, W, D = queries.shape
        if keys.shape[1] == H:
            folded = queries.reshape(B, H, G * W, D).float()
            dots = (folded @ keys.float().transpose(-1, -2)).view(B, H, G, W, -1)
        else:  # expanded latents: one KV head per query head
            each = queries.reshape(B, H * G, W, D).float()
            dots = (each @ keys.float().transpose(-1, -2)).view(B, H, G, W, -1)
        return dots * self.scale

    def attention_sums(self, store: Store) -> Tensor:
        """Return, per slot, the attention of all this forward's queries, ``[B, H, S]`` in fp32.

        Summed over queries, averaged over the group; done in blocks of queries, so that no T x S
        matrix is held.
        """
        B, H, G, T, _ = self.query.shape
        live = self.live
        valid = torch.ones_like(self.positions, dtype=torch.bool) if live is None else live
        total = torch.zeros(B, H, store.slots, device=self.query.device)
        for t0, t1 in query_blocks(T, B * H * G * store.slots):
            span = slice(t0, t1)
            block = self.weights(
                store, self.query[:, :, :, span], self.positions[:, span], valid[:, span]
            )
            total += block.sum(3).mean(2)
        return total

    @property
    def w_o(self) -> Tensor:
        """The output projection ``[H, G, Dv, C]``: what each query head's value becomes.

        Raises:
            UnsupportedSignal: the attention module has no output matrix that is known.
        """
        return self.layer.w_o()

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cos, sin [B, ..., R]`` of the model at ``positions [B, ...]``.

        Raises:
            UnsupportedSignal: the model's rotary positions can't be read.
        """
        if self.layer.rotary is None:
            raise UnsupportedSignal("This layer shows no rotary positions.")
        if self.offset is not None:
            shape = (-1, *[1] * (positions.dim() - 1))
            positions = positions + self.offset.to(positions.device).view(shape)
        return self.layer.rotary(positions)

    def unrotated(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Return ``queries [B, H, G, W, D]`` at ``positions [B, W]`` before rotation, in fp32."""
        cos, sin = self.rotation(positions)
        return unrotate(queries.float(), cos[:, None, None], sin[:, None, None])

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x [B, H, G, W, D]`` to ``positions [B, W]``, in fp32."""
        cos, sin = self.rotation(positions)
        return rotate(x.float(), cos[:, None, None], sin[:, None, None])
