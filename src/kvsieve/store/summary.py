"""What a table remembers of the slots it dropped: their moments, which attention can add back.

For the n dropped slots of one (row, head): n, the means mu_k and mu_v, and
``C = (1/n) sum_i (v_i - mu_v) (k_i - mu_k)^T``. To the first order around the means, with
``s_i = scale q . k_i`` and ``s = scale q . mu_k``,

    sum_i exp(s_i)      ~  n exp(s)
    sum_i exp(s_i) v_i  ~  n exp(s) (mu_v + scale C q)

so that attention sees one more slot: its logit is ``s + log n``, its value depends on the query. It
costs O(D Dv) per query head and query, whatever n is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class Summarise:
    """That dropped slots are summarised, and how.

    ``added``: attention adds them back; ``parts``: summaries per head, each of a stretch of
    positions: a ``parts``-th of what a row has seen when it first drops something, the last
    stretch open to the end.
    """

    added: bool = True
    parts: int = 1

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise RecipeError(f"parts={self.parts}: there must be 1 summary or more per head.")

    def nbytes(self, D: int, Dv: int) -> int:
        """Bytes per row and head at most, for keys of D and values of Dv numbers."""
        stretch = torch.int64.itemsize
        return stretch + torch.float32.itemsize * self.parts * (1 + D + Dv + D * Dv)


class Summary:
    """Moments of what was dropped, in fp32, in N parts of each row and head.

    ``count [B, H, N]``; ``key [B, H, N, D]`` and ``value [B, H, N, Dv]``: means; ``cross
    [B, H, N, Dv, D]``: n C. ``stretch [B]`` int64: positions to a part (0: nothing dropped yet).
    """

    def __init__(self, how: Summarise, keys: Tensor, values: Tensor) -> None:
        """Summarise nothing yet, for ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``."""
        self.how = how
        shape = (*keys.shape[:2], how.parts)
        kind = {"dtype": torch.float32, "device": keys.device}
        self.count = torch.zeros(shape, **kind)
        self.key = torch.zeros(*shape, keys.shape[-1], **kind)
        self.value = torch.zeros(*shape, values.shape[-1], **kind)
        self.cross = torch.zeros(*shape, values.shape[-1], keys.shape[-1], **kind)
        self.stretch = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)

    def part_of(self, position: Tensor) -> Tensor:
        """Return which part slots at ``position [B, 1 or H, S]`` belong to, in their shape."""
        stretch = self.stretch.clamp_min(1)[:, None, None]
        return (position // stretch).clamp_max(self.how.parts - 1)

    def take_in(
        self, keys: Tensor, values: Tensor, position: Tensor, gone: Tensor, seen: Tensor
    ) -> None:
        """Add the slots ``gone [B, H, S]`` of a table; ``seen [B]`` are its rows' lengths."""
        first = (self.stretch == 0) & gone.any(-1).any(-1)
        share = -(-seen.to(gone.device) // self.how.parts)
        self.stretch = torch.where(first, share, self.stretch)
        part = self.part_of(position)
        for n in range(self.how.parts):
            self._join(n, *moments(keys, values, gone & (part == n)))

    def _join(self, n: int, count: Tensor, key: Tensor, value: Tensor, cross: Tensor) -> None:
        """Join the moments of two sets exactly: n C = n1 C1 + n2 C2 + (n1 n2 / n) D_v D_k^T."""
        old = self.count[:, :, n]
        total = old + count
        share = (count / total.clamp_min(1))[..., None]
        D_k, D_v = key - self.key[:, :, n], value - self.value[:, :, n]
        outer = D_v[..., :, None] * D_k[..., None, :]
        self.cross[:, :, n] += cross + outer * (old[..., None] * share)[..., None]
        self.key[:, :, n] += share * D_k
        self.value[:, :, n] += share * D_v
        self.count[:, :, n] = total

    def covariance(self) -> Tensor:
        """Return C, ``[B, H, N, Dv, D]``."""
        return self.cross / self.count.clamp_min(1)[..., None, None]

    def answer(
        self, query: Tensor, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what attention sees of the dropped: a logit and a value for every query and part.

        ``query [B, H, G, T, D]`` -> ``[B, H, G, T, N]`` (-inf where nothing was dropped) and
        ``[B, H, G, T, N, Dv]``, in fp32. Soft-capped logits are expanded as they are.
        """
        q = scale * query.float()
        logit = torch.einsum("bhgtd,bhnd->bhgtn", q, self.key)
        moved = torch.einsum("bhgtd,bhnvd->bhgtnv", q, self.covariance())
        if softcap is not None:
            bent = torch.tanh(logit / softcap)
            logit, moved = softcap * bent, moved * (1 - bent**2)[..., None]
        logit = logit + self.count.log()[:, :, None, None]
        return logit, self.value[:, :, None, None] + moved

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        for name in ("count", "key", "value", "cross", "stretch"):
            setattr(self, name, getattr(self, name).index_select(0, index))

    def tensors(self) -> list[Tensor]:
        """Return everything stored, for counting bytes."""
        return [self.count, self.key, self.value, self.cross, self.stretch]


def moments(keys: Tensor, values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``n [B, H]``, ``mu_k [B, H, D]``, ``mu_v [B, H, Dv]`` and ``n C [B, H, Dv, D]``.

    Of the slots ``chosen [B, H, S]``, in fp32, in blocks of slots.
    """
    count = chosen.sum(-1).float()
    some = count.clamp_min(1)[..., None]
    key = torch.zeros(*count.shape, keys.shape[-1], device=keys.device)
    value = torch.zeros(*count.shape, values.shape[-1], device=keys.device)
    for k, v, _ in _blocks(keys, values, chosen):
        key += k.sum(2) / some
        value += v.sum(2) / some
    cross = torch.zeros(*value.shape, key.shape[-1], device=keys.device)
    for k, v, there in _blocks(keys, values, chosen):
        apart = (v - value[:, :, None]).masked_fill_(~there, 0.0)
        cross += apart.transpose(-1, -2) @ (k - key[:, :, None])
    return count, key, value, cross


def _blocks(
    keys: Tensor, values: Tensor, chosen: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield fp32 keys and values ``[B, H, s, D]``, zero where not ``chosen``, and the latter."""
    B, H, S, D = keys.shape
    for s0, s1 in query_blocks(S, B * H * D, layer_block(keys)):
        there = chosen[:, :, s0:s1, None]
        # Memory of slots that don't exist may hold anything, and 0 times NaN is NaN.
        k, v = (x[:, :, s0:s1].float().masked_fill(~there, 0.0) for x in (keys, values))
        yield k, v, there
