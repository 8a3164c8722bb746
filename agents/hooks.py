"""What can be hung into an agent's training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from agents.meter import Meter, step_values
from tats_env.processes import average, num_processes
from tats_env.wrappers import UpdateEvery

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger

    from agents.guards import Guards
    from tats_env.data.staging import WaitClock


class Hook:
    """Called by every agent here as it learns; override what you need. ``agent`` is the agent itself."""

    def on_step(self, agent: Any) -> None:
        """After each step of the environment."""

    def on_rollout_end(self, agent: Any) -> None:
        """After the last step before an update of the agent."""

    def on_update_end(self, agent: Any) -> None:
        """After each update of the agent (for one that does not learn: after each step)."""


class MAEUpdateHook(Hook):
    """Interleave the MAE's training with the agent's: one update on the forward pass of every ``every``-th step.

    The same as wrapping the environment in ``tats_env.wrappers.CoTrainMAE``; use one of the two.
    """

    def __init__(self, every: int = 1) -> None:
        self.updates = UpdateEvery(every)

    def on_step(self, agent: Any) -> None:
        """Update the MAE, if it is its turn."""
        self.updates.after_step(agent.env.unwrapped.mae)

    def state(self) -> int:
        """Steps so far, which ``restore`` takes."""
        return self.updates.num_steps

    def restore(self, state: int) -> None:
        """Go on counting from there."""
        self.updates.num_steps = state


def as_hooks(callback: Hook | Sequence[Hook] | None) -> list[Hook]:
    """One hook, several or none, as a list."""
    if callback is None:
        return []
    return [callback] if isinstance(callback, Hook) else list(callback)


class LogHook(Hook):
    """Dump what the agent and the MAE measured through stable-baselines3's logger, every so many steps.

    Keys are stable-baselines3's (``train/approx_kl``, ``time/fps``, ...) and, of ours: ``mae/*`` of the MAE's
    optimiser; ``mask/reconstruction_error`` under the agent's masks and, the yardstick beside it,
    ``mask/random_mask_error``, of the next clips under uniform masks; ``mask/motion_lift`` where the truth is known;
    ``mask/plackett_luce_entropy`` (summed conditional entropies of the K draws, nats) and ``mask/effective_tokens``
    (exp of the entropy of one draw); ``time/data_wait``, the share of the time for which the device waited for clips.

    An agent adds numbers of its own by a method ``metrics()``.

    Where several processes take part, each has this hook, and all come to a line at the same step: what is logged is
    of all of them. Give those that write nothing a logger without outputs.

    Args:
        logger: stable-baselines3's; None prints a table.
        every: steps of the environment from one line to the next, at least.
        guards: look at each line and warn; None has nobody look.
    """

    def __init__(self, logger: Logger | None = None, every: int = 10, guards: Guards | None = None) -> None:
        if logger is None:
            from stable_baselines3.common.logger import configure

            logger = configure(None, ["stdout"])
        self.logger, self.every, self.guards = logger, every, guards
        self.iterations = self.steps = 0
        self.meter = Meter()
        self.waits: WaitClock | None = None
        self.start = self.last = time.perf_counter()
        self.timesteps = 0

    def on_step(self, agent: Any) -> None:
        """Take down what came of a step."""
        if self.waits is None:
            self.waits = agent.env.unwrapped.task.videos.waits
            self.waits.seconds()  # leaves out what others waited for the same set before
        self.steps += 1
        self.meter.add(step_values(agent.env.unwrapped.task))

    def on_update_end(self, agent: Any) -> None:
        """Write a line, if one is due; raises if learning broke down."""
        self.iterations += 1
        if self.steps < self.every:
            return
        assert self.waits is not None, "a step comes before an update"
        self.steps = 0
        env = agent.env.unwrapped
        # On the clips to come: an update has just fitted the MAE to those of this step.
        self.meter.add({"mask/random_mask_error": env.task.random_mask_error()})
        env.check()
        values = agent.metrics() if hasattr(agent, "metrics") else {}
        values |= env.mae.metrics() | self.meter.means()
        now, timesteps = time.perf_counter(), agent.num_timesteps * num_processes()
        waited = torch.tensor(self.waits.seconds() / (now - self.last), device=env.task.device)
        average(waited)
        values |= {
            "time/fps": (timesteps - self.timesteps) / (now - self.last),
            "time/iterations": self.iterations,
            "time/data_wait": float(waited),
            "time/time_elapsed": now - self.start,
            "time/total_timesteps": timesteps,
        }
        self.last, self.timesteps = now, timesteps
        if self.guards is not None:
            values |= self.guards.look(agent, values, timesteps)
        for name, value in values.items():
            self.logger.record(name, value)
        self.logger.dump(step=timesteps)

    def state(self) -> dict[str, float]:
        """Its counts right after a line, which ``restore`` takes."""
        return {
            "iterations": self.iterations,
            "timesteps": self.timesteps,
            "seconds": time.perf_counter() - self.start,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Go on counting from there, as though no time had passed since."""
        self.iterations, self.timesteps = int(state["iterations"]), int(state["timesteps"])
        self.last = time.perf_counter()
        self.start = self.last - state["seconds"]
