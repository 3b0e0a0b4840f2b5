"""CONF-KV: the surer the model was of its last token, the less its cache may hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import padded, prompt, tiny
from torch import Tensor

import kvsieve
from kvsieve.allocators import ByConfidence
from kvsieve.errors import EngineError, RecipeError
from kvsieve.interfaces import Round
from kvsieve.prediction import Confidence, Prediction

from .support import Layer, Row, Run, draw, mean, rows, softmax
from .support import best as best_of

CAP, LEAST, SINKS, RECENT, W = 12, 5, 1, 2, 4
RHO, LAMBDA, TAU = 0.8, 0.6, 9.0


def recipe(budget: int | float = CAP, **options: Any) -> kvsieve.Recipe:
    small: dict[str, Any] = {"least": LEAST, "sinks": SINKS, "recent": RECENT, "window": W}
    small |= {"smoothing": RHO, "mass": LAMBDA, "reach": TAU, "slack": 0}
    return kvsieve.recipe("conf-kv", budget=budget, **(small | options))


def predicted(*rows: list[float]) -> Prediction:
    """What a model predicts with these probabilities."""
    return Prediction.of(torch.tensor(rows).log())


def target(p: Prediction, least: int | float, cap: int, **weights: float) -> list[int]:
    allocator = ByConfidence(least=least, slack=0, confidence=Confidence(**weights))
    budgets = torch.full((len(p.top),), cap)
    return allocator.target(
        Round(budgets=budgets, layers=(0,), layer_count=1, prediction=p)
    ).tolist()


def test_hand_example() -> None:
    p = predicted([0.7, 0.1, 0.1, 0.1])
    assert float(p.entropy) == pytest.approx(0.9404, abs=1e-4)
    assert float(p.margin) == pytest.approx(math.log(7), abs=1e-5)
    assert float(p.top) == pytest.approx(0.7)
    for name, want in (("entropy", 0.3216), ("margin", 0.8571), ("top", 0.7)):
        alone = {"entropy": 0.0, "margin": 0.0, "top": 0.0} | {name: 2.0}
        assert float(Confidence(**alone).of(p)) == pytest.approx(want, abs=1e-4)
    assert float(Confidence().of(p)) == pytest.approx(0.6263, abs=1e-4)
    assert target(p, 4, 12) == [7]


def test_a_calibrated_range_of_the_entropy() -> None:
    p = predicted([0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], [0.25] * 4)
    sure = Confidence(entropy=1, margin=0, top=0, low=0.5, high=1.0).of(p).tolist()
    assert sure == pytest.approx([(1.0 - 0.9404) / 0.5, 1.0, 0.0], abs=1e-3)


def test_certain_and_uniform_predictions_are_the_ends() -> None:
    p = predicted([1.0, 0.0, 0.0, 0.0], [0.25] * 4)
    assert target(p, 4, 12) == [4, 12 - round(8 * 0.25 / 3)]
    assert target(p, 4, 12, top=0.0) == [4, 12]
    assert target(p, 0.25, 12) == target(p, 3, 12)


def test_warmer_is_less_certain_and_a_shift_of_logits_is_nothing() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 3
    sure = [float(Confidence().of(Prediction.of(logits / t))) for t in (0.3, 0.6, 1, 2, 5)]
    assert sure == sorted(sure, reverse=True) and sure[0] > sure[-1] + 0.3
    shifted = Confidence().of(Prediction.of(logits + 100))
    assert float(shifted) == pytest.approx(sure[2], abs=1e-4)


def test_last_real_tokens_count() -> None:
    made = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 8, generator=made)
    live = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    before = Prediction.of(torch.randn(3, 8, generator=made))
    got = Prediction.after(before, logits, live)
    want = [Prediction.of(x) for x in (logits[:, 1], logits[:, 3])]
    assert got.entropy.tolist() == [
        float(want[0].entropy[0]),
        float(want[1].entropy[1]),
        float(before.entropy[2]),
    ]
    with pytest.raises(EngineError, match="left out"):
        Prediction.after(before, logits[:, -1:], live)
    Prediction.after(before, logits[:, -1:], live[1:2].expand(3, -1))


class Head:
    """One KV head of the described loop, its state in dictionaries."""

    def __init__(self, row: Row, h: int) -> None:
        self.row, self.h = row, h
        self.slots: list[int] = []
        self.mass: dict[int, float] = {}

    def attention(self, t: int, slots: list[int]) -> dict[int, float]:
        """The group's mean attention of query t."""
        each = [self.row.attention_to(slots, self.h, g, t) for g in self.row.groups]
        return {i: mean(a[j] for a in each) for j, i in enumerate(slots)}

    def fill(self, n: int) -> None:
        self.slots = list(range(n))
        asked = range(max(0, n - W), n)
        seen = [self.attention(t, list(range(t + 1))) for t in asked]
        self.mass = {i: mean(a.get(i, 0.0) for a in seen) for i in self.slots}
        self.cut(n - 1, CAP)

    def step(self, t: int, budget: int) -> None:
        self.slots.append(t)
        for i, a in self.attention(t, self.slots).items():
            self.mass[i] = RHO * self.mass[i] + (1 - RHO) * a if i in self.mass else a
        self.cut(t, budget)

    def cut(self, t: int, budget: int) -> None:
        top = max(self.mass[i] for i in self.slots)
        score = [
            LAMBDA * self.mass[i] / top + (1 - LAMBDA) * math.exp(-(t - i) / TAU)
            for i in self.slots
        ]
        n = len(self.slots)
        if n > budget:
            safe = [*range(SINKS), *range(n - RECENT, n)]
            self.slots = [self.slots[j] for j in best_of(score, budget, safe)]


def logits_of(step: int, B: int) -> Tensor:
    """Logits of changing sharpness, other ones for every row and step."""
    made = torch.Generator().manual_seed(step)
    return torch.randn(B, 1, 32, generator=made) * (1 + 7 * torch.rand(B, 1, 1, generator=made))


def budget_of(logits: Tensor) -> int:
    """B_t by the formulas, from one row's logits."""
    p = sorted(softmax(logits.double().tolist()), reverse=True)
    entropy = -sum(x * math.log(x) for x in p if x)
    c = mean([1 - entropy / math.log(len(p)), 1 - p[1] / p[0], p[0]])
    return round(LEAST + (1 - c) * (CAP - LEAST))


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_every_step_is_that_of_a_simulation(layout: Any) -> None:
    layer, lengths = draw(B=3, S=44, padding=(0, 6, 14), seed=2), (20, 14, 6)
    heads = [[Head(row, h) for h in row.heads] for row in rows(layer)]
    run = Run(recipe(layout=layout), layer.part(0, 20))
    for row, n in zip(heads, lengths, strict=True):
        for head in row:
            head.fill(n)
    chosen: list[list[int]] = [[], [], []]
    for t in range(20, 44):
        assert run.kept() == [[head.slots for head in row] for row in heads]
        logits = logits_of(t, 3)
        outlook = run.session.outlook
        assert outlook is not None
        outlook.take(logits)
        run.feed(layer.part(t, t + 1))
        for b, n in enumerate(lengths):
            chosen[b].append(budget_of(logits[b, 0]))
            for head in heads[b]:
                head.step(n + t - 20, chosen[b][-1])
    assert run.kept() == [[head.slots for head in row] for row in heads]
    assert len({n for row in chosen for n in row}) > 4, "budgets were to vary"
    report = run.session.report()
    assert report.chosen is not None
    for b, n in enumerate(lengths):
        held = [size for _, size in report.chosen[b]]
        assert [seen for seen, _ in report.chosen[b]] == list(range(n, n + 25))
        assert max(held) <= CAP and held[1:][-1] <= chosen[b][-1]
        for before, after, allowed in zip(held, held[1:], chosen[b], strict=False):
            assert after == min(before + 1, allowed), "what is gone does not come back"


def test_slack_puts_off_evictions_but_not_above_the_cap() -> None:
    allocator = ByConfidence(least=4, slack=3)
    p = predicted([1.0, 0.0], [0.5, 0.5])
    live = [torch.tensor([[7, 8], [10, 13]])]
    round = Round(budgets=torch.tensor([12, 12]), layers=(0,), layer_count=1, live=live)
    scores = [torch.zeros(2, 2, 13)]
    assert allocator.allocate(scores, round)[0].tolist() == [[7, 8], [10, 12]]
    told = Round(
        budgets=torch.tensor([12, 12]), layers=(0,), layer_count=1, live=live, prediction=p
    )
    assert allocator.allocate(scores, told)[0].tolist() == [[7, 4], [10, 11]]
    scores[0][0, 1, :6] = torch.inf
    assert allocator.allocate(scores, told)[0].tolist()[0] == [7, 8], "protected: 6, and 3 of slack"


def test_by_recency_alone_it_is_a_sliding_window() -> None:
    layer = draw(B=1, S=30, seed=3)
    run = Run(recipe(mass=0.0, least=1.0), layer.part(0, 20))
    same = Run(kvsieve.recipe("streaming-llm", budget=CAP, sinks=SINKS), layer.part(0, 20))
    for t in range(20, 30):
        assert run.session.outlook is not None
        run.session.outlook.take(logits_of(t, 1))
        run.feed(layer.part(t, t + 1))
        same.feed(layer.part(t, t + 1))
        assert run.kept() == same.kept()


def test_a_finished_row_stays_as_it_is() -> None:
    layer = draw(B=2, S=22, seed=4)
    run = Run(recipe(), layer.part(0, 20))
    assert run.session.outlook is not None
    run.session.outlook.take(torch.eye(8)[None].expand(2, -1, -1)[:, :1] * 90)  # sure: B_min
    last = layer.part(20, 21)
    live = torch.tensor([[True], [False]])
    before, mass = run.kept()[1], run.store()["mass"][1].clone()
    run.feed(Layer(queries=last.queries, keys=last.keys, values=last.values, live=live))
    assert run.kept()[1] == before and len(before[0]) == CAP
    assert [len(head) for head in run.kept()[0]] == [LEAST] * 2
    assert torch.equal(run.store()["mass"][1][:, :CAP], mass)


@torch.no_grad()
def test_the_logits_of_every_forward_must_be_seen() -> None:
    model = tiny("llama")
    with kvsieve.Cache(model, recipe()) as cache:
        model.model(prompt(20), past_key_values=cache)
        with pytest.raises(EngineError, match="needs the logits"):
            model(prompt(1, 2), past_key_values=cache)
    with kvsieve.Cache(model, recipe()) as cache:
        model(prompt(20), past_key_values=cache)
        model(prompt(1, 2), past_key_values=cache, return_dict=False)
        with pytest.raises(EngineError, match="return_dict=True"):
            model(prompt(1, 3), past_key_values=cache)


@torch.no_grad()
def test_right_padding_needs_all_logits() -> None:
    model = tiny("llama")
    ids, mask = padded([prompt(20), prompt(12, 1)], side="right")
    with kvsieve.Cache(model, recipe()) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
    with (
        kvsieve.Cache(model, recipe()) as cache,
        pytest.raises(EngineError, match="logits_to_keep"),
    ):
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)


def test_beams_take_their_predictions_with_them() -> None:
    model = tiny("llama")
    ids, mask = padded([prompt(30), prompt(19, 1)])
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with kvsieve.attach(model, recipe()) as run:
        together = model.generate(ids, attention_mask=mask, **options)
    with kvsieve.attach(model, recipe()):
        alone = model.generate(ids[:1], **options)
    assert torch.equal(together[:1], alone)
    assert len(run.report.chosen or []) == 6
    assert max(n for row in run.report.chosen or [] for _, n in row) <= CAP
    with kvsieve.attach(model, recipe(60, least=1.0)):
        wide = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(wide, model.generate(ids, attention_mask=mask, **options))
    assert not torch.equal(wide, together)


def test_generate_chooses_from_the_model_s_own_logits() -> None:
    model = tiny("llama")
    with kvsieve.attach(model, recipe(mass=0.5)) as run:
        out = model.generate(
            prompt(30),
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    chosen = (run.report.chosen or [])[0]
    held = chosen[0][1]
    assert held == CAP
    for (_, after), logits in zip(chosen[1:], out.logits, strict=False):
        allowed = budget_of(logits[0])
        assert after == min(held + 1, allowed)
        held = after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 0}, "least=0"),
        ({"least": 1.5}, "least=1.5"),
        ({"slack": -1}, "negative"),
        ({"entropy": -1.0}, "weights"),
        ({"entropy": 0.0, "margin": 0.0, "top": 0.0}, "weights"),
        ({"low": 3.0, "high": 2.0}, "low below high"),
        ({"mass": 1.2}, "share from 0 to 1"),
        ({"smoothing": 1.0}, "below 1"),
        ({"reach": 0.0}, "above 0"),
        ({"window": 0}, "1 query or more"),
    ],
)
def test_refuses_what_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**options)
