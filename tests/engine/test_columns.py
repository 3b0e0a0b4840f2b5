"""The Transformers engine under a schedule of block columns, the one that vLLM follows."""

from __future__ import annotations

import models
import pytest
import torch
from running import decode

import kvsieve
from kvsieve.columns import Columns, ColumnSchedule


def column_recipe(method: str, columns: Columns, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe(
        method, budget=columns.budget, schedule=ColumnSchedule(columns), **options
    )


@pytest.mark.parametrize("policy", ["after-prompt", "chunk"])
@pytest.mark.parametrize("chunks", [(50,), (20, 17, 13), (1, 30, 19)])
def test_counts_follow_the_columns(policy: str, chunks: tuple[int, ...]) -> None:
    columns = Columns(block=8, budget=24, interval=16, policy=policy)  # type: ignore[arg-type]
    model = models.tiny("llama")
    trace = decode(
        model,
        column_recipe("keydiff", columns),
        models.prompt(50),
        steps=60,
        chunks=chunks,
        prompt_length=50,
    )
    lengths = [sum(chunks[: i + 1]) for i in range(len(chunks))] + list(range(51, 111))
    for n, counts in zip(lengths, trace.counts, strict=True):
        assert set(counts.flatten().tolist()) == {columns.held(n, 50)}, n


def test_the_newest_tokens_in_no_whole_column_stay() -> None:
    columns = Columns(block=8, budget=16, interval=8)
    model = models.tiny("qwen3")
    trace = decode(
        model, column_recipe("keydiff", columns), models.prompt(53), steps=20, prompt_length=53
    )
    for n, layers in zip(range(53, 74), trace.held, strict=True):
        first = columns.dropped(n, 53) * 8
        for rows in layers:
            for head in rows[0]:
                assert head[-len(range(first, n)) :] == list(range(first, n)) or first == n


def test_rows_of_a_batch_are_as_alone() -> None:
    columns = Columns(block=4, budget=8, interval=8, policy="chunk")
    model = models.tiny("llama")
    recipe = column_recipe("knorm", columns)
    rows = [models.prompt(31, seed=1), models.prompt(18, seed=2)]
    ids, mask = models.padded(rows)
    both = decode(model, recipe, ids, mask, steps=20)
    for b, row in enumerate(rows):
        alone = decode(model, recipe, row, steps=20)
        assert torch.equal(both.tokens[b], alone.tokens[0])
        assert [layer[b] for layer in both.held[-1]] == [layer[0] for layer in alone.held[-1]]
