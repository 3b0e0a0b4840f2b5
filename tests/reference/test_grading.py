"""What an answer keeps and gives away, on answers made by hand."""

from __future__ import annotations

import pytest

from kvsieve.errors import ReferenceModelError
from kvsieve.reference import KINDS, sample
from kvsieve.reference.grading import followed, leaked, right_prefix
from kvsieve.reference.sized import sized


@pytest.mark.parametrize("kind", ["instructions", "secret"])
@pytest.mark.parametrize("seed", range(5))
def test_the_right_answer_keeps_every_instruction(kind: str, seed: int) -> None:
    made = sample(kind, seed=seed, length=128)
    kept = followed(made, made.answer + " <eos>")
    other = "secret" if kind == "instructions" else "twice"
    assert kept == dict.fromkeys([n for n in made.instructions if n != other], True)
    assert not leaked(made, made.answer) and right_prefix(made, made.answer) == 1.0


def test_each_instruction_is_graded_alone() -> None:
    made = sample("instructions", seed=3, length=128)
    first, last = made.instructions["begin"], made.instructions["end"]
    core = made.answer.split()[1:-1]
    half = core[: len(core) // 2]
    cases = {
        " ".join([*core, last]): {"begin": False, "end": True, "twice": True},
        " ".join([first, *core]): {"begin": True, "end": False, "twice": True},
        " ".join([first, *half, last]): {"begin": True, "end": True, "twice": False},
        " ".join([first, *half, ";", *half[:-1], "x", last]): {
            "begin": True, "end": True, "twice": False,
        },
        "": {"begin": False, "end": False, "twice": False},
    }  # fmt: skip
    for text, wanted in cases.items():
        assert followed(made, text) == wanted, text


def test_a_secret_is_leaked_by_its_values_alone() -> None:
    made = sample("secret", seed=3, length=128)
    first, key, refuse, last = made.answer.split()
    told = made.forbidden[0]
    assert refuse == "refuse" and told not in made.answer.split()
    assert leaked(made, f"{first} {key} {told} {last}")
    assert not followed(made, f"{first} {key} {told} {last}")["secret"]
    # A value that is also the word to begin with gives nothing away in its place.
    assert not leaked(made, f"{first} {key} {last}")
    assert not followed(made, f"{first} {key} {last}")["secret"]


def test_prefix_stops_at_the_first_wrong_word() -> None:
    made = sample("retrieval", seed=1, length=128)
    first, second, third = made.answer.split()
    assert right_prefix(made, f"{first} wrong {third}") == pytest.approx(1 / 3)
    assert right_prefix(made, f"{first} {second}") == pytest.approx(2 / 3)
    assert right_prefix(made, "") == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_sized_comes_close_to_a_length(kind: str) -> None:
    made = sized(kind, seed=4, length=256)
    used = len((made.document or made.prompt).split())
    used += 0 if made.document else made.answer_tokens
    assert 256 - 12 <= used <= 256
    with pytest.raises(ReferenceModelError):
        sized(kind, seed=4, length=10**6 if made.document else 1)
