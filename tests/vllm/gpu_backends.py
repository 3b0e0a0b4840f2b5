"""The GPU backends inside vLLM's engine on this CPU, in place of its CPU backend.

Triton attention runs as it is, in Triton's interpreter: vLLM's kernels and kvsieve's. Of
FlashAttention the compiled functions are missing here; plain torch takes their place, by the
arguments that vLLM gives them. All else is the code that a GPU would run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import vllm.triton_utils
from torch import Tensor
from vllm.v1.attention import selector
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvsieve.engines.vllm import compat, gpu
from kvsieve.engines.vllm.gather import TritonMover

OPS = "vllm.v1.attention.ops.triton_"


class Flash(gpu.FlashBackend):
    """Under the name that CPUs ask for."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


class Triton(gpu.TritonBackend):
    """Under the name that CPUs ask for."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


@contextmanager
def instead(name: str) -> Iterator[None]:
    """Let vLLM on this CPU take the backend ``flash`` or ``triton``, layouts and all."""
    with pytest.MonkeyPatch.context() as patch:
        usual = compat.BACKENDS["cpu"]["CPU_ATTN"]
        path = f"{__name__}.{name.title()}"
        # The first engine of a process loads the plugin, which registers what it knows.
        patch.setitem(compat.BACKENDS["cpu"], "CPU_ATTN", path)
        register(path)
        try:
            (replace_flash if name == "flash" else interpret_triton)(patch)
            yield
        finally:
            register(usual)


def register(path: str) -> None:
    """Let CPUs take the backend at ``path`` from now on."""
    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    selector._cached_get_attn_backend.cache_clear()


def interpret_triton(patch: pytest.MonkeyPatch) -> None:
    """Import vLLM's Triton kernels anew, in the interpreter; kvsieve's move the rows."""
    import triton
    import triton.language as tl

    names = ("triton_unified_attention", "triton_reshape_and_cache_flash")
    with pytest.MonkeyPatch.context() as meanwhile:  # others are to go on without Triton
        meanwhile.setattr(vllm.triton_utils, "triton", triton)
        meanwhile.setattr(vllm.triton_utils, "tl", tl)
        for module in [name for name in sys.modules if name.startswith(OPS)]:
            meanwhile.delitem(sys.modules, module)
        fresh = [importlib.import_module(f"vllm.v1.attention.ops.{name}") for name in names]
        for module in [name for name in sys.modules if name.startswith(OPS)]:
            del sys.modules[module]
    patch.setattr(triton_attn, "unified_attention", fresh[0].unified_attention)
    writing = "triton_reshape_and_cache_flash"
    patch.setattr(triton_attn, writing, getattr(fresh[1], writing))
    patch.setattr(triton_attn, "MIN_LAUNCH_GRID_SIZE_2D", 2)  # the kernel of larger batches
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(gpu, "mover", lambda device: TritonMover())


def replace_flash(patch: pytest.MonkeyPatch) -> None:
    """Put plain torch in place of FlashAttention's compiled functions; FA3 plans ahead."""
    for name, function in (
        ("get_flash_attn_version", lambda **_: 3),
        ("flash_attn_varlen_func", attend),
        ("reshape_and_cache_flash", write),
        ("get_scheduler_metadata", schedule),
        ("flash_attn_supports_quant_query_input", lambda: False),
    ):
        patch.setattr(flash_attn, name, function, raising=False)


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
    """Do what ``reshape_and_cache_flash`` does: caches ``[blocks, b, H, D]``, -1 is padding."""
    real, b = slots >= 0, keys.shape[1]
    at, n = slots[real], len(slots)
    keys[at // b, at % b] = key[:n][real]
    values[at // b, at % b] = value[:n][real]


def schedule(**facts: Any) -> Tensor:
    """Return what FA3 would have to know again when it attends, in place of its own plan."""
    lengths = facts["cache_seqlens"]
    assert int(lengths.max()) <= facts["max_seqlen_k"]
    assert lengths.shape[0] == facts["batch_size"]
    return lengths.clone()


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    scheduler_metadata: Tensor,
    **_: Any,
) -> None:
    """Attend as ``flash_attn_varlen_func`` does, request by request."""
    assert causal and torch.equal(scheduler_metadata, seqused_k), "planned for other lengths"
    b, group = k.shape[1], q.shape[1] // k.shape[2]
    for row, n in enumerate(seqused_k.tolist()):
        start, stop = cu_seqlens_q[row : row + 2].tolist()
        T = stop - start
        assert n <= max_seqlen_k and T <= max_seqlen_q
        if T == 0:
            continue
        slots = torch.arange(n)
        blocks = block_table[row, slots // b].long()
        key, value = (x[blocks, slots % b].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("thd,shd->hts", q[start:stop], key) * softmax_scale
        late = torch.arange(n) > torch.arange(n - T, n)[:, None]
        weights = logits.masked_fill(late, -torch.inf).float().softmax(-1).to(value)
        out[start:stop] = torch.einsum("hts,shd->thd", weights, value)
