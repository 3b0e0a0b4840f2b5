"""What the model predicts after a forward, in a few numbers per row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvsieve.errors import EngineError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The distribution of the next token of each row, all ``[B]`` in fp32 on the CPU.

    ``entropy`` in nats; ``margin``: log-probability of the likeliest token minus that of the
    second; ``top``: probability of the likeliest; ``vocabulary``: number of tokens.
    """

    entropy: Tensor
    margin: Tensor
    top: Tensor
    vocabulary: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Prediction:
        """Read ``logits [B, V]``; a constant added to a row changes nothing."""
        log_p = logits.detach().float().log_softmax(-1)
        best = log_p.topk(2, dim=-1).values
        return cls(
            entropy=torch.special.entr(log_p.exp()).sum(-1).cpu(),
            margin=(best[:, 0] - best[:, 1]).cpu(),
            top=best[:, 0].exp().cpu(),
            vocabulary=torch.full((len(logits),), float(logits.shape[-1])),
        )

    @classmethod
    def after(cls, before: Prediction | None, logits: Tensor, live: Tensor | None) -> Prediction:
        """Read ``logits [B, T', V]`` of the last T' tokens of a forward.

        ``live [B, T]`` marks its padding (None: none): each row's last real token counts, and a
        row without one keeps what was predicted ``before``.

        Raises:
            EngineError: the logits of a row's last real token are not among them.
        """
        B, width = logits.shape[:2]
        if live is None:
            return cls.of(logits[:, -1])
        live = live.to(logits.device)
        trailing = live.flip(1).byte().argmax(1)  # padding behind the last real token
        real = live.any(1)
        if bool((trailing >= width).logical_and(real).any()):
            raise EngineError(
                "The logits of a row's last token were left out (logits_to_keep), which this "
                "method needs. Pad on the left, or keep all logits."
            )
        rows = torch.arange(B, device=logits.device)
        new = cls.of(logits[rows, width - 1 - trailing.clamp_max(width - 1)])
        if before is None or bool(real.all()):
            return new
        mixed = {
            f.name: torch.where(real.cpu(), getattr(new, f.name), getattr(before, f.name))
            for f in fields(cls)
        }
        return cls(**mixed)

    def select_rows(self, index: Tensor) -> Prediction:
        """Return the rows ``index`` of it."""
        return Prediction(**{f.name: getattr(self, f.name)[index.cpu()] for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How sure of the next token a model is, from 0 to 1: a weighted mean of three signals.

    ``entropy``, ``margin``, ``top``: their weights; ``low``, ``high``: the range of the entropy in
    nats, on a text to calibrate with (``high`` 0: that of a uniform distribution).
    """

    entropy: float = 1.0
    margin: float = 1.0
    top: float = 1.0
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.entropy, self.margin, self.top)
        if not min(weights) >= 0 or not sum(weights) > 0:
            raise RecipeError("entropy, margin and top are weights: none below 0, one above.")
        if not self.low >= 0 or (self.high and not self.high > self.low):
            raise RecipeError("low and high are entropies in nats, low below high (0: log V).")

    def of(self, seen: Prediction) -> Tensor:
        """Return the confidence ``[B]``."""
        high = torch.full_like(seen.top, self.high) if self.high else seen.vocabulary.log()
        sure = ((high - seen.entropy) / (high - self.low)).clamp(0, 1)
        ahead = 1 - torch.exp(-seen.margin)
        total = self.entropy * sure + self.margin * ahead + self.top * seen.top
        return total / (self.entropy + self.margin + self.top)


class Outlook:
    """What the model predicted last, for a method that needs the logits of every forward."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.prediction: Prediction | None = None
        self.awaiting = False
        self._live: Tensor | None = None

    def await_logits(self, live: Tensor | None) -> None:
        """A forward has ended, whose padding ``live [B, T]`` marks; its logits are to come."""
        self.awaiting, self._live = True, live

    def take(self, logits: Tensor) -> None:
        """Take in the logits ``[B, T', V]`` of that forward's last T' tokens.

        Raises:
            EngineError: those of a row's last real token are not among them.
        """
        self.prediction = Prediction.after(self.prediction, logits, self._live)
        self.awaiting, self._live = False, None

    def last(self) -> Prediction:
        """Return what was predicted after the last forward.

        Raises:
            EngineError: its logits were never seen.
        """
        if self.prediction is None or self.awaiting:
            raise EngineError(
                f"{self.method!r} needs the logits of every forward, but those of the last one "
                "were not seen. Call the whole model, with its language modelling head and "
                "return_dict=True."
            )
        return self.prediction

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        if self.prediction is not None:
            self.prediction = self.prediction.select_rows(index)
