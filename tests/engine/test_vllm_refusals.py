"""What of vLLM a compressed cache can't take part in: found in its configuration, said by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvsieve.engines.vllm.compat import check_version
from kvsieve.engines.vllm.refusals import check_config, check_layer
from kvsieve.errors import EngineError


def config(**changes: Any) -> Any:
    """A vLLM configuration with nothing special; changes are dotted names with ``__`` for dots."""
    whole = SimpleNamespace(
        cache_config=SimpleNamespace(
            enable_prefix_caching=False, cache_dtype="auto", kv_offloading_size=None
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            enable_dbo=False,
        ),
        model_config=SimpleNamespace(
            use_mla=False,
            is_hybrid=False,
            is_encoder_decoder=False,
            runner_type="generate",
            get_total_num_kv_heads=lambda: 4,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name="FULL_AND_PIECEWISE")
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        part, _, name = path.rpartition("__")
        setattr(getattr(whole, part) if part else whole, name, value)
    return whole


def test_nothing_special_is_fine() -> None:
    check_config(config())
    check_config(config(cache_config__cache_dtype="bfloat16"))
    check_config(config(parallel_config__tensor_parallel_size=4))
    check_layer({"sliding_window": -1, "alibi_slopes": None, "attn_type": "decoder"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cache_config__enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__tensor_parallel_size": 8}, "4 KV heads over 8 workers"),
        ({"parallel_config__tensor_parallel_size": 3}, "4 KV heads over 3 workers"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline or data parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "pipeline or data parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__is_hybrid": True}, "hybrid models"),
        ({"model_config__is_encoder_decoder": True}, "cross-attention"),
        ({"model_config__runner_type": "pooling"}, "nothing to generate"),
        (
            {"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL_DECODE_ONLY")},
            "full CUDA graphs.*PIECEWISE",
        ),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "quantized KV cache"),
        ({"cache_config__cache_dtype": "int8_per_token_head"}, "quantized KV cache"),
        ({"cache_config__kv_offloading_size": 4.0}, "KV offloading"),
    ],
)
def test_refused_by_configuration(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        check_config(config(**changes))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"sliding_window": 128}, "sliding-window layers .here: 128 tokens"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share another layer"),
        ({"attn_type": "encoder_decoder"}, "'encoder_decoder' attention"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "'encoder_only' attention"),
    ],
)
def test_refused_by_layer(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        check_layer(facts)


@pytest.mark.parametrize("found", ["0.31.0", "0.32.0", "0.32.1+cpu", "0.32.0rc1"])
def test_versions_that_are_known(found: str) -> None:
    check_version(found)


@pytest.mark.parametrize("found", ["0.30.2", "0.33.0", "1.0.0", "0.20.2+cu129", "dev"])
def test_versions_that_are_not(found: str) -> None:
    with pytest.raises(EngineError, match=r"0\.31 to 0\.32"):
        check_version(found)
