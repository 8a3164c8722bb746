"""Train the MAE as an agent acts, whatever library the agent comes from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every={every}: give 1 to update the MAE after each step, k to update it after each k-th")


class CoTrainMAE(gym.Wrapper[Any, Any, Any, Any]):
    """Update the environment's MAE on the forward pass of every ``every``-th step; the others are skipped.

    Wraps a single or a vector environment: ``CoTrainMAE(gym.make(...))``, ``CoTrainMAE(gym.make_vec(...))``.

    Args:
        env: an environment whose ``unwrapped`` has the learner as ``mae``.
        every: steps for each update.
    """

    def __new__(cls, env: Any, every: int = 1) -> Any:
        if isinstance(env, gym.vector.VectorEnv):
            return CoTrainMAEVector(env, every)
        return super().__new__(cls)

    def __init__(self, env: gym.Env[Any, Any], every: int = 1) -> None:
        _check_every(every)
        super().__init__(env)
        self.every, self.num_steps = every, 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, then let the MAE learn from it."""
        result = self.env.step(action)
        self.num_steps += 1
        if self.num_steps % self.every == 0:
            self.env.unwrapped.mae.update()  # type: ignore[attr-defined]
        return result


class CoTrainMAEVector(gym.vector.VectorWrapper):
    """``CoTrainMAE`` for a vector environment: one update on all of its clips."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], every: int = 1) -> None:
        _check_every(every)
        super().__init__(env)
        self.every, self.num_steps = every, 0

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, then let the MAE learn from it."""
        result = self.env.step(actions)
        self.num_steps += 1
        if self.num_steps % self.every == 0:
            self.env.unwrapped.mae.update()  # type: ignore[attr-defined]
        return result
