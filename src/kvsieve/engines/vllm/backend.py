# pyright: reportMissingImports=false
"""Worker side, for any attention backend of vLLM: three mix-ins over its own three classes.

    class Backend(SieveBackend, TheirBackend)      puts the schedule into the cache spec
    class Builder(SieveBuilder, TheirBuilder)      shows attention the columns that are left
    class Impl(SieveImpl, TheirImpl)               remembers queries and compacts after attention

Without settings they do what the originals do. ``attach`` connects builder and layers once the
runner has made its cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from kvsieve.engines.vllm.beside import Places, Writes
from kvsieve.engines.vllm.effective import Effective, effective
from kvsieve.engines.vllm.layer import LayerSieve, Work
from kvsieve.engines.vllm.layouts import Tiles
from kvsieve.engines.vllm.metrics import TALLY
from kvsieve.engines.vllm.model import check_signals, layer_info
from kvsieve.engines.vllm.plan import Plan, Row, plan
from kvsieve.engines.vllm.refusals import check_config, check_layer
from kvsieve.engines.vllm.settings import Settings
from kvsieve.engines.vllm.spec import SieveSpec
from kvsieve.errors import EngineError
from kvsieve.step import LayerInfo

logger = init_logger("vllm.kvsieve")


class _Current:
    """The settings of the model that was built last in this process, and its chunk size."""

    settings: ClassVar[Settings | None] = None
    chunk: ClassVar[int] = 0


def read_settings(config: Any) -> Settings | None:
    """Read and check a vLLM configuration; None: nothing is to be compressed.

    Raises:
        RecipeError: the recipe can't be honoured.
        EngineError: something is on that compaction can't take part in.
    """
    settings = Settings.read(config.additional_config)
    if settings is not None:
        check_config(config)
    return settings


class SieveBackend:
    """Mix-in: a layer's cache spec carries the schedule."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Extend the spec; see ``SieveSpec``."""
        spec = super().customize_spec(spec)  # type: ignore[misc]
        settings = _Current.settings
        if settings is None:
            return spec
        columns = effective(settings.recipe, spec.block_size, settings.policy).columns
        return SieveSpec.of(spec, columns, _Current.chunk)


class SieveImpl:
    """Mix-in: what follows a layer's attention."""

    tiles: Tiles
    sieve_class: ClassVar[type[LayerSieve]] = LayerSieve

    def __init__(self, *args: Any, **facts: Any) -> None:
        config = get_current_vllm_config()
        _Current.settings = read_settings(config)
        _Current.chunk = config.scheduler_config.max_num_batched_tokens
        super().__init__(*args, **facts)  # type: ignore[call-arg]
        self.sieve: LayerSieve | None = None
        if _Current.settings is not None:
            check_layer(vars(self))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **facts: Any,
    ) -> Tensor:
        """Attend, then do the forward's work on this layer."""
        out = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **facts
        )
        work = getattr(attn_metadata, "kvsieve", None)
        if work is not None:
            assert self.sieve is not None, "attached before anything runs"
            self.sieve.after_attention(query, kv_cache, work)
        return out


class SieveBuilder:
    """Mix-in: attention sees what is left of each request."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: Any,
        **facts: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **facts)  # type: ignore[call-arg]
        self.spec = kv_cache_spec if isinstance(kv_cache_spec, SieveSpec) else None
        self.names = layer_names
        self.requests: Any = None
        self.places = Places()
        self.known: set[str] = set()
        self.window = 0
        self.poison = False
        self.layers: list[Any] = []
        if self.spec is not None and self.spec.schedule.block != self.spec.block_size:
            raise EngineError(
                f"The attention backend splits blocks of {self.spec.schedule.block} slots into "
                f"{self.spec.block_size}; kvsieve needs them whole. Use --block-size "
                f"{self.spec.block_size}."
            )

    def attach(self, requests: Any, model: Any, config: Any) -> None:
        """Connect to the runner's ``requests`` and to the layers, once the cache is made.

        Raises:
            UnsupportedSignal: the model can't show what the scorer needs.
        """
        settings = read_settings(config)
        if self.spec is None or settings is None:
            return
        made = effective(settings.recipe, self.spec.block_size, settings.policy)
        assert made.recipe.scorer is not None, "only recipes that compress come here"
        self.requests, self.window = requests, made.recipe.scorer.window
        self.poison = settings.poison
        rank = get_tensor_model_parallel_rank()
        TALLY.first = rank == 0
        context = config.compilation_config.static_forward_context
        self.layers = [context[name] for name in self.names]
        for ordinal, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            info = layer_info(model, name, ordinal, layer.impl, rank)
            check_signals(made.recipe, info, model)
            layer.impl.sieve = _layer_sieve(layer, info, made, settings.poison)
        logger.info("kvsieve: %s", made)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """Build the backend's metadata for what is left, and the work that follows."""
        cam = common_attn_metadata
        if self.spec is None:
            return super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        if self.requests is None:
            raise EngineError("kvsieve was not attached: this vLLM made its cache another way.")
        made = plan(self.spec.schedule, self._rows(cam))
        if self.poison:
            self._clean(made, cam.block_table_tensor)
        work = Work(plan=made, table=cam.block_table_tensor, gone=self._gone(made))
        if self.window:
            device = cam.block_table_tensor.device
            work.writes = Writes.of(made, self.places, self.window, device)
            work.place, work.places = dict(self.places.of), self.places.size
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, self.narrowed(cam, made), fast_build
        )
        metadata.kvsieve = work
        return metadata

    def narrowed(self, cam: Any, made: Plan) -> Any:
        """Return the common metadata of what is left of each request."""
        return narrowed(cam, made)

    def _rows(self, cam: Any) -> list[Row]:
        ends = cam.seq_lens_cpu_upper_bound.tolist()
        starts = cam.query_start_loc_cpu.tolist()
        rows = []
        for index in range(cam.num_reqs):
            tokens = starts[index + 1] - starts[index]
            request = self.requests.row(index)
            if tokens <= 0 or request is None:
                continue  # padding, or a dummy run
            key, prompt = request
            rows.append(
                Row(
                    index=index,
                    key=key,
                    n0=ends[index] - tokens,
                    n1=ends[index],
                    prompt=prompt,
                    start=starts[index],
                )
            )
        return rows

    def _clean(self, made: Plan, table: Tensor) -> None:
        """Take the poison out of blocks that are begun now.

        Kernels multiply what lies behind a request's last slot by weights of zero.
        """
        size = made.columns.block
        blocks = [
            int(table[row.index, column])
            for row in made.rows
            for column in range(-(-row.n0 // size), -(-row.n1 // size))
        ]
        for layer in self.layers if blocks else []:
            layer.kv_cache[torch.tensor(blocks)] = 0

    def _gone(self, made: Plan) -> list[str]:
        """Return the requests whose state ends: finished ones, and those that start (again)."""
        gone = self.requests.ended(self.known)
        for key in gone:
            self.places.drop(key)
        self.known -= set(gone)
        gone += [row.key for row in made.rows if row.n0 == 0]
        self.known |= {row.key for row in made.rows}
        return gone


def _layer_sieve(layer: Any, info: LayerInfo, made: Effective, poison: bool) -> LayerSieve:
    impl = layer.impl
    heads = impl.num_kv_heads
    sinks = getattr(impl, "sinks", None)
    return impl.sieve_class(
        made.recipe,
        info,
        impl.make_tiles(layer),
        TALLY,
        heads=heads,
        scale=impl.scale,
        sinks=None if sinks is None else sinks.float().view(heads, -1),
        softcap=getattr(impl, "logits_soft_cap", None) or None,
        poison=poison,
    )


def narrowed(cam: Any, made: Plan) -> Any:
    """Return vLLM's common metadata with tables and lengths of what is left of each request."""
    if all(columns is None for columns in made.seen):
        return cam
    table, lengths = cam.block_table_tensor.clone(), cam.seq_lens.clone()
    on_cpu = cam.seq_lens_cpu_upper_bound.clone()
    for row, columns, held in zip(made.rows, made.seen, made.lengths, strict=True):
        if columns is None:
            continue
        index = torch.tensor(columns, dtype=torch.int64, device=table.device)
        table[row.index, : len(columns)] = cam.block_table_tensor[row.index, index]
        lengths[row.index] = held
        on_cpu[row.index] = held
    return cam.replace(
        block_table_tensor=table,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=on_cpu,
        max_seq_len=int(on_cpu.max()),
        _num_computed_tokens_cache=None,
    )
