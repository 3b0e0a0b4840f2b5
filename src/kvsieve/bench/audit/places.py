"""Where each instruction of a system prompt stands: the data names its kind, not its words.

A kind has words by which its sentence is known. Of 526 instructions in prompts with several of
them, three are not found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Span = tuple[int, int]

CUES = {
    "change_case:capital_word_frequency": r"capital|all[- ]caps|in caps|upper ?-?case",
    "change_case:english_capital": r"capital|all[- ]caps|upper ?-?case",
    "change_case:english_lowercase": r"lower ?-?case|no capital|capital letters",
    "combination:repeat_prompt": r"repeat",
    "combination:two_responses": r"\*{6}|6 asterisk|\btwo\b",
    "detectable_content:number_placeholders": r"placeholder|square bracket",
    "detectable_content:postscript": r"post ?-?script|P\. ?S\.|\bPS\b",
    "detectable_format:constrained_response": r"My answer is|choose|following (?:options|phrases)",
    "detectable_format:json_format": r"JSON",
    "detectable_format:multiple_sections": r"section|chapter|part",
    "detectable_format:number_bullet_lists": r"bullet",
    "detectable_format:number_highlighted_sections": r"highlight|\*[^*\n]+\*|italic|markdown",
    "detectable_format:title": r"title|<<|angular bracket",
    "keywords:existence": r"key ?words?|include|mention|the word",
    "keywords:forbidden_words": r"key ?words?|exclude|do not (?:use|include|say)|avoid",
    "keywords:frequency": r"the word|include|mention|key ?words?",
    "keywords:letter_frequency": r"\bletter\b|hashtag|exclamation|[#!]",
    "language:response_language": (
        r"language|english|german|kannada|hindi|bengali|italian|marathi|korean|urdu|vietnamese|thai|"
        r"russian|portuguese|punjabi|gujarati|finnish|swahili|nepali|bulgarian|arabic|persian|farsi|"
        r"tamil|telugu|french|spanish|chinese|japanese"
    ),
    "length_constraints:nth_paragraph_first_word": r"paragraph",
    "length_constraints:number_paragraphs": r"paragraph|section|stanza|part|\*\*\*",
    "length_constraints:number_sentences": r"sentence",
    "length_constraints:number_words": r"\d\+? words|\bwords\b|\bword",
    "punctuation:no_comma": r"comma",
    "startend:end_checker": r"\bend|finish|last|conclu|\bfinal",
    "startend:quotation": r"quot",
}
"""Of every kind of instruction in IFEval, a regular expression for words of its sentence."""

_NAMES = ("section_spliter", "keywords", "forbidden_words", "keyword", "end_phrase",
          "postscript_marker", "first_word")  # fmt: skip
_SENTENCE_END = re.compile(r"(?<!i\.e\.)(?<!e\.g\.)(?<=[.!?])\s+|\n+")


def places(text: str, kinds: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Return the characters of each instruction's sentence; of a single one, the whole text.

    Sentences of two instructions may be the same. An instruction that is not found stands nowhere:
    its span is empty.
    """
    if len(kinds) == 1:
        return [(0, len(text))]
    return [_place(text, kind, given) for kind, given in zip(kinds, settings, strict=True)]


def _place(text: str, kind: str, given: Mapping[str, Any]) -> Span:
    """What an instruction is about (its keyword, say) tells more than the words of its kind."""
    about = [given[name] for name in _NAMES if given.get(name)]
    words = [word for one in about for word in (one if isinstance(one, list) else [one])]
    whole = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in words]
    for pattern in (*whole, CUES[kind]):
        found = re.search(pattern, text, re.IGNORECASE)
        if found is not None:
            return _sentence(text, found.start())
    return 0, 0


def _sentence(text: str, place: int) -> Span:
    start, end = 0, len(text)
    for gap in _SENTENCE_END.finditer(text):
        if gap.end() <= place:
            start = gap.end()
        elif gap.start() >= place:
            end = gap.start()
            break
    return start, end
