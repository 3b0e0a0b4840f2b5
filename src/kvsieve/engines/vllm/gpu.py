# pyright: reportMissingImports=false
"""vLLM's FlashAttention and Triton backends with the mix-ins. Not yet run on a GPU.

Everything here is tested on CPU tensors: the kernel in Triton's interpreter, Triton attention
likewise, metadata with made-up tensors. ``attach`` therefore warns, and tries the layout of the
first layer out before anything is served: what the backend's own function writes must be read back,
and moved, exactly.

Compaction follows each layer's attention inside ``forward``, decided on CPU values of which a
captured graph knows nothing. So it runs outside of CUDA graphs: attention is announced as not
capturable, which makes vLLM capture what lies between attention layers only (PIECEWISE).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from kvsieve.engines.vllm.backend import SieveBackend, SieveBuilder, SieveImpl, _Current
from kvsieve.engines.vllm.gather import Mover, TorchMover, TritonMover
from kvsieve.engines.vllm.layer import LayerSieve
from kvsieve.engines.vllm.layouts import Strided
from kvsieve.engines.vllm.moving import MovingSieve
from kvsieve.engines.vllm.plan import Plan, Row
from kvsieve.engines.vllm.refusals import PIECEWISE
from kvsieve.engines.vllm.spec import SieveSpec
from kvsieve.errors import EngineError

logger = init_logger("vllm.kvsieve")

UNTRIED = (
    "kvsieve: its GPU backends have not yet been run on a GPU. They were tested in Triton's "
    "interpreter and with made-up metadata on CPUs. Compare answers with those of the full cache "
    "before you rely on them, and please report what you find."
)


class GPUImpl(SieveImpl):
    """GPU attention, then compaction of all requests that are due by one launch each way."""

    sieve_class: ClassVar[type[LayerSieve]] = MovingSieve

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        # Blocks are freed once a step has been processed; until then those in flight hold theirs.
        _Current.chunk = get_current_vllm_config().max_in_flight_tokens

    def make_tiles(self, layer: Any) -> Strided:
        """Return the layout of this layer's blocks."""
        made = Strided(self.head_size, mover(layer.kv_cache.device))  # type: ignore[attr-defined]
        made.check(layer.kv_cache)
        return made


def mover(device: torch.device) -> Mover:
    """Return what copies rows there: Triton's kernel, or torch on CPUs."""
    return TorchMover() if device.type == "cpu" else TritonMover()


class GPUBuilder(SieveBuilder):
    """GPU metadata of what is left of each request."""

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        if self.spec is not None:
            # It would put the whole block table in place of the narrowed one.
            self.supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Never, under a recipe; else what the backend says."""
        if isinstance(kv_cache_spec, SieveSpec):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Refuse to be captured: asked for full graphs only."""
        if self.spec is not None:
            raise EngineError(f"kvsieve can't run in full CUDA graphs. {PIECEWISE}")
        return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]

    def attach(self, requests: Any, model: Any, config: Any) -> None:
        """See ``SieveBuilder``; then try out that the layout is what it is taken for.

        Raises:
            EngineError: what the backend writes is not what is read, or full graphs are still on.
        """
        super().attach(requests, model, config)
        if not self.layers:
            return
        if config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            raise EngineError(f"kvsieve can't run in full CUDA graphs. {PIECEWISE}")
        if self.device.type != "cpu":  # type: ignore[attr-defined]
            logger.warning(UNTRIED)
        try_out(self.layers[0])

    def _rows(self, cam: Any) -> list[Row]:
        self.requests.follow(cam)
        return super()._rows(cam)

    def narrowed(self, cam: Any, made: Plan) -> Any:
        """Return the common metadata of what is left of each request, worked out on the device."""
        return narrowed(cam, made)


def narrowed(cam: Any, made: Plan) -> Any:
    """Do what ``backend.narrowed`` does by one copy to the device, and none from it.

    A request whose C leading columns were compacted into B has lost C - B: that number of each row
    is all that the device needs. Table entries behind a request's own are meaningless, before and
    after.
    """
    lost = [0] * cam.block_table_tensor.shape[0]
    for row, columns in zip(made.rows, made.seen, strict=True):
        if columns is not None:
            lost[row.index] = made.columns.dropped(row.n0, row.prompt) - made.columns.kept
    if not any(lost):
        return cam
    table = cam.block_table_tensor
    on_cpu = torch.tensor(lost, dtype=torch.int32, pin_memory=table.is_cuda)
    there = on_cpu.to(table.device, non_blocking=True)
    column = torch.arange(table.shape[1], device=table.device)
    behind = (column >= made.columns.kept) * there[:, None]
    source = (column + behind).clamp_max(table.shape[1] - 1)
    b, known = made.columns.block, cam.seq_lens_cpu_upper_bound
    left = known - b * on_cpu[: known.shape[0]]
    return cam.replace(
        block_table_tensor=table.gather(1, source),
        seq_lens=cam.seq_lens - b * there[: cam.seq_lens.shape[0]],
        seq_lens_cpu_upper_bound=left,
        max_seq_len=int(left.max()),
        _num_computed_tokens_cache=None,
    )


@torch.no_grad()
def try_out(layer: Any) -> None:
    """Write two blocks by the backend's own function, then read and move them; leave zeros.

    Called while nothing is served.

    Raises:
        EngineError: not what was written.
    """
    impl, cache = layer.impl, layer.kv_cache
    tiles, size = impl.sieve.tiles, min(2, cache.shape[0])
    b, H, D = cache.shape[2], impl.num_kv_heads, impl.head_size
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, size * b, H, D, generator=generator).to(cache.device, cache.dtype)
    blocks = torch.arange(size, device=cache.device).flip(0)  # not in the order they lie in
    slots = (blocks[:, None] * b + torch.arange(b, device=cache.device)).flatten()
    impl.do_kv_cache_update(layer, both[0], both[1], cache, slots)
    wanted = both.transpose(1, 2)[:, None]  # [2, 1, H, size * b, D]
    _same(tiles.read(cache, blocks), wanted)
    odd = torch.arange(1, size * b, 2, device=cache.device)
    tiles.compact(cache, blocks[None], odd.expand(1, H, -1))
    moved = torch.cat([wanted[:, :, :, 1::2], wanted[:, :, :, len(odd) :]], 3)
    _same(tiles.read(cache, blocks), moved)
    cache[blocks] = 0


def _same(found: tuple[Tensor, Tensor], wanted: Tensor) -> None:
    if not (torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])):
        raise EngineError(
            "This backend's blocks don't hold keys and values as kvsieve reads them; they can't be "
            "compacted. Try the other one of --attention-backend FLASH_ATTN and TRITON_ATTN, and "
            "please report this, with versions and GPU."
        )


class FlashImpl(GPUImpl, FlashAttentionImpl):
    """FlashAttention, then compaction."""


class FlashBuilder(GPUBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata; FA3's schedule is made from the narrowed lengths."""


class FlashBackend(SieveBackend, FlashAttentionBackend):
    """vLLM's FlashAttention under a recipe, or exactly itself without one."""

    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        return FlashBuilder


class TritonImpl(GPUImpl, TritonAttentionImpl):
    """Triton attention, then compaction."""


class TritonBuilder(GPUBuilder, TritonAttentionMetadataBuilder):
    """Triton attention's metadata."""


class TritonBackend(SieveBackend, TritonAttentionBackend):
    """vLLM's Triton attention under a recipe, or exactly itself without one."""

    @staticmethod
    def get_impl_cls() -> type[TritonImpl]:
        return TritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonBuilder]:
        return TritonBuilder
