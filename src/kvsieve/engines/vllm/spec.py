# pyright: reportMissingImports=false
"""Scheduler side: a KV cache spec that carries the schedule, and its manager, which frees blocks.

The spec travels from the workers to the engine core (pickled: unpickling imports this module,
which registers it). Nothing else of kvsieve runs there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvsieve.columns import Columns
from kvsieve.engines.vllm.metrics import TALLY
from kvsieve.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class SieveSpec(FullAttentionSpec):
    """Full attention whose requests give blocks back by ``columns``.

    ``chunk``: tokens in one forward, at most.
    """

    columns: Columns | None = None
    chunk: int = 0

    @classmethod
    def of(cls, spec: Any, columns: Columns, chunk: int) -> SieveSpec:
        """Extend vLLM's own spec of a layer.

        Raises:
            EngineError: a kind of attention that can't be compressed.
        """
        windowed = getattr(spec, "sliding_window", None) or getattr(
            spec, "attention_chunk_size", None
        )
        if type(spec) is not FullAttentionSpec or windowed or spec.non_causal:
            raise EngineError(
                f"kvsieve compresses causal full attention; this model has a layer of kind "
                f"{type(spec).__name__}{' with a window' if windowed else ''}. Sliding-window, "
                "chunked-local, hybrid and prefix-bidirectional models can't be compressed in vLLM."
            )
        plain = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**plain, columns=columns, chunk=chunk)

    @property
    def schedule(self) -> Columns:
        assert self.columns is not None, "made by `of`"
        return self.columns

    @property
    def prefix_cacheable(self) -> bool:
        """Never: what a block holds after a compaction depends on later queries."""
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of a request at its peak: what start-up must find room for."""
        blocks = self.schedule.peak(vllm_config.model_config.max_model_len, self.chunk)
        return blocks * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """All layers have one spec."""
        assert all(spec == specs[0] for spec in specs), "kvsieve: layers of one model differ"
        return specs[0]


class SieveManager(FullAttentionManager):
    """Frees the columns that the workers have compacted away."""

    def __init__(self, kv_cache_spec: SieveSpec, **facts: Any) -> None:
        if facts.get("enable_caching"):
            raise EngineError(
                "kvsieve needs prefix caching off: compacted blocks must never be shared. Start "
                "with --no-enable-prefix-caching."
            )
        super().__init__(kv_cache_spec, **facts)
        self.columns = kv_cache_spec.schedule
        self.chunk = kv_cache_spec.chunk
        if self.columns.policy == "chunk":
            # Whatever its length, a request never holds more.
            self.max_admission_blocks_per_request = self.columns.peak(1 << 40, self.chunk)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what was compacted when that many tokens were cached; they have been processed."""
        if num_prompt_tokens is None:
            raise EngineError("This vLLM doesn't tell managers the prompt's length.")
        dropped = self.columns.dropped(processed_computed_tokens, num_prompt_tokens)
        if not dropped:
            return
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, self.columns.kept, dropped)
        freed = self.block_pool.get_num_free_blocks() - before
        if freed:
            TALLY.freed(freed)

    def allocate_new_blocks(self, *args: Any, **facts: Any) -> Any:
        """Count what a request takes."""
        taken = super().allocate_new_blocks(*args, **facts)
        TALLY.taken(len(taken))
        return taken

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Count what a request gives back when it ends or is preempted."""
        blocks = super().pop_blocks_for_free(request_id)
        TALLY.taken(-sum(not block.is_null for block in blocks))
        return blocks


def register() -> None:
    """Make the spec known to vLLM; may be called more than once."""
    # A non-empty table would keep vLLM from registering its own specs.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SieveSpec, SieveManager, uniform_type_base_spec=FullAttentionSpec)


register()
