"""Muon for the hidden matrices, Adam for the embedding and the norms.

Muon (Jordan et al., 2024): the momentum of a matrix is replaced by the nearest semi-orthogonal
matrix, by five Newton-Schulz steps. Matrices of one shape are handled as one batch. With plain Adam
the same model had not learned to retrieve after several times as many tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MUON_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.02, 0.95, 0.01
_ADAM_RATE, _BETAS = 3e-3, (0.9, 0.98)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices [count, rows, columns] towards 1; bf16 inside."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Both optimizers behind one `step`, with one state."""

    def __init__(self, model: nn.Module) -> None:
        self._matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
        self._others: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                self._matrices.setdefault(tuple(weight.shape), []).append(weight)
            else:
                self._others.append(weight)
        self._momentum = {
            shape: torch.zeros(len(weights), *shape, device=weights[0].device)
            for shape, weights in self._matrices.items()
        }
        self._adam = torch.optim.Adam(self._others, lr=_ADAM_RATE, betas=_BETAS, eps=1e-10)

    def step(self, rate: float) -> None:
        """Apply the gradients with both learning rates times `rate`, then set them to zero."""
        nn.utils.clip_grad_norm_(self._others, 1.0)
        self._muon(_MUON_RATE * rate)
        for group in self._adam.param_groups:
            group["lr"] = _ADAM_RATE * rate
        self._adam.step()
        for weight in (*self._others, *(w for ws in self._matrices.values() for w in ws)):
            if weight.grad is not None:
                weight.grad.zero_()

    @torch.no_grad()
    def _muon(self, rate: float) -> None:
        for shape, weights in self._matrices.items():
            gradient = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            momentum = self._momentum[shape].lerp_(gradient, 1 - _MOMENTUM)
            updates = orthogonalise(gradient.lerp(momentum, _MOMENTUM))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - rate * _WEIGHT_DECAY).add_(update, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"adam": self._adam.state_dict(), "momentum": self._momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` gave."""
        self._adam.load_state_dict(state["adam"])
        for shape, momentum in state["momentum"].items():
            self._momentum[shape].copy_(momentum)
