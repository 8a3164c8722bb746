"""What every agent here keeps to, in stable-baselines3's words, and the loop that agents share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.hooks import Hook
from tats_env.vector_env import TATSMaskingVectorEnv


@runtime_checkable
class Agent(Protocol):
    """An agent that can be trained, asked, saved and brought back."""

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> Any:
        """Train for that many clips, calling the hooks as it goes; returns the agent."""

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, None]:
        """Scores in [-1, 1], [N] or [B, N], for an observation [T', S, D] or [B, T', S, D]; no hidden state."""

    def save(self, path: str | Path) -> None:
        """Write all that ``load`` needs, without pickling."""

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Any:
        """Bring back what ``save`` wrote."""


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


def open_env(env: str | gym.vector.VectorEnv[Any, Any, Any], num_envs: int = 32) -> gym.vector.VectorEnv[Any, Any, Any]:
    """A ``TATSMasking`` vector environment that speaks torch, from one of those or from an id.

    Raises:
        TypeError: for an environment of another kind.
    """
    if isinstance(env, str):
        env = gym.make_vec(env, num_envs, vectorization_mode="vector_entry_point", vector_kwargs=None, output="torch")
    if not isinstance(env.unwrapped, TATSMaskingVectorEnv) or env.unwrapped.output != "torch":
        raise TypeError(
            "our agents step the batched environment on its device: make it with gym.make_vec('TATSMasking-v0', "
            f"num_envs=..., vectorization_mode='vector_entry_point', output='torch'); got {env}"
        )
    return env


def env_device(env: Any) -> torch.device:
    """Where an environment lives; the CPU for an agent without one."""
    return torch.device("cpu") if env is None else env.unwrapped.mae.device


def step_values(reward: Tensor, info: dict[str, Any], horizon: int) -> dict[str, Tensor]:
    """Scalars worth logging of one step of an environment whose episodes all take ``horizon`` steps."""
    scored = info.get("final_info", info)
    values = {
        "rollout/ep_rew_mean": horizon * reward.mean(),
        "mask/reconstruction_error": scored["reconstruction_error"].mean(),
    }
    if "foreground" in scored:
        values["mask/motion_lift"] = motion_lift(scored["visible"], scored["foreground"])
    return values


def to_batch(observation: Any, device: torch.device) -> tuple[Tensor, bool, bool]:
    """(float32 [B, T', S, D] on the device, whether it came as one observation, whether as numpy)."""
    x = torch.as_tensor(observation, dtype=torch.float32, device=device)
    single = x.ndim == 3
    return (x[None] if single else x), single, isinstance(observation, np.ndarray)


def from_batch(scores: Tensor, single: bool, as_numpy: bool) -> Any:
    """Undo ``to_batch`` for scores [B, N]."""
    scores = scores[0] if single else scores
    return scores.cpu().numpy() if as_numpy else scores
