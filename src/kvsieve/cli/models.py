"""Opening a model in two steps: first what a prompt is checked against, then the weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsieve.cli.guard import BadInput
from kvsieve.errors import choices

REFERENCE = "the reference model"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model's tokenizer and limits; `weights()` loads the rest.

    `context`: tokens that the model takes, prompt and answer together, where it says so.
    """

    name: str
    tokenizer: Any
    context: int | None
    weights: Callable[[], Any]

    @property
    def reference(self) -> bool:
        return self.name == REFERENCE


@dataclass(frozen=True)
class Choice:
    """Which model was asked for, checked as far as that goes without loading anything."""

    name: str | None
    dtype: str
    device: torch.device

    @classmethod
    def read(cls, name: str | None, dtype: str, device: str) -> Choice:
        """Check what was given.

        Raises:
            BadInput: no such dtype or device.
        """
        if dtype not in _DTYPES:
            raise BadInput(f"Unknown --dtype {dtype!r}. {choices(dtype, _DTYPES)}")
        return cls(name, dtype, _device(device, gpu=name is not None))

    def open(self) -> Opened:
        """Load tokenizer and configuration.

        Raises:
            BadInput: no such model, or it can't be reached, or it can't generate text.
        """
        quieten()
        return _reference(self) if self.name is None else _users(self, self.name)


def _device(asked: str, gpu: bool) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"Can't use --device {asked}: {reason}") from error
    if device.type == "meta":
        raise BadInput("Can't use --device meta: it computes nothing.")
    return device


def quieten() -> None:
    """Keep Transformers' bars and warnings off stderr; a download's bar stays on a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils import logging

    set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _reference(choice: Choice) -> Opened:
    from kvsieve import reference

    if choice.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # So small a model gains nothing from more threads, and loses much on a busy machine.
        torch.set_num_threads(1)
    dtype = "float32" if choice.dtype == "auto" else choice.dtype
    model, tokenizer = reference.load(dtype, str(choice.device))
    return Opened(
        name=REFERENCE,
        tokenizer=tokenizer,
        context=reference.MAX_TOKENS,
        weights=lambda: model,
    )


def _users(choice: Choice, name: str) -> Opened:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise BadInput(f"Can't load the model {name!r}: there is no such folder.")
    with _loading(name):
        config = AutoConfig.from_pretrained(name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BadInput(
                f"{name!r} is a {config.model_type} model, which Transformers can't use as a "
                "decoder-only language model."
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)

    def weights() -> Any:
        from transformers import AutoModelForCausalLM

        with _loading(name):
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=choice.dtype)
        return model.to(choice.device).eval()

    return Opened(name=name, tokenizer=tokenizer, context=context, weights=weights)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what goes wrong while loading a model into one short reason."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BadInput(f"Can't load the model {name!r}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if _offline(error) or "connect to" in text or "offline" in text.lower():
        return (
            "it is not in a folder of that name nor in the local cache, and the Hugging Face Hub "
            "can't be reached (offline?). Download it first, or check the network."
        )
    return text.split(" If this is a private repository")[0] or type(error).__name__


def _offline(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
            return True
        error = error.__cause__ or error.__context__
    return False
