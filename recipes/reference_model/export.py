"""Write a trained checkpoint as a Transformers folder: `export.py --run DIR [--to FOLDER]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from model import Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from train import CHECKPOINT
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvsieve.reference.loader import MAX_TOKENS, folder
from kvsieve.reference.vocabulary import IDS


def to_transformers(shape: Shape, weights: dict[str, torch.Tensor]) -> Qwen3ForCausalLM:
    """Return the same model as a Qwen3ForCausalLM in fp32."""
    ends = {
        "bos_token_id": IDS["<bos>"],
        "eos_token_id": IDS["<eos>"],
        "pad_token_id": IDS["<pad>"],
    }
    config = Qwen3Config(
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
    model = Qwen3ForCausalLM(config)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder given to train.py as --out")
    parser.add_argument("--to", type=Path, default=folder(), help="default: the package's model")
    options = parser.parse_args(arguments)
    state = torch.load(options.run / CHECKPOINT, map_location="cpu", weights_only=True)
    model = to_transformers(Shape(**state["shape"]), state["model"])
    model.to(torch.bfloat16).save_pretrained(options.to)
    tokenizer().save_pretrained(options.to)
    print(f"step {state['step']} -> {options.to}")


if __name__ == "__main__":
    main()
