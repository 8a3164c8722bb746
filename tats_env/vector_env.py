"""The natively batched face of the masking task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor
from typing_extensions import Unpack

from tats_env.mae import MAELearner
from tats_env.rendering import render_task
from tats_env.task import EnvOptions, MaskingTask, as_scores

Array = Any  # numpy.ndarray or torch.Tensor, as `output` says


class TATSMaskingVectorEnv(VectorEnv[Any, Any, Any]):
    """B masking tasks on one device, with one forward pass for all; `TATSMaskingEnv` documents the task.

    Environment i with `reset(seed=s)` is the single environment with `reset(seed=s + i)`; a list of seeds gives one
    to each. Autoreset is `AutoresetMode.SAME_STEP`: a step that ends an episode returns the next one's observation,
    and the ended one's under `final_obs` (dense, [B, T', S, D]) and `final_info`. At the top level `video_index`,
    `start_frame` and `label` tell of the clip now observed, in `final_info` of the clip just scored; `token_error`,
    `motion_error`, `visible`, `reconstruction_error` and `foreground` tell of the clip just scored in both.

    With `output="numpy"` the vector wrappers that support SAME_STEP work: `RecordEpisodeStatistics`, `NumpyToTorch`,
    `NormalizeReward`, transforms of actions and rewards, and `DictInfoToList` (Gymnasium 1.4, not 1.2). Changes of
    observations (`FlattenObservation`, `NormalizeObservation`, ...) need another autoreset mode and refuse. With
    `output="torch"` observations, rewards, flags and info stay on the device, and so should actions: nothing in a step
    waits for it.
    A NaN among the actions is then reported by `check()`, which trainers call when they log; and `final_obs` is the
    tensor returned before, so don't write into observations.

    `gymnasium.wrappers.vector.RecordVideo` is to be given a `video_length`, with a trigger that fires once: then each
    frame after a step shows its decisions. Videos of an episode each end before its last decision under SAME_STEP, as
    the wrapper warns.

    Under `CoTrainMAE` the observation returned with an episode's end is made before that step's update, where a single
    environment's `reset()` comes after it.

    Args:
        num_envs: B.
        first_env: the place of environment 0 in a larger batch, of which this is a share: `reset(seed=s)` gives
            environment i the seed `s + first_env + i`.
        output: `numpy` or `torch`.
        render_mode: None or `rgb_array`.
        **options: as of `TATSMaskingEnv`.
    """

    metadata = {  # noqa: RUF012 (Gymnasium's own form)
        "render_modes": ["rgb_array"],
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    autoreset_mode = AutoresetMode.SAME_STEP  # where TorchRL looks for it
    task_class: ClassVar[Callable[..., MaskingTask]] = MaskingTask

    def __init__(
        self,
        num_envs: int = 1,
        *,
        first_env: int = 0,
        output: str = "numpy",
        render_mode: str | None = None,
        **options: Unpack[EnvOptions],
    ) -> None:
        if output not in ("numpy", "torch"):
            raise ValueError(f"output {output!r} is unknown; give numpy or torch")
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: give at least 1")
        self.num_envs, self.output, self.render_mode = num_envs, output, render_mode
        self.first_env = first_env
        self.task = self.task_class(num_envs, **options)
        self.single_observation_space: gym.Space[Any] = self.task.observation_space
        self.single_action_space: gym.Space[Any] = self.task.action_space
        self._seeded = False
        self._num_nan = torch.zeros((), dtype=torch.int64, device=self.task.device)

    # Their bounds take up as much as several batches of observations, and our own agents never ask.
    @cached_property
    def observation_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """Of a batch of observations, [B, T', S, D]."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """Of a batch of actions, [B, N]."""
        return batch_space(self.single_action_space, self.num_envs)

    @property
    def mae(self) -> MAELearner:
        """The learner whose errors are the reward."""
        return self.task.mae

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Draw the first clip of every environment's next episode; seeds start their sequences of episodes anew.

        With `options={"state": state}`, of `task.state()`, the sequences of these seeds go on from where that was.
        """
        seeds = [seed] * self.num_envs if seed is None or isinstance(seed, (int, np.integer)) else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one to each")
        super().reset(seed=None if seeds[0] is None else int(seeds[0]))
        if isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + self.first_env + i for i in range(self.num_envs)]
        if seed is not None or not self._seeded:
            self.task.seed([int(self.np_random.integers(1 << 62)) if s is None else int(s) for s in seeds])
            self._seeded = True
        self.task.decision = None
        if options and "state" in options:
            self._observation = self._out(self.task.restore(options["state"]))
        else:
            self.task.begin_episode()
            self._observation = self._out(self.task.observe())
        return self._own(self._observation), self._out(self.task.identity_info())

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Keep the K highest scores of each row of ``actions`` [B, N] visible, and go on to the next decision."""
        if not self._seeded:
            raise ResetNeeded("call reset() before step()")
        if not isinstance(actions, Tensor):
            actions = as_scores(actions)
        elif actions.is_complex():
            raise InvalidAction(f"the actions hold {actions.dtype}; every score must be a real number")
        self.task.check_shape(actions, (self.num_envs, self.task.grid.num_tokens))
        scores = torch.as_tensor(actions, dtype=torch.float32, device=self.task.device)
        self._num_nan += scores.isnan().sum()
        if self.output == "numpy":
            self.check()
        rewards = self.task.step(scores)
        info: dict[str, Any] = self._out(self.task.token_info())
        ended = self.task.episode_ends
        terminated = torch.full((self.num_envs,), ended, device=self.task.device)
        if ended:
            if self.task.observes_actions:
                self._observation = self._out(self.task.observe())
            final_info = {**info, **self._out(self.task.identity_info())}
            info |= {"final_obs": self._observation, "final_info": final_info}
            info["_final_obs"], info["_final_info"] = self._out(terminated), self._out(terminated.clone())
            self.task.begin_episode()
        else:
            self.task.advance()
        info |= self._out(self.task.identity_info())
        self._observation = self._out(self.task.observe())
        flags = self._out(terminated.clone()), self._out(torch.zeros_like(terminated))
        return self._own(self._observation), self._out(rewards), *flags, info

    def check(self) -> None:
        """Raise InvalidAction if an action since the last call held a NaN; waits for the device."""
        num_nan = int(self._num_nan)
        if num_nan:
            self._num_nan.zero_()
            raise InvalidAction(f"the actions held {num_nan} NaN; every score must be a number")

    def render(self) -> tuple[np.ndarray, ...] | None:
        """For each environment uint8 [height, width, 3]: clip, visible tokens, reconstruction and error."""
        if not self._seeded:
            raise ResetNeeded("call reset() before render()")
        if self.render_mode != "rgb_array":
            return None
        return tuple(render_task(self.task, i) for i in range(self.num_envs))

    def _own(self, observation: Array) -> Array:
        """What the caller may write into, since ``final_obs`` comes from ours; on a device the two are shared."""
        return observation.copy() if self.output == "numpy" else observation

    def _out(self, x: Tensor | dict[str, Tensor]) -> Any:
        if isinstance(x, dict):
            return {name: self._out(y) for name, y in x.items()}
        return x if self.output == "torch" else x.cpu().numpy()
