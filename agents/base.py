"""What every agent here keeps to, in stable-baselines3's words, and the loop of those that act one step at a time."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from agents import AGENTS
from agents.hooks import Hook, as_hooks
from tats_env.keyed import keyed_bits, keyed_uniform
from tats_env.processes import num_processes
from tats_env.rewards import import_object
from tats_env.vector_env import TATSMaskingVectorEnv


class Agent(Protocol):
    """What ``agent: {class: ...}`` of a configuration must name: an agent that learns, is asked, saved, brought back.

    It is made as ``Class(env, seed=..., **settings)``, where ``env`` is a ``TATSMasking`` vector environment with
    ``output="torch"`` and the settings are what else the configuration's ``agent`` holds. A class may say more about
    itself by attributes, all optional:

    - ``observation``: ``"tokens"`` (the default), ``"pixels"``, ``"nothing"`` or, for oracles, ``"foreground"``: what
      it wants to see;
    - ``suffix``: how the name of the file that ``save`` writes should end, such as ``".json"``;
    - ``logits(observation)``: a method -> [B, N], for the heat map;
    - ``metrics()``: a method -> numbers for a log line, that raises if learning broke down;
    - ``state()`` and ``restore(state)``: as ``Resumable`` has them, so that a run can be resumed.

    ``Stepwise`` is a base class with everything but the mask.
    """

    env: Any
    """The vector environment it learns in; hooks reach the MAE through ``env.unwrapped.mae``."""
    num_timesteps: int
    """Steps times environments so far."""

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> Any:
        """Train for that many clips, calling the hooks as it goes (``Hook``'s methods say when); returns the agent.

        Begins with ``env.reset(seed=first_seed(seed))``, so that all agents see the same clips in the same order.
        """

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, Any]:
        """Scores in [-1, 1], [N] or [B, N], for an observation [T', S, D] or [B, T', S, D]; and the hidden state."""

    def save(self, path: str | Path) -> None:
        """Write all that ``load`` needs."""

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Any:
        """Bring back what ``save`` wrote; without an environment it can predict."""


@contextmanager
def damage_told(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside, as an agent is made of what a file holds, into ValueError, which names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged, of another agent or of another version: {error}") from error


def resolve_agent(name: str) -> Any:
    """The class that a configuration's ``agent.class`` names.

    Args:
        name: of ``AGENTS``, ``sb3:ALGORITHM`` of stable-baselines3 or sb3-contrib, or ``package.module:Class``.

    Raises:
        ValueError: if there is none of that name, or it is not an ``Agent``.
    """
    if name.startswith("sb3:"):
        from agents.sb3_agent import peer

        return peer(name[len("sb3:") :])
    if name not in AGENTS and ":" not in name:
        near = "".join(f"; did you mean {close}?" for close in get_close_matches(name, AGENTS, n=1))
        raise ValueError(
            f"agent class {name!r} is unknown; give one of {', '.join(AGENTS)}, sb3:ALGORITHM, or your own as "
            f"package.module:Class{near}"
        )
    found = import_object(AGENTS.get(name, name), "agent class")
    missing = [method for method in ("learn", "predict", "save", "load") if not callable(getattr(found, method, None))]
    missing += sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(
            f"agent class {name!r} has no method {' and no '.join(missing)}; an agent has learn, predict, save and "
            "load, as agents.base.Agent says"
        )
    return found


def first_seed(seed: int) -> int:
    """The environment's seed for an agent's: far apart, since environment i of seed s is keyed by s + i, so that agents
    with seeds 0, 1, ... share no clips."""
    return seed << 20


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


def to_batch(observation: Any, device: torch.device) -> tuple[Tensor, bool, bool]:
    """(float32 [B, T', S, D] on the device, whether it came as one observation, whether as numpy)."""
    x = torch.as_tensor(observation, dtype=torch.float32, device=device)
    single = x.ndim == 3
    return (x[None] if single else x), single, isinstance(observation, np.ndarray)


def from_batch(scores: Tensor, single: bool, as_numpy: bool) -> Any:
    """Undo ``to_batch`` for scores [B, N]."""
    scores = scores[0] if single else scores
    return scores.cpu().numpy() if as_numpy else scores


class Draws:
    """Uniform random numbers for each environment: a hash of the agent's seed, of the environment's place in the whole
    batch and of how often was drawn.

    So they are the same on every device, and a process that steps a share of the environments draws what would be drawn
    for these among all.

    Attributes:
        count: draws so far.
    """

    def __init__(self, seed: int, env: Any = None) -> None:
        self.seed, self.device, self.count = seed, env_device(env), 0
        self.first_env = 0 if env is None else env.unwrapped.first_env

    def uniform(self, num_envs: int, *shape: int) -> Tensor:
        """float64 in [0, 1), [num_envs, *shape]."""
        self.count += 1
        env = torch.arange(self.first_env, self.first_env + num_envs, device=self.device)
        key = keyed_bits(env, self.seed, self.count)
        each = torch.arange(prod(shape), device=self.device)
        return keyed_uniform(key[:, None], each).view(num_envs, *shape)


class Resumable:
    """What a checkpoint holds of an agent in the midst of ``learn``.

    States are those of all processes, so that any number of them can take up what another number left.
    """

    env: Any
    seed: int
    draws: Draws
    num_timesteps: int
    _began = 0  # num_timesteps when the present ``learn`` began
    _env_state: dict[str, Any] | None = None  # for ``learn`` to go on from

    def state(self) -> dict[str, Any]:
        """All that ``learn`` goes on from: tensors, numbers and strings in dicts and lists.

        To be asked for by a hook after an update, once ``metrics`` were read.
        """
        return {
            "num_timesteps": self.num_timesteps * num_processes(),
            "began": self._began * num_processes(),
            "draws": self.draws.count,
            "task": self.env.unwrapped.task.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was asked for: a ``learn`` of as many clips as the one of then completes that one.

        The environment's MAE must have been restored by then.
        """
        self.num_timesteps, self._began = state["num_timesteps"] // num_processes(), state["began"] // num_processes()
        self.draws.count, self._env_state = state["draws"], state["task"]

    def _begin(self, total_timesteps: int) -> tuple[Tensor, int]:
        """The first observation of ``learn``, and ``num_timesteps`` at its end."""
        state, self._env_state = self._env_state, None
        if state is None:
            self._began = self.num_timesteps
        observation, _ = self.env.reset(seed=first_seed(self.seed), options=None if state is None else {"state": state})
        return observation, self._began + total_timesteps


def is_resumable(agent: Any) -> bool:
    """Whether a checkpoint can hold all of an agent: it has a state, of its own if it learns in its own way."""
    if not (callable(getattr(agent, "state", None)) and callable(getattr(agent, "restore", None))):
        return False
    kind = type(agent)
    learns = isinstance(agent, Stepwise) and kind.after_step is not Stepwise.after_step
    return not learns or kind.state is not Resumable.state


class Stepwise(Resumable, ABC):
    """An agent that acts, and may learn, one step at a time. Give it ``scores``, and you have an ``Agent``.

    Whatever else a subclass's constructor takes by keyword must be kept under the same name: ``save`` writes it down.

    Args:
        env: a ``TATSMasking`` vector environment with ``output="torch"``, an id, or None (to predict only).
        seed: of the environment's clips, and of ``self.draws``, where random numbers come from.
    """

    observation: ClassVar[str] = "tokens"
    suffix: ClassVar[str] = ".json"

    def __init__(self, env: str | gym.vector.VectorEnv[Any, Any, Any] | None = None, *, seed: int = 0) -> None:
        self.env: Any = None if env is None else open_env(env)
        self.seed = seed
        self.device = env_device(self.env)
        self.draws = Draws(seed, self.env)
        self.num_timesteps = 0

    @abstractmethod
    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """Priorities [B, N] for an observation [B, T', S, D]; the highest stay visible."""

    def after_step(self, observation: Tensor) -> None:
        """Learn from ``self.env.unwrapped.task.decision``, which came of the observation; by default nothing.

        Whoever learns adds what it has learnt to ``state`` and ``restore``, or its runs can't be resumed.
        """

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> Self:
        """Step the environment for that many clips, calling the hooks.

        Raises:
            ValueError: without an environment.
        """
        if self.env is None:
            raise ValueError("this agent was made or loaded without an environment: give env= to learn")
        hooks = as_hooks(callback)
        observation, end = self._begin(total_timesteps)
        while self.num_timesteps < end:
            following, reward, _, _, _ = self.env.step(self.scores(observation, False))
            self.num_timesteps += len(reward)
            self.after_step(observation)
            observation = following
            for event in ("on_step", "on_rollout_end", "on_update_end"):
                for hook in hooks:
                    getattr(hook, event)(self)
        return self

    @torch.no_grad()
    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, None]:
        """Scores [N] or [B, N] for an observation [T', S, D] or [B, T', S, D], numpy or torch; no hidden state."""
        x, single, as_numpy = to_batch(observation, self.device)
        return from_batch(self.scores(x, deterministic), single, as_numpy), None

    def settings(self) -> dict[str, Any]:
        """What the constructor was given, but the environment."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "env"}

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON."""
        Path(path).write_text(json.dumps({"agent": type(self).__name__, **self.settings()}) + "\n")

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Self:
        """Bring back what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, or another agent wrote it.
        """
        with damage_told(path):
            settings = dict(json.loads(Path(path).read_text("utf-8")))
        if settings.pop("agent", None) != cls.__name__:
            raise ValueError(f"{path} was not written by {cls.__name__}.save")
        with damage_told(path):
            return cls(env, **settings)
