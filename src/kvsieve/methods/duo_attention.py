"""DuoAttention: retrieval heads keep everything, streaming heads their first and recent tokens
("DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv
2410.10819).

    all heads keep the first ``sinks`` and last ``recent`` tokens; in order of their gates a[l, h],
    heads keep all other tokens too, until the model's budget is used

a[l, h] in [0, 1]: how much KV head h of layer l needs the other tokens. Gates come from a file of
`kvsieve calibrate` (``stats``), or from a pattern in the form in which the paper's are published
(``pattern``: a TSV file, a line for each layer, a number for each KV head, full_attention_heads.tsv
in its repository). They are known before anything runs, so that a layer is cut as soon as it has
been read. O(S) per event; no query is looked at.

Differs from the paper: the paper trains gates on passkey retrieval, with a loss on the model's
output and an L1 penalty; ours are measured on calibration text without any training. A gate is the
share of its output's norm that a head loses if it sees first and recent tokens only, one head at a
time. That tells which heads use far tokens on such text; training would also tell which of them
the answer depends on. With ``pattern`` the paper's own gates are used. The paper thresholds gates
and takes the size that comes of it; here the budget is given, and the head on the line keeps, of
its other tokens, the newest. Streaming heads are cut every ``interval`` steps, not at each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Signal
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.scorers import Recency
from kvsieve.shares import RetrievalHeads
from kvsieve.statistics import Statistics, read


@dataclass(frozen=True, kw_only=True)
class GatedRecency(Recency):
    """The later, the better; which heads are asked at all, the gates decide."""

    statistics: Statistics | None = None

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.STATISTICS})


@method(
    name="duo-attention",
    paper="DuoAttention",
    year=2024,
    arxiv="2410.10819",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
)
def duo_attention(
    *,
    stats: str | os.PathLike[str] | Statistics | None = None,
    pattern: str | os.PathLike[str] | None = None,
    sinks: int = 128,
    recent: int = 256,
    interval: int = 16,
) -> Recipe:
    """``stats``: a file of `kvsieve calibrate` for this model, or ``pattern``: a TSV file of gates;
    ``sinks``, ``recent``: first and last tokens that streaming heads keep; ``interval``: decode
    steps between two compressions.
    """
    if stats is not None and pattern is not None:
        raise RecipeError("duo-attention: give stats or pattern, not both.")
    gates = read(stats, "head_gate") if pattern is None else Statistics.pattern(pattern)
    return Recipe(
        method="duo-attention",
        scorer=GatedRecency(statistics=gates),
        allocator=RetrievalHeads(statistics=gates),
        schedule=AfterPrefill() | Every(interval),
        layout="ragged",
        sinks=sinks,
        recent=recent,
    )
