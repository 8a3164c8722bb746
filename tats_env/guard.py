"""An optimiser step that skips what is not finite, decided and counted on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tats_env.processes import average

MAX_SKIPPED_IN_A_ROW = 20


def fused_adamw(parameters: Any, device: torch.device, **settings: Any) -> torch.optim.AdamW:
    """AdamW as one kernel; on ``meta``, where there is none, as many."""
    return torch.optim.AdamW(parameters, fused=device.type != "meta", **settings)


class GuardedOptimizer:
    """Backward, gradient norm, optional clipping and a fused step that is left out where anything is not finite.

    Where several processes take part, gradients and loss are their means, so that all of them take the same step.
    Nothing here waits for the device until ``report``.

    Args:
        optimizer: a fused torch optimiser.
        parameters: what it trains.
        max_grad_norm: clip the gradient's norm at this; None leaves it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_grad_norm: float | None = None
    ) -> None:
        self.optimizer, self.parameters, self.max_grad_norm = optimizer, list(parameters), max_grad_norm
        device = self.parameters[0].device
        self.skipped_in_a_row, self.skipped, self.grad_norm = torch.zeros(3, device=device).unbind()
        self.loss = torch.zeros((), device=device)

    def accumulate(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradient of ``weight * loss`` (scalar, whose graph is freed) to that of the step to come."""
        loss = weight * loss
        loss.backward()
        self.loss = self.loss + loss.detach()

    def discard(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros_like(self.loss)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step on what was accumulated.

        Args:
            skip: bool scalar; True leaves the step out (a stop by KL, say) without counting it as broken.

        Returns:
            the loss, and a bool scalar, True where it or its gradient was not finite.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss = self.loss
        average(loss, *gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        broken = ~torch.isfinite(norm + loss)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        if self.optimizer.defaults["fused"]:
            # The fused kernels leave weights and moments alone where found_inf is 1: no round trip to the host.
            found = broken if skip is None else broken | skip
            self.optimizer.found_inf = found.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.skipped += broken
        self.skipped_in_a_row.add_(1).mul_(broken)
        self.grad_norm.copy_(norm)
        self.discard()
        return loss, broken

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs, between two steps."""
        counts = torch.stack([self.skipped_in_a_row, self.skipped, self.grad_norm])
        return {"optimizer": self.optimizer.state_dict(), "counts": counts}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was asked for, on whatever device that was."""
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, count in zip((self.skipped_in_a_row, self.skipped, self.grad_norm), state["counts"], strict=True):
            mine.copy_(count)

    def report(self, what: str, remedy: str) -> tuple[float, float]:
        """(gradient norm of the last step, steps skipped so far); waits for the device.

        Raises:
            FloatingPointError: if the last 20 steps or more were all skipped; the message names the remedy.
        """
        streak, skipped, norm = torch.stack([self.skipped_in_a_row, self.skipped, self.grad_norm]).tolist()
        if streak >= MAX_SKIPPED_IN_A_ROW:
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the {what}'s loss or gradient was not finite in {int(streak)} updates in a row "
                f"(learning rate {rate:.2g}): {remedy}"
            )
        return norm, skipped
