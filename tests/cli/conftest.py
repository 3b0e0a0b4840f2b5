"""The reference model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsieve import reference
from kvsieve.reference.loader import folder


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    return reference.load("float32", "cpu")


@pytest.fixture(autouse=True)
def _load_once(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "load", lambda dtype, device: loaded)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_model() -> str:
    """A model that is given with `--model`: the reference model's folder."""
    return str(folder())


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A file with a short prompt that the reference model answers well."""
    path = tmp_path / "story.txt"
    path.write_text(reference.sample("reasoning", seed=5, steps=12).prompt, "utf-8")
    return path
