"""What the encoder is worth on the way: weights kept at points of a training, and probes of them once it is over."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agents.hooks import Hook, LogHook
from experiments.build import load_mae
from experiments.checkpoints import whole
from experiments.downstream import downstream, top1_figures
from experiments.folder import stored
from experiments.probes import PROBES
from experiments.schema import RunConfig
from experiments.videos import Videos
from tats_env.mae import MAELearner, save_learner

FILE = "points.csv"
FOLDER = "points"
"""In a sampler's folder: one folder a point, called by its clips, with weights and scores."""
MAE_FILE, SCORES = "mae.safetensors", "scores.json"


class Points(Hook):
    """Keeps the MAE's weights after the shares of a training that ``evaluate.points`` says; its clocks stand still.

    Args:
        config: of the run.
        folder: the sampler's.
        mae: the one in training.
        log: whose clocks.
        done: steps of the training that were made before.
    """

    def __init__(self, config: RunConfig, folder: Path, mae: MAELearner, log: LogHook, done: int) -> None:
        self.steps = [max(1, round(share * config.steps)) for share in config.evaluate.points]
        self.config, self.folder, self.mae, self.log, self.done = config, folder, mae, log, done

    def on_update_end(self, agent: Any) -> None:
        """Write the weights, if a point has been passed."""
        before, self.done = self.done, agent.num_timesteps // (agent.env.num_envs * self.config.rounds)
        if not any(before < step <= self.done for step in self.steps):
            return
        start = time.perf_counter()
        where = self.folder / FOLDER / str(self.done * self.config.batch_size)
        where.mkdir(parents=True, exist_ok=True)
        with whole(where / MAE_FILE) as partial:
            save_learner(self.mae, partial)
        seconds = time.perf_counter() - start
        self.log.start += seconds
        self.log.last += seconds


def probe_points(
    config: RunConfig, videos: Videos, folder: Path, console: Console, end: dict[str, float | None]
) -> None:
    """Probe what ``Points`` kept, and write points.csv: clips, seconds of training, and accuracies; its end included.

    Args:
        config: of the run.
        videos: opens its data sets.
        folder: the sampler's.
        console: where to show progress.
        end: the sampler's figures at the end of the training, as in summary.json.
    """
    tasks = [task for task in config.evaluate.tasks if task in PROBES]
    config = config.model_copy(update={"probe": config.probe.model_copy(update={"keep_features": False})})
    found: dict[int, dict[str, Any]] = {}
    for weights in folder.glob(f"{FOLDER}/*/{MAE_FILE}"):
        where = weights.parent
        if not (scores := stored(where / SCORES)):
            mae = load_mae(weights, config, str(where), device=config.device, compile=config.compile)
            scores = top1_figures(downstream(config, tasks, mae, None, videos, where, console), config)
            with whole(where / SCORES) as partial:
                partial.write_text(json.dumps(scores) + "\n")
        found[int(where.name)] = scores
    names = [name for name in end if name.partition("_top1")[0] in tasks]
    found[config.steps * config.batch_size] = {name: end.get(name) for name in names}
    seconds = _seconds(folder / "metrics.csv", config)
    with whole(folder / FILE) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["clips", "seconds", *names])
        writer.writeheader()
        for clips in sorted(found):
            writer.writerow({"clips": clips, "seconds": float(np.interp(clips, *seconds)), **found[clips]})


def _seconds(path: Path, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """(clips seen, seconds of training) at each line of metrics, from the beginning."""
    with path.open(newline="") as file:
        rows = [(float(row["time/total_timesteps"]), float(row["time/time_elapsed"])) for row in csv.DictReader(file)]
    clips, seconds = np.array([(0.0, 0.0), *rows]).T
    return clips / config.rounds, seconds
