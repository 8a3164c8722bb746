"""Named rewards. Each says what it makes an agent prefer; bring one of your own by import path.

A reward is a function of a ``Decision`` that returns one number a clip, [B].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tats_env.grid import visible_mask
from tats_env.mae.errors import Reconstruction
from tats_env.mae.learner import MAELearner


class Decision:
    """One decision for each of B clips and what came of it.

    Attributes:
        clips: uint8 [B, T, H, W, 3].
        visible: bool [B, N], the tokens that the action kept.
        reconstruction: errors of the hidden tokens under that mask, or of the share of them that was decoded.
        rewards: float32 [B], once the reward function has spoken.
        foreground: float32 [B, N], share of each token's pixels on moving foreground, if the environment was asked.
    """

    rewards: Tensor
    foreground: Tensor | None = None

    def __init__(
        self,
        mae: MAELearner,
        clips: Tensor,
        visible: Tensor,
        reconstruction: Reconstruction,
        uniform: Callable[[], Tensor],
    ) -> None:
        self.clips, self.visible, self.reconstruction = clips, visible, reconstruction
        self._mae, self._uniform = mae, uniform

    @cached_property
    def _uniform_picks(self) -> Tensor:
        return self._uniform()

    @cached_property
    def uniform_visible(self) -> Tensor:
        """bool [B, N]: what ``uniform_reconstruction`` kept visible."""
        return visible_mask(self._uniform_picks, self.visible.shape[1])

    @cached_property
    def uniform_reconstruction(self) -> Reconstruction:
        """Errors of the same MAE under a uniform random mask with the same budget: one extra pass, made once."""
        return self._mae.errors(self.clips, self._uniform_picks)


Reward = Callable[[Decision], Tensor]


def pick_surprise(error: Tensor, shown: Tensor) -> Tensor:
    """Each token's error under a mask, relative to the clip's mean hidden error: [B, N], 1 is chance.

    Args:
        error: [B, N] errors, 0 where visible.
        shown: bool [B, N], what that mask showed; such tokens count as chance, as do all of a clip without error.
    """
    mean = error.sum(1, keepdim=True) / (~shown).sum(1, keepdim=True)
    return torch.where(shown | (mean <= 0), 1.0, error / mean)


def _mean_surprise(decision: Decision, error: Tensor) -> Tensor:
    shown = decision.uniform_visible
    counted = decision.visible & ~shown
    total = (pick_surprise(error, shown) * counted).sum(1)
    return torch.where(counted.any(1), total / counted.sum(1).clamp_min(1), 1.0)


def surprise(decision: Decision) -> Tensor:
    """Prefers hard tokens *visible*: the error each pick would have had if hidden, over the clip's mean; 1 is chance.

    Read off one extra pass under a uniform random mask; picks that this pass shows as well are left out.
    """
    return _mean_surprise(decision, decision.uniform_reconstruction.token_error)


def motion_surprise(decision: Decision) -> Tensor:
    """Prefers tokens visible whose *change* is hard to predict: ``surprise`` with the motion error."""
    return _mean_surprise(decision, decision.uniform_reconstruction.motion_error)


def reconstruction_error(decision: Decision) -> Tensor:
    """Prefers hard tokens *hidden* (adversarial): the mean error of the hidden tokens."""
    return decision.reconstruction.reconstruction_error


def negative_reconstruction_error(decision: Decision) -> Tensor:
    """Prefers masks that are easy to explain (cooperative): minus the mean error of the hidden tokens."""
    return -decision.reconstruction.reconstruction_error


REWARDS: dict[str, Reward] = {
    f.__name__: f for f in (surprise, motion_surprise, reconstruction_error, negative_reconstruction_error)
}


def resolve_reward(name: str | Reward) -> Reward:
    """A reward by name, by import path ``package.module:function``, or the function itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if callable(name):
        return name
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise ValueError(
            f"reward {name!r} is unknown; give one of {', '.join(REWARDS)}, or your own as package.module:function"
        )
    function: Reward = import_object(name, "reward")
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}; give a function of a Decision")
    return function


def import_object(path: str, what: str) -> Any:
    """What an import path ``package.module:name`` leads to.

    Raises:
        ValueError: that names ``what`` it should have been, if it leads nowhere.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} {path!r} can't be imported: {error}") from error
