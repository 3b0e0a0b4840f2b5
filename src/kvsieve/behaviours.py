"""How heads behave while an answer is written whose sources are known: what they copy, and gather.

A probe is a prompt with its answer. Some of its tokens are copied into the answer (N_s); others
must be read for it, but are not copied (N_l). For the query that writes the answer's token y_t,
with a the attention of a head over the prompt and j* its highest entry:

    surface = sum of a_j* over the steps with j* in N_s and token(j*) = y_t,
              divided by the number of steps whose y_t is one of N_s's tokens
    logic   = mean over steps of  sum of a_j over j in N_l that are among the |N_s| + |N_l| highest

so that attention spread thin counts for nothing. Both are averaged over the group and over probes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults
from kvsieve.shares import Table
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Token ids of a prompt and of its ``answer``, and positions in the prompt: N_s and N_l."""

    prompt: Sequence[int]
    answer: Sequence[int]
    surface: Sequence[int] = ()
    logic: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.prompt) < 2 or not self.answer:
            raise RecipeError("A probe needs a prompt of 2 tokens or more, and an answer.")
        if not self.surface and not self.logic:
            raise RecipeError("A probe needs tokens that are copied or read: surface or logic.")
        wrong = [i for i in (*self.surface, *self.logic) if not 0 <= i < len(self.prompt)]
        if wrong:
            raise RecipeError(f"Positions {wrong} are not in a prompt of {len(self.prompt)}.")


@dataclass(frozen=True, kw_only=True)
class Behaviours:
    """How much each KV head of each compressed layer copies, and gathers."""

    surface: Table
    logic: Table

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        text = json.dumps({"surface": self.surface, "logic": self.logic})
        Path(path).write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Behaviours:
        """Read what ``save`` wrote.

        Raises:
            RecipeError: no such file, or it holds something else.
        """
        try:
            plain = json.loads(Path(path).read_text("utf-8"))
            tables = [
                tuple(tuple(float(x) for x in row) for row in plain[name])
                for name in ("surface", "logic")
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"Can't read head scores from {str(path)!r}: {error!r}.") from error
        widths = {len(row) for table in tables for row in table}
        bad = any(not 0 <= x < float("inf") for table in tables for row in table for x in row)
        if len(tables[0]) != len(tables[1]) or len(widths) != 1 or bad:
            raise RecipeError(
                f"The head scores in {str(path)!r} are no two tables of layers and heads alike, of "
                "finite numbers from 0 on."
            )
        return cls(surface=tables[0], logic=tables[1])


def behaviour(weights: Tensor, probe: Probe) -> tuple[Tensor, Tensor]:
    """Return surface and logic of each KV head, ``[H]`` each, in fp32.

    ``weights [H, G, T, S]``: attention of the queries that write the T tokens of the answer, over
    the prompt's S tokens.
    """
    tokens = torch.tensor(list(probe.prompt), device=weights.device)
    answer = torch.tensor(list(probe.answer), device=weights.device)
    copied, read = (_marked(x, tokens) for x in (probe.surface, probe.logic))
    best, place = weights.max(-1)  # [H, G, T]
    event = copied[place] & (tokens[place] == answer)
    steps = torch.isin(answer, tokens[copied]).sum().clamp_min(1)
    surface = (best * event).sum(-1).mean(1) / steps
    top = weights.topk(min(len(set(probe.surface) | set(probe.logic)), weights.shape[-1]))
    logic = (top.values * read[top.indices]).sum(-1).mean((1, 2))
    return surface, logic


def _marked(positions: Sequence[int], tokens: Tensor) -> Tensor:
    index = torch.tensor(list(positions), dtype=torch.int64, device=tokens.device)
    return torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, index, True)


@dataclass(kw_only=True)
class HeadObserver(ScorerDefaults):
    """Notes the behaviour of every layer while a probe's answer is fed; it never scores."""

    probe: Probe
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def observe(self, step: Step, store: Store) -> None:
        first, n = len(self.probe.prompt) - 1, len(self.probe.answer)
        if step.positions.shape[1] != n or int(step.positions[0, 0]) != first:
            return  # the prompt itself
        weights = step.attention(store)[0, ..., : first + 1]  # [H, G, n, S]
        self.found[step.layer.ordinal] = behaviour(weights, self.probe)

    def score(self, step: Step, store: Store) -> Tensor:
        raise NotImplementedError("an observer is given no schedule")


def averaged(observers: Sequence[HeadObserver]) -> Behaviours:
    """Return the mean over probes."""
    tables = []
    for which in (0, 1):
        each = [torch.stack([x.found[n][which] for n in sorted(x.found)]) for x in observers]
        mean = torch.stack(each).double().mean(0)  # [L, H]
        tables.append(tuple(tuple(row) for row in mean.tolist()))
    return Behaviours(surface=tables[0], logic=tables[1])
