"""A lean Qwen3 or Llama for training, with the parameter names of Transformers' classes.

Pre-norm blocks, grouped-query attention, rotary positions, SwiGLU, embedding shared with the
output; queries and keys are normalised in the Qwen3 form and not in the Llama form. Training needs
the hidden states only (logits are computed where the loss is), and no cache, so it compiles to less
than the originals do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the fields are named as in Qwen3Config and LlamaConfig."""

    vocab_size: int = 576
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 8192
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-6
    query_key_norm: bool = True


FORMS = {
    "qwen3": Shape(),
    "qwen3-fast-rope": Shape(rope_theta=1e4),
    "llama": Shape(query_key_norm=False, rope_theta=1e4),
}
"""The shipped model's form, and others that differ in what compression looks at: rotations ten
times as fast at the slow end, and keys as projected. The last hasn't learned to look up so far."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rotary_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [max_position_embeddings, head_dim], fp32."""
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    positions = torch.arange(shape.max_position_embeddings).float()
    angles = torch.outer(positions, 1.0 / shape.rope_theta**exponents)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, length, head_dim] to its positions; the result is fp32."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_size = shape.num_attention_heads * shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)
        if shape.query_key_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        split = (rows, length, -1, self.shape.head_dim)
        query, key = self.q_proj(x).view(split), self.k_proj(x).view(split)
        value = self.v_proj(x).view(split).transpose(1, 2)  # [rows, kv_heads, length, head_dim]
        if self.shape.query_key_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query.transpose(1, 2), cos, sin).to(value.dtype)
        key = rotate(key.transpose(1, 2), cos, sin).to(value.dtype)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each with a norm before and a residual around."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Token ids [rows, length] to hidden states [rows, length, hidden_size]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.layers:
            x = block(x, cos, sin)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The trunk and its tied output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(weight, std=0.5)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
                if "o_proj" in name or "down_proj" in name:
                    weight.mul_(0.3)
        # With tied embeddings of this size a final norm of 1 would make the model predict the
        # current token with a logit of about 14: the loss would start above that of guessing.
        self.model.norm.weight.fill_(0.2 / math.sqrt(self.shape.hidden_size))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden_size] to logits [..., vocab_size]."""
        return F.linear(hidden, self.model.embed_tokens.weight)
