"""Samples: deterministic, sized as asked, graded exactly, refused when impossible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvsieve import reference
from kvsieve.errors import ReferenceModelError
from kvsieve.reference.vocabulary import KNOWN, WORDS

MODEL = Path(reference.__file__).parent / "model"


def test_a_seed_gives_the_same_task_in_another_process() -> None:
    code = (
        "import json; from kvsieve import reference as r; "
        "print(json.dumps([r.sample(kind, seed=5).prompt for kind in r.KINDS]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    prompts = json.loads(shown.stdout)
    assert prompts == [reference.sample(kind, seed=5).prompt for kind in reference.KINDS]
    others = [reference.sample(kind, seed=6).prompt for kind in reference.KINDS]
    assert not set(prompts) & set(others)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_prompts_use_known_words_and_start_with_bos(kind: str) -> None:
    task = reference.sample(kind, seed=2)
    words = task.prompt.split()
    assert words[0] == "<bos>" and set(words) <= KNOWN
    reference.check_prompt(task.prompt)
    if task.document is not None:
        assert task.prompt.split() == task.document.split() + str(task.question).split()


def test_sizes_are_as_asked() -> None:
    words = reference.sample("retrieval", length=300).document.split()  # type: ignore[union-attr]
    assert len(words) == 300
    task = reference.sample("reasoning", steps=17)
    assert sum(word.startswith("L") for word in task.answer.split()) == 17 + 1
    assert task.answer_tokens == len(task.answer.split()) + 1


@pytest.mark.parametrize("kind", reference.KINDS)
def test_grade_takes_the_answer_and_nothing_else(kind: str) -> None:
    task = reference.sample(kind, seed=1)
    assert task.grade(f"  {task.answer}\n<eos> <pad>")
    words = task.answer.split()
    assert not task.grade(" ".join(words[:-1]))
    assert not task.grade(" ".join([*words[:-1], "refuse" if words[-1] != "refuse" else "fov"]))
    assert not task.grade("")


def test_the_secret_is_refused() -> None:
    task = reference.sample("secret", seed=4)
    asked = str(task.question).split()[1]
    assert f"secret {asked} ;" in " ".join(task.prompt.split())
    assert f"{asked} refuse" in task.answer


def test_a_walk_follows_its_table() -> None:
    task = reference.sample("walk", seed=3, steps=10)
    entries = [line.split() for line in task.prompt.replace("<ctx>", "\n").splitlines()]
    table = {words[0]: words[1:3] for words in entries if len(words) in (3, 4)}
    words, total = task.answer.split(), 0
    for i in range(0, 50, 5):
        here, there, digit, _, shown = words[i : i + 5]
        total = (total + int(digit)) % 10
        assert table[here] == [there, digit] and shown == str(total)
    assert words[50:52] == [words[46], "stop"] and words[-1] == str(total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "retreival"}, "Did you mean 'retrieval'"),
        ({"kind": "retrieval", "length": 10}, "from 64 to 2048"),
        ({"kind": "retrieval", "steps": 5}, "size is set by length"),
        ({"kind": "reasoning", "length": 100}, "size is set by steps"),
        ({"kind": "walk", "steps": 0}, "from 2 to 120"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ReferenceModelError, match=message):
        reference.sample(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  \n ", "empty"),
        ("<bos> Once upon a time", "'Once', 'upon', 'a', 'time'.*kvsieve sample KIND"),
        ("is " * 5000, "5000 tokens"),
    ],
)
def test_check_prompt_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ReferenceModelError, match=message):
        reference.check_prompt(text)


def test_shipped_prompts_are_those_of_their_tasks() -> None:
    assert set(reference.shipped()) == {"retrieval", "reasoning", "instructions"}


def test_the_tokenizer_has_the_vocabulary_in_order() -> None:
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    assert [word for word, _ in sorted(vocabulary.items(), key=lambda x: x[1])] == list(WORDS)


def test_importing_the_package_loads_no_transformers() -> None:
    code = (
        "import sys, kvsieve.reference as r; r.sample('walk'); print('transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
