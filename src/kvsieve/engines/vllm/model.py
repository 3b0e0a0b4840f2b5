"""What a scorer may want to know about an attention layer of a vLLM model, found by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import UnsupportedSignal
from kvsieve.interfaces import Signal
from kvsieve.step import LayerInfo, Rotary
from kvsieve.store.rope import rotate


def layer_info(model: Any, name: str, ordinal: int, impl: Any, rank: int = 0) -> LayerInfo:
    """Describe the attention layer ``name``, such as "model.layers.3.self_attn.attn".

    ``impl``: its implementation, which knows heads and sizes of this worker's share; ``rank``: of
    this worker among those that share the layer's heads.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    return LayerInfo(
        ordinal=ordinal,
        heads=impl.num_kv_heads,
        first_head=rank * impl.num_kv_heads,
        output_projection=_projection(parent, impl),
        rotary=_rotary(parent, impl.head_size),
    )


def check_signals(recipe: Recipe, info: LayerInfo, model: Any) -> None:
    """Refuse a recipe whose scorer needs what this model can't show.

    Raises:
        UnsupportedSignal: says which signal, and why.
    """
    reasons: dict[Signal, str] = {}
    if info.rotary is None:
        reasons[Signal.PRE_ROPE] = "its rotary positions can't be undone"
    if info.output_projection is None:
        reasons[Signal.W_O] = "its attention has no o_proj beside it"
    for signal in sorted(recipe.needs & reasons.keys(), key=lambda s: s.value):
        raise UnsupportedSignal(
            f"Method {recipe.method!r} needs {signal.value}, which {type(model).__name__} can't "
            f"show in vLLM: {reasons[signal]}. `kvsieve methods` lists what each method needs."
        )


def _projection(parent: Any, impl: Any) -> Callable[[], Tensor] | None:
    module = getattr(parent, "o_proj", None)
    method = getattr(module, "quant_method", None)
    if module is None or method is None:
        return None
    heads, group, size = impl.num_kv_heads, impl.num_heads // impl.num_kv_heads, impl.head_size

    def projection() -> Tensor:
        # Weights may be packed or quantized: what the layer makes of unit vectors tells them all.
        # The method itself is called, without the sum over workers that the layer would add.
        device = next((x.device for x in module.parameters()), torch.device("cpu"))
        dtype = module.params_dtype
        unit = torch.eye(heads * group * size, dtype=dtype, device=device)
        with torch.no_grad():
            out = method.apply(module, unit, None)
        return out.reshape(heads, group, size, -1)  # [H, G, Dv, C]

    return projection


def _rotary(parent: Any, size: int) -> Rotary | None:
    """Return rotation tables that were tried on the model's own function; None: not undoable."""
    module = getattr(parent, "rotary_emb", None)
    table = getattr(module, "cos_sin_cache", None)
    if module is None or table is None or table.dim() != 2:
        return None

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        halves = _at(module.cos_sin_cache.float(), positions.long())
        cos, sin = halves.chunk(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    return tables if _agrees(module, tables, size) else None


def _at(table: Tensor, positions: Tensor) -> Tensor:
    """Look ``positions`` up in ``cos | sin`` rows; beyond its end, two rotations are joined."""
    last = table.shape[0] - 1
    found = table[positions.clamp_max(last)]
    beyond = positions - last
    if not bool((beyond > 0).any()):
        return found
    cos, sin = found.chunk(2, -1)
    more_cos, more_sin = table[beyond.clamp_min(0)].chunk(2, -1)
    length = table[0].chunk(2, -1)[0]  # the factor of scaled tables; 1 as a rule
    return torch.cat([cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin], -1) / (
        torch.cat([length, length], -1)
    )


def _agrees(module: Any, tables: Rotary, size: int) -> bool:
    """Whether turning by ``tables`` is what the model does, tried on three positions."""
    dtype, device = module.cos_sin_cache.dtype, module.cos_sin_cache.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, generator=generator).to(device, dtype)
    positions = torch.arange(3, 6, device=device)
    with torch.no_grad():
        theirs = module.forward_native(positions, x.clone(), x.clone())[0]
    cos, sin = tables(positions)
    if cos.shape[-1] > size:
        return False
    close = 1e-5 if dtype is torch.float32 else 5e-2
    return torch.allclose(theirs.float(), rotate(x.float(), cos, sin), atol=close)
