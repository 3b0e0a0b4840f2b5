"""Files of examples in a folder; GSM8K, MATH-500 and IFEval: the harness's own tasks, our data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsieve.bench.harness.checks import HarnessError


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file with one JSON object a line; ``fields``: what each must have, with its type."""

    file: str
    fields: dict[str, type]


@dataclass(frozen=True, kw_only=True)
class Local(DataFile):
    """A task whose examples lie in a file.

    ``base``: the harness's task that says how to ask and to score; ``split``: the split that it
    tests on; ``metric``: the score of a row.
    """

    base: str
    split: str
    metric: str


LOCAL = {
    "gsm8k": Local(
        file="gsm8k_test.jsonl",
        base="gsm8k_cot",
        split="test",
        fields={"question": str, "answer": str},
        metric="math_verify",
    ),
    "math500": Local(
        file="math500.jsonl",
        base="minerva_math500",
        split="test",
        fields={"problem": str, "solution": str, "answer": str},
        metric="math_verify",
    ),
    "ifeval": Local(
        file="ifeval.jsonl",
        base="ifeval",
        split="train",
        fields={"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
        metric="prompt_level_strict_acc",
    ),
}
"""The tasks that ``--data`` brings, by the names of ``--tasks``."""


def read(task: DataFile, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Return a file's lines, with its fields alone, and a short hash of it.

    Raises:
        HarnessError: no such file; a line that is no JSON object, or lacks a field.
    """
    path = folder / task.file
    if not folder.is_dir():
        raise HarnessError(f"--data {str(folder)!r} is no folder.")
    if not path.is_file():
        raise HarnessError(
            f"{str(folder)!r} has no {task.file}: one JSON object a line, with the fields "
            f"{', '.join(task.fields)}."
        )
    data = path.read_bytes()
    lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise HarnessError(f"{str(path)!r} is empty.")
    rows = [_row(task, path, number, line) for number, line in enumerate(lines, 1)]
    return rows, hashlib.sha256(data).hexdigest()[:16]


def _row(task: DataFile, path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise HarnessError(f"{str(path)!r}, line {number}, is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise HarnessError(f"{str(path)!r}, line {number}, is no JSON object.")
    for name, kind in task.fields.items():
        if name not in row:
            raise HarnessError(f"{str(path)!r}, line {number}, has no field {name!r}.")
        if not isinstance(row[name], kind):
            raise HarnessError(
                f"{str(path)!r}, line {number}: {name!r} is no {kind.__name__}, but "
                f"{type(row[name]).__name__}."
            )
    return {name: row[name] for name in task.fields}
