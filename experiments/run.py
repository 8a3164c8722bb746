"""``tats run``: train MAE and sampler together, then compare with uniform random masks trained equally long."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat

from agents.heuristics import RandomMask
from agents.hooks import LogHook, MAEUpdateHook
from agents.ppo import PPO, SETTINGS
from experiments.config import ConfigError, RunConfig, dump_config
from experiments.evaluation import evaluate_sampler, linear_probe, table_row
from experiments.progress import RunProgress
from tats_env.data import VideoSet, open_dataset, write_bad_videos
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner, save_learner
from tats_env.mae.learner import resolve_device
from tats_env.rendering import animation, decision_rows, strip
from tats_env.rewards import resolve_reward
from tats_env.vector_env import TATSMaskingVectorEnv

Results = dict[str, dict[str, float | None]]

COLUMNS = {
    "reconstruction_error": ".3f",
    "random_mask_error": ".3f",
    "motion_lift": ".2f",
    "probe_top1": ".3f",
    "seconds_per_step": ".4f",
}
EVALUATION_SEED = 1 << 40
"""The same for all runs, so that all samplers are compared on the same validation clips."""
EXAMPLES = 4


class Run:
    """One run and its folder.

    Args:
        config: what to do.
        console: where to tell of it.
    """

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.start = time.perf_counter()
        self.results: Results = {}
        # What can be refused is refused before there is a folder.
        for key, resolve in (("reward", resolve_reward), ("device", resolve_device)):
            try:
                resolve(getattr(config, key))
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error
        self.train_set = self._open("train", config.num_videos)
        self.test_set = self._open("validation", config.evaluate.num_videos)
        self.folder = new_folder(Path(config.out), config.name)
        (self.folder / "config.yaml").write_text(dump_config(config))
        write_bad_videos(self.folder, self.train_set, self.test_set)

    def _open(self, split: str, num_videos: int | None) -> VideoSet:
        clip = self.config.clip
        return open_dataset(
            self.config.data,
            split=split,
            num_frames=clip.num_frames,
            frame_stride=clip.frame_stride,
            size=(clip.size, clip.size),
            num_videos=num_videos,
            seed=0,
            progress=True,
        )

    def _env(self, videos: VideoSet, mae: MAELearner, num_envs: int) -> TATSMaskingVectorEnv:
        clip = self.config.clip
        return TATSMaskingVectorEnv(
            num_envs,
            output="torch",
            dataset=videos,
            mask_ratio=self.config.mask_ratio,
            num_frames=clip.num_frames,
            frame_stride=clip.frame_stride,
            size=clip.size,
            tubelet_size=clip.tubelet_size,
            patch_size=clip.patch_size,
            mae=mae,
            reward=self.config.reward,
            horizon=self.config.horizon,
            foreground=videos.has_foreground,
        )

    def _learner(self) -> MAELearner:
        config, clip = self.config, self.config.clip
        return MAELearner(
            TokenGrid(clip.num_frames, clip.size, clip.size, clip.tubelet_size, clip.patch_size),
            config.mae.size,
            batch_size=config.batch_size,
            learning_rate=config.mae.learning_rate,
            base_learning_rate=config.mae.base_learning_rate,
            weight_decay=config.mae.weight_decay,
            warmup_steps=config.mae.warmup_steps,
            total_steps=config.steps // config.mae.update_every,
            device=config.device,
            seed=config.seed,
            compile=config.mae.compile,
        )

    def _agent(self, name: str, env: TATSMaskingVectorEnv) -> PPO | RandomMask:
        if name == "random":
            return RandomMask(env, seed=self.config.seed)
        agent = self.config.agent
        policy = {"width": agent.width, "num_heads": agent.num_heads, "depth": agent.depth}
        return PPO(
            env,
            policy_kwargs=policy | {"logit_cap": agent.logit_cap},
            seed=self.config.seed,
            **{name: getattr(agent, name) for name in SETTINGS},
        )

    def train(self, name: str, progress: RunProgress) -> None:
        """Train the sampler of that name with an MAE of its own, and evaluate both."""
        config, folder = self.config, self.folder if name == "ppo" else self.folder / name
        folder.mkdir(exist_ok=True)
        mae = self._learner()
        env = self._env(self.train_set, mae, config.batch_size)
        agent = self._agent(name, env)
        logger = Logger(
            str(folder),
            [CSVOutputFormat(str(folder / "metrics.csv")), TensorBoardOutputFormat(str(folder)), progress],
        )
        progress.start(name)
        # The display counts first: should the MAE's update or a log line raise, it tells the step that did.
        hooks = [progress, MAEUpdateHook(config.mae.update_every), LogHook(logger, config.log_interval)]
        start = time.perf_counter()
        try:
            agent.learn(config.steps * config.batch_size, hooks)
        finally:
            seconds = (time.perf_counter() - start) / config.steps
            save_learner(mae, folder / "mae.safetensors")
            agent.save(folder / ("policy.safetensors" if isinstance(agent, PPO) else "policy.json"))
            for output in logger.output_formats[:2]:
                output.close()
        test_env = self._env(self.test_set, mae, min(64, config.evaluate.clips))
        self.results[name] = {
            **evaluate_sampler(agent, test_env, config.evaluate.clips, EVALUATION_SEED),
            "probe_top1": linear_probe(mae, self.train_set, self.test_set) if config.evaluate.probe else None,
            "seconds_per_step": seconds,
        }
        self._draw(agent, mae, folder)

    def _draw(self, agent: PPO | RandomMask, mae: MAELearner, folder: Path) -> None:
        """Write masks.png and masks.gif of a few validation clips."""
        from PIL import Image

        env = self._env(self.test_set, mae, EXAMPLES)
        mae.train(False)
        observation, _ = env.reset(seed=EVALUATION_SEED)
        env.step(agent.predict(observation)[0])
        with torch.no_grad():
            heat = agent.policy(observation)[0] if isinstance(agent, PPO) else [None] * EXAMPLES
        examples = [decision_rows(env.task, i, heat[i]) for i in range(EXAMPLES)]
        Image.fromarray(np.concatenate([strip(rows, env.task.grid) for rows in examples[:2]])).save(
            folder / "masks.png"
        )
        frames = [Image.fromarray(frame).quantize(128) for frame in animation(examples)]
        frames[0].save(folder / "masks.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)

    def write_summary(self, **more: Any) -> None:
        """Write summary.json: each sampler's figures under its name, seconds and versions; and the bad videos anew."""
        write_bad_videos(self.folder, self.train_set, self.test_set)
        packages = ("torch", "gymnasium", "stable-baselines3", "timm", "numpy")
        versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
        summary = {**self.results, "wall_seconds": time.perf_counter() - self.start, "versions": versions, **more}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def table(self) -> Table:
        """The samplers side by side."""
        caption = (
            f"Validation clips of {self.test_set.name}, mask ratio {self.config.mask_ratio:g}. Errors are in units of "
            "a patch's variance. Motion lift: share of moving foreground among the visible tokens over its share among "
            "all; 1 is chance. "
        )
        if self.config.evaluate.probe:
            caption += "A run as short as the quickstart trains no representation: its probe can't show a gain."
        table = Table(title=self.config.name, caption=caption, caption_justify="left")
        for heading in ("sampler", "error, own masks", "error, random masks", "motion lift", "probe top-1", "s/step"):
            table.add_column(heading, justify="left" if heading == "sampler" else "right")
        for name, metrics in self.results.items():
            table.add_row(name, *table_row(metrics, COLUMNS))
        return table


def new_folder(out: Path, name: str) -> Path:
    """Make ``out/name``, or ``out/name-2`` and so on where there is a run already."""
    for number in range(1, 10_000):
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{out} holds thousands of runs called {name}; give --out another folder")


def run(config: RunConfig) -> int:
    """Carry out a run; returns the exit code, 130 after Ctrl-C, which leaves what there is in the run's folder."""
    console = Console()
    this = Run(config, console)
    console.print(f"Run folder: {this.folder}", soft_wrap=True)
    names = ["ppo", "random"] if config.evaluate.baseline else ["ppo"]
    progress = RunProgress(console, config.steps * len(names))
    try:
        for name in names:
            this.train(name, progress)
    except KeyboardInterrupt:
        progress.close()
        this.write_summary(interrupted=True)
        console.print(f"Interrupted; checkpoints and metrics so far are in {this.folder}", soft_wrap=True)
        return 130
    finally:
        progress.close()
    this.write_summary()
    console.print(this.table())
    console.print(f"Written to {this.folder}: summary.json, metrics.csv, masks.png, masks.gif ...", soft_wrap=True)
    return 0
