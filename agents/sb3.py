"""The way to stable-baselines3: its VecEnv on the batched environment, its callback, and a policy that picks tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from agents.distributions import PlackettLuce, picks_to_scores
from agents.policies import TrajectoryPolicy
from tats_env.vector_env import TATSMaskingVectorEnv
from tats_env.wrappers import CoTrainMAE, UpdateEvery


def to_host(x: Any) -> np.ndarray:
    """A copy as numpy, of the same type: what stable-baselines3 gets is its own to write into."""
    return x.to("cpu", copy=True).numpy() if isinstance(x, Tensor) else np.array(x)


class SB3VecEnv(VecEnv):
    """A batched ``TATSMasking`` environment as stable-baselines3's ``VecEnv``: one forward pass for all.

    What a step tells is what a ``DummyVecEnv`` of single environments would: with an episode's end comes the next one's
    observation, and in its info ``terminal_observation`` and what the clip just scored was. All environments share one
    MAE and one task, so an attribute has one value for all of them.

    Args:
        env: ``TATSMaskingVectorEnv`` or ``TATSMaskingSequentialVectorEnv``, of either ``output``, or a wrapper around
            it such as ``CoTrainMAE``.

    Raises:
        TypeError: for an environment of another kind.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any] | CoTrainMAE) -> None:
        if not isinstance(env.unwrapped, TATSMaskingVectorEnv):
            raise TypeError(
                "SB3VecEnv takes the batched environment: make it with gym.make_vec('TATSMasking-v0', num_envs=..., "
                f"vectorization_mode='vector_entry_point'); got {env}"
            )
        self.env: Any = env
        super().__init__(self.env.num_envs, self.env.single_observation_space, self.env.single_action_space)
        self.metadata = env.metadata

    def reset(self) -> np.ndarray:
        """Observations [B, T', S, D] of the next episodes; after ``seed(s)``, environment i is keyed by s + i."""
        seeds = None if None in self._seeds else list(self._seeds)
        observation, _ = self.env.reset(seed=seeds)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = self._split(self.env.unwrapped.task.identity_info())
        return to_host(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the scores [B, N] for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [B, T', S, D], rewards [B], dones [B], and an info for each environment."""
        observation, reward, terminated, truncated, info = self.env.step(self._actions)
        self.env.unwrapped.check()
        truncated = to_host(truncated)
        done = to_host(terminated) | truncated
        if done.any():  # all of them, since episodes have one length
            infos = self._split(info["final_info"] | {"terminal_observation": info["final_obs"]})
            self.reset_infos = self._split(self.env.unwrapped.task.identity_info())
        else:
            infos = self._split(info)
        for info_of_one, cut in zip(infos, truncated, strict=True):
            info_of_one["TimeLimit.truncated"] = bool(cut)
        return to_host(observation), to_host(reward), done, infos

    def _split(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """One dictionary for each environment."""
        host = {name: to_host(x) for name, x in info.items()}
        return [{name: x[i] for name, x in host.items()} for i in range(self.num_envs)]

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A picture of each environment's last decision, or None."""
        pictures: Any = self.env.render()
        return [None] * self.num_envs if pictures is None else list(pictures)

    def _layers(self) -> list[Any]:
        """The wrappers from the outside in, the environment, and its task."""
        layers: list[Any] = [self.env]
        while layers[-1] is not self.env.unwrapped:
            layers.append(layers[-1].env)
        return [*layers, layers[-1].task]

    def _owner(self, name: str) -> Any:
        """The outermost layer that has an attribute."""
        for layer in self._layers():
            if hasattr(layer, name):
                return layer
        raise AttributeError(f"neither {self.env} nor its task has an attribute {name!r}")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the wrappers, the environment or its task, once for each index."""
        return [getattr(self._owner(attr_name), attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute where it is, or else on the environment.

        Raises:
            ValueError: for some of the environments only.
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"the {self.num_envs} environments share one {attr_name!r}: set it without indices")
        setattr(self._owner(attr_name) if self.has_attr(attr_name) else self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method once, for all environments; its result once for each index."""
        result = getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the batched environment is in such a wrapper, once for each index."""
        wrapped = any(isinstance(layer, wrapper_class) for layer in self._layers()[:-2])
        return [wrapped] * len(list(self._get_indices(indices)))


class MAEUpdateCallback(BaseCallback):
    """Interleave the MAE's training with any algorithm of stable-baselines3: as ``agents.hooks.MAEUpdateHook`` does.

    The same as ``tats_env.wrappers.CoTrainMAE`` around the environment; use one of the two. For ARS with
    ``n_eval_episodes`` above 1, which calls back several times a step, use the wrapper.

    Args:
        every: steps of the environment for each update.

    Raises:
        ValueError: as training starts, if the environments have an MAE each.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.updates = UpdateEvery(every)

    def _init_callback(self) -> None:
        env = self.training_env.unwrapped
        if not isinstance(env, SB3VecEnv) and not (isinstance(env, DummyVecEnv) and env.num_envs == 1):
            raise ValueError(
                f"MAEUpdateCallback trains one MAE on all clips of a step, but {type(env).__name__} has "
                f"{env.num_envs} separate environment(s): give the algorithm an SB3VecEnv(gym.make_vec(...)), or wrap "
                "each of them in tats_env.wrappers.CoTrainMAE and leave this callback out"
            )
        self.mae = env.get_attr("mae")[0]

    def _on_step(self) -> bool:
        self.updates.after_step(self.mae)
        return True


class SubsetActorCriticPolicy(ActorCriticPolicy):
    """``TrajectoryPolicy`` and the Plackett-Luce distribution as a policy for stable-baselines3's PPO and A2C.

    An action is the scores [B, N] of ``picks_to_scores``; the picks, in their order, are its K highest. Log-probability
    and entropy are the joint ones over K, as in our PPO's ``clip`` credit, so that ``clip_range`` and ``ent_coef`` mean
    the same at every K. Draws come from torch's global generator.

    Args:
        observation_space, action_space, lr_schedule, use_sde: given by the algorithm.
        num_picks: K, tokens that one action chooses.
        explore: share of uniform draws, as in ``PlackettLuce``.
        shown_channel: which of an observation's D channels is 1 where a token is visible already and can't be picked;
            None where all tokens can.
        width, num_heads, depth, logit_cap: of ``TrajectoryPolicy``.
        optimizer_class, optimizer_kwargs: as in ``ActorCriticPolicy``.

    Raises:
        ValueError: with ``use_sde``, which is noise for Gaussian actions.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Space[Any],
        action_space: gym.spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        num_picks: int,
        explore: float = 0.0,
        shown_channel: int | None = None,
        width: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        logit_cap: float = 8.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde=True is noise for Gaussian actions; this policy draws tokens: leave it out")
        self.num_picks, self.explore, self.shown_channel = num_picks, explore, shown_channel
        self.network_options = {"width": width, "num_heads": num_heads, "depth": depth, "logit_cap": logit_cap}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        shape: Any = self.observation_space.shape
        self.network = TrajectoryPolicy(shape, **self.network_options)  # type: ignore[arg-type]
        learning_rate: Any = {"lr": lr_schedule(1)}
        self.optimizer = self.optimizer_class(self.network.parameters(), **learning_rate, **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "num_picks": self.num_picks,
            "explore": self.explore,
            "shown_channel": self.shown_channel,
            **self.network_options,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def _both(self, obs: Tensor) -> tuple[PlackettLuce, Tensor]:
        """The distribution of the picks, and values [B, 1], for an observation [B, T', S, D]."""
        logits, values = self.network(obs.float())
        available = None if self.shown_channel is None else obs[..., self.shown_channel].flatten(1) < 0.5
        return PlackettLuce(logits, self.num_picks, self.explore, available), values[:, None]

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, N], values [B, 1] and log-probabilities for each pick [B]: for an observation [B, T', S, D]."""
        distribution, values = self._both(obs)
        picks = distribution.mode() if deterministic else distribution.sample()
        scores = picks_to_scores(picks, self.action_space.shape[0])  # type: ignore[index]
        return scores, values, distribution.log_prob(picks) / self.num_picks

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self(observation, deterministic)[0]

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Values [B, 1], log-probabilities and entropies for each pick [B], of scores [B, N] that ``forward`` gave."""
        distribution, values = self._both(obs)
        picks = actions.topk(self.num_picks).indices
        return values, distribution.log_prob(picks) / self.num_picks, distribution.entropy(picks) / self.num_picks

    def get_distribution(self, obs: Tensor) -> PlackettLuce:  # type: ignore[override]
        """Over ordered picks [B, K], not over scores: for an observation [B, T', S, D]."""
        return self._both(obs)[0]

    def predict_values(self, obs: Tensor) -> Tensor:  # type: ignore[override]
        """Values [B, 1] of an observation [B, T', S, D]."""
        return self._both(obs)[1]

    @torch.no_grad()
    def logits(self, obs: Tensor) -> Tensor:
        """[B, N] for an observation [B, T', S, D]."""
        return self.network(obs.float())[0]
