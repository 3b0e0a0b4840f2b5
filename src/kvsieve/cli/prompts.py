"""The prompt: where it comes from, and every check that needs no weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.cli.guard import BadInput
from kvsieve.cli.models import Opened

if TYPE_CHECKING:
    from kvsieve.reference import Sample

_NEW_TOKENS = 2048
_REFERENCE_NEW_TOKENS = 1280
"""The reference model's longest answer, 200 steps of reasoning, has 1205 tokens."""
_BEYOND = 32
"""Tokens after which an answer that is longer than the right one is cut off."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and the sample that it was made from."""

    text: str
    sample: Sample | None = None

    def right(self, answer: str) -> bool | None:
        """Say whether an answer is right, where that is known."""
        return None if self.sample is None else self.sample.grade(answer)


def read(
    prompt: str | None,
    file: Path | None,
    kind: str | None,
    *,
    seed: int,
    steps: int | None,
    length: int | None,
    own_model: bool,
) -> Prompt:
    """Get the prompt from the one place that was named.

    Raises:
        BadInput: none, or two places; nothing in it; a file that can't be read.
        ReferenceModelError: a sample that can't be made, or words the reference model lacks.
    """
    if sum(source is not None for source in (prompt, file, kind)) != 1:
        raise BadInput("Give the prompt in one way: --prompt, --prompt-file or --sample.")
    if kind is None and (steps is not None or length is not None):
        raise BadInput("--steps and --length shape a sample: use them with --sample.")
    if kind is not None:
        if own_model:
            raise BadInput("--sample is written in the reference model's words: leave out --model.")
        made = make_sample(kind, seed=seed, steps=steps, length=length)
        return Prompt(made.prompt, made)
    text = prompt if prompt is not None else text_file(file or Path(), "prompt")
    if not text.strip():
        raise BadInput("The prompt is empty.")
    if not own_model:
        from kvsieve import reference

        reference.check_prompt(text)
    return Prompt(text)


def make_sample(kind: str, *, seed: int, steps: int | None, length: int | None) -> Sample:
    """Make up a prompt for the reference model, with the known answer."""
    from kvsieve import reference

    return reference.sample(kind, seed=seed, steps=steps, length=length)


def text_file(path: Path, what: str) -> str:
    """Return the text of a file, or of stdin (-).

    Raises:
        BadInput: it can't be read, or isn't UTF-8; names ``what`` it was to be.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"The {what} file {str(path)!r} is not UTF-8 text (byte {error.start})."
        ) from error
    except OSError as error:
        raise BadInput(f"Can't read the {what} file {str(path)!r}: {error.strerror}.") from error


def encode(text: str, opened: Opened, chat: bool) -> Any:
    """Return the prompt's token ids `[1, T]`.

    Raises:
        BadInput: a chat template asked for where there is none; nothing left as tokens.
    """
    tokenizer = opened.tokenizer
    if chat and not getattr(tokenizer, "chat_template", None):
        raise BadInput(f"--chat: {opened.name} has no chat template.")
    if chat:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise BadInput("The prompt is empty: it has no token of this model.")
    return ids


def room(prompt_tokens: int, opened: Opened, asked: int | None, sample: Sample | None) -> int:
    """Return how many tokens may be generated.

    Raises:
        BadInput: the prompt and those tokens don't fit into the model's context.
    """
    wanted = asked or _default_new_tokens(opened, sample)
    if opened.context is None:
        return wanted
    left = opened.context - prompt_tokens
    if left < (asked or 1):
        raise BadInput(
            f"The prompt's tokens and the new ones, {prompt_tokens} + {asked or 1}, don't fit: "
            f"{opened.name} takes {opened.context} in all. Shorten the prompt or lower "
            "--max-new-tokens."
        )
    return min(wanted, left)


def _default_new_tokens(opened: Opened, sample: Sample | None) -> int:
    if sample is not None:
        return sample.answer_tokens + _BEYOND
    return _REFERENCE_NEW_TOKENS if opened.reference else _NEW_TOKENS


def check_generation(max_new_tokens: int | None, temperature: float) -> None:
    """Check the numbers of a generation.

    Raises:
        BadInput: no token asked for, or a negative temperature.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {max_new_tokens}: it must be 1 or more.")
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"--temperature {temperature}: it must be 0 (greedy) or above.")
