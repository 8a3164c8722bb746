"""Train the MAE as an agent acts, whatever library the agent comes from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from tats_env.mae.learner import MAELearner


class UpdateEvery:
    """Update a learner on the forward pass of every ``every``-th step; the others are skipped, not accumulated.

    Raises:
        ValueError: if ``every`` is below 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}: give 1 to update the MAE after each step, k to update it after each k-th")
        self.every, self.num_steps = every, 0

    def after_step(self, mae: MAELearner) -> None:
        """Count a step of the environment, and update if it is one's turn."""
        self.num_steps += 1
        if self.num_steps % self.every == 0:
            mae.update()


class _CoTraining:
    """``step`` of both wrappers."""

    def __init__(self, env: Any, every: int = 1) -> None:
        self.updates = UpdateEvery(every)
        super().__init__(env)  # type: ignore[call-arg]

    def step(self, action: Any) -> Any:
        """Step, then let the MAE learn from it."""
        result = self.env.step(action)  # type: ignore[attr-defined]
        self.updates.after_step(self.env.unwrapped.mae)  # type: ignore[attr-defined]
        return result


class CoTrainMAE(_CoTraining, gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Train the environment's MAE on what the agent does: an update after every ``every``-th step.

    Wraps a single or a vector environment: ``CoTrainMAE(gym.make(...))``, ``CoTrainMAE(gym.make_vec(...))``.

    Args:
        env: an environment whose ``unwrapped`` has the learner as ``mae``.
        every: steps for each update.
    """

    def __new__(cls, env: Any, every: int = 1) -> Any:
        if isinstance(env, gym.vector.VectorEnv):
            return CoTrainMAEVector(env, every)
        return super().__new__(cls)

    def __init__(self, env: Any, every: int = 1) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, every=every)
        super().__init__(env, every)


class CoTrainMAEVector(_CoTraining, gym.vector.VectorWrapper):
    """``CoTrainMAE`` for a vector environment: one update on all of its clips."""

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The environment's, for TorchRL."""
        return self.env.metadata["autoreset_mode"]
