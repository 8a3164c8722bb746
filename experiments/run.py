"""``tats run``: train MAE and sampler together, then compare with uniform random masks trained equally long."""

from __future__ import annotations

import inspect
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat

from agents import AGENTS
from agents.base import resolve_agent
from agents.hooks import LogHook, MAEUpdateHook
from agents.ppo import PPO, SETTINGS
from experiments.config import dump_config
from experiments.downstream import downstream, top1_figures
from experiments.evaluation import evaluate_sampler
from experiments.metrics import heading, in_digits, shown
from experiments.progress import RunProgress
from experiments.refusals import ConfigError, close, did_you_mean
from experiments.schema import AgentConfig, OtherAgentConfig, RunConfig
from experiments.videos import Videos
from tats_env.data import VideoSet, list_videos, write_bad_videos
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner, load_learner, save_learner
from tats_env.mae.learner import resolve_device
from tats_env.rendering import animation, decision_rows, strip
from tats_env.rewards import resolve_reward
from tats_env.sequential import TATSMaskingSequentialVectorEnv
from tats_env.vector_env import TATSMaskingVectorEnv

Results = dict[str, dict[str, float | None]]

EVALUATION_SEED = 1 << 40
"""The same for all runs, so that all samplers are compared on the same validation clips."""
EXAMPLES = 4
SHORT = 100_000
"""Clips under which a run is told not to expect features."""
LOCK = ".lock"
"""Held in a run's folder for as long as its process lives."""


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
        sections: list[AgentConfig | OtherAgentConfig] = [config.agent]
        if config.evaluate.baseline and config.agent.class_ != "random":
            sections.append(OtherAgentConfig(**{"class": "random"}))
        self.makers = {section.class_: agent_maker(section) for section in sections}
        self.videos = Videos(config)
        self.train_set = self.videos(config.data, "train", None, config.clip.augment, config.clip.flip)
        self.test_set = self.videos(config.data, "validation")
        for data in config.evaluate.data if config.evaluate.tasks else ():
            for split, count in (("train", config.num_videos), ("validation", config.evaluate.num_videos)):
                list_videos(data, split, count, progress=True)
        self._first = self._make(config.agent.class_)
        self.folder = new_folder(Path(config.out), config.name)
        self.lock = FileLock(self.folder / LOCK)
        self.lock.acquire(blocking=False)
        (self.folder / "config.yaml").write_text(dump_config(config))
        write_bad_videos(self.folder, *self.videos.opened())

    def _env(self, videos: VideoSet, mae: MAELearner, num_envs: int, observation: str) -> TATSMaskingVectorEnv:
        repeats = self.config.loader.repeats if videos is self.train_set else 1
        return masking_env(self.config, videos, mae, num_envs, observation, repeats)

    def _make(self, name: str) -> tuple[MAELearner, Any]:
        """An MAE, and the agent of that name in an environment around it."""
        make, settings = self.makers[name]
        mae = new_learner(self.config)
        try:
            env = self._env(self.train_set, mae, self.config.batch_size, getattr(make, "observation", "tokens"))
            return mae, make(env, seed=self.config.seed, **settings)
        except (TypeError, ValueError) as error:
            if name not in AGENTS or isinstance(error, ValueError):
                raise ConfigError(f"agent ({name}): {error}") from error
            raise

    def train(self, name: str, progress: RunProgress) -> None:
        """Train the agent of that name with an MAE of its own, and evaluate both."""
        config, main = self.config, name == self.config.agent.class_
        folder = self.folder if main else self.folder / name
        folder.mkdir(exist_ok=True)
        mae, agent = self._first if main else self._make(name)
        logger = Logger(
            str(folder),
            [CSVOutputFormat(str(folder / "metrics.csv")), TensorBoardOutputFormat(str(folder)), progress],
        )
        progress.start(name)
        # The display counts first: should the MAE's update or a log line raise, it tells the step that did. The MAE
        # learns from complete masks only.
        updates = [] if config.mae.frozen else [MAEUpdateHook(config.mae.update_every * config.rounds)]
        hooks = [progress, *updates, LogHook(logger, config.log_interval * config.rounds)]
        start = time.perf_counter()
        path = folder / f"policy{getattr(agent, 'suffix', '')}"
        try:
            agent.learn(config.steps * config.rounds * config.batch_size, hooks)
        finally:
            seconds = (time.perf_counter() - start) / config.steps
            save_learner(mae, folder / "mae.safetensors")
            agent.save(path)
            for output in logger.output_formats[:2]:
                output.close()
        clips = min(64, config.evaluate.clips)
        observation = getattr(agent, "observation", "tokens")
        test_env = self._env(self.test_set, mae, clips, observation)
        judged = type(agent).load(path, test_env)  # what is judged is what was saved
        self.results[name] = {
            **evaluate_sampler(judged, test_env, config.evaluate.clips, EVALUATION_SEED),
            "seconds_per_step": seconds,
            "mae_updates": mae.num_updates,
        }
        if config.evaluate.pictures:
            env = self._env(self.test_set, mae, EXAMPLES, observation)
            draw(type(agent).load(path, env), env, folder)
        if config.evaluate.tasks:
            self.write_summary(interrupted=True)  # what there is, should a task fail
            found = downstream(config, config.evaluate.tasks, mae, judged, self.videos, folder, self.console)
            self.results[name] |= top1_figures(found, config)

    def write_summary(self, **more: Any) -> None:
        """Write summary.json: each sampler's figures under its name, seconds and versions; and the bad videos anew."""
        write_bad_videos(self.folder, *self.videos.opened())
        packages = ("torch", "gymnasium", "stable-baselines3", "timm", "numpy")
        versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
        summary = {**self.results, "wall_seconds": time.perf_counter() - self.start, "versions": versions, **more}
        partial = self.folder / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(self.folder / "summary.json")  # whole or not there: who resumes goes by it

    def table(self) -> Table:
        """The samplers side by side."""
        caption = (
            f"Validation clips of {self.test_set.name}, mask ratio {self.config.mask_ratio:g}. Errors are in units of "
            "a patch's variance. Motion lift: share of moving foreground among the visible tokens over its share among "
            "all; 1 is chance. "
        )
        if self.config.evaluate.tasks and self.config.steps * self.config.batch_size < SHORT:
            caption += "A run as short as the quickstart trains no representation: its probe can't show a gain."
        table = Table(title=self.config.name, caption=caption, caption_justify="left")
        metrics = shown(self.results.values())
        table.add_column("sampler")
        for metric in metrics:
            table.add_column(heading(metric), justify="right")
        for name, figures in self.results.items():
            table.add_row(name, *(in_digits(figures, metric) for metric in metrics))
        return table


def masking_env(
    config: RunConfig, videos: VideoSet, mae: MAELearner, num_envs: int, observation: str, repeats: int = 1
) -> TATSMaskingVectorEnv:
    """The environment that a configuration describes, on the device."""
    clip = config.clip
    options: dict[str, Any] = {
        "dataset": videos,
        "mask_ratio": config.mask_ratio,
        "num_frames": clip.num_frames,
        "frame_stride": clip.frame_stride,
        "size": clip.size,
        "tubelet_size": clip.tubelet_size,
        "patch_size": clip.patch_size,
        "mae": mae,
        "observation": observation,
        "repeats": repeats,
        "foreground": videos.has_foreground,
    }
    if config.rounds > 1:
        return TATSMaskingSequentialVectorEnv(num_envs, output="torch", rounds=config.rounds, **options)
    return TATSMaskingVectorEnv(num_envs, output="torch", reward=config.reward, horizon=config.horizon, **options)


def new_learner(config: RunConfig) -> MAELearner:
    """The MAE that a configuration asks for, from scratch or from ``mae.init``.

    Raises:
        ConfigError: if ``mae.init`` cannot be loaded, or is not for clips such as these.
    """
    mae = config.mae
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "learning_rate": mae.learning_rate,
        "base_learning_rate": mae.base_learning_rate,
        "weight_decay": mae.weight_decay,
        "warmup_steps": mae.warmup_steps,
        "total_steps": config.steps // mae.update_every,
        "device": config.device,
        "seed": config.seed,
        "compile": mae.compile,
    }
    if mae.init is None:
        return MAELearner(token_grid(config), mae.size, **options).train(not mae.frozen)
    return load_mae(mae.init, config, "mae.init", **options).train(not mae.frozen)


def load_mae(path: str | Path, config: RunConfig, what: str, **options: Any) -> MAELearner:
    """A trained MAE, for clips such as the configuration's.

    Args:
        path: of ``load_learner``, and so are the options.
        what: names it in an error.

    Raises:
        ConfigError: if it cannot be loaded, or was made for other clips.
    """
    try:
        learner = load_learner(path, **options)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
    if learner.grid != token_grid(config):
        raise ConfigError(f"{what}: {path} was made for {learner.grid}, but clip says {token_grid(config)}")
    return learner


def token_grid(config: RunConfig) -> TokenGrid:
    """How the configuration's clips are cut into tokens."""
    clip = config.clip
    return TokenGrid(clip.num_frames, clip.size, clip.size, clip.tubelet_size, clip.patch_size)


def agent_maker(section: AgentConfig | OtherAgentConfig) -> tuple[Any, dict[str, Any]]:
    """The agent's class, and the settings that its constructor takes besides the environment and the seed.

    Raises:
        ConfigError: if there is no such class, or it takes no such setting.
    """
    if isinstance(section, AgentConfig):
        policy = {name: getattr(section, name) for name in ("width", "num_heads", "depth", "logit_cap")}
        return PPO, {"policy_kwargs": policy, **{name: getattr(section, name) for name in SETTINGS}}
    try:
        found = resolve_agent(section.class_)
    except ValueError as error:
        raise ConfigError(f"agent.class: {error}") from error
    settings = dict(section.model_extra or {})
    taken = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        names = [name for name in taken if name not in ("env", "seed")]
        for name in settings:
            if name not in names:
                known = f"{section.class_} takes {', '.join(names) or 'no settings'}"
                raise ConfigError(f"agent.{name}: unknown key; {known}{did_you_mean(*close(name, names))}")
    return found, settings


def draw(agent: Any, env: TATSMaskingVectorEnv, folder: Path) -> None:
    """Write masks.png and masks.gif of what the agent does with an environment of a few clips."""
    from PIL import Image

    env.mae.train(False)
    following, _ = env.reset(seed=EVALUATION_SEED)
    complete = False
    while not complete:
        observation = following
        following, *_ = env.step(agent.predict(observation)[0])
        complete = env.task.mask_complete
    with torch.no_grad():
        heat = agent.logits(observation) if hasattr(agent, "logits") else [None] * env.num_envs
    examples = [decision_rows(env.task, i, heat[i]) for i in range(env.num_envs)]
    Image.fromarray(np.concatenate([strip(rows, env.task.grid) for rows in examples[:2]])).save(folder / "masks.png")
    frames = [Image.fromarray(frame).quantize(128) for frame in animation(examples)]
    frames[0].save(folder / "masks.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)


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
    progress = RunProgress(console, config.steps * config.rounds * len(this.makers))
    try:
        for name in this.makers:
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
    written = sorted(
        path.name for path in this.folder.iterdir() if path.is_file() and path.suffix and "tfevents" not in path.name
    )
    console.print(f"Written to {this.folder}: {', '.join(written)}", soft_wrap=True)
    return 0
