"""RULER through the harness, at a length that the task's name says: ruler_4k, niah_single_1_8k.

The harness makes RULER's prompts from the model's own tokenizer. Some need essays or question sets
of the Hugging Face Hub; the others can be made anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from kvsieve.bench.harness.checks import HarnessError

GROUP = "ruler"
MEMBERS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery"),
    *("niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad"),
    "ruler_qa_hotpot",
)
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
LENGTHS = (4, 8, 16, 32, 64, 128)
"""In thousands (1024) of tokens, prompt and answer together: those that the harness scores."""

_NAME = re.compile(r"(.+?)(?:_(\d+)k)?")


def parse(name: str) -> tuple[tuple[str, ...], int] | None:
    """Return the harness's tasks and their tokens; None: it is no task of RULER.

    Raises:
        HarnessError: a length that the harness doesn't score.
    """
    found = _NAME.fullmatch(name)
    base, number = found.groups() if found else (name, None)
    if base != GROUP and base not in MEMBERS:
        return None
    thousands = int(number or LENGTHS[0])
    if thousands not in LENGTHS:
        possible = ", ".join(f"{base}_{n}k" for n in LENGTHS)
        raise HarnessError(f"{name!r}: no such length. Possible: {possible}.")
    return (MEMBERS if base == GROUP else (base,)), 1024 * thousands


def spec(config: dict[str, Any], length: int, tokenizer: Any) -> dict[str, Any]:
    """Return a task's configuration for prompts of a length."""
    made = {name: value for name, value in config.items() if name != "tag"}
    metadata = {"max_seq_lengths": [length], "tokenizer": tokenizer.name_or_path or "tokenizer"}
    return made | {"metadata": {**config.get("metadata", {}), **metadata}}


@contextmanager
def making(names: tuple[str, ...], tokenizer: Any) -> Iterator[None]:
    """Let the harness make prompts inside: with the tokenizer that is loaded already.

    By itself it loads the tokenizer again, and runs code that comes with it.

    Raises:
        HarnessError: packages are missing, or essays that are needed can't be had.
    """
    from kvsieve.bench.harness.tasks import library

    common = library("lm_eval.tasks.ruler.common_utils")
    common.get_tokenizer.cache_clear()
    given = SimpleNamespace(from_pretrained=lambda *args, **options: tokenizer)
    # What it prints would be taken for rows.
    with patch.object(common, "AutoTokenizer", given), redirect_stdout(StringIO()):
        _prepare(any(name in ESSAYS for name in names))
        yield


def _prepare(essays: bool) -> None:
    """Find out first what would only fail after minutes of making prompts."""
    from kvsieve.bench.harness.tasks import library

    try:
        with redirect_stderr(StringIO()):  # NLTK's word that it can't download
            made = library("lm_eval.tasks.ruler.prepare_niah")
    except ImportError as error:
        raise HarnessError(
            "RULER needs the package wonderwords: pip install 'kvsieve[harness]'."
        ) from error
    if not essays:
        return
    try:
        library("nltk").data.find("tokenizers/punkt_tab")
        made.get_haystack("essay")
    except (OSError, ConnectionError, LookupError, ValueError) as error:
        without = ", ".join(name for name in MEMBERS if name not in ESSAYS and "qa" not in name)
        raise HarnessError(
            "RULER hides its needles in essays from the Hugging Face Hub (baber/"
            "paul_graham_essays), cut by NLTK's punkt_tab; one of them is not here and can't be "
            f"fetched (offline?). Without them go: {without}."
        ) from error
