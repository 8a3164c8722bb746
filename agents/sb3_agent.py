"""stable-baselines3's algorithms, and sb3-contrib's, as agents among ours."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import psutil
import stable_baselines3
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor
from typing_extensions import Self

from agents.base import env_device, first_seed, open_env
from agents.hooks import Hook, as_hooks
from agents.sb3 import SB3VecEnv, SubsetActorCriticPolicy, to_host
from tats_env.processes import num_processes
from tats_env.rewards import import_object
from tats_env.task import MaskingTask

LOGGER = logging.getLogger(__name__)
CONTRIB = ("ARS", "CrossQ", "RecurrentPPO", "TQC", "TRPO")
"""Algorithms that sb3-contrib has, to be named where it isn't installed."""
DISCRETE = ("DQN", "MaskablePPO", "QRDQN")
"""Algorithms that choose one action of a few."""


class BufferMemory(NamedTuple):
    """What the rollout or replay buffer of an algorithm takes up."""

    num_bytes: int
    """Of its arrays."""
    peak_bytes: int
    """While it is read out, at least."""
    text: str
    """The sum, in words."""
    argument: str
    """The algorithm's argument that it grows with."""
    value: int
    """That argument's."""


def buffer_memory(
    algorithm_class: type[BaseAlgorithm], env: VecEnv, kwargs: dict[str, Any] | None = None
) -> BufferMemory | None:
    """What an algorithm's buffer would take up; None for one without.

    Args:
        algorithm_class: of stable-baselines3 or sb3-contrib.
        env: what it would be given.
        kwargs: further arguments it would be given; the others have its defaults.
    """
    parameters = inspect.signature(algorithm_class).parameters
    given = {name: parameter.default for name, parameter in parameters.items()} | (kwargs or {})
    observation, action = (math.prod(space.shape or ()) for space in (env.observation_space, env.action_space))
    if issubclass(algorithm_class, OnPolicyAlgorithm):
        # rewards, returns, episode starts, values, log-probabilities, advantages
        floats, others = observation + action + 6, "6 others"
        if "MlpLstmPolicy" in algorithm_class.policy_aliases:
            options = {"n_lstm_layers": 1, "lstm_hidden_size": 256} | (given["policy_kwargs"] or {})
            states = 4 * options["n_lstm_layers"] * options["lstm_hidden_size"]
            floats, others = floats + states, f"6 others + {states:,} hidden state"
        steps = given["n_steps"]
        num_bytes = steps * env.num_envs * floats * 4
        text = (
            f"n_steps {steps:,} x {env.num_envs:,} environments x ({observation:,} observation + {action:,} action + "
            f"{others}) floats x 4 bytes = {_amount(num_bytes)}, and at least twice that while it is read out"
        )
        return BufferMemory(num_bytes, 2 * num_bytes, text, "n_steps", steps)
    if issubclass(algorithm_class, OffPolicyAlgorithm):
        size = given["buffer_size"]
        times = 1 if given["optimize_memory_usage"] else 2  # with the next observation
        # rewards, dones, timeouts
        floats = times * observation + action + 3
        num_bytes = max(size // env.num_envs, 1) * env.num_envs * floats * 4
        text = (
            f"buffer_size {size:,} x ({times} x {observation:,} observation + {action:,} action + 3 others) floats x "
            f"4 bytes = {_amount(num_bytes)}"
        )
        return BufferMemory(num_bytes, num_bytes, text, "buffer_size", size)
    return None


def check_memory(memory: BufferMemory) -> None:
    """Log what a buffer takes up.

    Raises:
        ValueError: if that is more than the memory available.
    """
    LOGGER.info("buffer: %s", memory.text)
    available = psutil.virtual_memory().available
    if memory.peak_bytes > available:
        raise ValueError(
            f"the buffer would take {memory.text}, but {_amount(available)} are available: give "
            f"{memory.argument}={memory.value * available // memory.peak_bytes} or less"
        )


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


class _OutOfSteps(Exception):
    """``learn`` has made all of its steps."""


class _AgentEnv(SB3VecEnv):
    """An agent's own, which counts its steps and calls its hooks.

    Here rather than in a callback, for ARS ignores what a callback returns, and may call it several times a step.
    """

    def __init__(self, agent: SB3Agent) -> None:
        super().__init__(agent.env)
        self.agent, self.steps_left = agent, 0
        self.hooks: list[Hook] = []

    def step_wait(self) -> VecEnvStepReturn:
        if not self.steps_left:
            raise _OutOfSteps
        self.steps_left -= 1
        result = super().step_wait()
        self.agent.num_timesteps += self.num_envs
        for hook in self.hooks:
            hook.on_step(self.agent)
        return result


class _Events(BaseCallback):
    """Calls an agent's hooks around its updates."""

    def __init__(self, agent: SB3Agent, hooks: list[Hook]) -> None:
        super().__init__()
        self.agent, self.hooks, self.collected = agent, hooks, False

    def _on_rollout_start(self) -> None:
        self._report_update()

    def _on_step(self) -> bool:
        self.model.num_timesteps = self.agent.num_timesteps  # the same, but for ARS, which counts some steps twice
        return True

    def _on_rollout_end(self) -> None:
        for hook in self.hooks:
            hook.on_rollout_end(self.agent)
        self.collected = True

    def _on_training_end(self) -> None:
        self._report_update()

    def _report_update(self) -> None:
        if self.collected:
            self.collected = False
            for hook in self.hooks:
                hook.on_update_end(self.agent)


class SB3Agent:
    """An ``agents.base.Agent`` around an algorithm of stable-baselines3 or sb3-contrib; ``peer(name)`` makes the class.

    Args:
        env: a ``TATSMasking`` vector environment with ``output="torch"``, or an id; None only for ``load``.
        policy: one of the algorithm's names, or an import path such as ``agents.sb3.SubsetActorCriticPolicy``. That
            one's ``num_picks`` and ``shown_channel`` follow from the environment unless ``policy_kwargs`` has them.
        seed: of the networks' weights, the draws (the algorithm seeds the global generators) and the clips.
        **kwargs: of the algorithm.

    Raises:
        ValueError: on settings that can't work, among several processes, or if the buffer does not fit into memory.
    """

    observation: ClassVar[str] = "tokens"
    suffix: ClassVar[str] = ".zip"
    algorithm: ClassVar[type[BaseAlgorithm]]

    def __init__(self, env: Any, *, policy: str = "MlpPolicy", seed: int = 0, **kwargs: Any) -> None:
        self.env: Any = None if env is None else open_env(env)
        self.seed = seed
        self.num_timesteps = 0
        self.model: Any = None
        if num_processes() > 1:
            raise ValueError("stable-baselines3's algorithms know nothing of other processes: run this agent in one")
        if self.env is not None:
            self._adopt(self._make_model(policy, kwargs))

    def _make_model(self, policy: str, kwargs: dict[str, Any]) -> BaseAlgorithm:
        name = self.algorithm.__name__
        taken = [x for x in inspect.signature(self.algorithm).parameters if x not in _OURS]
        for key in kwargs:
            if key not in taken:
                raise ValueError(f"{name} takes no {key!r}{_did_you_mean(key, taken)}; it takes {', '.join(taken)}")
        kwargs = copy.deepcopy(kwargs)  # for stable-baselines3 writes into its arguments
        policy_class = _find_policy(self.algorithm, policy)
        if issubclass(policy_class, SubsetActorCriticPolicy):
            own = _subset_options(self.env.unwrapped.task)
            kwargs["policy_kwargs"] = own | (kwargs.get("policy_kwargs") or {})
        vec_env = _AgentEnv(self)
        memory = buffer_memory(self.algorithm, vec_env, kwargs)
        if memory is not None:
            check_memory(memory)
            print(f"{name}'s buffer: {memory.text}")
        try:
            return self.algorithm(  # type: ignore[call-arg]
                policy_class, vec_env, seed=self.seed, device=env_device(self.env), **kwargs
            )
        except AssertionError as error:  # so it refuses settings
            raise ValueError(f"{name}: {error}") from error

    def _adopt(self, model: BaseAlgorithm) -> None:
        model.set_logger(Logger(None, []))
        self.model = model

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> Self:
        """Train for that many clips, calling the hooks.

        The environment makes as many steps as under any other agent. Those of a last rollout that this cuts short
        train the MAE, by its hook, but not the algorithm, and end without ``on_rollout_end``. ARS resets the
        environment before each candidate, and so skips every second clip.

        Raises:
            ValueError: without an environment, or if not even one rollout fits.
            FloatingPointError: by ``metrics``, if a hook that logs finds that learning broke down.
        """
        if self.env is None:
            raise ValueError("this agent was loaded without an environment: give env= to learn")
        steps = -(-total_timesteps // self.env.num_envs)
        if isinstance(self.model, OnPolicyAlgorithm) and steps < self.model.n_steps:
            raise ValueError(
                f"n_steps={self.model.n_steps} make a rollout, but learn({total_timesteps}) with {self.env.num_envs} "
                f"environments is {steps} steps, without a single update: give n_steps={steps} or less"
            )
        hooks = as_hooks(callback)
        vec_env = self.model.get_env()
        vec_env.hooks, vec_env.steps_left = hooks, steps
        self.model.set_random_seed(self.seed)
        vec_env.seed(first_seed(self.seed))
        self.model.set_env(vec_env)  # so that learning starts with a reset
        try:
            self.model.learn(total_timesteps, _Events(self, hooks), log_interval=None, reset_num_timesteps=False)
        except _OutOfSteps:
            self.model.num_timesteps = self.num_timesteps
        return self

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, Any]:
        """Scores [N] or [B, N] for an observation [T', S, D] or [B, T', S, D], numpy or torch; and the hidden state.

        A recurrent policy is asked anew each time, as at the start of an episode.
        """
        scores, state = self.model.predict(to_host(observation), deterministic=deterministic)
        if isinstance(observation, Tensor):
            scores = torch.from_numpy(scores).to(observation.device)
        return scores, state

    @property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """Observation [B, T', S, D] -> logits [B, N]; there is such a method with ``SubsetActorCriticPolicy`` only."""
        if not isinstance(self.model.policy, SubsetActorCriticPolicy):
            raise AttributeError(f"{type(self.model.policy).__name__} has no logits of tokens")
        return self.model.policy.logits

    def metrics(self) -> dict[str, float]:
        """What the algorithm logged about its training since the last call.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        logger = self.model.logger
        values = {name: float(x) for name, x in logger.name_to_value.items() if name.startswith("train/")}
        logger.dump()
        for name, value in values.items():
            if "loss" in name and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} of {self.algorithm.__name__} is {value}: try a lower agent.learning_rate"
                )
        return values

    def save(self, path: str | Path) -> None:
        """Write stable-baselines3's zip."""
        self.model.save(path, exclude=["_last_obs", "_last_original_obs"])

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Self:
        """Bring back what ``save`` wrote; without ``env`` it can predict.

        The file is unpickled, which can run any code: load only your own.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, or the environment does not fit it.
        """
        agent = cls(None)
        agent.env = None if env is None else open_env(env)
        vec_env = None if env is None else _AgentEnv(agent)
        agent._adopt(cls.algorithm.load(path, vec_env, device=env_device(agent.env)))
        agent.seed, agent.num_timesteps = agent.model.seed, agent.model.num_timesteps
        return agent


_OURS = ("policy", "env", "seed", "device", "_init_setup_model")
"""Arguments of an algorithm that ``SB3Agent`` gives it."""


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    spelt = {x.lower(): x for x in names}
    return "".join(f"; did you mean {spelt[close]}?" for close in get_close_matches(name.lower(), spelt, n=1))


def _subset_options(task: MaskingTask) -> dict[str, Any]:
    """What ``SubsetActorCriticPolicy`` has to know about a task."""
    # Of the sequential task's D + 1 + P channels, the one after the clip's D
    channel = task.observation_space.shape[-1] - task.grid.patch_dim - 1 if task.observes_actions else None
    return {"num_picks": task.num_picks, "shown_channel": channel}


def _find_policy(algorithm: type[BaseAlgorithm], policy: str) -> type[BasePolicy]:
    """The class that ``SB3Agent``'s argument names."""
    name = algorithm.__name__
    if "." not in policy and ":" not in policy:
        if policy not in algorithm.policy_aliases:
            known = ", ".join(algorithm.policy_aliases)
            raise ValueError(f"{name} has no policy {policy!r}; give one of {known}, or package.module:Class")
        return algorithm.policy_aliases[policy]
    path = policy if ":" in policy else ":".join(policy.rsplit(".", 1))
    found = import_object(path, "policy")
    if not (isinstance(found, type) and issubclass(found, BasePolicy)):
        raise ValueError(f"policy {policy!r} is not one of stable-baselines3's: give a subclass of its BasePolicy")
    if issubclass(found, SubsetActorCriticPolicy) and not issubclass(algorithm, (PPO, A2C)):
        raise ValueError(f"{found.__name__} is a policy for PPO and A2C; give {name} one of its own")
    return found


@functools.cache
def peer(name: str) -> type[SB3Agent]:
    """``SB3Agent`` for an algorithm of stable-baselines3 or, where that has none of the name, of sb3-contrib.

    Raises:
        ValueError: if there is none of that name, it takes discrete actions only, or sb3-contrib, which has it, is not
            installed.
    """
    if name in DISCRETE:
        raise ValueError(f"{name} chooses one of a few actions; here an action is N scores: give PPO, SAC or another")
    modules: list[Any] = [stable_baselines3]
    with contextlib.suppress(ImportError):
        modules.insert(0, importlib.import_module("sb3_contrib"))
    algorithms = {
        key: found
        for module in modules
        for key, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, BaseAlgorithm) and key not in DISCRETE
    }
    if name not in algorithms:
        if name in CONTRIB:
            raise ValueError(f"{name} is one of sb3-contrib's: pip install 'tats-env[contrib]'")
        known = sorted({*algorithms, *CONTRIB})
        raise ValueError(
            f"algorithm {name!r} is unknown; stable-baselines3 and sb3-contrib have {', '.join(known)}"
            f"{_did_you_mean(name, known)}"
        )
    return type(f"SB3{name}", (SB3Agent,), {"algorithm": algorithms[name], "__module__": __name__})
