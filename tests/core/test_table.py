"""The table against plain lists: every operation, both layouts, with padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import positions_of

from kvsieve.interfaces import Column
from kvsieve.store import Layout, Store
from kvsieve.store.dense import Dense
from kvsieve.store.ragged import Ragged
from kvsieve.store.rows import pick_rows, storage_bytes

H = 2
FILL = 0.5


@dataclass(frozen=True)
class Slot:
    """What a slot holds; keys and values are recognised by ``token``."""

    position: int
    token: int
    note: float = FILL


Lists = list[list[list[Slot]]]  # [row][head]


class Twin:
    """A store and its model in plain lists; every operation is done to both."""

    def __init__(self, layout: Layout, rows: int, slack: int | None) -> None:
        self.store = Store((Column(name="note", fill=FILL),), layout, slack)
        self.lists: Lists = [[[] for _ in range(H)] for _ in range(rows)]
        self.seen = [0] * rows
        self.tokens = self.removed = 0

    def append(self, live: list[list[bool]]) -> None:
        B, T = len(live), len(live[0])
        names = torch.arange(self.tokens, self.tokens + B * T).view(B, T)
        self.tokens += B * T
        keys = names[:, None, :, None] + torch.tensor([0.0, 0.25])[:, None, None].expand(H, 1, 3)
        mask = torch.tensor(live)
        positions = self.store.append(
            keys.clone(), -keys[..., :2].clone(), None if bool(mask.all()) else mask
        )
        for b in range(B):
            for t in range(T):
                if not live[b][t]:
                    continue
                assert int(positions[b, t]) == self.seen[b]
                for h in range(H):
                    self.lists[b][h].append(Slot(self.seen[b], int(names[b, t])))
                self.seen[b] += 1

    def keep(self, choose: Any) -> None:
        """``choose(n)`` returns ascending indices of slots to keep."""
        B, position = len(self.lists), self.store["position"]
        kept = [[choose(len(head)) for head in row] for row in self.lists]
        counts = torch.tensor([[len(head) for head in row] for row in kept])
        live = self.store.live
        live = torch.ones(B, H, self.store.slots, dtype=torch.bool) if live is None else live
        live = live.expand(B, H, position.shape[-1])
        index = torch.zeros(B, H, int(counts.max()), dtype=torch.int64)
        for b in range(B):
            for h in range(H):
                physical = live[b, h].nonzero()[:, 0]
                index[b, h, : counts[b, h]] = physical[kept[b][h]]
        before = sum(len(head) for row in self.lists for head in row)
        self.store.keep(index, counts)
        self.lists = [
            [[head[i] for i in chosen] for head, chosen in zip(row, picks, strict=True)]
            for row, picks in zip(self.lists, kept, strict=True)
        ]
        self.removed += before - int(counts.sum())

    def note(self) -> None:
        """Give every slot a note of its own."""
        B = len(self.lists)
        fresh = torch.arange(B * H * self.store.slots).view(B, H, -1) + 0.125
        live = self.store.live
        live = torch.ones_like(fresh, dtype=torch.bool) if live is None else live.expand_as(fresh)
        self.store["note"] = fresh
        self.lists = [
            [
                [replace(s, note=x) for s, x in zip(head, fresh[b, h][live[b, h]], strict=True)]
                for h, head in enumerate(row)
            ]
            for b, row in enumerate(self.lists)
        ]

    def select(self, rows: list[int]) -> None:
        self.store.select_rows(torch.tensor(rows))
        self.lists = [[list(head) for head in self.lists[b]] for b in rows]
        self.seen = [self.seen[b] for b in rows]

    def try_and_take_back(self, live: list[list[bool]]) -> None:
        lists, seen = [[list(head) for head in row] for row in self.lists], list(self.seen)
        mark = self.store.mark()
        self.append(live)
        self.store.rollback(mark)
        self.lists, self.seen = lists, seen

    def check(self) -> None:
        store, B = self.store, len(self.lists)
        assert store.seen.tolist() == self.seen
        assert store.counts.tolist() == [[len(head) for head in row] for row in self.lists]
        assert store.removed == self.removed
        if not self.tokens:
            return
        live = store.live
        live = torch.ones(B, H, store.slots, dtype=torch.bool) if live is None else live
        live = live.expand(B, H, -1)
        for b, row in enumerate(self.lists):
            for h, head in enumerate(row):
                here = live[b, h]
                assert positions_of(store)[b][h] == [s.position for s in head]
                names = [s.token + 0.25 * h for s in head]
                assert store.keys[b, h][here].tolist() == [[x] * 3 for x in names]
                assert store.values[b, h][here].tolist() == [[-x] * 2 for x in names]
                notes = store["note"].expand(B, H, -1)[b, h][here]
                assert notes.tolist() == [float(s.note) for s in head]
        assert store.nbytes() == storage_bytes(store.table.tensors())


def masks(B: int) -> st.SearchStrategy[list[list[bool]]]:
    def of(T: int) -> st.SearchStrategy[list[list[bool]]]:
        row = st.one_of(st.just([True] * T), st.lists(st.booleans(), min_size=T, max_size=T))
        return st.lists(row, min_size=B, max_size=B)

    return st.one_of(st.just(1), st.integers(1, 40)).flatmap(of)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), layout=st.sampled_from(["dense", "ragged"]), slack=st.sampled_from([None, 3])
)
def test_any_sequence_of_operations(data: st.DataObject, layout: Layout, slack: int | None) -> None:
    B = data.draw(st.integers(1, 3), "rows")
    twin = Twin(layout, B, slack)
    twin.append(data.draw(masks(B), "first"))
    twin.check()
    names = ("append", "keep", "trim", "note", "select", "try")
    for name in data.draw(st.lists(st.sampled_from(names), max_size=7), "operations"):
        if name == "append":
            twin.append(data.draw(masks(B)))
        elif name == "keep":

            def choose(n: int) -> list[int]:
                return sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else []

            twin.keep(choose)
        elif name == "trim":
            # Every head keeps equally many: a dense table then has no dead slots.
            least = min(len(head) for row in twin.lists for head in row)
            if least:
                last = data.draw(st.integers(1, least))
                twin.keep(lambda n, last=last: list(range(n - last, n)))
                assert twin.store.live is None or bool(twin.store.live.all())
        elif name == "note" and twin.store.slots:
            twin.note()
        elif name == "select":
            rows = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=4))
            twin.select(rows)
            B = len(rows)
        elif name == "try":
            twin.try_and_take_back(data.draw(masks(B)))
        twin.check()


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_decoding_copies_rarely_and_leaves_little_spare(layout: Layout) -> None:
    twin = Twin(layout, 2, None)
    twin.append([[True] * 300] * 2)
    twin.keep(lambda n: list(range(n - 200, n)))
    copies = set()
    for _ in range(160):
        twin.append([[True]] * 2)
        copies.add(twin.store.version)
    twin.check()
    assert len(copies) <= 160 // 32 + 2
    slot = (3 + 2) * 4 + 4 + 4  # key, value, position, note
    assert twin.store.nbytes() <= 2 * H * slot * (360 + 360 // 16 + 33)


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_keep_frees_what_it_drops(layout: Layout) -> None:
    twin = Twin(layout, 2, None)
    twin.append([[True] * 300] * 2)
    old = twin.store.version
    twin.keep(lambda n: list(range(0, n, 30)))
    assert twin.store.version != old, "the session measures anew when the version changes"
    assert twin.store.nbytes() == 2 * H * 10 * ((3 + 2) * 4 + 4 + 4)


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_an_emptied_table_goes_on(layout: Layout) -> None:
    twin = Twin(layout, 2, None)
    twin.append([[True, True], [False, True]])
    twin.keep(lambda n: [])
    twin.check()
    twin.try_and_take_back([[True], [False]])
    twin.check()
    twin.append([[True, True], [True, False]])
    twin.check()


def test_it_turns_ragged_at_the_first_removal_only() -> None:
    twin = Twin("ragged", 2, None)
    twin.append([[False, True, True], [True, True, True]])
    assert isinstance(twin.store.table, Dense)
    twin.keep(lambda n: list(range(1, n)))
    assert isinstance(twin.store.table, Ragged)
    twin.check()


def test_columns_are_shared_by_heads_until_heads_differ() -> None:
    twin = Twin("dense", 1, None)
    twin.append([[True] * 5])
    assert twin.store["position"].shape == (1, 1, 5)
    twin.keep(lambda n: [0, 3, 4])
    assert twin.store["position"].shape == (1, H, 3)


def test_slots_are_never_views_of_larger_tensors() -> None:
    big = torch.randn(1, H, 1000, 4)
    store = Store()
    store.append(big[:, :, :3], big[:, :, 3:6])
    assert store.nbytes() == 2 * H * 3 * 4 * 4 + 3 * 4


@pytest.mark.parametrize("shape", [(), (5,)])
def test_pick_rows_equals_gather(shape: tuple[int, ...]) -> None:
    table, index = torch.randn(2, 3, 7, *shape), torch.randint(0, 7, (2, 3, 4))
    where = index.view(2, 3, 4, *[1] * len(shape)).expand(2, 3, 4, *shape)
    assert torch.equal(pick_rows(table, index), table.gather(2, where))


def test_storage_bytes_count_shared_memory_once() -> None:
    x = torch.zeros(10)
    assert storage_bytes([x, x[2:], x.view(2, 5), torch.zeros(3)]) == 40 + 12
