"""These tests need vLLM: `make test-vllm` sets it up in an environment of its own.

There is no ``__init__.py`` here on purpose: this folder must not stand in the way of the package
``vllm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

HERE = find_spec("vllm") is not None and find_spec("vllm.version") is not None

if not HERE:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def reference() -> object:
    """Return the reference model in Transformers, in fp32."""
    from kvsieve import reference

    return reference.load()[0]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Return a running server, the same for all tests."""
    from http_serving import started_server

    with started_server(tmp_path_factory.mktemp("server") / "log") as made:
        yield made
