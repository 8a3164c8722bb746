"""What a trained MAE and its sampler are worth: errors under masks, motion lift, and where the sampler looks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import Agent
from agents.meter import motion_lift
from tats_env.vector_env import TATSMaskingVectorEnv

EVALUATION_SEED = 1 << 40
"""The same for all runs, so that all samplers are compared on the same validation clips."""


class Evaluation(NamedTuple):
    """What ``evaluate_sampler`` found."""

    figures: dict[str, float | None]
    """``reconstruction_error``, ``random_mask_error`` (both in units of the patch's variance), and ``motion_lift``
    (None where the truth is unknown)."""
    positions: Tensor
    """[N], the share of the clips in which each token was visible."""


def evaluate_sampler(agent: Agent, env: TATSMaskingVectorEnv, num_clips: int, seed: int) -> Evaluation:
    """Errors of the environment's MAE under the agent's masks and under uniform ones, on the same clips.

    Args:
        agent: asked for draws, as in training.
        env: with ``output="torch"``, of the split to evaluate on; its MAE is left as it is.
        num_clips: rounded up to whole batches.
        seed: of the clips.
    """
    was_training = env.mae.training
    env.mae.train(False)
    own: list[Tensor] = []
    uniform, shown, moving = [], [], []
    observation, _ = env.reset(seed=seed)
    while len(own) * env.num_envs < num_clips:
        scores, _ = agent.predict(observation)
        observation, *_ = env.step(scores)
        decision = env.task.decision
        assert decision is not None
        if not env.task.mask_complete:
            continue
        own.append(decision.reconstruction.reconstruction_error)
        uniform.append(decision.uniform_reconstruction.reconstruction_error)
        shown.append(decision.visible)
        if decision.foreground is not None:
            moving.append(decision.foreground)
    env.mae.train(was_training)
    visible = torch.cat(shown)
    figures = {
        "reconstruction_error": float(torch.cat(own).mean()),
        "random_mask_error": float(torch.cat(uniform).mean()),
        "motion_lift": float(motion_lift(visible, torch.cat(moving))) if moving else None,
    }
    return Evaluation(figures, visible.float().mean(0))
