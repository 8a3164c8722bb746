"""Masks that need no learning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from agents.base import Meter, env_device, from_batch, open_env, step_values, to_batch
from agents.hooks import Hook, as_hooks


class RandomMask:
    """Uniform random masks: the baseline of every comparison. It learns nothing; its hooks may train the MAE.

    Args:
        env: a ``TATSMasking`` vector environment with ``output="torch"``, or an id.
        seed: of the masks.
    """

    def __init__(self, env: str | gym.vector.VectorEnv[Any, Any, Any] | None = None, seed: int = 0) -> None:
        self.env: Any = None if env is None else open_env(env)
        self.seed = seed
        self.num_timesteps = 0
        self.meter = Meter()
        self.device = env_device(self.env)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> RandomMask:
        """Step the environment under random masks for that many clips, calling the hooks."""
        if self.env is None:
            raise ValueError("this agent was made or loaded without an environment: give env= to learn")
        hooks = as_hooks(callback)
        observation, _ = self.env.reset(seed=self.seed << 20)
        while self.num_timesteps < total_timesteps:
            scores, _ = self.predict(observation)
            observation, reward, _, _, info = self.env.step(scores)
            self.num_timesteps += len(reward)
            self.meter.add(step_values(reward, info, self.env.unwrapped.task.horizon))
            for event in ("on_step", "on_rollout_end", "on_update_end"):
                for hook in hooks:
                    getattr(hook, event)(self)
        return self

    def check(self) -> dict[str, float]:
        """Nothing of its own to measure; raises if an action was broken."""
        self.env.unwrapped.check()
        return {}

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, None]:
        """Scores drawn uniformly from [-1, 1]; there is no other mode, so ``deterministic`` changes nothing."""
        x, single, as_numpy = to_batch(observation, self.device)
        shape = (x.shape[0], x.shape[1] * x.shape[2])
        scores = 2 * torch.rand(shape, generator=self.generator, device=self.device) - 1
        return from_batch(scores, single, as_numpy), None

    def save(self, path: str | Path) -> None:
        """Write the seed as JSON."""
        Path(path).write_text(json.dumps({"agent": "random", "seed": self.seed}))

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> RandomMask:
        """Bring back what ``save`` wrote."""
        return cls(env, seed=json.loads(Path(path).read_text())["seed"])
