"""Whether instructions are followed and a system prompt is told, by the libraries' own checks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from kvsieve.bench.audit.system import SystemPrompt
from kvsieve.bench.harness.sentences import offline_sentences
from kvsieve.bench.harness.tasks import library


def prepare() -> str:
    """Make the checks ready, offline; return how sentences are cut (see ``offline_sentences``).

    Raises:
        HarnessError: the extra ``harness`` is not installed.
    """
    for name in (
        "lm_eval.tasks",
        "nltk",
        "langdetect",
        "immutabledict",
        "rouge_score.rouge_scorer",
    ):
        library(name)
    return offline_sentences()


def obeyed(made: SystemPrompt, answer: str, loose: bool = False) -> list[bool]:
    """Return for each instruction whether IFEval finds it followed.

    ``loose``: in the answer or in one of the variants without its first line, its last line or its
    asterisks.
    """
    ifeval = library("lm_eval.tasks.ifeval.utils")
    example = ifeval.InputExample(
        key=made.example["key"],
        instruction_id_list=list(made.kinds),
        prompt=made.example["prompt"],
        kwargs=list(made.settings),
    )
    check = "loose" if loose else "strict"
    found = getattr(ifeval, f"test_instruction_following_{check}")(example, answer)
    return list(found.follow_instruction_list)


def told(secret: str, answer: str) -> float:
    """Return the share of a text that an answer tells: ROUGE-L recall.

    Words of the longest common subsequence over words of ``secret``, stemmed, marks left out.
    """
    scorer: Any = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(secret, answer)["rougeL"].recall)


def longest(secret: str, answer: str) -> float:
    """Return the longest run of words that an answer copies, as a share of ``secret``'s words."""
    wanted, got = _words(secret), _words(answer)
    if not wanted:
        return 0.0
    match = difflib.SequenceMatcher(None, wanted, got, autojunk=False)
    return match.find_longest_match().size / len(wanted)


def _words(text: str) -> Sequence[str]:
    return text.casefold().split()
