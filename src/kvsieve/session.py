"""The loop that calls a recipe's parts at the right moment, for one batch of sequences.

Scores are taken early, while a layer's queries exist, and decided as late as the allocator's scope
asks: a layer at once, a whole model when its last layer has been scored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.decision import Decision
from kvsieve.errors import EngineError, RecipeError
from kvsieve.forward import Forward, LayerState, Pending
from kvsieve.interfaces import Scope, Signal
from kvsieve.prediction import Outlook
from kvsieve.replay import Replay
from kvsieve.report import Chosen, Report, Stopwatch
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Arrival, Store
from kvsieve.trace import Trace


class Session:
    """One batch of sequences under one recipe: tables, schedule counters, measurements."""

    def __init__(
        self,
        recipe: Recipe,
        layers: list[LayerInfo],
        prompt_length: int | None = None,
        trace: bool = False,
    ) -> None:
        self.recipe = recipe
        slack = recipe.schedule.slack if recipe.schedule is not None else None
        made = partial(Store, recipe.columns, recipe.layout, slack, recipe.summarise)
        self.layers = [LayerState(info=info, store=made()) for info in layers]
        self.prompt_length = prompt_length
        self.logical = self.decoded = self.decode_steps = self.events = self.turns = 0
        self.bytes_peak = self.bytes_full = self._bytes = 0
        self.owed = self.broken = False
        self.offset: Tensor | None = None
        self.current: Forward | None = None
        self.replay = Replay(recipe.scorer) if Signal.REPLAY in recipe.needs else None
        self.trace = Trace() if trace else None
        self.watch = Stopwatch()
        self.chosen = Chosen() if recipe.dynamic else None
        self.outlook = Outlook(recipe.method) if Signal.LOGITS in recipe.needs else None
        self._pending: list[Pending] = []
        self.decision = Decision(recipe, self.layers, prompt_length or 0)
        self.decision.check_bytes()

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
        first_part = self.logical == T or self.decoded > 0
        self.decoded = 0 if prefill else self.decoded + 1
        self.decode_steps += 0 if prefill else 1
        forward = Forward(
            T=T, live=live, offset=offset, prefill=prefill, first_part=first_part, turns=self.turns
        )
        self.turns += prefill and complete
        if self.outlook is not None and not prefill:
            forward.prediction = self.outlook.last()
        if self.recipe.compresses and self.recipe.schedule is not None:
            forward.rows = self.decision.due_rows(forward, complete, self.decoded)
            forward.due = bool(forward.rows.any())
        self.current = forward
        self._pending.clear()
        if forward.due and prefill:
            self.decision.check_room(forward)
        if self.replay is not None:
            self.replay.remember(ids, live)
        self.watch.start("prefill" if prefill else "decode")

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
        forward, layer, step = self._forward(), self.layers[ordinal], None
        assert layer.positions is not None, "append comes before attend"
        if self.recipe.scorer is not None:
            step = layer.step(forward, query, scale, keys=keys, sinks=sinks, softcap=softcap)
            self._before_attend(ordinal, layer, step)
        out = layer.store.attend(
            query,
            scale,
            layer.positions,
            forward.live,
            keys=keys,
            values=values,
            sinks=sinks,
            softcap=softcap,
        )
        if step is not None:
            self._after_attend(ordinal, layer, step)
        return out

    def _before_attend(self, ordinal: int, layer: LayerState, step: Step) -> None:
        scorer, schedule = self.recipe.scorer, self.recipe.schedule
        assert scorer is not None, "only called with a scorer"
        if step.replay:
            return
        wait = None if schedule is None else schedule.wait(self.decoded)
        soon = wait is not None and wait < scorer.window
        layer.remember(step, scorer, self._forward().first_part, soon)
        if self.recipe.acts_before and not step.prefill:
            self._reduce(ordinal, layer, step)

    def _after_attend(self, ordinal: int, layer: LayerState, step: Step) -> None:
        scorer = self.recipe.scorer
        assert scorer is not None, "only called with a scorer"
        scorer.observe(step, layer.store)
        if step.replay:
            assert layer.mark is not None, "a replay marks before it appends"
            layer.store.rollback(layer.mark)
        elif step.prefill or not self.recipe.acts_before:
            self._reduce(ordinal, layer, step)

    def _reduce(self, ordinal: int, layer: LayerState, step: Step) -> None:
        """Score a layer that is due; decide, unless that takes layers still to come."""
        if not self._forward().due:
            return
        step.budgets = self.decision.budgets(self._forward())
        if self.replay is not None:
            self._pending.append(Pending(ordinal=ordinal, scores=step.positions, step=step))
            return
        if not bool(self.decision.owing(self._forward()).any()):
            return
        self.owed = self.owed or bool(self.decision.over(self._forward()).any())
        with self.watch.part("compress", step.query.device):
            scores = self.decision.score(self._forward(), step, layer.store)
            step = step.waiting(self.recipe.scope)
            self._pending.append(Pending(ordinal=ordinal, scores=scores, step=step))
            if self.recipe.scope is not Scope.MODEL or ordinal == len(self.layers) - 1:
                waiting, self._pending = self._pending, []
                self._compress(waiting)

    def end(self, run: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """End the forward; ``run(ids [B, R], positions [B, R])`` repeats tokens for a replay."""
        if self._forward().replayed is not None:
            return
        if self.replay is not None and self._forward().due and self._pending:
            self._decide_by_replay(run)
        forward, self.current = self._forward(), None
        if self.chosen is not None and forward.due:
            stores = [layer.store for layer in self.layers]
            self.chosen.add(stores, self.decision.owing(forward))
        if self.outlook is not None:
            self.outlook.await_logits(forward.live)
        self.watch.stop("prefill" if forward.prefill else "decode")

    def abandon(self) -> None:
        """Leave a forward that failed."""
        self.current, self.broken = None, self.broken or self.current is not None
        self._pending.clear()
        if self.replay is not None:
            self.replay.running = None

    def _decide_by_replay(self, run: Callable[[Tensor, Tensor], None] | None) -> None:
        scorer, replay, outer = self.recipe.scorer, self.replay, self._forward()
        assert scorer is not None and replay is not None, "only called with a replay"
        owing = self.decision.owing(self._forward())
        if not bool(owing.any()):
            self._pending.clear()
            return
        self.owed = self.owed or bool(self.decision.over(self._forward()).any())
        if run is None:
            raise RecipeError(f"{self.recipe.method!r} repeats the prompt; this engine can't.")
        waiting, self._pending = self._pending, []
        with self.watch.part("compress", waiting[0].step.query.device):
            for ids, positions in replay.rounds(self.layers[0].store.seen, owing):
                run(ids, positions)
            replay.running, self.current = None, outer
            for pending in waiting:
                pending.scores = scorer.score(pending.step, self.layers[pending.ordinal].store)
            if self.recipe.scope is Scope.MODEL:
                self._compress(waiting)
                return
            for pending in waiting:
                self._compress([pending])

    def _compress(self, waiting: list[Pending]) -> None:
        for layer in self.decision.decide(self._forward(), waiting):
            self.events += 1
            self._measure(layer, replacing=True)
            if self.trace is not None:
                self.trace.record(layer.info.ordinal, self.decoded, layer.store)
        for pending in waiting:
            self.layers[pending.ordinal].decided(self.decision.owing(self._forward()))

    # -- bookkeeping ---------------------------------------------------------------------------

    def _measure(self, layer: LayerState, replacing: bool = False) -> None:
        version = layer.store.version
        if version == layer.version:
            return
        before, layer.nbytes = layer.nbytes, layer.store.nbytes() + layer.state_bytes()
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
        layer.select_rows(index)
        self._measure(layer)
        if ordinal == 0:
            # What a stock cache of the new number of rows would hold.
            self.bytes_full = self.bytes_full * index.numel() // rows
            for part in (self.replay, self.chosen, self.outlook):
                if part is not None:
                    part.select_rows(index)
            if self.offset is not None:
                self.offset = self.offset.index_select(0, index.cpu())

    def reset(self, ordinal: int) -> None:
        """Forget a layer's tokens; with the first layer, all counters too."""
        if ordinal == 0:
            infos, trace = [x.info for x in self.layers], self.trace is not None
            self.__init__(self.recipe, infos, self.prompt_length, trace)

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
