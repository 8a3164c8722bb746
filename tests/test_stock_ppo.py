"""Stock stable-baselines3 PPO, without any adapter, learns which tokens are hard."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import tats_env  # noqa: F401 (registers the environment)
from tats_env.vector_env import TATSMaskingVectorEnv
from tats_env.wrappers import CoTrainMAE

# 32 tokens of which 3 stay visible: few enough dimensions for a Gaussian policy to learn in a minute.
TASK: dict[str, Any] = {"num_videos": 60, "patch_size": 16}


def mean_surprise(model: Any, mae: Any, num_clips: int = 1000) -> tuple[float, float]:
    """Mean and standard error of the reward on fresh clips; random actions without a model."""
    env = gym.make("TATSMasking-v0", mae=mae, **TASK)
    env.action_space.seed(0)
    rewards = []
    for seed in range(10_000, 10_000 + num_clips):
        observation, _ = env.reset(seed=seed)
        action = env.action_space.sample() if model is None else model.predict(observation)[0]
        rewards.append(float(env.step(action)[1]))
    return float(np.mean(rewards)), float(np.std(rewards) / num_clips**0.5)


@pytest.mark.timeout(900)  # about a minute and a half on a quiet core
def test_stock_ppo_learns_surprise_beyond_a_random_agent() -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    # An MAE that has seen some clips under uniform masks, so that some tokens are harder than others
    vector = CoTrainMAE(TATSMaskingVectorEnv(16, output="torch", reward="reconstruction_error", device="cpu", **TASK))
    vector.reset(seed=0)
    for _ in range(500):
        vector.step(torch.zeros(16, 32))
    mae = vector.unwrapped.mae.train(False)

    env = make_vec_env("TATSMasking-v0", n_envs=8, env_kwargs={"mae": mae, **TASK})
    model = PPO(
        "MlpPolicy", env, n_steps=64, batch_size=128, n_epochs=10, learning_rate=3e-3, gamma=0.0, seed=1,
        policy_kwargs={"log_std_init": -2, "net_arch": [16]},
    )  # fmt: skip
    model.learn(8192)
    (learned, error), (random, random_error) = mean_surprise(model, mae), mean_surprise(None, mae)
    assert random == pytest.approx(1, abs=4 * random_error)
    assert learned > random + 0.035, f"surprise {learned:.3f} ± {error:.3f} learned, {random:.3f} ± {random_error:.3f}"
