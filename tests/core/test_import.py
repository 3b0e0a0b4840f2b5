"""`import kvsieve` is light, and its public names are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvsieve

HEAVY = ("transformers", "vllm", "triton")


def loaded_by(statement: str) -> set[str]:
    """Return which of the heavy packages a fresh interpreter has imported after a statement."""
    code = f"import sys\n{statement}\nprint(*(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_takes_nothing_heavy() -> None:
    # torch itself may bring some of them: only what comes on top is ours.
    assert loaded_by("import kvsieve") <= loaded_by("import torch")


def test_building_a_recipe_takes_nothing_heavy() -> None:
    used = "import kvsieve; kvsieve.recipe('adakv', budget=99)"
    assert loaded_by(used) <= loaded_by("import torch")


def test_the_check_sees_what_is_imported() -> None:
    assert "transformers" in loaded_by("import transformers")


def test_public_names_are_sorted_and_there() -> None:
    assert kvsieve.__all__ == sorted(kvsieve.__all__)
    for name in kvsieve.__all__:
        assert getattr(kvsieve, name).__name__ == name


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sieve'"):
        _ = kvsieve.sieve
    with pytest.raises(ImportError):
        exec("from kvsieve import sieve")
