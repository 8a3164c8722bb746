"""An optimiser step that skips what is not finite, decided and counted on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAX_SKIPPED_IN_A_ROW = 20


class GuardedOptimizer:
    """Backward, gradient norm, optional clipping and a fused step that is left out where anything is not finite.

    Nothing here waits for the device until ``report``.

    Args:
        optimizer: a fused torch optimiser (``fused=True``).
        parameters: what it trains.
        max_grad_norm: clip the gradient's norm at this; None leaves it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_grad_norm: float | None = None
    ) -> None:
        self.optimizer, self.parameters, self.max_grad_norm = optimizer, list(parameters), max_grad_norm
        device = self.parameters[0].device
        self.skipped_in_a_row, self.skipped, self.grad_norm = torch.zeros(3, device=device).unbind()

    def step(self, loss: Tensor, skip: Tensor | None = None) -> Tensor:
        """One step on ``loss`` (scalar); returns a bool scalar, True where the loss or gradient was not finite.

        Args:
            loss: scalar with a graph, which is freed.
            skip: bool scalar; True leaves the step out as well (a stop by KL, say) without counting it as broken.
        """
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        with torch.no_grad():
            broken = ~torch.isfinite(norm + loss)
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            # The fused kernels leave weights and moments alone where found_inf is 1: no round trip to the host.
            found = broken if skip is None else broken | skip
            self.optimizer.found_inf = found.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.skipped += broken
            self.skipped_in_a_row.add_(1).mul_(broken)
            self.grad_norm.copy_(norm)
        return broken

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
