"""Loading the shipped model, and checking what is said to it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.errors import ReferenceModelError, choices
from kvsieve.reference.vocabulary import IDS, KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TOKENS = 4096
"""Tokens of prompt and answer together that the model is meant for (see ``ADVERTISED``)."""

_SHOWN = 8


def folder() -> Path:
    """Return the folder of the shipped model: a Transformers checkpoint."""
    return Path(str(resources.files("kvsieve.reference") / "model"))


def load(dtype: Any = "float32", device: str = "cpu", at: Path | None = None) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, ready for inference; needs no network.

    Args:
        dtype: "float32", "bfloat16" or a torch dtype; the weights are stored in bfloat16.
        device: where the model goes.
        at: another checkpoint in the same language (``recipes/reference_model``); else the
            shipped one.

    Raises:
        ReferenceModelError: an unknown dtype, or a folder without such a checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known and dtype not in known.values():
        raise ReferenceModelError(f"Unknown dtype {dtype!r}. {choices(str(dtype), known)}")
    at = at or folder()
    check_checkpoint(at)
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(at, dtype=known.get(dtype, dtype))
        tokenizer = AutoTokenizer.from_pretrained(at)
    return model.eval().to(device), tokenizer


def check_checkpoint(at: Path) -> None:
    """Check that a folder holds a checkpoint that speaks the reference model's language.

    Raises:
        ReferenceModelError: files are missing, or the vocabulary is another.
    """
    advice = "recipes/reference_model/train.py and export.py --to FOLDER make one."
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (at / name).is_file():
            raise ReferenceModelError(f"{str(at)!r} has no {name}: {advice}")
    spoken = json.loads((at / "tokenizer.json").read_text()).get("model", {}).get("vocab")
    if spoken != IDS:
        raise ReferenceModelError(
            f"The model at {str(at)!r} doesn't speak the reference model's language: {advice}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Transformers' loading bars, and leave them as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_prompt(text: str) -> None:
    """Check that the model can make something of a prompt.

    Raises:
        ReferenceModelError: an empty prompt, words that it has never seen, or too many words.
    """
    words = text.split()
    if not words:
        raise ReferenceModelError(
            "The prompt is empty. `kvsieve sample reasoning` prints one that the model understands."
        )
    unknown = list(dict.fromkeys(word for word in words if word not in KNOWN))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise ReferenceModelError(
            f"The reference model has never seen {', '.join(map(repr, unknown[:_SHOWN]))}{more}. "
            "It speaks a made-up language of 576 words: `kvsieve sample KIND` prints a prompt in "
            "it. For ordinary text, name a model of yours with --model."
        )
    if len(words) > MAX_TOKENS:
        raise ReferenceModelError(
            f"The prompt has {len(words)} tokens; the reference model takes up to {MAX_TOKENS}."
        )
