"""How the program ends: failures, Ctrl-C, closed pipes; and how fast it starts."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvsieve import reference
from kvsieve.cli.guard import Failed, working
from kvsieve.errors import BudgetError, EngineError

from .support import call

PROGRAM = (sys.executable, "-c", "from kvsieve.cli import main; main()")
LONG = ("run", "--method", "full", "--sample", "reasoning", "--steps", "200")


PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def interruptible() -> None:
    """Undo what a shell does to its background jobs, whose children would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_no_traceback() -> None:
    with subprocess.Popen((*PROGRAM, *LONG), **PIPES, preexec_fn=interruptible) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.read(1)  # it writes
        run.send_signal(signal.SIGINT)
        error = run.stderr.read().decode()
    assert run.returncode == 130
    assert error.strip() == "Interrupted."


def test_a_closed_pipe_is_no_error() -> None:
    command = (*PROGRAM, "sample", "reasoning")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sample:
        assert sample.stdout is not None and sample.stderr is not None
        sample.stdout.close()
        assert sample.stderr.read() == b""


def test_listing_does_not_wait_for_transformers() -> None:
    code = "import sys; from kvsieve.cli import app; app(['methods'], standalone_mode=True)"
    check = f"try:\n {code}\nfinally:\n assert 'transformers' not in sys.modules"
    ran = subprocess.run((sys.executable, "-c", check), capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "snapkv" in ran.stdout


def test_on_a_terminal_text_and_progress_do_not_mix() -> None:
    size = ("--sample", "reasoning", "--seed", "5", "--steps", "12")
    seen, code = on_a_terminal("run", "--method", "full", *size)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert code == 0 and "reading" in plain
    shown = [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]
    words = " ".join(shown).split()
    answer = reference.sample("reasoning", seed=5, steps=12).answer.split()
    assert any(words[i : i + 12] == answer[:12] for i in range(len(words)))
    assert "answer right" in " ".join(words)


def on_a_terminal(*arguments: str) -> tuple[str, int]:
    """Run with stdin, stdout and stderr on one terminal; return what it shows."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        (*PROGRAM, *arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as run:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
    os.close(ours)
    return seen.decode(), run.returncode


def test_what_fails_at_work_is_a_failure(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = reference.load("float32", "cpu")
    base = ("run", "--method", "full", "--prompt-file", str(story))
    for error, code, message in (
        (RuntimeError("out of memory"), 1, "Error: out of memory\n"),
        (EngineError("not this way"), 1, "Error: not this way\n"),
        (BudgetError("too small"), 2, "Error: too small\n"),
        (
            TypeError("a bug"),
            1,
            "Error: TypeError: a bug (`kvsieve --traceback ...` shows where.)\n",
        ),
    ):

        def broken(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(model, "generate", broken)
        assert call(*base) == (code, "", message)
    assert "in broken" in call("--traceback", *base).err


def test_a_model_that_cannot_be_compressed_is_bad_input(
    story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("compiled")

    monkeypatch.setattr("kvsieve.engines.transformers.installation", refuse)
    called = call("run", "--method", "full", "--prompt-file", str(story))
    assert called == (2, "", "Error: compiled\n")


def test_work_keeps_what_is_no_failure() -> None:
    for error in (BudgetError("b"), BrokenPipeError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), working():
            raise error
    with pytest.raises(Failed, match="disk"), working():
        raise OSError("disk")
