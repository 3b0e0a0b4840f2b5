"""The smallest cache that keeps quality, by measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsieve.bench.report import aggregate
from kvsieve.bench.report.aggregate import FULL, Estimate, grouped, labels, variant
from kvsieve.bench.report.check import ResultsError, Row
from kvsieve.bench.report.reading import SETUP, Results, as_text
from kvsieve.errors import choices

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Candidate:
    """One method at one budget, with all its rows of the task."""

    label: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The method and its budget."""
        budget = self.rows[0]["budget"]
        return self.label if budget is None else f"{self.label} at {budget}"

    @property
    def bytes_kept(self) -> float:
        """The mean over its rows."""
        return aggregate.average(self.rows, "cache", "bytes_kept") or 0.0

    @property
    def settings(self) -> dict[str, tuple[Row, ...]]:
        """Its rows by setting: lengths and seeds are pooled, settings never are."""
        groups = grouped(self.rows, lambda row: row["setting"])
        return {group[0]["setting"]: tuple(group) for group in groups}

    @property
    def differences(self) -> dict[str, Estimate]:
        """The paired difference to the full cache in each setting."""
        return {name: aggregate.difference(rows) for name, rows in self.settings.items()}

    @property
    def worst(self) -> float:
        """The least lower end of all settings."""
        return min(found.low for found in self.differences.values())

    @property
    def worst_mean(self) -> float:
        """The least mean of all settings."""
        return min(found.mean for found in self.differences.values())


@dataclass(frozen=True)
class Advice:
    """What the rows say."""

    holds: Candidate | None
    """The smallest whose lower ends all stay within the loss."""
    by_mean: Candidate | None
    """The smallest whose means do, if it is smaller than ``holds`` (or there is none)."""
    closest: Candidate | None
    """Where nothing qualifies: the one with the highest lower end."""
    considered: int
    left_out: dict[str, str]
    """Candidates that can't be compared, and why."""


def recommend(
    results: Results,
    task: str,
    max_loss: float,
    setting: str | None = None,
    model: str | None = None,
) -> Advice:
    """Return the smallest mean bytes kept for which a loss above ``max_loss`` is ruled out.

    Every setting must hold by itself. A method counts only where it has rows of all settings and
    lengths, none of them failed: else it would be compared on easier prompts. kvpress's rows are
    there for comparison, not to choose from.

    Raises:
        ResultsError: a task, setting or model without rows, or rows of several setups.
    """
    ours = [row for row in results.everything if row["engine"] != "kvpress"]
    rows = _asked(ours, task, setting, model)
    needed = {(row["setting"], row["length"]) for row in rows}
    left_out: dict[str, str] = {}
    complete: list[Candidate] = []
    for candidate in _candidates(rows):
        reason = _incomplete(candidate.rows, needed)
        if reason:
            left_out[candidate.name] = reason
        else:
            complete.append(candidate)
    return _advice(complete, max_loss, left_out)


def _advice(found: Sequence[Candidate], max_loss: float, left_out: dict[str, str]) -> Advice:
    by_size = sorted(found, key=lambda c: (c.bytes_kept, -c.worst, c.name))
    least = -max_loss - _ROUNDING
    holds = next((c for c in by_size if c.worst >= least), None)
    by_mean = next((c for c in by_size if c.worst_mean >= least), None)
    if holds and by_mean and by_mean.bytes_kept >= holds.bytes_kept:
        by_mean = None
    closest = max(by_size, key=lambda c: c.worst) if by_size and not holds and not by_mean else None
    return Advice(holds, by_mean, closest, len(by_size), left_out)


def _asked(rows: Sequence[Row], task: str, setting: str | None, model: str | None) -> list[Row]:
    wanted = {"task": task, "setting": setting, "model": model}
    found = list(rows)
    for name, value in wanted.items():
        if value is None:
            continue
        known = {row[name] for row in found}
        if value not in known:
            raise ResultsError(f"No rows of {name} {value!r}. {choices(value, known)}")
        found = [row for row in found if row[name] == value]
    fields = (*SETUP, "task_version", "metric")
    setups = {as_text({n: row[n] for n in fields}): row for row in found if row["error"] is None}
    if len(setups) > 1:
        raise ResultsError(
            f"The rows of task {task!r} can't be compared with one another: {'; '.join(setups)}. "
            "Choose with --model, or keep them in folders of their own."
        )
    return found


def _candidates(rows: Sequence[Row]) -> list[Candidate]:
    compressed = [row for row in rows if row["method"] != FULL]
    names = labels(compressed)
    groups = grouped(compressed, lambda row: as_text([variant(row), row["budget"]]))
    return [Candidate(names[variant(group[0])], tuple(group)) for group in groups]


def _incomplete(rows: Sequence[Row], needed: set[tuple[str, int | None]]) -> str | None:
    errors = sorted({row["error"] for row in rows if row["error"] is not None})
    if errors:
        return f"failed: {errors[0]}"
    missing = needed - {(row["setting"], row["length"]) for row in rows}
    where = sorted(setting + (f", length {n}" if n else "") for setting, n in missing)
    return f"no rows of {'; '.join(where)}" if where else None
