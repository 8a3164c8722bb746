"""What is measured as an agent acts, kept on the device until a log line is due."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tats_env.processes import average
from tats_env.task import MaskingTask

Ratio = tuple[Tensor, Tensor]
"""Numerator and denominator, scalars."""


class Meter:
    """Means of scalar tensors over many steps and all processes, summed on the device and read once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor | float] = {}

    def add(self, values: Mapping[str, Tensor | Ratio]) -> None:
        """Count in one step's scalars; of ratios, numerators and denominators are summed apart."""
        for name, value in values.items():
            x, weight = value if isinstance(value, tuple) else (value, 1.0)
            x = x.detach()  # else every step's graph would be kept
            self.sums[name] = self.sums[name] + x if name in self.sums else x.float()
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Mean of each since the last call; waits for the device once, and for all processes, which call it alike."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))
        weights = torch.stack([torch.as_tensor(x, dtype=sums.dtype, device=sums.device) for x in self.weights.values()])
        average(sums, weights)
        means = dict(zip(self.sums, (sums / weights).tolist(), strict=True))
        self.sums, self.weights = {}, {}
        return means


def motion_lift(visible: Tensor, foreground: Tensor) -> Tensor:
    """Share of moving foreground among the visible tokens over its share among all; 1 is chance.

    Taken over the whole batch, so that clips without moving foreground weigh nothing.

    Args:
        visible: bool [B, N].
        foreground: [B, N], share of each token's pixels on moving foreground.
    """
    among_visible, among_all = _shares_of_foreground(visible, foreground)
    return among_visible / among_all


def _shares_of_foreground(visible: Tensor, foreground: Tensor) -> Ratio:
    return (foreground * visible).sum() / visible.sum(), foreground.mean().clamp_min(1e-12)


def step_values(task: MaskingTask) -> dict[str, Tensor | Ratio]:
    """What is worth logging of the task's last decision; what its masks did only once these are complete."""
    decision = task.decision
    assert decision is not None, "step_values() follows step()"
    values: dict[str, Tensor | Ratio] = {"rollout/ep_rew_mean": task.horizon * decision.rewards.mean()}
    if task.mask_complete:
        values["mask/reconstruction_error"] = decision.reconstruction.reconstruction_error.mean()
        if decision.foreground is not None:
            values["mask/motion_lift"] = _shares_of_foreground(decision.visible, decision.foreground)
    return values
