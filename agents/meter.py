"""What is measured as an agent acts, kept on the device until a log line is due."""

from __future__ import annotations

import torch
from torch import Tensor

from tats_env.task import MaskingTask


class Meter:
    """Means of scalar tensors over many steps, summed on the device and read once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Count in one step's scalars."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each since the last call; waits for the device once."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums, self.counts = {}, {}
        return means


def motion_lift(visible: Tensor, foreground: Tensor) -> Tensor:
    """Share of moving foreground among the visible tokens over its share among all; 1 is chance.

    Taken over the whole batch, so that clips without moving foreground weigh nothing.

    Args:
        visible: bool [B, N].
        foreground: [B, N], share of each token's pixels on moving foreground.
    """
    kept = (foreground * visible).sum() / visible.sum()
    return kept / foreground.mean().clamp_min(1e-12)


def step_values(task: MaskingTask) -> dict[str, Tensor]:
    """Scalars worth logging of the task's last decision; what its masks did only once these are complete."""
    decision = task.decision
    assert decision is not None, "step_values() follows step()"
    values = {"rollout/ep_rew_mean": task.horizon * decision.rewards.mean()}
    if task.mask_complete:
        values["mask/reconstruction_error"] = decision.reconstruction.reconstruction_error.mean()
        if decision.foreground is not None:
            values["mask/motion_lift"] = motion_lift(decision.visible, decision.foreground)
    return values
