"""A layer without a model: drawn tensors, the same numbers as plain lists, and a recipe at work.

What the tests expect are loops over plain Python floats (fp64), written from the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsieve import Recipe
from kvsieve.interfaces import Scorer
from kvsieve.session import Session
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store

Vector = list[float]

FULL = (1.0, 0.3)  # RoPE over all four dimensions
PARTIAL = (0.7,)  # RoPE over the first two


@dataclass(frozen=True, kw_only=True)
class Layer:
    """``queries [B, H, G, S, D]``, ``keys``, ``values [B, H, S, D]``, ``live [B, S]`` or None.

    ``w_o [H, G, D, C]``; ``angles``: RoPE's angle per position, one for each pair of dimensions.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    live: Tensor | None = None
    w_o: Tensor | None = None
    angles: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.keys.shape[-1])

    def part(self, start: int, end: int) -> Layer:
        """Return the tokens ``start .. end - 1``."""
        return replace(
            self,
            queries=self.queries[:, :, :, start:end],
            keys=self.keys[:, :, start:end],
            values=self.values[:, :, start:end],
            live=None if self.live is None else self.live[:, start:end],
        )

    def info(self, ordinal: int = 0) -> LayerInfo:
        """Return what an engine would tell about this layer."""
        w_o = self.w_o
        return LayerInfo(
            ordinal=ordinal,
            output_projection=None if w_o is None else lambda: w_o,
            rotary=self._tables if self.angles else None,
        )

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        turned = positions[..., None].double() * torch.tensor(self.angles, dtype=torch.float64)
        doubled = torch.cat([turned, turned], -1)
        return doubled.cos().float(), doubled.sin().float()


def draw(
    *,
    B: int = 2,
    H: int = 2,
    G: int = 2,
    S: int = 12,
    D: int = 4,
    padding: Sequence[int] = (),
    seed: int = 0,
    **more: tuple[float, ...],
) -> Layer:
    """Draw a layer at random; ``padding`` gives the dead tokens at the left of each row."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    live = None
    if padding:
        live = torch.arange(S) >= torch.tensor(list(padding))[:, None]
    return Layer(
        queries=normal(B, H, G, S, D),
        keys=normal(B, H, S, D),
        values=normal(B, H, S, D),
        live=live,
        w_o=normal(H, G, D, 6),
        angles=more.get("angles", ()),
    )


def long_layer(*, G: int, queries: int, seed: int) -> Layer:
    """Draw 32k slots of four heads, with the last tokens' queries alone."""
    made = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 4, 1 << 15, 32, generator=made) for _ in range(2))
    asked = torch.randn(1, 4, G, queries, 32, generator=made)
    w_o = torch.randn(4, G, 32, 64, generator=made)
    return Layer(queries=asked, keys=keys, values=values, w_o=w_o)


def from_attention(weights: Sequence[Sequence[float]], values: Sequence[Vector] = ()) -> Layer:
    """Make one head whose last queries attend as given: a row of weights per query, newest last.

    ``values``: one vector per slot (default: zeros).
    """
    W, S = len(weights), len(weights[0])
    keys = torch.full((1, 1, S, W), -1e4)
    for w, row in enumerate(weights):
        for i, weight in enumerate(row):
            if weight:
                keys[0, 0, i, w] = math.log(weight) * math.sqrt(W)
    queries = torch.zeros(1, 1, 1, S, W)
    queries[0, 0, 0, S - W :] = torch.eye(W)
    rows = torch.tensor(list(values)) if values else torch.zeros(S, W)
    return Layer(queries=queries, keys=keys, values=rows[None, None], w_o=None)


@dataclass(frozen=True)
class Row:
    """The real tokens of one row as plain numbers: ``q[h][g][t]``, ``k[h][i]``, ``v[h][i]``."""

    q: list[list[list[Vector]]]
    k: list[list[Vector]]
    v: list[list[Vector]]
    scale: float

    @property
    def n(self) -> int:
        return len(self.k[0])

    @property
    def groups(self) -> range:
        return range(len(self.q[0]))

    @property
    def heads(self) -> range:
        return range(len(self.q))

    def attention(self, h: int, g: int, t: int) -> Vector:
        """Softmax attention of query t over the slots 0 .. t; zero behind it."""
        logits = [dot(self.q[h][g][t], self.k[h][i]) * self.scale for i in range(t + 1)]
        return softmax(logits) + [0.0] * (self.n - t - 1)

    def attention_to(self, slots: Sequence[int], h: int, g: int, t: int) -> Vector:
        """Softmax attention of query t over some slots alone, in their order."""
        return softmax([dot(self.q[h][g][t], self.k[h][i]) * self.scale for i in slots])


def rows(layer: Layer) -> list[Row]:
    """Return each row's real tokens."""
    out = []
    for b in range(layer.keys.shape[0]):
        real = torch.arange(layer.keys.shape[2])
        if layer.live is not None:
            real = real[layer.live[b]]
        q, k, v = (
            x.double() for x in (layer.queries[b, :, :, real], layer.keys[b], layer.values[b])
        )
        out.append(Row(q.tolist(), k[:, real].tolist(), v[:, real].tolist(), layer.scale))
    return out


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / (norm(a) * norm(b))


def mean(xs: Iterable[float]) -> float:
    values = list(xs)
    return sum(values) / len(values)


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    raised = [math.exp(x - top) for x in logits]
    return [x / sum(raised) for x in raised]


def project(v: Vector, w_o: list[Vector]) -> Vector:
    """Return ``v W_O`` for a matrix of D rows and C columns."""
    return [sum(v[d] * w_o[d][c] for d in range(len(v))) for c in range(len(w_o[0]))]


def turned(x: Vector, position: int, angles: tuple[float, ...]) -> Vector:
    """Apply RoPE at a position (a negative one turns back), rotate-half layout."""
    out, half = list(x), len(angles)
    for i, angle in enumerate(angles):
        c, s = math.cos(position * angle), math.sin(position * angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


def neighbours(xs: Vector, i: int, kernel: int) -> Vector:
    """Return the values under a pooling kernel centred on i; zeros beyond the ends."""
    reach = range(i - kernel // 2, i + kernel // 2 + 1)
    return [xs[j] if 0 <= j < len(xs) else 0.0 for j in reach]


def pooled(xs: Vector, kernel: int, how: Callable[[Vector], float] = mean) -> Vector:
    """Pool over neighbours, with zeros beyond the ends."""
    return [how(neighbours(xs, i, kernel)) for i in range(len(xs))]


def window_attention(
    row: Row, h: int, window: int, kernel: int = 1, how: Callable[[Vector], float] = mean
) -> Vector:
    """What the slots before the window get from its queries: their mean, pooled, group mean."""
    heads = []
    for g in row.groups:
        seen = [row.attention(h, g, t) for t in range(row.n - window, row.n)]
        raw = [mean(a[i] for a in seen) for i in range(row.n - window)]
        heads.append(pooled(raw, kernel, how))
    return [mean(x) for x in zip(*heads, strict=True)]


def table(layer: Layer, scorer: Scorer, ordinal: int = 0) -> tuple[Step, Store]:
    """Store the layer in one forward and return what its scorer would get."""
    store = Store(scorer.columns)
    positions = store.append(layer.keys, layer.values, layer.live)
    step = Step(
        layer=layer.info(ordinal),
        query=layer.queries,
        scale=layer.scale,
        positions=positions,
        live=layer.live,
        prefill=True,
    )
    scorer.observe(step, store)
    return step, store


def scores(layer: Layer, recipe: Recipe, ordinal: int = 0) -> list[list[Vector]]:
    """Return the recipe's scores of each row's real tokens: ``[b][h][i]``."""
    scorer = recipe.scorer
    assert scorer is not None
    step, store = table(layer, scorer, ordinal)
    if recipe.budget is not None:
        step.budgets = torch.full_like(store.seen, int(recipe.budget.value))
    return real_only(scorer.score(step, store), layer)


def real_only(score: Tensor, layer: Layer) -> list[list[Vector]]:
    """Cut padding from ``score [B, H, S]`` and return plain numbers."""
    assert score.shape == layer.keys.shape[:3], score.shape
    assert score.dtype is torch.float32
    if layer.live is None:
        return score.double().tolist()
    return [score[b][:, layer.live[b]].double().tolist() for b in range(score.shape[0])]


def expected(layer: Layer, formula: Callable[[Row, int], Vector]) -> list[list[Vector]]:
    """Apply ``formula(row, h)`` to every row and KV head."""
    return [[formula(row, h) for h in row.heads] for row in rows(layer)]


def assert_close(
    got: list[list[Vector]], want: list[list[Vector]], *, cut: int = 0, skip: int = 0
) -> None:
    """Compare to 1e-5; the last ``cut`` and first ``skip`` slots of each head are not scored."""
    for b, (got_row, want_row) in enumerate(zip(got, want, strict=True)):
        for h, (x, y) in enumerate(zip(got_row, want_row, strict=True)):
            assert len(x) == len(y)
            for i in range(skip, len(x) - cut):
                close = math.isclose(x[i], y[i], rel_tol=1e-5, abs_tol=1e-5)
                assert close, f"row {b}, head {h}, slot {i}: {x[i]} instead of {y[i]}"


def best(scores: Vector, count: int, protected: Iterable[int] = ()) -> list[int]:
    """Return the slots that stay: protected ones, then the best; ties go to the earlier one."""
    safe = set(protected)
    order = sorted(range(len(scores)), key=lambda i: (i not in safe, -scores[i], i))
    return sorted(order[:count])


def shared(
    heads: list[Vector], budget: int, floor: float, *, first: int = 0, window: int = 0
) -> list[list[int]]:
    """Return what stays where heads share a budget: each head's floor, then the best of all.

    The ``first`` and the last ``window`` slots of every head are protected.
    """
    safe = set()
    for h, head in enumerate(heads):
        protected = {*range(first), *range(len(head) - window, len(head))}
        safe |= {(h, i) for i in best(head, int(budget * floor), protected)}
        safe |= {(h, i) for i in protected}
    entries = [(h, i) for h, head in enumerate(heads) for i in range(len(head))]
    entries.sort(key=lambda e: (e not in safe, -heads[e[0]][e[1]], e))
    chosen = entries[: budget * len(heads)]
    return [sorted(i for h, i in chosen if h == head) for head in range(len(heads))]


class Run:
    """A recipe at work on layers that are fed by hand."""

    def __init__(self, recipe: Recipe, *layers: Layer) -> None:
        self.session = Session(recipe, [x.info(i) for i, x in enumerate(layers)])
        self.feed(*layers)

    def feed(self, *layers: Layer) -> None:
        """Run one forward: the same tokens' queries, keys and values in every layer."""
        self.session.begin(layers[0].keys.shape[2], layers[0].live, None)
        for i, x in enumerate(layers):
            self.session.append(i, x.keys, x.values)
            self.session.attend(i, x.queries, x.scale)
        self.session.end()

    def kept(self, ordinal: int = 0) -> list[list[list[int]]]:
        """Return the positions that a layer still holds: ``[b][h]``, in slot order."""
        store = self.session.layers[ordinal].store
        B, H = store.counts.shape
        position = store["position"].expand(B, H, -1)
        live = torch.ones_like(position, dtype=torch.bool) if store.live is None else store.live
        live = live.expand(B, H, -1)
        return [[position[b, h][live[b, h]].tolist() for h in range(H)] for b in range(B)]

    def store(self, ordinal: int = 0) -> Store:
        return self.session.layers[ordinal].store


def kept(recipe: Recipe, *layers: Layer) -> list[list[list[int]]]:
    """Return what the first layer holds after one forward under a recipe."""
    return Run(recipe, *layers).kept()
