"""Compression as masks on a full cache: written from the definition, sharing no code with kvsieve.

The model runs with its stock cache, which keeps everything. Before every forward the oracle is told
which positions each head of each layer still held; attention then hides all others. Where a recipe
adds moments of what it evicted, the oracle takes them from what it hides itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "kvsieve-test-oracle"


class Oracle:
    """Runs ``model`` with full attention under explicit masks ``[layer][row][head]``."""

    def __init__(self, model: Any, layers: list[int], parts: int = 0) -> None:
        """``layers``: indices of the masked layers; the others attend as the model says.

        ``parts``: summaries per head of what is hidden (0: none).
        """
        self.parts = parts
        self.stretches: dict[tuple[int, int], int] = {}
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        self.model, self.layers = model, layers
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.held: Any = None

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, held: Any) -> Tensor:
        """Return the last logits ``[B, V]``; ``held``: positions kept before this forward."""
        self.held, self.mask, self.new = held, mask, ids.shape[1]
        place = (mask.cumsum(1) - 1).clamp_min(0)[:, -self.new :]
        out = self.model(
            ids,
            attention_mask=mask,
            position_ids=place,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]

    def _visible(self, ordinal: int, heads: int) -> Tensor:
        """Return bool ``[B, H, T, columns]``: kept before, or new and not later than the query."""
        B, columns = self.mask.shape
        before = columns - self.new
        seen = torch.zeros(B, heads, self.new, columns, dtype=torch.bool)
        for b in range(B):
            real = self.mask[b].nonzero()[:, 0].tolist()  # column of each position
            for h in range(heads):
                if self.held is not None:
                    for position in self.held[ordinal][b][h]:
                        seen[b, h, :, real[position]] = True
                for t in range(self.new):
                    for column in range(before, before + t + 1):
                        seen[b, h, t, column] = bool(self.mask[b, column])
        return seen

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(-1, -2) * scaling
        if module.layer_idx in self.layers:
            seen = self._visible(self.layers.index(module.layer_idx), heads)
            logits = logits.masked_fill(~seen.repeat_interleave(group, 1), -torch.inf)
        elif attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        elif query.shape[2] > 1:
            future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        theirs = None
        if self.parts and self.held is not None and module.layer_idx in self.layers:
            ordinal = self.layers.index(module.layer_idx)
            more, theirs = self._moments(ordinal, group, query, key, value, scaling)
            logits = torch.cat([logits, more], -1)
        if s_aux is not None:
            extra = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, extra], -1)
        weights = logits.softmax(-1).nan_to_num(0)
        out = weights[..., : key.shape[2]] @ value
        if theirs is not None:
            mass = weights[..., key.shape[2] : key.shape[2] + self.parts, None]
            out = out + (mass * theirs).sum(-2)
        return out.transpose(1, 2).contiguous(), None

    def _moments(
        self, ordinal: int, group: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, Hq, T, N]`` and values ``[B, Hq, T, N, Dv]`` of what is hidden."""
        B, Hq, T, _ = query.shape
        logits = torch.full((B, Hq, T, self.parts), -torch.inf)
        values = torch.zeros(B, Hq, T, self.parts, value.shape[-1])
        before = self.mask.shape[1] - self.new
        for b in range(B):
            real = self.mask[b, :before].nonzero()[:, 0].tolist()
            for h in range(Hq):
                kept = set(self.held[ordinal][b][h // group])
                gone = [p for p in range(len(real)) if p not in kept]
                if gone:
                    self.stretches.setdefault((ordinal, b), math.ceil(len(real) / self.parts))
                for n in range(self.parts):
                    part = [
                        real[p]
                        for p in gone
                        if min(p // self.stretches[ordinal, b], self.parts - 1) == n
                    ]
                    if part:
                        k, v = key[b, h, part].double(), value[b, h, part].double()
                        q = query[b, h].double() * scaling
                        slope = (v - v.mean(0)).T @ (k - k.mean(0)) / len(part)  # [Dv, D]
                        logits[b, h, :, n] = q @ k.mean(0) + math.log(len(part))
                        values[b, h, :, n] = v.mean(0) + q @ slope.T
        return logits, values
