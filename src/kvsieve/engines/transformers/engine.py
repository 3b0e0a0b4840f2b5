"""Attaching a recipe to a model: one attention name, two hooks on the decoder, all of it undone.

No model class is changed. A forward hook sees every forward begin and end, turns the fresh cache
that ``generate`` made into a compressed one, and takes the padding mask; what attention needs
travels through the cache layer's ``update``.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as StockCache
from transformers.cache_utils import DynamicCache

from kvsieve.compose import Recipe
from kvsieve.engines.transformers.attention import NAME, Active, active, awaiting, register
from kvsieve.engines.transformers.inspection import ModelView
from kvsieve.engines.transformers.layer import SieveLayer
from kvsieve.errors import EngineError
from kvsieve.session import Session


class Installation:
    """The hooks on one model, shared by every run and cache that uses it."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self.users = 0
        self.fresh: Any = None  # called with the layers of a new stock cache; None: not attached

    def acquire(self) -> None:
        """Switch the model over at the first user."""
        if self.users == 0:
            register()
            self._original = self.view.model.config._attn_implementation
            self.view.model.set_attn_implementation(NAME)
            decoder = self.view.decoder
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
                self.view.model.register_forward_hook(self._show_logits),
            ]
        self.users += 1

    def release(self) -> None:
        """Switch it back after the last one."""
        self.users -= 1
        if self.users == 0:
            for hook in self._hooks:
                hook.remove()
            # An interrupt in mid-forward skips the hooks that would have done this.
            active.set(None)
            awaiting.set(None)
            self.view.model.set_attn_implementation(self._original)

    # -- hooks ---------------------------------------------------------------------------------

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            names = list(inspect.signature(decoder.forward).parameters)
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        current = Active(kwargs=kwargs)
        # Set first: the hook after the forward also runs when this one raises, and resets it.
        current.token = active.set(current)
        cache = kwargs.get("past_key_values")
        if cache is None and self.fresh is not None and self._wants_cache(kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.view.config)
        session = self._session_of(cache)
        if session is not None:
            self._begin(session, kwargs)
            current.session = session
        return (), kwargs

    def _wants_cache(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.view.config, "use_cache", True) if wanted is None else wanted)

    def _after(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = active.get()
        if current is None or current.token is None:
            return
        session = current.session
        try:
            if session is not None and output is not None:
                session.end(lambda ids, positions: self._repeat(session, ids, positions))
            elif session is not None:
                session.abandon()
        except BaseException:
            if session is not None:
                session.abandon()
            raise
        finally:
            active.reset(current.token)
            outlook = None if session is None else session.outlook
            awaiting.set(outlook if outlook is not None and outlook.awaiting else None)

    def _show_logits(self, model: nn.Module, args: Any, output: Any) -> None:
        """Hand what the whole model returns to the session whose forward has just ended."""
        outlook, logits = awaiting.get(), getattr(output, "logits", None)
        awaiting.set(None)
        if outlook is not None and isinstance(logits, Tensor):
            outlook.take(logits)

    def _repeat(self, session: Session, ids: Tensor, positions: Tensor) -> None:
        """Feed tokens again at ``positions [B, R]``, with the session's cache, keeping nothing."""
        current = active.get()
        assert current is not None, "a replay runs at the end of a forward"
        if session.offset is not None:
            positions = positions + session.offset.to(positions.device)[:, None]
        with torch.no_grad():
            self.view.decoder(
                input_ids=ids,
                position_ids=positions,
                past_key_values=current.kwargs["past_key_values"],
                use_cache=True,
            )

    # -- caches --------------------------------------------------------------------------------

    def _session_of(self, cache: Any) -> Session | None:
        if cache is None:
            return None
        found = session_of(cache)
        if found is not None:
            if len(cache.layers) != len(self.view.types):
                raise EngineError("This cache was built for another model.")
            return found
        if self.fresh is None:
            return None
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            raise EngineError(
                f"A {type(cache).__name__} can't be compressed: kvsieve needs the default cache. "
                "Leave past_key_values and cache_implementation unset (static, quantized and "
                "offloaded caches and continuous batching are not supported), or pass a "
                "kvsieve.Cache."
            )
        if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
            raise EngineError(
                "This cache was filled without kvsieve. Start with a new one, or make a "
                "kvsieve.Cache before the first forward."
            )
        return self.fresh(cache)

    def _begin(self, session: Session, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        shape = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        if session.replaying:
            session.begin(shape[1], None, session.offset)
            return
        live = _padding(kwargs.get("attention_mask"), shape[1])
        offset = _offset(kwargs.get("position_ids"), session, live, shape)
        session.begin(shape[1], live, offset, ids)


def _padding(mask: Any, T: int) -> Tensor | None:
    """Return which of the T new tokens are real, ``[B, T]``, or None when all are."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise EngineError(
            "kvsieve needs the attention mask as [rows, tokens] (1 = real, 0 = padding); a 4-D "
            "or prepared mask can't be followed once slots are removed."
        )
    new = mask[:, -T:].bool()
    return None if bool(new.all()) else new


def _offset(position_ids: Any, session: Session, live: Tensor | None, shape: Any) -> Tensor | None:
    """Return rotary position minus index among the row's real tokens, ``[B]``, or None for 0."""
    B, T = shape
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        if position_ids is not None:
            return session.offset
        # The model counts padding too: positions are indices in the padded row.
        last = torch.full((B,), session.logical + T - 1)
    else:
        last = position_ids[:, -1].expand(B).cpu()
    seen = session.layers[0].store.seen
    new = torch.full((B,), T) if live is None else live.sum(1).cpu()
    index = (seen if seen.numel() else torch.zeros(B, dtype=torch.int64)) + new - 1
    if live is not None and not bool(live[:, -1].all()):
        return session.offset  # right padding: the last column says nothing about real tokens
    offset = last - index
    return offset if bool((offset != 0).any()) else None


def session_of(cache: Any) -> Session | None:
    """Return the session behind a cache, if it is compressed by kvsieve."""
    if not isinstance(cache, StockCache):
        return None
    found = (x.session for x in cache.layers if isinstance(x, SieveLayer))
    return next(found, None)


def sieve_layers(cache: StockCache, view: ModelView, session: Session) -> None:
    """Replace the full-attention layers of an empty stock cache by compressed ones."""
    if not cache.layers:
        cache.layers = DynamicCache(config=view.config).layers
    for ordinal, index in enumerate(view.compressible):
        cache.layers[index] = SieveLayer(session, ordinal, view.latent)


_installations: WeakKeyDictionary[nn.Module, Installation] = WeakKeyDictionary()


def installation(model: Any) -> Installation:
    """Return the model's installation, made on first use.

    Raises:
        EngineError: the model can't be compressed.
    """
    view = ModelView(model)
    if model not in _installations:
        _installations[model] = Installation(view)
    return _installations[model]


def new_session(
    view: ModelView, recipe: Recipe, prompt_length: int | None, trace: bool = False
) -> Session:
    """Return a session for one batch on this model."""
    return Session(recipe, view.layer_infos(), prompt_length, trace)
