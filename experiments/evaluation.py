"""What a trained MAE and its sampler are worth: errors under masks and motion lift."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.base import Agent
from agents.meter import motion_lift
from tats_env.vector_env import TATSMaskingVectorEnv

EVALUATION_SEED = 1 << 40
"""The same for all runs, so that all samplers are compared on the same validation clips."""


def evaluate_sampler(agent: Agent, env: TATSMaskingVectorEnv, num_clips: int, seed: int) -> dict[str, float | None]:
    """Errors of the environment's MAE under the agent's masks and under uniform ones, on the same clips.

    Args:
        agent: asked for draws, as in training.
        env: with ``output="torch"``, of the split to evaluate on; its MAE is left as it is.
        num_clips: rounded up to whole batches.
        seed: of the clips.

    Returns:
        ``reconstruction_error``, ``random_mask_error`` (both in units of the patch's variance), and
        ``motion_lift`` (None where the truth is unknown).
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
        if decision.foreground is not None:
            shown.append(decision.visible)
            moving.append(decision.foreground)
    env.mae.train(was_training)
    return {
        "reconstruction_error": float(torch.cat(own).mean()),
        "random_mask_error": float(torch.cat(uniform).mean()),
        "motion_lift": float(motion_lift(torch.cat(shown), torch.cat(moving))) if shown else None,
    }
