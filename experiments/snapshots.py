"""How a sampler's masks of the same few clips move as it is trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from stable_baselines3.common.logger import Image, KVWriter
from torch import Tensor

from agents.base import Draws
from agents.hooks import Hook, LogHook
from experiments.build import masking_env
from experiments.checkpoints import whole
from experiments.gallery import EXAMPLES, decide, examples
from experiments.schema import RunConfig
from tats_env.data import VideoSet
from tats_env.mae import MAELearner
from tats_env.processes import num_processes
from tats_env.rendering import strip

FILE = "snapshots.npz"
MOMENTS = 10
PICTURED = 2
"""Clips of which each moment's pictures go beside the curves."""


class Snapshots(Hook):
    """Records at ten moments of a training what the agent makes visible of six validation clips.

    Training goes on from a moment as though it had not been looked at, and its clocks stand still meanwhile. One
    process alone has this hook.

    Args:
        config: of the run.
        videos: of the split that the clips are from.
        mae: the one in training.
        observation: what the agent wants to see.
        folder: where snapshots.npz is written anew at each moment.
        log: whose clocks stand still.
        outputs: where pictures go.
        console: where to tell if the file can't be written.
    """

    def __init__(
        self,
        config: RunConfig,
        videos: VideoSet,
        mae: MAELearner,
        observation: str,
        folder: Path,
        log: LogHook,
        outputs: Sequence[KVWriter],
        console: Console,
    ) -> None:
        # Nobody asks for the reward: one that costs no pass, and is no user's, who may count calls
        config = config.model_copy(update={"reward": "reconstruction_error"})
        self.env = masking_env(config, videos, mae, EXAMPLES, observation)
        self.rounds, self.moments = config.rounds, np.linspace(0, config.steps, MOMENTS).round()
        self.path, self.log, self.outputs, self.console = folder / FILE, log, outputs, console
        self.steps: list[int] = []
        self.visible: list[Tensor] = []
        self.heat: list[Tensor] = []

    def on_update_end(self, agent: Any) -> None:
        """Look, if it is time."""
        self.look(agent)

    def look(self, agent: Any) -> None:
        """Record a moment if one is due: before the first step, as training goes on, and at its end."""
        step = agent.num_timesteps // (agent.env.num_envs * self.rounds)
        ahead = self.moments[self.moments > max(self.steps, default=-1)]
        if not len(ahead) or step < ahead[0]:
            return
        device = self.env.task.device
        if device.type == "cuda":  # what it still has to do of the training is no time of ours
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with _aside(agent, self.env):
            logits = decide(agent, self.env, deterministic=True)
            rows = examples(self.env, logits, PICTURED)
        decision = self.env.task.decision
        assert decision is not None
        self.steps.append(step)
        self.visible.append(decision.visible.cpu())
        if logits is not None:
            self.heat.append(logits.float().softmax(1).cpu())
        pictures = {f"masks/{i}": Image(strip(each, self.env.task.grid), "HWC") for i, each in enumerate(rows)}
        for output in self.outputs:
            output.write(pictures, dict.fromkeys(pictures, ()), agent.num_timesteps * num_processes())
        try:
            self._write(decision.clips)
        except OSError as error:
            text = f"{self.path} can't be written ({error.strerror}); the run goes on"
            self.console.print(text, style="yellow", soft_wrap=True)
        seconds = time.perf_counter() - start
        self.log.start += seconds
        self.log.last += seconds

    def _write(self, clips: Tensor) -> None:
        arrays = {"clips": clips.cpu().numpy(), "steps": np.array(self.steps, np.int64)}
        arrays |= {"visible": torch.stack(self.visible).numpy()}
        if self.heat:
            arrays["heat"] = torch.stack(self.heat).numpy()
        with whole(self.path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        """The moments so far, which ``restore`` takes."""
        return {"steps": self.steps, "visible": self.visible, "heat": self.heat}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after those moments."""
        self.steps, self.visible, self.heat = (list(state[name]) for name in ("steps", "visible", "heat"))


@contextlib.contextmanager
def _aside(agent: Any, env: Any) -> Iterator[None]:
    """Have an agent in the midst of training look at another environment around its MAE, and know nothing of it after.

    Between an update and the next step no graph is waited for: the MAE's, if it has one, gives way to the next step's.
    """
    mae, home, draws = env.mae, agent.env, getattr(agent, "draws", None)
    training, count = mae.training, draws.count if isinstance(draws, Draws) else 0
    devices = [mae.device] if mae.device.type == "cuda" else []
    # Other shapes would have compiled code made for them
    with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        mae.train(False)
        agent.env = env  # which an oracle looks into
        try:
            yield
        finally:
            agent.env = home
            mae.train(training)
            if isinstance(draws, Draws):
                draws.count = count
