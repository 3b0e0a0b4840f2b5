"""The cache layer: it stores, and hands the attention function the place instead of the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvsieve.engines.transformers.attention import Handle, active, require_no_grad
from kvsieve.errors import EngineError
from kvsieve.session import Session


class SieveLayer(CacheLayerMixin):
    """One compressed layer of a Transformers cache.

    Lengths that Transformers asks for are logical: tokens seen, whatever is still stored.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, session: Session, ordinal: int, latent: bool) -> None:
        super().__init__()
        self.session, self.ordinal, self.latent = session, ordinal, latent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the table makes itself from what it is given."""
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Store ``[B, H, T, D]`` keys and values; return the handle for both.

        Raises:
            EngineError: the model is not attached (any more), or gradients are on.
        """
        current = active.get()
        if current is None or current.session is not self.session:
            raise EngineError(
                "This cache belongs to a closed run, or to another model. Use it inside "
                "`with kvsieve.attach(...)` or while its kvsieve.Cache is open, with the model "
                "that it was made for."
            )
        require_no_grad(key_states)
        self.is_initialized = True
        store = self.session.append(self.ordinal, key_states, value_states)
        if self.latent and key_states.shape[1] == 1:
            # The model expands what it caches before it attends: it needs real tensors back.
            current.latent = self.ordinal
            return store.keys, store.values
        handle = Handle(self.session, self.ordinal, key_states.shape[1])
        return handle, handle

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.session.layers[self.ordinal].logical

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the logical width of a mask and its offset."""
        # Transformers before 5.4 passes the positions instead of their number.
        T = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + T, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (name of older releases)."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beam search: rows become ``beam_idx``."""
        self.session.select_rows(self.ordinal, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        rows = torch.arange(self.session.layers[self.ordinal].store.seen.numel())
        self.session.select_rows(self.ordinal, rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        self.session.select_rows(self.ordinal, indices)

    def reset(self) -> None:
        """Forget everything, as if new."""
        self.session.reset(self.ordinal)
        self.is_initialized = False

    def crop(self, tokens: int) -> None:
        """Refuse: what was evicted on behalf of later tokens can't be brought back.

        Raises:
            EngineError: always, unless nothing is to be taken back.
        """
        if tokens == 0:
            return
        raise EngineError(
            "Assisted decoding, prompt lookup and cache.crop() take tokens back out of the cache. "
            "A compressed cache can't: generate without assistant_model, prompt_lookup_num_tokens "
            "and crop()."
        )


def other_bytes(layers: list[Any]) -> int:
    """Bytes of the layers that kvsieve leaves alone: sliding windows, recurrent states."""
    storages: dict[int, int] = {}
    for layer in layers:
        if not isinstance(layer, SieveLayer):
            for x in _tensors(vars(layer)):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, list) else []
