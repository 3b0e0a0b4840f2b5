"""IFEval counts sentences with NLTK's Punkt; its data may not be there, and isn't fetched."""

from __future__ import annotations

import importlib
from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

TRAINED, UNTRAINED = "punkt", "punkt, untrained"


def offline_sentences() -> str:
    """Make sure that IFEval's checks can be made without a network; return how sentences are cut.

    With NLTK's data for Punkt ("punkt_tab") they are as IFEval has them. Without it, Punkt works
    untrained: it knows no abbreviations, so that "Dr. No" counts as two sentences.
    """
    nltk: Any = importlib.import_module("nltk")
    langdetect: Any = importlib.import_module("langdetect")
    langdetect.DetectorFactory.seed = 0  # it draws numbers
    if _trained(nltk):
        return TRAINED
    # The harness downloads it on import; a measurement must not depend on when that worked.
    with patch.object(nltk, "download"), redirect_stdout(StringIO()):
        util: Any = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
    punkt: Any = importlib.import_module("nltk.tokenize.punkt")
    untrained = punkt.PunktSentenceTokenizer()
    util._get_sentence_tokenizer = lambda: untrained
    util.nltk = _Untrained(nltk, untrained)
    return UNTRAINED


def _trained(nltk: Any) -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


class _Untrained:
    """NLTK as IFEval's checks see it, with words cut without data."""

    def __init__(self, nltk: Any, sentences: Any) -> None:
        self._nltk, self._sentences = nltk, sentences

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nltk, name)

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words and marks of a text."""
        cut = self._nltk.tokenize.NLTKWordTokenizer().tokenize
        return [word for sentence in self._sentences.tokenize(text) for word in cut(sentence)]
