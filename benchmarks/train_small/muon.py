"""Muon for many small matrices: those of one shape are orthogonalised together.

The rule is Keller Jordan's (Nesterov momentum, then five Newton-Schulz steps), with the step scaled
so that its root mean square is 0.2 of the rate, about what AdamW's is. ``torch.optim.Muon`` with
``adjust_lr_fn="match_rms_adamw"`` does the same one matrix after the other, which for so small a
model costs more time than its forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For two-dimensional weights; ``weight_decay`` is decoupled."""

    def __init__(
        self,
        weights: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step over all weights."""
        for group in self.param_groups:
            weights: list[Tensor] = [w for w in group["params"] if w.grad is not None]
            grads = [w.grad for w in weights]
            for w in weights:
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            momenta = [self.state[w]["momentum"] for w in weights]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[tuple[int, int], list[int]] = {}
            for i, w in enumerate(weights):
                rows, columns = w.shape
                by_shape.setdefault((max(rows, columns), min(rows, columns)), []).append(i)
            for (long, _), members in by_shape.items():
                tall = [updates[i] if len(updates[i]) == long else updates[i].mT for i in members]
                made = orthogonalise(torch.stack(tall)).unbind()
                turned = [
                    m if len(weights[i]) == long else m.mT
                    for m, i in zip(made, members, strict=True)
                ]
                rate = 0.2 * group["lr"] * long**0.5
                torch._foreach_add_([weights[i] for i in members], turned, alpha=-rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Near-orthogonal matrices of the same directions.

    matrices: ``[count, rows, columns]`` with rows >= columns.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x.to(matrices.dtype)
