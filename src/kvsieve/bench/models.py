"""The models that speed is measured on: Qwen3 from a config, random weights, nothing downloaded."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3 by its sizes; ``config()`` are the arguments of Transformers' Qwen3Config."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    def config(self) -> dict[str, Any]:
        """Return the arguments of Qwen3Config."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "max_position_embeddings": 1 << 17,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def slot_bytes(self, dtype: str) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * getattr(torch, dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes."""
        return asdict(self)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3-98m", layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64,
              mlp=3072, vocab=1024),
        Shape(name="qwen3-tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16,
              mlp=128, vocab=256),
    )
}  # fmt: skip


def build(shape: Shape, dtype: str, device: str) -> nn.Module:
    """Return the model in evaluation mode, its weights drawn from ``SEED``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape.config()))
    return model.to(torch.device(device), getattr(torch, dtype)).eval()


def sharing(model: nn.Module) -> nn.Module:
    """Return a second model on the same weights, so that attaching to it leaves the first alone."""
    kept = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def weight_facts(model: nn.Module) -> dict[str, int]:
    """Return how many parameters there are, and their bytes."""
    weights = list(model.parameters())
    return {
        "parameters": sum(x.numel() for x in weights),
        "parameter_bytes": sum(x.numel() * x.element_size() for x in weights),
    }


def prompt(shape: Shape, context: int, batch: int) -> Tensor:
    """Return random tokens ``[batch, context]``, the same for every engine."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, shape.vocab, (batch, context), generator=generator)
