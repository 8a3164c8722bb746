"""A stock algorithm learns in this environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

import tats_env  # noqa: F401 (registers the environment)
from tats_env.data import open_dataset
from tats_env.wrappers import CoTrainMAE


def test_stock_ppo_learns_to_show_what_surprises_the_mae() -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    # N = 32, K = 3, and few enough videos that the MAE knows them after 200 updates
    options: dict[str, Any] = {"size": 16, "dataset": open_dataset("motion", num_videos=15, size=(16, 16))}

    def make_vec(num_envs: int, **more: Any) -> Any:
        return gym.make_vec("TATSMasking-v0", num_envs, "vector_entry_point", **options, **more)

    pretraining = CoTrainMAE(make_vec(16, device="cpu", output="torch", reward="reconstruction_error"))
    pretraining.reset(seed=0)
    for _ in range(200):
        pretraining.step(torch.zeros(16, 32))  # ties: uniform masks
    options["mae"] = pretraining.unwrapped.mae.train(False)

    agents = DummyVecEnv([lambda: gym.make("TATSMasking-v0", **options)] * 8)
    agent = PPO(
        "MlpPolicy", agents, n_steps=32, batch_size=64, n_epochs=10, learning_rate=1e-3, seed=0,
        policy_kwargs={"log_std_init": -2},
    ).learn(1024)  # fmt: skip

    evaluation = make_vec(128)
    evaluation.action_space.seed(0)
    rewards: dict[str, list[float]] = {}
    for name in ("trained", "random"):
        observations, _ = evaluation.reset(seed=10**6)
        rewards[name] = []
        for _ in range(4):
            trained = agent.predict(observations, deterministic=True)[0]
            actions = trained if name == "trained" else evaluation.action_space.sample()
            observations, reward, *_ = evaluation.step(actions)
            rewards[name].extend(reward)
    trained_mean, random_mean = np.mean(rewards["trained"]), np.mean(rewards["random"])
    error = np.sqrt((np.var(rewards["trained"]) + np.var(rewards["random"])) / len(rewards["random"]))
    margin = trained_mean - random_mean
    assert margin > 5 * error, f"surprise {trained_mean:.3f} against {random_mean:.3f}: {margin:.3f}, error {error:.3f}"
