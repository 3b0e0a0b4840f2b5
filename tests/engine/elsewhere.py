"""Tensors that lie on another device as far as torch can see, on a machine that has none.

Their numbers are on the CPU; their device is "meta". Operations are refused as CUDA would refuse
them: where a CPU tensor of one dimension or more meets one that lies elsewhere, other than as an
index of it, or in a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default),
    _aten._index_put_impl_.default,
}


class There(torch.Tensor):
    """A tensor elsewhere; ``held`` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} outside of `elsewhere`")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, There) for x in given)
        if there and func not in _COPIES:
            _check(func, args, given)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        if func is _aten.copy_.default:
            there = isinstance(args[0], There)
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not there:
            return out
        known = {id(x.held): x for x in given if isinstance(x, There)}  # what works in place
        return tree_map(lambda x: _wrapped(x, known), out)


def _wrapped(x: Any, known: dict[int, There]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else There(x)


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        out = func(*args, **kwargs)
        return out if device is None else out.to(device)  # else its numbers would be lost


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def _check(func: Any, args: Any, given: list[Tensor]) -> None:
    indices = args[1] if func in _INDEXED and isinstance(args[0], There) else ()
    free = {id(x) for x in tree_leaves(indices)}
    for x in given:
        if not isinstance(x, There) and x.dim() > 0 and id(x) not in free:
            raise RuntimeError(f"{func}: a CPU tensor {list(x.shape)} meets one that is elsewhere")


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Give a device that is not the CPU; tensors go there by ``to``, and come back by ``cpu``."""
    with _Function(), _Dispatch():
        yield DEVICE
