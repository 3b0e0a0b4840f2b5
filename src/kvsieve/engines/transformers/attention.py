"""The two functions registered with Transformers: attention over tables, and "no mask, please".

They are registered when a model is first attached, never at import. The forward in progress is
known through a context variable that the hooks of ``engine.py`` set, so that threads don't mix.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvsieve.errors import EngineError
from kvsieve.prediction import Outlook
from kvsieve.session import Session
from kvsieve.store.attend import attend

NAME = "kvsieve"


@dataclass
class Active:
    """The forward in progress: what it was called with, its session if its cache is compressed,
    and the layer that returned plain tensors last."""

    kwargs: dict[str, Any]
    session: Session | None = None
    latent: int | None = None
    token: Token[Active | None] | None = None


active: ContextVar[Active | None] = ContextVar("kvsieve_active", default=None)

awaiting: ContextVar[Outlook | None] = ContextVar("kvsieve_awaiting", default=None)
"""Where the logits belong that the model is about to compute, if anyone needs them."""


@dataclass(frozen=True)
class Handle:
    """What a cache layer returns instead of keys and values: where they are kept."""

    session: Session
    ordinal: int
    heads: int


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ``query [B, Hq, T, D]`` -> ``[B, T, Hq, Dv]``.

    Raises:
        EngineError: attention dropout, which a cache under compression has no use for.
    """
    if dropout:
        raise EngineError("Attention dropout is on. kvsieve runs inference: call model.eval().")
    B, Hq, T, D = query.shape
    scale = D**-0.5 if scaling is None else scaling
    current = active.get()
    if isinstance(key, Handle):
        grouped = query.view(B, key.heads, Hq // key.heads, T, D)
        sinks = None if s_aux is None else s_aux.view(key.heads, -1)
        out = key.session.attend(key.ordinal, grouped, scale, sinks=sinks, softcap=softcap)
    elif current is not None and current.session is not None and current.latent is not None:
        assert isinstance(value, Tensor), "latent layers return tensors"
        ordinal, current.latent = current.latent, None
        latents = query.view(B, 1, Hq, T, D)
        out = current.session.attend(ordinal, latents, scale, keys=key, values=value)
    else:
        assert isinstance(value, Tensor), "keys and values come from the same cache layer"
        out = _attend_elsewhere(query, key, value, attention_mask, scale, s_aux, softcap)
    return out.reshape(B, Hq, T, -1).transpose(1, 2).contiguous(), None


def _attend_elsewhere(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    s_aux: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a layer that kvsieve leaves alone (sliding windows), sinks honoured."""
    B, Hq, T, D = query.shape
    H = key.shape[1]
    return attend(
        query.view(B, H, Hq // H, T, D),
        key,
        value,
        scale,
        visible=None if mask is None else lambda t0, t1: mask[:, :, t0:t1],
        causal=mask is None and T > 1,
        sinks=None if s_aux is None else s_aux.view(H, -1),
        softcap=softcap,
    )


def causal_mask(**arguments: Any) -> Tensor | None:
    """Transformers' mask interface: None for plain causal layers, whose tables mask themselves.

    Raises:
        EngineError: the model asks for a full-attention mask that isn't causal.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    current = active.get()
    if current is None or current.session is None:
        return sdpa_mask(**arguments)
    function = arguments.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return None
    if not arguments.get("local_size"):
        raise EngineError(
            "This model masks its full-attention layers by more than causality (bidirectional "
            "blocks, packed sequences or chunks); kvsieve can't follow that mask yet."
        )
    return sdpa_mask(**arguments)


@cache
def register() -> None:
    """Make the name known to Transformers; models that don't use it are not touched."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, causal_mask)


def require_no_grad(x: Tensor) -> None:
    """Refuse to store tensors that autograd follows.

    Raises:
        EngineError: the forward runs with gradients.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise EngineError(
            "The forward runs with gradients, and a cache is written in place. "
            "Wrap it in torch.no_grad() or torch.inference_mode()."
        )
