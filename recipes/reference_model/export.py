"""Write a trained model as a Transformers folder: `export.py --run DIR [DIR ...] [--to FOLDER]`.

Of several runs, the later refined from the earlier, the mean of their weights is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from model import Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from train import CHECKPOINT
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvsieve.reference.loader import MAX_TOKENS, folder
from kvsieve.reference.vocabulary import IDS


def to_transformers(
    shape: Shape, weights: dict[str, torch.Tensor]
) -> Qwen3ForCausalLM | LlamaForCausalLM:
    """Return the same model in Transformers' form, in fp32."""
    form = (Qwen3Config, Qwen3ForCausalLM)
    if not shape.query_key_norm:
        form = (LlamaConfig, LlamaForCausalLM)
    ends = {
        "bos_token_id": IDS["<bos>"],
        "eos_token_id": IDS["<eos>"],
        "pad_token_id": IDS["<pad>"],
    }
    config = form[0](
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        **ends,
    )
    model = form[1](config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one id a word, words apart by white space, no marks added."""
    words = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def mean(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each weight over several runs of one shape."""
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--run", type=Path, nargs="+", required=True, help="folders given to train.py as --out"
    )
    parser.add_argument("--to", type=Path, default=folder(), help="default: the package's model")
    options = parser.parse_args(arguments)
    runs = [
        torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True) for run in options.run
    ]
    model = to_transformers(Shape(**runs[0]["shape"]), mean([run["model"] for run in runs]))
    model.to(torch.bfloat16).save_pretrained(options.to)
    tokenizer().save_pretrained(options.to)
    # Safetensors files are written readable by their owner alone; a package is for everybody.
    (options.to / "model.safetensors").chmod(0o644)
    print(f"steps {', '.join(str(run['step']) for run in runs)} -> {options.to}")


if __name__ == "__main__":
    main()
