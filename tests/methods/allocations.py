"""How much memory a piece of work has in use at its worst, counted over every operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block: ``held`` now, ``peak`` at most.

    ``given``: tensors that were there before, whose views are nothing new.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def held(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak = max(self.peak, self.held)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._given:
            return
        self._users[storage._cdata] += 1
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(tensor, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key], self._sizes[key]
