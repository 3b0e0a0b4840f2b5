"""Tiny models with random weights, sharp enough that dropping slots changes what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

VOCAB = 512
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# family -> (config class, changes to BASE); the model class is the config's, "...ForCausalLM".
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        EXPERTS
        | {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 16, "num_experts": 4}),
    "qwen3-next": (
        "Qwen3NextConfig",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0, 1, 2, 3],
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        EXPERTS
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
    ),
}

LATENT = ("deepseek-v3",)
"""Families that cache latents: one "head" of slots, no values to read."""


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a new model of ``family``; generation never stops early and needs no download."""
    import transformers

    config_name, own = FAMILIES[family]
    config = getattr(transformers, config_name)(**(BASE | own | changes))
    stem = config_name.replace("TextConfig", "").replace("Config", "")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
        _make_uneven(model)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def _make_uneven(model: Any) -> None:
    """Draw weights that start as constants, so that key norms and sinks differ."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            _fill(weight, 1 + 0.5 * torch.randn_like(weight))
        elif name.endswith("sinks"):
            _fill(weight, torch.randn_like(weight))


@torch.no_grad()
def _fill(weight: Parameter, new: Tensor) -> None:
    weight.copy_(new)


@cache
def tiny(family: str) -> Any:
    """Return the shared model of ``family``: never change it."""
    return build(family)


def prompt(length: int, seed: int = 0) -> Tensor:
    """Return token ids ``[1, length]``, none of them padding.

    They don't repeat (as far as the vocabulary reaches): equal tokens have equal keys in the first
    layer, and which of two equal scores wins would be left to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(VOCAB - 1, generator=generator) + 1
    return ids.repeat(length // len(ids) + 1)[None, :length]


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Stack rows ``[1, n]`` of unequal lengths: ids and mask, both ``[B, longest]``."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        n = row.shape[1]
        span = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[b, span], mask[b, span] = row[0], 1
    return ids, mask
