"""Statistics files: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kvsieve
from kvsieve import Recipe
from kvsieve.errors import RecipeError, UnsupportedSignal
from kvsieve.interfaces import Signal
from kvsieve.statistics import TENSORS, Identity, Statistics

CPU = torch.device("cpu")


def identity(**changes: Any) -> Identity:
    facts = {"architecture": "llama", "layers": 3, "heads": 2, "group": 2, "head_dim": 4}
    sample = torch.linspace(-2, 2, 9) ** 3
    return Identity(**({"sample": sample} | facts | changes))


def made(**changes: Any) -> Statistics:
    whose = identity()
    tensors = {name: torch.rand(whose.shape(name)) for name in TENSORS}
    given = {"tensors": tensors, "identity": whose, "source": "s", "facts": {"tokens": 7}}
    return Statistics(**(given | changes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made().save(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def test_what_is_written_is_read_back(file: Path) -> None:
    torch.manual_seed(0)  # as when the file was made
    first, again = made(), Statistics.load(file)
    assert again == Statistics.load(file) != first
    assert again.source == repr(str(file)) and again.facts == {"tokens": 7}
    for name in TENSORS:
        assert torch.equal(again.tensors[name], first.tensors[name])
        assert torch.equal(again.of(name, 2, CPU), first.tensors[name][2])
    assert again.identity is not None and again.identity.same(identity())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x").touch()
    with pytest.raises(OSError, match=r"directory|exists"):
        made().save(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"sample": (torch.linspace(-2, 2, 9) ** 3).bfloat16().float()}, True),
        ({"sample": (torch.linspace(-2, 2, 9) ** 3).half().float()}, True),
        ({"sample": (torch.linspace(-2, 2, 9) ** 3) * 1.02}, False),
        ({"sample": torch.zeros(9)}, False),
        ({"sample": torch.zeros(8)}, False),
        ({"layers": 4}, False),
        ({"architecture": "qwen3"}, False),
    ],
)
def test_one_model_in_any_dtype_and_no_other(changes: dict[str, Any], same: bool) -> None:
    other = identity(**changes)
    assert identity().same(other) == other.same(identity()) == same
    if same:
        made().check(other)
    else:
        with pytest.raises(UnsupportedSignal, match=r"another model.*kvsieve calibrate"):
            made().check(other)


def test_other_weights_are_named() -> None:
    with pytest.raises(UnsupportedSignal, match="2 query heads each with other weights; this one"):
        made().check(identity(sample=torch.zeros(9)))


def test_shapes_are_checked_where_no_model_is_told() -> None:
    unknown = made(identity=None)
    unknown.check(identity())
    with pytest.raises(UnsupportedSignal, match=r"query_mean \[3, 2, 2, 4\].*takes \[5, 2, 2, 4\]"):
        unknown.check(identity(layers=5))


def test_what_is_missing_is_named() -> None:
    few = made(tensors={"query_filter": torch.zeros(3, 2, 4)}, facts={"no_head_gate": "Why. "})
    with pytest.raises(UnsupportedSignal, match=r"no head_gate, only query_filter. Why. Make"):
        few.of("head_gate", 0, CPU)
    with pytest.raises(UnsupportedSignal, match="has 3 layers; the model has more"):
        few.of("query_filter", 3, CPU)


def rewritten(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> None:
    save_file(tensors, path, None if header is None else {"kvsieve": json.dumps(header)})


def test_files_that_are_no_statistics(tmp_path: Path, file: Path) -> None:
    path, whose = tmp_path / "x", identity()
    with pytest.raises(RecipeError, match=r"Can't read the statistics.*kvsieve calibrate"):
        Statistics.load(path)
    for content in (b"", b"no safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="Can't read the statistics"):
            Statistics.load(path)
    sample = {"weight_sample": whose.sample}
    good = {"version": 1, "facts": {}, "model": whose.plain()}
    for tensors, header in (
        ({"a": torch.zeros(1)}, None),
        (sample, good | {"version": 2}),
        ({"query_mean": torch.zeros(1)}, good),
    ):
        rewritten(path, tensors, header)
        with pytest.raises(RecipeError, match="holds no statistics"):
            Statistics.load(path)
    rewritten(path, sample | {"head_gate": torch.zeros(3, 3)}, good)
    with pytest.raises(RecipeError, match=r"damaged: head_gate is \[3, 3\]"):
        Statistics.load(path)
    rewritten(path, sample | {"more": torch.zeros(3)}, good)
    with pytest.raises(RecipeError, match="damaged: more"):
        Statistics.load(path)


# -- pattern files ---------------------------------------------------------------------------------


def test_a_pattern_file(tmp_path: Path) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.5\t1.25\n-0.1\t0.75\n1e-3\t0\n\n", "utf-8")
    found = Statistics.pattern(path)
    want = [[0.5, 1.0], [0.0, 0.75], [1e-3, 0.0]]
    assert torch.equal(found.tensors["head_gate"], torch.tensor(want))
    found.check(identity())
    with pytest.raises(UnsupportedSignal, match=r"head_gate \[3, 2\]"):
        found.check(identity(heads=4))


@pytest.mark.parametrize("text", ["", "a\tb\n", "1\t2\n3\n", "1 2\n", "nan\t1\n"])
def test_files_that_are_no_pattern(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match="pattern"):
        Statistics.pattern(path)
    with pytest.raises(RecipeError, match="Can't read the pattern"):
        Statistics.pattern(tmp_path / "none.tsv")


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q-filters", "duo-attention", "expected-attention"])
def test_a_recipe_with_a_file_reads_back(name: str, file: Path) -> None:
    recipe = kvsieve.recipe(name, budget=4096, stats=file)
    assert recipe.statistics is not None and Signal.STATISTICS in recipe.needs
    plain = recipe.to_dict()
    assert plain["stats"] == str(file)
    assert Recipe.from_dict(json.loads(json.dumps(plain))).scorer == recipe.scorer
    recipe.check_statistics()


@pytest.mark.parametrize("name", ["q-filters", "duo-attention"])
def test_a_recipe_without_them_says_how_they_are_made(name: str) -> None:
    recipe = kvsieve.recipe(name, budget=4096)
    with pytest.raises(UnsupportedSignal, match=f"'{name}' needs statistics.*kvsieve calibrate"):
        recipe.check_statistics()
    kvsieve.recipe("expected-attention", budget=4096).check_statistics()


def test_both_sources_of_gates_are_refused(file: Path) -> None:
    with pytest.raises(RecipeError, match="stats or pattern, not both"):
        kvsieve.recipe("duo-attention", budget=4096, stats=file, pattern=file)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RecipeError, match=r"'/no/such.safetensors'.*kvsieve calibrate"):
        kvsieve.recipe("q-filters", budget=100, stats="/no/such.safetensors")


def test_identities_are_plain_values() -> None:
    assert Identity(sample=torch.zeros(1), **identity().plain()) == identity()
    assert dataclasses.replace(identity(), heads=3) != identity()
