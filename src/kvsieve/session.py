"""The loop that calls a recipe's parts at the right moment, for one batch of sequences.

Scores are taken early, while a layer's queries exist, and decided as late as the allocator's scope
asks: a layer at once, a whole model when its last layer has been scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.budget import Geometry
from kvsieve.compose import Recipe
from kvsieve.errors import EngineError, RecipeError
from kvsieve.interfaces import Moment, Occasion, Round, Schedule, Scope, Scorer, Signal
from kvsieve.replay import Replay
from kvsieve.report import Report, Stopwatch
from kvsieve.step import LayerInfo, QueryWindow, Step, newest
from kvsieve.store import Arrival, Store


@dataclass(kw_only=True)
class Forward:
    """What one forward brings to all layers: T tokens per row, which of them are real."""

    T: int
    live: Tensor | None = None
    offset: Tensor | None = None
    prefill: bool = True
    due: bool = False
    rows: Tensor | None = None  # [B] or [1] (all alike) bool, CPU: where the schedule is due
    owing: Tensor | None = None  # [B] bool, CPU: those of them that are over their budget
    replayed: Tensor | None = None
    arrival: Arrival | None = None
    budgets: Tensor | None = None


@dataclass(kw_only=True)
class LayerState:
    """One compressed layer: its table, its query window, its last step."""

    info: LayerInfo
    store: Store
    recent: QueryWindow | None = None
    positions: Tensor | None = None
    mark: tuple[Tensor, int | Tensor] | None = None
    logical: int = 0
    version: int = -1
    nbytes: int = 0


@dataclass(kw_only=True)
class Pending:
    """A layer that was scored and waits for the decision."""

    ordinal: int
    scores: Tensor
    step: Step


class Session:
    """One batch of sequences under one recipe: tables, schedule counters, measurements."""

    def __init__(
        self, recipe: Recipe, layers: list[LayerInfo], prompt_length: int | None = None
    ) -> None:
        self.recipe = recipe
        slack = recipe.schedule.slack if recipe.schedule is not None else None
        columns = recipe.scorer.columns if recipe.scorer is not None else ()
        self.layers = [
            LayerState(
                info=info,
                store=Store(columns, recipe.layout, slack),
            )
            for info in layers
        ]
        self.prompt_length = prompt_length
        self.logical = 0
        self.decoded = 0
        self.decode_steps = 0
        self.owed = False
        self.broken = False
        self.offset: Tensor | None = None
        self.current: Forward | None = None
        self.replay = Replay(recipe.scorer) if Signal.REPLAY in recipe.needs else None
        self.events = 0
        self.bytes_peak = 0
        self.bytes_full = 0
        self.watch = Stopwatch()
        self._bytes = 0
        self._pending: list[Pending] = []
        self._check_bytes()

    def _check_bytes(self) -> None:
        """Refuse bytes that don't hold one row, as far as it can be told before anything runs."""
        budget, geometry = self.recipe.budget, self._geometry(1)
        if budget is not None and budget.kind == "bytes" and geometry is not None:
            slots = budget.slots(torch.ones(1, dtype=torch.int64), geometry)
            self.recipe.check_room(int(slots[0]))

    # -- one forward ---------------------------------------------------------------------------

    def begin(
        self, T: int, live: Tensor | None, offset: Tensor | None, ids: Tensor | None = None
    ) -> None:
        """Start a forward of T tokens per row; ``live [B, T]`` marks padding, None: none.

        Raises:
            BudgetError: what is protected leaves no room in a row's budget.
            EngineError: an earlier forward failed half-way, so that the layers disagree.
        """
        if self.broken or (self.current is not None and not self.replaying):
            raise EngineError(
                "An earlier forward with this cache failed or was interrupted, so that its layers "
                "hold different tokens. Start again with a new cache."
            )
        if self.replay is not None and self.replay.running is not None:
            running = self.replay.running
            self.current = Forward(T=T, live=running.live, offset=offset, replayed=running.span)
            return
        self.offset = offset
        # A prompt of known length may come with a part of one token: that is no decode step.
        prefill = T > 1 or self.logical == 0 or self.logical < (self.prompt_length or 0)
        self.logical += T
        complete = self.prompt_length is None or self.logical >= self.prompt_length
        self.decoded = 0 if prefill else self.decoded + 1
        self.decode_steps += 0 if prefill else 1
        forward = Forward(T=T, live=live, offset=offset, prefill=prefill)
        if self.recipe.compresses and self.recipe.schedule is not None:
            forward.rows = self._due_rows(forward, self.recipe.schedule, complete)
            forward.due = bool(forward.rows.any())
        self.current = forward
        self._pending.clear()
        if forward.due and prefill:
            self._check_room(forward)
        if self.replay is not None:
            self.replay.remember(ids, live)
        self.watch.start("prefill" if prefill else "decode")

    def _due_rows(self, forward: Forward, schedule: Schedule, complete: bool) -> Tensor:
        """Ask the schedule for each row by its own slots, so that no row depends on others."""
        held = [x.store.counts.amax(1) for x in self.layers if x.store.slots]
        slots = torch.stack(held).amax(0) if held else torch.zeros(1, dtype=torch.int64)
        new = forward.T if forward.live is None else forward.live.sum(1).cpu()
        occasions = [
            Occasion(
                moment=Moment.AFTER_ATTEND,
                prefill=forward.prefill,
                prompt_complete=complete,
                decoded=self.decoded,
                slots=n,
            )
            for n in (slots + new).tolist()
        ]
        return torch.tensor([schedule.due(occasion) for occasion in occasions])

    def _check_room(self, forward: Forward) -> None:
        lengths = torch.tensor(self._lengths_after(forward))
        geometry = self._geometry(len(lengths))
        if self.recipe.budget is None or geometry is None:
            return
        budgets = self.recipe.budget.slots(lengths, geometry)
        for length, budget in zip(lengths.tolist(), budgets.tolist(), strict=True):
            self.recipe.check_room(budget, length)

    def _lengths_after(self, forward: Forward) -> list[int]:
        seen = self.layers[0].store.seen
        if forward.live is not None:
            new = forward.live.sum(1).cpu()
            return ((seen if seen.numel() else 0) + new).tolist()
        return (seen + forward.T).tolist() if seen.numel() else [forward.T]

    def append(self, ordinal: int, keys: Tensor, values: Tensor) -> Store:
        """Store a layer's new ``keys [B, H, T, D]`` and ``values [B, H, T, Dv]``.

        Raises:
            EngineError: the session is not inside a forward, or the batch changed.
        """
        forward, layer = self._forward(), self.layers[ordinal]
        store = layer.store
        if store.seen.numel() not in (0, keys.shape[0]):
            raise EngineError(
                f"This cache holds {store.seen.numel()} row(s), but {keys.shape[0]} came in. "
                "Use a new cache for a new batch."
            )
        if forward.replayed is not None:
            layer.mark = store.mark()
        if forward.arrival is None or forward.arrival.positions.device != keys.device:
            B, _, T = keys.shape[:3]
            forward.arrival = Arrival.of(store.seen, B, T, forward.live, keys.device)
        layer.positions = store.append(keys, values, forward.live, forward.arrival)
        if forward.replayed is None:
            tokens = keys.numel() * keys.element_size() + values.numel() * values.element_size()
            self.bytes_full += tokens
            layer.logical += forward.T
        self._measure(layer)
        return store

    def _forward(self) -> Forward:
        if self.current is None:
            raise EngineError("The cache was used outside a forward that kvsieve follows.")
        return self.current

    def attend(
        self,
        ordinal: int,
        query: Tensor,
        scale: float,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output ``[B, H, G, T, Dv]`` of ``query [B, H, G, T, D]``, then compression."""
        forward, layer = self._forward(), self.layers[ordinal]
        assert layer.positions is not None, "append comes before attend"
        positions, store = layer.positions, layer.store
        out = store.attend(
            query,
            scale,
            positions,
            forward.live,
            keys=keys,
            values=values,
            sinks=sinks,
            softcap=softcap,
        )
        if self.recipe.scorer is not None:
            step = Step(
                layer=layer.info,
                query=query,
                scale=scale,
                positions=positions,
                live=forward.live,
                prefill=forward.prefill,
                keys=keys,
                sinks=sinks,
                softcap=softcap,
                offset=forward.offset,
                recent=layer.recent,
                replayed=forward.replayed,
            )
            self._after_attend(ordinal, layer, step)
        return out

    def _after_attend(self, ordinal: int, layer: LayerState, step: Step) -> None:
        scorer = self.recipe.scorer
        assert scorer is not None, "only called with a scorer"
        if step.replay:
            scorer.observe(step, layer.store)
            assert layer.mark is not None, "a replay marks before it appends"
            layer.store.rollback(layer.mark)
            return
        if scorer.window:
            self._remember_queries(layer, step, scorer.window)
        scorer.observe(step, layer.store)
        if not self._forward().due:
            return
        if self.replay is not None:
            self._pending.append(Pending(ordinal=ordinal, scores=step.positions, step=step))
            return
        if not bool(self._owing().any()):
            return
        self.owed = True
        with self.watch.part("compress", step.query.device):
            scores = self._score(scorer, step, layer.store)
            self._pending.append(Pending(ordinal=ordinal, scores=scores, step=step))
            last = ordinal == len(self.layers) - 1
            if self.recipe.scope is not Scope.MODEL or last:
                self._decide()

    def _score(self, scorer: Scorer, step: Step, store: Store) -> Tensor:
        """Score a layer; rows that owe nothing keep their columns, as if they were alone."""
        owing = self._owing()
        names = [] if bool(owing.all()) else [column.name for column in scorer.columns]
        before = {name: store[name].clone() for name in names}
        scores = scorer.score(step, store)
        here = owing.to(scores.device)[:, None, None]
        for name, old in before.items():
            store[name] = torch.where(here, store[name], old).expand(*store.counts.shape, -1)
        return scores

    def _remember_queries(self, layer: LayerState, step: Step, window: int) -> None:
        if layer.recent is None:
            layer.recent = QueryWindow.empty(step.query, window)
            step.recent = layer.recent
        if step.query.shape[3] == 1:
            layer.recent.push(step.query, step.positions, step.live)
        else:
            layer.recent.push(*newest(step.query, step.positions, step.live, window))

    def end(self, run: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """End the forward; ``run(ids [B, R], positions [B, R])`` repeats tokens for a replay."""
        if self._forward().replayed is not None:
            return
        if self.replay is not None and self._forward().due and self._pending:
            self._decide_by_replay(run)
        phase = "prefill" if self._forward().prefill else "decode"
        self.current = None
        self.watch.stop(phase)

    def abandon(self) -> None:
        """Leave a forward that failed."""
        self.current, self.broken = None, self.broken or self.current is not None
        self._pending.clear()
        if self.replay is not None:
            self.replay.running = None

    def _decide_by_replay(self, run: Callable[[Tensor, Tensor], None] | None) -> None:
        scorer, replay, outer = self.recipe.scorer, self.replay, self._forward()
        assert scorer is not None and replay is not None, "only called with a replay"
        if not bool(self._owing().any()):
            self._pending.clear()
            return
        self.owed = True
        if run is None:
            raise RecipeError(f"{self.recipe.method!r} repeats the prompt; this engine can't.")
        waiting, self._pending = self._pending, []
        with self.watch.part("compress", waiting[0].step.query.device):
            for ids, positions in replay.rounds(self.layers[0].store.seen):
                run(ids, positions)
            replay.running, self.current = None, outer
            for pending in waiting:
                pending.scores = scorer.score(pending.step, self.layers[pending.ordinal].store)
            if self.recipe.scope is Scope.MODEL:
                self._pending = waiting
                self._decide()
                return
            for pending in waiting:
                self._pending = [pending]
                self._decide()

    # -- compression ---------------------------------------------------------------------------

    def budgets(self) -> Tensor:
        """Return the budget of each row in slots per head, ``[B]`` int64; once a forward.

        Raises:
            BudgetError: bytes that don't hold one slot per head.
        """
        forward, store = self._forward(), self.layers[0].store
        if forward.budgets is None:
            assert self.recipe.budget is not None, "a recipe that compresses has a budget"
            geometry = self._geometry(store.seen.numel())
            assert geometry is not None, "known as soon as something is stored"
            forward.budgets = self.recipe.budget.slots(store.seen, geometry)
        return forward.budgets

    def _geometry(self, rows: int) -> Geometry | None:
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
        )

    def _owing(self) -> Tensor:
        """Return the rows that are due and have seen more than their budget, ``[B]`` bool."""
        forward = self._forward()
        if forward.owing is None:
            assert forward.rows is not None, "only asked when the schedule is due"
            forward.owing = forward.rows & (self.layers[0].store.seen > self.budgets())
        return forward.owing

    def _decide(self) -> None:
        waiting, self._pending = self._pending, []
        stores = [self.layers[p.ordinal].store for p in waiting]
        round = Round(
            budgets=self.budgets(),
            layers=tuple(p.ordinal for p in waiting),
            layer_count=len(self.layers),
            seen=stores[0].seen,
            live=[store.counts for store in stores],
            window=self.recipe.recent_slots(int(self.budgets().min())),
        )
        scores = [
            self._protected(p.scores, store, round.budgets)
            for p, store in zip(waiting, stores, strict=True)
        ]
        counts = self.recipe.allocator.allocate(scores, round)
        # What a row keeps must not depend on whether another row is due.
        counts = [
            torch.where(self._owing()[:, None], count, store.counts)
            for count, store in zip(counts, stores, strict=True)
        ]
        for pending, store, score, count in zip(waiting, stores, scores, counts, strict=True):
            if not bool((count < store.counts).any()):
                continue
            self.recipe.compressor.compress(pending.step, store, score, count)
            self.events += 1
            self._measure(self.layers[pending.ordinal], replacing=True)

    def _protected(self, scores: Tensor, store: Store, budgets: Tensor) -> Tensor:
        """Apply protection and liveness to raw scores: +inf stays, -inf is no slot at all."""
        if bool(scores.isnan().any()):
            raise RecipeError(
                f"{self.recipe.method!r} gave NaN scores: the model's keys, queries or values are "
                "not finite, or the scorer divides by zero. Nothing was removed in this layer."
            )
        position = store["position"]  # [B, 1|H, S]
        recent = torch.tensor([self.recipe.recent_slots(b) for b in budgets.tolist()])
        first_recent = (store.seen - recent).to(scores.device)[:, None, None]
        safe = (position < self.recipe.sinks) | (position >= first_recent)
        for start, end in self.recipe.protect:
            safe = safe | ((position >= start) & (position < end))
        # A slot that a scorer condemned still ranks above a slot that does not exist.
        scores = scores.float().clamp_min(torch.finfo(torch.float32).min)
        scores = scores.masked_fill(safe, torch.inf)
        live = store.live
        return scores if live is None else scores.masked_fill(~live, -torch.inf)

    # -- bookkeeping ---------------------------------------------------------------------------

    def _measure(self, layer: LayerState, replacing: bool = False) -> None:
        version = layer.store.version
        if version == layer.version:
            return
        before, layer.nbytes = layer.nbytes, layer.store.nbytes()
        layer.version = version
        # While a table is copied into a new one, both exist.
        transient = layer.nbytes if replacing else 0
        self.bytes_peak = max(self.bytes_peak, self._bytes + transient)
        self._bytes += layer.nbytes - before
        self.bytes_peak = max(self.bytes_peak, self._bytes)

    def select_rows(self, ordinal: int, index: Tensor) -> None:
        """Replace a layer's rows by ``index`` of them: beam search, batch selection."""
        layer = self.layers[ordinal]
        if not layer.logical:
            return
        index = index.to(layer.store.device)
        rows = layer.store.seen.numel()
        layer.store.select_rows(index)
        if layer.recent is not None:
            layer.recent.select_rows(index)
        self._measure(layer)
        if ordinal == 0:
            # What a stock cache of the new number of rows would hold.
            self.bytes_full = self.bytes_full * index.numel() // rows
            if self.replay is not None:
                self.replay.select_rows(index)
            if self.offset is not None:
                self.offset = self.offset.index_select(0, index.cpu())

    def reset(self, ordinal: int) -> None:
        """Forget a layer's tokens; with the first layer, all counters too."""
        if ordinal == 0:
            self.__init__(self.recipe, [x.info for x in self.layers], self.prompt_length)

    @property
    def replaying(self) -> bool:
        """Whether a prompt is being repeated to its own cache right now."""
        return self.replay is not None and self.replay.running is not None

    @property
    def removed(self) -> int:
        """Slots removed so far, over all rows, heads and layers."""
        return sum(layer.store.removed for layer in self.layers)

    def report(self, other_bytes: int = 0) -> Report:
        """Measure what is held now; see ``Report``."""
        return Report.of(self, other_bytes)
