"""One thread, no network, fixed seeds; safe to run in several processes at once.

Annotations are not enforced at run time: the parts are structural protocols, and tests pass wrong
types on purpose to see the library's own errors. Pyright checks them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Programs that tests start would take every core from the other workers.
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; Triton asks when it is first imported, which is below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Memory that nobody has written is then NaN, so that reading it shows.
torch.use_deterministic_algorithms(True)

# models, oracle and running are shared by all folders, however pytest finds them.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Start every test from the same seed; none may leave gradients off."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "a test left gradients off"
