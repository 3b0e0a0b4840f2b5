"""Calling the command line inside the tests."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from typer.testing import CliRunner

from kvsieve.cli import app


class Called(NamedTuple):
    """How a call ended."""

    code: int
    out: str
    err: str


def call(*arguments: str, stdin: str | bytes | None = None) -> Called:
    """Run `kvsieve` with arguments."""
    result = CliRunner().invoke(app, arguments, input=stdin)
    return Called(result.exit_code, result.stdout, result.stderr)


def call_json(*arguments: str, code: int = 0) -> Any:
    """Run `kvsieve ... --json`; stdout must hold one JSON document and stderr nothing."""
    called = call(*arguments, "--json")
    assert called.code == code, called.err
    assert called.err == ""
    return json.loads(called.out)
