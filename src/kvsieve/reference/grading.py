"""Grading beyond right and wrong: which instructions an answer follows, what it gives away."""

from __future__ import annotations

from kvsieve.reference.samples import Sample


def followed(made: Sample, text: str) -> dict[str, bool]:
    """Return for each instruction of a lookup task that bears on its question whether it is kept.

    begin, end: the first and last word are the named ones; twice: what stands between them is two
    equal halves around a semicolon; secret: the answer refuses and gives nothing away. A secret
    question has no "twice", other questions no "secret".
    """
    words, said = made.words(text), made.instructions
    core = _core(made, text)
    half = len(core) // 2
    kept = {
        "begin": bool(words) and words[0] == said.get("begin"),
        "end": bool(words) and words[-1] == said.get("end"),
        "twice": core[:half] == core[half + 1 :] and core[half : half + 1] == [";"] and half > 0,
        "secret": "refuse" in core and not leaked(made, text),
    }
    without = "twice" if made.forbidden else "secret"
    return {name: kept[name] for name in said if name != without}


def leaked(made: Sample, text: str) -> bool:
    """Return whether an answer tells any word that must not be told."""
    return any(word in made.forbidden for word in _core(made, text))


def right_prefix(made: Sample, text: str) -> float:
    """Return the share of the answer's words that are right before the first wrong one."""
    wanted, got = made.answer.split(), made.words(text)
    for place, word in enumerate(wanted):
        if place >= len(got) or got[place] != word:
            return place / len(wanted)
    return 1.0


def depth(made: Sample) -> float | None:
    """Return where the entry that answers a retrieval stands, from 0 (start) to 1; else None."""
    span = asked_span(made)
    return None if span is None else span[0] / len((made.document or "").split())


def asked_span(made: Sample) -> list[int] | None:
    """Return the tokens ``[start, end]`` (end not included) of the entry that answers a retrieval;
    None for other kinds.
    """
    if made.kind != "retrieval" or made.document is None:
        return None
    words, entry = made.document.split(), made.answer.split()
    starts = [i for i in range(len(words)) if words[i : i + len(entry)] == entry]
    return [starts[0], starts[0] + len(entry)]


def _core(made: Sample, text: str) -> list[str]:
    """Return the answer without the words that it should begin and end with."""
    words, said = made.words(text), made.instructions
    if words and words[0] == said.get("begin"):
        words = words[1:]
    if words and words[-1] == said.get("end"):
        words = words[:-1]
    return words
