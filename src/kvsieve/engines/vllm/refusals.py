"""What vLLM can do that a compressed cache can't take part in: refused at start-up, by name."""

from __future__ import annotations

from typing import Any

from kvsieve.errors import EngineError

PIECEWISE = (
    "Attention, and the compaction that follows it, runs between graphs: leave cudagraph_mode out, "
    """or set --compilation-config '{"cudagraph_mode": "PIECEWISE"}'."""
)
"""What to set."""


def check_config(config: Any) -> None:
    """Refuse a vLLM configuration under which compaction would be wrong.

    Raises:
        EngineError: says what is on, and how to turn it off.
    """
    for found, why in _findings(config):
        if found:
            raise EngineError(f"kvsieve can't run with {why}")


def _findings(config: Any) -> list[tuple[bool, str]]:
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    dtype, workers = cache.cache_dtype, parallel.tensor_parallel_size
    return [
        (
            bool(cache.enable_prefix_caching),
            "prefix caching: a compacted block holds one request's choice of tokens and must not "
            "be shared. Start with --no-enable-prefix-caching (enable_prefix_caching=False).",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding: rejected tokens would have to be taken back out of a compacted "
            "cache. Leave --speculative-config out.",
        ),
        (
            config.kv_transfer_config is not None,
            "a KV connector (disaggregated prefill, offloading): it takes block i for tokens "
            "i b .. i b + b - 1, which compaction changes. Leave --kv-transfer-config out.",
        ),
        (
            _size(parallel, "decode_context_parallel_size") > 1
            or _size(parallel, "prefill_context_parallel_size") > 1,
            "context parallelism: a block's slots would lie on several workers.",
        ),
        (
            workers > 1 and bool(model.get_total_num_kv_heads() % workers),
            f"{model.get_total_num_kv_heads()} KV heads over {workers} workers: a head would be on "
            "several of them, each with some of its queries, and they would keep different slots. "
            "Use a --tensor-parallel-size that divides the KV heads.",
        ),
        (
            parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1,
            "pipeline or data parallelism: not checked. Use tensor parallelism "
            "(--tensor-parallel-size), or several servers.",
        ),
        (
            bool(getattr(parallel, "enable_dbo", False)),
            "dual batch overlap: its micro-batches are built apart. Leave --enable-dbo out.",
        ),
        (
            # The usual FULL_AND_PIECEWISE becomes PIECEWISE by itself (see `gpu`).
            getattr(config.compilation_config.cudagraph_mode, "name", "")
            in ("FULL", "FULL_DECODE_ONLY"),
            f"full CUDA graphs. {PIECEWISE}",
        ),
        (
            bool(model.use_mla),
            "latent attention (MLA): slots are latents shared by all heads. Use a model with "
            "plain or grouped-query attention.",
        ),
        (
            bool(model.is_hybrid),
            "hybrid models (Mamba or linear attention beside full attention).",
        ),
        (
            bool(model.is_encoder_decoder),
            "encoder-decoders: cross-attention reads the encoder's tokens by their place.",
        ),
        (
            model.runner_type != "generate",
            f"the {model.runner_type!r} runner: there is nothing to generate.",
        ),
        (
            (dtype != "auto" and "fp8" in dtype) or dtype.startswith("int"),
            f"a quantized KV cache ({dtype}): not checked. Leave --kv-cache-dtype out.",
        ),
        (
            bool(getattr(cache, "kv_offloading_size", None)),
            "KV offloading: it takes block i for tokens i b .. i b + b - 1. Leave it out.",
        ),
    ]


def _size(parallel: Any, name: str) -> int:
    return getattr(parallel, name, 1) or 1


def check_layer(facts: dict[str, Any]) -> None:
    """Refuse an attention layer by what its implementation is made with.

    Raises:
        EngineError: windows, ALiBi, shared caches, cross-attention.
    """
    window = facts.get("sliding_window")
    if isinstance(window, tuple):  # GPU backends count the tokens before, and behind, a query's own
        window = max(window) + 1
    if window is not None and window > 0:
        raise EngineError(
            f"kvsieve can't run with sliding-window layers (here: {window} tokens): a window is a "
            "distance in the cache, which compaction changes. Use a model with full attention."
        )
    if facts.get("alibi_slopes") is not None:
        raise EngineError(
            "kvsieve can't run with ALiBi: it reads distances off places in the cache."
        )
    if facts.get("kv_sharing_target_layer_name") is not None:
        raise EngineError("kvsieve can't run with layers that share another layer's KV cache.")
    kind = getattr(facts.get("attn_type"), "value", facts.get("attn_type", "decoder"))
    if kind != "decoder":
        raise EngineError(
            f"kvsieve can't run with {kind!r} attention: only causal self-attention is compressed."
        )
