"""SurfaceLogicKV (in its style): budgets by what heads copy and gather, tokens as in SnapKV."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny

import kvsieve
from kvsieve.behaviours import Behaviours, Probe, behaviour
from kvsieve.engines.transformers.heads import measure_heads
from kvsieve.errors import RecipeError, UnsupportedLayout
from kvsieve.interfaces import Round
from kvsieve.shares import Shares, divide

from .support import Layer, Run, Vector, best, draw, mean, rows, window_attention

W, KERNEL, BUDGET = 3, 3, 9
Tables = list[list[float]]


def recipe(budget: int = BUDGET, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe(
        "surface-logic-kv", budget=budget, **({"window": W, "kernel": KERNEL} | options)
    )


def write(path: Path, surface: Tables, logic: Tables) -> str:
    path.write_text(json.dumps({"surface": surface, "logic": logic}), "utf-8")
    return str(path)


def budgets(
    surface: Tables,
    logic: Tables,
    b: int,
    least: int,
    live: int,
    *,
    weight: float = 0.5,
    mu: float = 0.5,
    nu: float = 0.9,
) -> list[list[int]]:
    """The two stages, then the largest remainder; here no head may reach its cap."""
    L, H = len(surface), len(surface[0])
    total_s, total_l = sum(map(sum, surface)), sum(map(sum, logic))
    importance = [
        [weight * s / total_s + (1 - weight) * x / total_l for s, x in zip(a, c, strict=True)]
        for a, c in zip(surface, logic, strict=True)
    ]
    pool = L * H * (b - least)
    exact: dict[tuple[int, int], float] = {}
    for n, layer in enumerate(importance):
        B_l = H * least + pool * ((1 - mu) / L + mu * sum(layer))
        for h, x in enumerate(layer):
            share = (1 - nu) / H + nu * x / sum(layer)
            exact[n, h] = least + (B_l - H * least) * share
    assert max(exact.values()) < live
    counts = {key: math.floor(x) for key, x in exact.items()}
    order = sorted(exact, key=lambda key: (counts[key] - exact[key], key))
    for key in order[: L * H * b - sum(counts.values())]:
        counts[key] += 1
    return [[counts[n, h] for h in range(H)] for n in range(L)]


SURFACE, LOGIC = [[0.3, 0.01], [0.02, 0.1]], [[0.01, 0.2], [0.05, 0.06]]


@pytest.mark.parametrize(
    "options", [{}, {"mu": 1.0, "nu": 1.0}, {"surface": 1.0}, {"surface": 0.0, "mu": 0.2}], ids=str
)
def test_budgets_and_kept_sets(options: dict[str, Any], tmp_path: Path) -> None:
    layers = [draw(S=40, padding=(0, 6), seed=seed) for seed in (0, 1)]
    path = write(tmp_path / "heads.json", SURFACE, LOGIC)
    run = Run(recipe(heads=path, **options), *layers)
    given = {"weight" if key == "surface" else key: x for key, x in options.items()}
    for b, n in enumerate((40, 34)):
        want = budgets(SURFACE, LOGIC, BUDGET, max(W, BUDGET // 4), n, **given)
        assert sum(map(sum, want)) == 4 * BUDGET
        for ordinal, layer in enumerate(layers):
            row = rows(layer)[b]
            for h in row.heads:
                scores = snapkv(layer, b, h)
                protected = range(n - W, n)
                assert run.kept(ordinal)[b][h] == best(scores, want[ordinal][h], protected)


def snapkv(layer: Layer, b: int, h: int, kernel: int = KERNEL) -> Vector:
    """Window attention, max-pooled, averaged over the group; zeros for the window."""
    return window_attention(rows(layer)[b], h, W, kernel, max) + [0.0] * W


def test_taken_from_the_prompt() -> None:
    """S: a head's highest score; L: the sum of the next eight."""
    layers = [draw(S=40, seed=seed) for seed in (2, 3)]
    run = Run(recipe(), *layers)
    for b in range(2):
        ordered = [
            [sorted(snapkv(layer, b, h), reverse=True) for h in range(2)] for layer in layers
        ]
        surface = [[x[0] for x in layer] for layer in ordered]
        logic = [[sum(x[1:9]) for x in layer] for layer in ordered]
        want = budgets(surface, logic, BUDGET, W, 40)
        got = [[len(head) for head in run.kept(n)[b]] for n in range(2)]
        assert got == want


def test_without_importance_it_is_snapkv() -> None:
    layers = [draw(S=30, padding=(0, 5), seed=seed) for seed in (4, 5)]
    plain = kvsieve.recipe("snapkv", budget=BUDGET, window=W, kernel=KERNEL, pooling="max")
    got, want = (Run(made, *layers) for made in (recipe(mu=0.0, nu=0.0), plain))
    for ordinal in (0, 1):
        assert got.kept(ordinal) == want.kept(ordinal)


def test_aware_heads_that_copy_are_not_pooled(tmp_path: Path) -> None:
    layers = [draw(S=30, seed=seed) for seed in (6, 7)]
    path = write(tmp_path / "heads.json", SURFACE, LOGIC)
    aware = Run(recipe(heads=path, aware=True), *layers)
    for ordinal, layer in enumerate(layers):
        for h in (0, 1):
            copies = SURFACE[ordinal][h] > LOGIC[ordinal][h]
            scores = snapkv(layer, 0, h, 1 if copies else KERNEL)
            head = aware.kept(ordinal)[0][h]
            assert head == best(scores, len(head), range(30 - W, 30))


# -- the allocator ---------------------------------------------------------------------------------


def allocate(shares: Shares, live: Sequence[Sequence[int]], b: int) -> list[list[int]]:
    L, H, S = len(live), len(live[0]), 1 + max(map(max, live))
    held = [torch.tensor([row]) for row in live]
    scores = [torch.zeros(1, H, S) for _ in live]
    round = Round(budgets=torch.tensor([b]), layers=tuple(range(L)), layer_count=L, live=held)
    return [x[0].tolist() for x in shares.allocate(scores, round)]


def given(importance: Tables, **options: float) -> Shares:
    table = tuple(tuple(row) for row in importance)
    return Shares(surface=table, logic=table, **options)  # type: ignore[arg-type]


def test_hand_example() -> None:
    """1 layer, b 4, b_min 2, I (.75, .25), nu 1: a pool of 4 makes budgets 5 and 3."""
    assert allocate(given([[0.75, 0.25]], nu=1.0, least=2.0), [[20, 20]], 4) == [[5, 3]]


def test_one_head_with_all_importance_gets_the_pool_up_to_what_it_has() -> None:
    one = given([[0.0, 1.0], [0.0, 0.0]], mu=1.0, nu=1.0, least=4.0)
    assert allocate(one, [[90, 90], [90, 90]], 8) == [[2, 26], [2, 2]]
    assert allocate(one, [[90, 14], [90, 90]], 8) == [[6, 14], [6, 6]]


def test_scale_does_not_matter_and_more_importance_gives_more() -> None:
    made = torch.Generator().manual_seed(8)
    for _ in range(20):
        table = torch.rand(3, 4, generator=made).tolist()
        counts = allocate(given(table), [[80] * 4] * 3, 16)
        assert sum(map(sum, counts)) == 3 * 4 * 16
        scaled = [[7.0 * x for x in row] for row in table]
        assert allocate(given(scaled), [[80] * 4] * 3, 16) == counts
        for row, held in zip(table, counts, strict=True):
            order = sorted(range(4), key=lambda h, row=row: row[h])
            assert [held[h] for h in order] == sorted(held)


def test_divide_is_exact_whatever_is_asked() -> None:
    made = torch.Generator().manual_seed(9)
    for _ in range(200):
        most = torch.randint(0, 30, (7,), generator=made)
        floor = torch.minimum(torch.randint(0, 9, (7,), generator=made), most)
        share = torch.rand(7, generator=made).double() ** 4
        share[torch.rand(7, generator=made) < 0.3] = 0.0
        low, high = int(floor.sum()), int(most.sum())
        total = low + int((high - low) * float(torch.rand(1, generator=made)))
        counts = divide(total, share, floor, most)
        assert int(counts.sum()) == total
        assert bool((counts >= floor).all()) and bool((counts <= most).all())


# -- measuring -------------------------------------------------------------------------------------


def test_behaviours_of_made_up_attention() -> None:
    """Head 0 copies token 2, head 1 reads 4 and 5, head 2 looks everywhere."""
    probe = Probe(prompt=[7, 3, 9, 1, 6, 5, 2, 8], answer=[9, 4], surface=[2], logic=[4, 5])
    copier = [0.05, 0.05, 0.6, 0.05, 0.05, 0.05, 0.05, 0.1]
    reader = [0.05, 0.05, 0.05, 0.05, 0.3, 0.4, 0.05, 0.05]
    weights = torch.tensor([[[copier] * 2], [[reader] * 2], [[[0.125] * 8] * 2]])
    surface, logic = behaviour(weights, probe)
    # Only the first step's token is copied; the second step's highest is no copy of 4.
    assert surface.tolist() == pytest.approx([0.6, 0.0, 0.0])
    assert logic[1].item() == pytest.approx(0.7)
    assert logic[2].item() <= 3 * 0.125
    grouped = weights.expand(-1, 4, -1, -1)
    for x, y in zip(behaviour(grouped, probe), (surface, logic), strict=True):
        torch.testing.assert_close(x, y)


def attentions(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Every layer's attention ``[Hq, n, n]`` by the model itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True)
    model.set_attn_implementation(before)
    return [x[0].double() for x in out.attentions]


def test_measured_heads_are_those_of_the_model_s_own_attention(tmp_path: Path) -> None:
    model = tiny("llama")
    made = [prompt(24, seed)[0].tolist() for seed in (1, 2)]
    probes = [
        Probe(prompt=made[0][:20], answer=[made[0][3], made[0][4]], surface=[3, 4], logic=[9, 10]),
        Probe(prompt=made[1][:15], answer=[made[1][6]], surface=[6], logic=[1, 2, 8]),
    ]
    found = measure_heads(model, probes)
    H = len(found.surface[0])
    for layer in range(2):
        for h in range(H):
            surface, logic = [], []
            for probe in probes:
                S, wanted = len(probe.prompt), {*probe.surface, *probe.logic}
                each = attentions(model, [*probe.prompt, *probe.answer])[layer]
                group = len(each) // H
                for g in range(h * group, (h + 1) * group):
                    steps = [each[g, S - 1 + t, :S].tolist() for t in range(len(probe.answer))]
                    copied = 0.0
                    for a, y in zip(steps, probe.answer, strict=True):
                        j = max(range(S), key=lambda i, a=a: a[i])
                        copied += a[j] if j in probe.surface and probe.prompt[j] == y else 0.0
                    surface.append((copied / len(probe.answer), 1 / group))
                    read = []
                    for a in steps:
                        top = sorted(range(S), key=lambda i, a=a: -a[i])[: len(wanted)]
                        read.append(sum(a[j] for j in top if j in probe.logic))
                    logic.append((mean(read), 1 / group))
            for got, want in ((found.surface, surface), (found.logic, logic)):
                value = sum(x * share for x, share in want) / len(probes)
                assert got[layer][h] == pytest.approx(value, abs=1e-5)
    assert max(map(max, found.logic)) > 0
    other = measure_heads(model, probes[::-1])
    torch.testing.assert_close(torch.tensor(other.logic), torch.tensor(found.logic))
    found.save(tmp_path / "heads.json")
    assert Behaviours.load(tmp_path / "heads.json") == found
    with kvsieve.attach(model, recipe(heads=str(tmp_path / "heads.json"))) as run:
        model.generate(prompt(30), max_new_tokens=2, do_sample=False)
    assert sum(map(sum, run.report.slots[0])) == 4 * (BUDGET + 1)


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"aware": True}, {"mu": 1.5}, {"nu": -0.1}, {"surface": 2.0}, {"least": 0.5}, {"kernel": 2}],
    ids=str,
)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"surface": [[1]]}',
        '{"surface": [[1, 2], [3]], "logic": [[1, 2], [3, 4]]}',
        '{"surface": [[-1]], "logic": [[1]]}',
        '{"surface": [[1]], "logic": [[1], [1]]}',
    ],
)
def test_refuses_files_that_hold_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    with pytest.raises(RecipeError, match="head scores"):
        recipe(heads=str(path))
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match="head scores"):
        recipe(heads=str(path))


def test_refuses_heads_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path / "heads.json", [[1.0] * 2] * 3, [[1.0] * 2] * 3)
    with pytest.raises(RecipeError, match="Measure"):
        Run(recipe(heads=path), draw(S=30), draw(S=30, seed=1))


def test_a_dense_layout_is_refused() -> None:
    with pytest.raises(UnsupportedLayout):
        recipe(layout="dense")


def test_probes_must_make_sense() -> None:
    whole = {"prompt": [1, 2, 3], "answer": [2], "surface": [1]}
    for wrong in ({"prompt": [1]}, {"answer": []}, {"surface": []}, {"surface": [3]}):
        with pytest.raises(RecipeError):
            Probe(**(whole | wrong))
    with pytest.raises(RecipeError):
        measure_heads(tiny("llama"), [])
