"""Where Patrick-Ni/ReFreeKV stops, and what stays, setting by setting."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve.step import LayerInfo

from .recorded import Recorded, kept, load

SETTINGS = load("refreekv")[1]["settings"]


def layer(order: str) -> Recorded:
    tensors = load("refreekv")[0]
    query, key = tensors[f"{order}.query"], tensors[f"{order}.key"]
    info, scale = LayerInfo(ordinal=0), key.shape[-1] ** -0.5
    return Recorded(query=query, key=key, value=torch.zeros_like(key), scale=scale, info=info)


def recipe(order: str, tolerance: float) -> kvsieve.Recipe:
    header = load("refreekv")[1]
    own = {"sinks": header["sinks"], "window": header["window"], "whole": 0}
    return kvsieve.recipe("dbudgetkv", order=order, tolerance=tolerance, **own)


@pytest.mark.parametrize("name", SETTINGS)
def test_kept_sets(name: str) -> None:
    order, tolerance = SETTINGS[name]["order"], SETTINGS[name]["tolerance"]
    want = load("refreekv")[0][f"{name}.kept"]  # [B, query heads, N]
    got = kept(recipe(order, tolerance), [layer(order)])[0]
    groups = want.shape[1] // got.shape[1]
    assert torch.equal(got.repeat_interleave(groups, 1), want)
    stop = load("refreekv")[0][f"{name}.stop"]
    assert (want.shape[-1] - got.sum(-1)).tolist() == [[n] * got.shape[1] for n in stop.tolist()]


def test_the_recorded_rows_stop_at_different_places() -> None:
    for order in ("position", "attention"):
        stops = [load("refreekv")[0][f"{name}.stop"] for name in SETTINGS if order in name]
        assert torch.stack(stops).unique().numel() >= 6
