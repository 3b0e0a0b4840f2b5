"""Which slots stay: budgets in slots, protection, allocation, compression."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.budget import Geometry
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.fairness import fair_scores
from kvsieve.forward import Forward, LayerState, Pending
from kvsieve.interfaces import Occasion, Round
from kvsieve.rerotation import rerotate
from kvsieve.step import Step
from kvsieve.store import Store


class Decision:
    """A recipe's budget, protection, allocator and compressor, applied to a session's layers.

    ``prompt``: the prompt's length where it is known, else 0.
    """

    def __init__(self, recipe: Recipe, layers: list[LayerState], prompt: int = 0) -> None:
        self.recipe, self.layers, self.prompt = recipe, layers, prompt

    def check_bytes(self) -> None:
        """Refuse bytes that don't hold one row, as far as it can be told before anything runs."""
        budget, geometry = self.recipe.budget, self.geometry(1)
        if budget is not None and budget.kind == "bytes" and geometry is not None:
            slots = budget.slots(torch.ones(1, dtype=torch.int64), geometry)
            self.recipe.check_room(int(slots[0]))

    def due_rows(self, forward: Forward, complete: bool, decoded: int) -> Tensor:
        """Ask the schedule for each row by its own slots, so that no row depends on others."""
        schedule = self.recipe.schedule
        assert schedule is not None, "only asked of recipes that compress"
        held = [x.store.counts.amax(1) for x in self.layers if x.store.slots]
        slots = torch.stack(held).amax(0) if held else torch.zeros(1, dtype=torch.int64)
        seen = self.layers[0].store.seen if held else slots
        live = forward.live
        new = torch.full_like(slots, forward.T) if live is None else live.sum(1).cpu()
        occasions = [
            Occasion(
                prefill=forward.prefill,
                prompt_complete=complete,
                decoded=decoded,
                slots=int(n),
                seen=int(passed),
                new=int(fresh),
                prompt=self.prompt,
                turns=forward.turns,
            )
            for n, passed, fresh in zip(slots + new, seen + new, new, strict=True)
        ]
        return torch.tensor([schedule.due(occasion) for occasion in occasions])

    def check_room(self, forward: Forward) -> None:
        """Refuse budgets that protection fills, as far as it can be told before anything runs."""
        lengths = torch.tensor(self._lengths_after(forward))
        geometry = self.geometry(len(lengths))
        if self.recipe.budget is None or geometry is None:
            return
        budgets = self.recipe.budgets(lengths, geometry)
        for length, budget in zip(lengths.tolist(), budgets.tolist(), strict=True):
            self.recipe.check_room(budget, length)

    def _lengths_after(self, forward: Forward) -> list[int]:
        seen = self.layers[0].store.seen
        if forward.live is not None:
            new = forward.live.sum(1).cpu()
            return ((seen if seen.numel() else 0) + new).tolist()
        return (seen + forward.T).tolist() if seen.numel() else [forward.T]

    def budgets(self, forward: Forward) -> Tensor:
        """Return the budget of each row in slots per head, ``[B]`` int64; once a forward.

        Raises:
            BudgetError: bytes that don't hold one slot per head.
        """
        store = self.layers[0].store
        if forward.budgets is None:
            geometry = self.geometry(store.seen.numel())
            assert geometry is not None, "known as soon as something is stored"
            forward.budgets = self.recipe.budgets(store.seen, geometry) + self.tails()
        return forward.budgets

    def tails(self) -> Tensor:
        """Return each row's newest slots that this compression leaves alone, ``[B]`` int64."""
        schedule, seen = self.recipe.schedule, self.layers[0].store.seen
        assert schedule is not None, "a recipe that compresses has a schedule"
        return torch.tensor([schedule.tail(n, self.prompt) for n in seen.tolist()])

    def geometry(self, rows: int) -> Geometry | None:
        """What a slot costs; None before anything is stored, if the engine couldn't tell."""
        first, store = self.layers[0].info, self.layers[0].store
        if first.heads is not None and first.pair_bytes is not None:
            heads, pair = first.heads, first.pair_bytes
        elif store.slots:
            heads, pair = store.counts.shape[1], store.pair_bytes
        else:
            return None
        return Geometry(
            slot_bytes=pair + store.column_bytes,
            heads=heads * len(self.layers),
            rows=rows,
            slack=store.slack or 0,
            fixed=self._remembered_bytes() + len(self.layers) * heads * self._summary_bytes(),
        )

    def _remembered_bytes(self) -> int:
        """Bytes per row of the queries that the scorer wants remembered, positions included."""
        query, scorer = self.layers[0].info.query_bytes, self.recipe.scorer
        if query is None or scorer is None:
            return 0
        return len(self.layers) * scorer.window * (query + 9)

    def _summary_bytes(self) -> int:
        """Bytes per row and head of the summary of dropped slots, as soon as it can be told."""
        how, sizes, store = self.recipe.summarise, self.layers[0].info.sizes, self.layers[0].store
        if sizes is None and store.slots:
            sizes = (store.keys.shape[-1], store.values.shape[-1])
        return 0 if how is None or sizes is None else how.nbytes(*sizes)

    def over(self, forward: Forward) -> Tensor:
        """Return the rows that are due and have seen more than their budget, ``[B]`` bool."""
        assert forward.rows is not None, "only asked when the schedule is due"
        return forward.rows & (self.layers[0].store.seen > self.budgets(forward))

    def owing(self, forward: Forward) -> Tensor:
        """Return the rows from which something may go, ``[B]`` bool.

        Those over their budget; for a method that chooses its budget all that are due, but for
        rows that a decode step has nothing for.
        """
        if forward.owing is None:
            over = self.over(forward)
            forward.owing = self._fed(forward, over) if self.recipe.dynamic else over
        return forward.owing

    def _fed(self, forward: Forward, over: Tensor) -> Tensor:
        assert forward.rows is not None, "only asked when the schedule is due"
        due = (forward.rows | over).expand_as(over)
        if forward.prefill or forward.live is None:
            return due
        return due & forward.live.any(1).cpu()

    def score(self, forward: Forward, step: Step, store: Store) -> Tensor:
        """Score a layer; rows that owe nothing keep their columns, as if they were alone."""
        scorer, owing = self.recipe.scorer, self.owing(forward)
        assert scorer is not None, "only called with a scorer"
        names = [] if bool(owing.all()) else [column.name for column in scorer.columns]
        before = {name: store[name].clone() for name in names}
        scores = scorer.score(step, store)
        here = owing.to(scores.device)[:, None, None]
        for name, old in before.items():
            store[name] = torch.where(here, store[name], old).expand(*store.counts.shape, -1)
        return scores

    def decide(self, forward: Forward, waiting: list[Pending]) -> list[LayerState]:
        """Allocate and compress the layers of one scope; return those that were changed."""
        stores = [self.layers[p.ordinal].store for p in waiting]
        round = Round(
            budgets=self.budgets(forward),
            layers=tuple(p.ordinal for p in waiting),
            layer_count=len(self.layers),
            seen=stores[0].seen,
            live=[store.counts for store in stores],
            window=self.recipe.recent_slots(int(self.budgets(forward).min())),
            prediction=forward.prediction,
        )
        recent = self._recent(forward)
        scores = [
            self._protected(p.scores, store, recent)
            for p, store in zip(waiting, stores, strict=True)
        ]
        counts = self.recipe.allocator.allocate(scores, round)
        # What a row keeps must not depend on whether another row is due.
        counts = [
            torch.where(self.owing(forward)[:, None], count, store.counts)
            for count, store in zip(counts, stores, strict=True)
        ]
        changed = []
        for pending, store, score, count in zip(waiting, stores, scores, counts, strict=True):
            if bool((count < store.counts).any()):
                if self.recipe.fair:
                    place, seen = store["position"], store.seen
                    score = fair_scores(score, place, seen, count, self.recipe.fair)
                self.recipe.compressor.compress(pending.step, store, score, count)
                if self.recipe.rerotate:
                    rerotate(pending.step, store)
                changed.append(self.layers[pending.ordinal])
        return changed

    def _recent(self, forward: Forward) -> Tensor:
        """Return how many of each row's newest tokens stay, ``[B]``."""
        tails = self.tails()
        budgets = (self.budgets(forward) - tails).tolist()
        recent = torch.tensor([self.recipe.recent_slots(budget) for budget in budgets])
        return torch.maximum(recent, tails)

    def _protected(self, scores: Tensor, store: Store, recent: Tensor) -> Tensor:
        """Apply protection and liveness to raw scores: +inf stays, -inf is no slot at all."""
        if bool(scores.isnan().any()):
            raise RecipeError(
                f"{self.recipe.method!r} gave NaN scores: the model's keys, queries or values are "
                "not finite, or the scorer divides by zero. Nothing was removed in this layer."
            )
        position = store["position"]  # [B, 1|H, S]
        first_recent = (store.seen - recent).to(scores.device)[:, None, None]
        safe = (position < self.recipe.sinks) | (position >= first_recent)
        for start, end in self.recipe.protect:
            safe = safe | ((position >= start) & (position < end))
        # A slot that a scorer condemned still ranks above a slot that does not exist.
        scores = scores.float().clamp_min(torch.finfo(torch.float32).min)
        scores = scores.masked_fill(safe, torch.inf)
        live = store.live
        return scores if live is None else scores.masked_fill(~live, -torch.inf)
