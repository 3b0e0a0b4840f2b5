"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

import kvsieve

from .support import Run, draw, kept


def test_keeps_sinks_and_the_most_recent() -> None:
    recipe = kvsieve.recipe("streaming-llm", budget=7)
    want = [0, 1, 2, 3, 9, 10, 11]
    assert kept(recipe, draw()) == [[want, want], [want, want]]


def test_hand_example() -> None:
    recipe = kvsieve.recipe("streaming-llm", budget=3, sinks=1)
    assert kept(recipe, draw(B=1, H=1, S=4)) == [[[0, 2, 3]]]


def test_padding_is_no_sink() -> None:
    recipe = kvsieve.recipe("streaming-llm", budget=5, sinks=2)
    whole, padded = kept(recipe, draw(padding=(0, 3)))
    assert whole == [[0, 1, 9, 10, 11]] * 2
    assert padded == [[0, 1, 6, 7, 8]] * 2  # positions among the row's nine real tokens


def test_slides_while_decoding() -> None:
    layer = draw(S=16)
    run = Run(kvsieve.recipe("streaming-llm", budget=6, sinks=2), layer.part(0, 5))
    assert run.kept()[0][0] == [0, 1, 2, 3, 4]
    for t in range(5, 16):
        run.feed(layer.part(t, t + 1))
        recent = list(range(2, t + 1))[-4:]
        assert run.kept() == [[[0, 1, *recent]] * 2] * 2
