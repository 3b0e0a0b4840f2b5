"""kvpress in a subprocess: a variant like the others, so that it takes its turns with them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsieve.bench.models import SEED, Shape
from kvsieve.bench.plan import Spec
from kvsieve.bench.timing import Step
from kvsieve.errors import KVSieveError

_SCRIPT = Path(__file__).with_name("peer.py")


class PeerError(KVSieveError):
    """The peer can't do what was asked, or ended."""


class Peer:
    """The other process; started once, it keeps its model between cells."""

    def __init__(self, python: str, threads: int) -> None:
        self._python, self._threads = python, threads
        self._start()

    def _start(self) -> None:
        python = self._python
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [python, str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"Can't start the peer's Python {python!r}: {error}") from error
        self._built: Any = None
        self.versions: dict[str, str] = self.ask("threads", count=self._threads)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            PeerError: it failed there; the message is the peer's.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            code = self._process.wait(timeout=30)
            said = self._errors.read()[-500:].strip()
            raise PeerError(f"kvpress's process ended with exit code {code}: {said}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def restart(self) -> None:
        """Start the process anew; it holds no model then.

        Raises:
            PeerError: it can't be started.
        """
        self.close()
        self._start()

    def build(self, shape: Shape, dtype: str, device: str) -> None:
        """Make sure that the peer holds this model."""
        wanted = {"config": shape.config(), "dtype": dtype, "device": device, "seed": SEED}
        if wanted != self._built:
            self.ask("model", **wanted)
            self._built = wanted

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # what was written to a process that had ended
            self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._errors.close()


class Remote:
    """One press of kvpress."""

    compress_seconds = None

    def __init__(self, peer: Peer, spec: Spec, prompt: Tensor, full: int) -> None:
        self._peer, self._spec, self._prompt, self._full = peer, spec, prompt, full

    def prefill(self) -> float:
        """Read the prompt; return the seconds."""
        spec = self._spec
        answer = self._peer.ask(
            "prefill",
            prompt=self._prompt.tolist(),
            method=spec.method,
            slots=spec.slots(self._prompt.shape[1]),
            interval=interval(spec),
        )
        return answer["seconds"]

    def steps(self, count: int) -> list[Step]:
        """Decode tokens greedily."""
        answer = self._peer.ask("steps", count=count)
        return [Step(s, e) for s, e in zip(answer["seconds"], answer["events"], strict=True)]

    def bytes(self) -> dict[str, int | None]:
        """Return what its cache holds; the peak is not known."""
        kept = self._peer.ask("bytes")["bytes_kept"]
        return {"bytes_full": self._full, "bytes_kept": kept, "bytes_peak": None}

    def close(self) -> None:
        """Give the memory back."""
        self._peer.ask("close")


def interval(spec: Spec) -> int | None:
    """Return after how many decode steps the recipe compresses; None: after prefill only."""
    schedule = spec.recipe().schedule
    if schedule is None or "decode" not in schedule.phases:
        return None
    return (schedule.slack or 0) + 1
