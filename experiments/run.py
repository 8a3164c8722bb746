"""``tats run``: train MAE and sampler together, then compare with uniform random masks trained equally long."""

from __future__ import annotations

import json
import platform
import shutil
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from stable_baselines3.common.logger import Image, KVWriter, Logger

from agents import AGENTS
from agents.base import is_resumable
from agents.guards import Guards, Thresholds
from agents.hooks import Hook, LogHook, MAEUpdateHook
from experiments.build import agent_maker, load_mae, masking_env, new_learner
from experiments.checkpoints import (
    FOLDER,
    TERMINATED,
    Checkpoints,
    Curves,
    Metrics,
    Termination,
    check_alike,
    newest_checkpoint,
    sync,
    whole,
)
from experiments.config import dump_config
from experiments.deterministic import make_deterministic
from experiments.distributed import first_then_others, join, led_by_first, part
from experiments.downstream import downstream, top1_figures
from experiments.evaluation import EVALUATION_SEED, evaluate_sampler
from experiments.folder import hold, new_folder, stored
from experiments.gallery import EXAMPLES, draw
from experiments.machine import device_name
from experiments.metrics import heading, in_digits, shown
from experiments.points import Points, probe_points
from experiments.progress import RunProgress
from experiments.refusals import ConfigError
from experiments.schema import AgentConfig, OtherAgentConfig, RunConfig
from experiments.snapshots import Snapshots
from experiments.trackers import Tracker, check_tracker
from experiments.videos import Videos
from tats_env.data import list_videos, write_bad_videos
from tats_env.mae import MAELearner, save_learner
from tats_env.mae.learner import resolve_device
from tats_env.processes import num_processes, process_index
from tats_env.rewards import resolve_reward
from tats_env.vector_env import TATSMaskingVectorEnv

Results = dict[str, dict[str, float | None]]

SHORT = 100_000
"""Clips under which a run is told not to expect features."""
GO_ON = "once they can, tats run with --resume goes on"
TRAINED = "trained.json"
"""In a sampler's folder once it is trained: figures of its training, and what streaming found out about the videos."""


class Run:
    """One run and its folder; of several processes, this one's part in it.

    Args:
        config: what to do.
        console: where to tell of it.
        device: of this process; None is the configuration's.
        folder: the one that process 0 made; None makes it.
        resumed: the folder of a run to go on with, in place of a new one.
    """

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        device: str | None = None,
        folder: Path | None = None,
        resumed: Path | None = None,
    ) -> None:
        self.config, self.console = config.model_copy(update={"device": device or config.device}), console
        self.leads = folder is None
        self._first: tuple[MAELearner, Any] | None
        self.start = time.perf_counter()
        self.results: Results = {}
        self.termination = Termination()
        self.resumed = resumed is not None
        if resumed is not None and self.leads:
            self.folder, self.lock = resumed, hold(resumed)
        # What can be refused is refused before there is a folder.
        check_tracker(config)
        for key, resolve in (("reward", resolve_reward), ("device", resolve_device)):
            try:
                resolve(getattr(self.config, key))
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error
        sections: list[AgentConfig | OtherAgentConfig] = [config.agent]
        if config.evaluate.baseline and config.agent.class_ != "random":
            sections.append(OtherAgentConfig(**{"class": "random"}))
        self.makers = {section.class_: agent_maker(section, config) for section in sections}
        self.videos = Videos(config)
        self.train_set = self.videos(config.data, "train", None, config.clip.augment, config.clip.flip)
        if folder is not None:
            self.folder, self._first = folder, self._make(config.agent.class_)
            return
        self.test_set = self.videos(config.data, "validation")
        for data in config.evaluate.data if config.evaluate.tasks else ():
            evaluate = config.evaluate
            for split, count, seed in (
                ("train", config.num_videos, 0),
                ("validation", evaluate.num_videos, evaluate.seed),
            ):
                list_videos(data, split, count, seed, progress=True)
        self._first = self._make(config.agent.class_)
        if resumed is None:
            self.folder = new_folder(Path(config.out), config.name)
            self.lock = hold(self.folder)
        with whole(self.folder / "config.yaml") as partial:
            partial.write_text(dump_config(config))
        write_bad_videos(self.folder, *self.videos.opened())

    def _make(self, name: str) -> tuple[MAELearner, Any]:
        """An MAE, and the agent of that name in an environment around it, of this process's share of the clips."""
        make, settings = self.makers[name]
        mae = new_learner(self.config)
        share, observation = self.config.batch_size // num_processes(), getattr(make, "observation", "tokens")
        try:
            env = masking_env(
                self.config, self.train_set, mae, share, observation, self.config.loader.repeats,
                first_env=process_index() * share,
            )  # fmt: skip
            return mae, make(env, seed=self.config.seed, **settings)
        except (TypeError, ValueError) as error:
            if name not in AGENTS or isinstance(error, ValueError):
                raise ConfigError(f"agent ({name}): {error}") from error
            raise

    def _files(self, name: str) -> tuple[Path, Path, Path]:
        """Of the sampler of that name: its folder, and there the MAE and the policy."""
        folder = self.folder if name == self.config.agent.class_ else self.folder / name
        return folder, folder / "mae.safetensors", folder / f"policy{getattr(self.makers[name][0], 'suffix', '')}"

    def _curves(self, folder: Path, step: int) -> list[KVWriter]:
        """Where curves and pictures of the sampler in a folder go, from a step on."""
        tracker = [Tracker(self.config, self.folder, folder)] if self.config.tracker else []
        return [Curves(folder, step), *tracker]

    def train(self, name: str, progress: RunProgress) -> None:
        """Train the agent of that name with an MAE of its own, from where a checkpoint has it."""
        config = self.config
        folder, mae_file, policy_file = self._files(name)
        first, self._first = self._first, None
        if trained := stored(folder / TRAINED):
            self._take_up(trained, name)
            progress.skip(config.steps * config.rounds)
            return
        mae, agent = first or self._make(name)
        resumable = is_resumable(agent)
        found = newest_checkpoint(folder / FOLDER, self.console) if resumable else None
        step = found["step"] if found else 0
        check_alike(step, mae.device)
        if self.resumed and not resumable:
            self.console.print(f"{name} keeps no state that could be gone on from, and begins anew", soft_wrap=True)
        outputs: list[KVWriter] = []
        own: dict[str, Any] = {}  # what process 0 alone keeps
        if self.leads:
            folder.mkdir(exist_ok=True)
            own["metrics"] = Metrics(folder / "metrics.csv")
            own["guards"] = Guards(Thresholds(**config.guards.model_dump()), folder / "warnings.txt")
            outputs = [own["metrics"], *self._curves(folder, step), progress]
        progress.start(name)
        # The display counts first: should the MAE's update or a log line raise, it tells the step that did. The MAE
        # learns from complete masks only.
        updates = {} if config.mae.frozen else {"updates": MAEUpdateHook(config.mae.update_every * config.rounds)}
        log = LogHook(Logger(str(folder), outputs), config.log_interval * config.rounds, own.get("guards"))
        if self.leads and config.evaluate.pictures:
            observation = getattr(agent, "observation", "tokens")
            own["snapshots"] = Snapshots(
                config, self.test_set, mae, observation, folder, log, outputs[1:-1], self.console
            )
        hooks: list[Hook] = [*updates.values(), log]
        if resumable:
            parts: dict[str, Any] = {"mae": mae, "agent": agent, "log": log, **updates, **own}
            checkpoints = Checkpoints(
                folder / FOLDER, parts, log, config.checkpoint_minutes, self.termination, self.console, self.leads
            )
            hooks = checkpoints.around(*updates.values())
            if found:
                checkpoints.restore(found)
                progress.skip(step // config.batch_size)
                self.start -= found["log"]["seconds"]
                self.console.print(f"{name} goes on from step {step // config.batch_size}", soft_wrap=True)
        self.termination.waits = resumable
        snapshots = [own["snapshots"]] if "snapshots" in own else []
        done = step // (config.batch_size * config.rounds)
        points = [Points(config, folder, mae, log, done)] if self.leads and config.evaluate.points else []
        try:
            for each in snapshots:
                each.look(agent)
            agent.learn(config.steps * config.rounds * agent.env.num_envs, [progress, *snapshots, *points, *hooks])
            for each in snapshots:
                each.look(agent)
        finally:
            self.termination.waits = False
            seconds = (time.perf_counter() - log.start) / config.steps
            if self.leads:
                try:
                    save_learner(mae, mae_file)
                    agent.save(policy_file)
                except (OSError, SafetensorError) as error:
                    raise ConfigError(f"{folder}: weights can't be written: {error}; {GO_ON}") from error
            for output in outputs[:-1]:
                output.close()
        self.results[name] = {"seconds_per_step": seconds, "mae_updates": mae.num_updates}
        if self.leads:
            for path in (mae_file, policy_file):
                if path.is_file():
                    sync(path)
            with whole(folder / TRAINED) as partial:
                partial.write_text(json.dumps({"results": self.results[name], "videos": self.train_set.state()}))
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        if self.termination.asked:
            raise SystemExit(TERMINATED)

    def _take_up(self, trained: dict[str, Any], name: str) -> None:
        """What is known of the training of that name, which was finished before."""
        check_alike(-1, resolve_device(self.config.device))
        self.results[name] = trained["results"]
        self.train_set.restore(trained["videos"])
        self.start -= trained["results"]["seconds_per_step"] * self.config.steps

    def evaluate(self, name: str) -> None:
        """Measure what the agent of that name and its MAE are worth, as they were saved."""
        config, make = self.config, self.makers[name][0]
        folder, mae_file, policy_file = self._files(name)
        mae = load_mae(mae_file, config, name, device=config.device, compile=config.compile)

        def on_test_set(num_envs: int) -> tuple[Any, TATSMaskingVectorEnv]:
            env = masking_env(config, self.test_set, mae, num_envs, getattr(make, "observation", "tokens"))
            return make.load(policy_file, env), env

        judged, env = on_test_set(min(64, config.evaluate.clips))
        found = evaluate_sampler(judged, env, config.evaluate.clips, EVALUATION_SEED)
        self.results[name] = found.figures | self.results[name]
        grid = env.task.grid
        positions = {"grid": [grid.num_steps, grid.rows, grid.columns], "share": found.positions.tolist()}
        with whole(folder / "positions.json") as partial:
            partial.write_text(json.dumps(positions) + "\n")
        if config.evaluate.pictures:
            strips = draw(*on_test_set(EXAMPLES), folder)
            gallery = {f"gallery/{i}": Image(each, "HWC") for i, each in enumerate(strips)}
            step = config.steps * config.batch_size * config.rounds
            for output in self._curves(folder, step):
                output.write(gallery, dict.fromkeys(gallery, ()), step)
                output.close()
        if config.evaluate.tasks:
            self.write_summary(interrupted=True)  # what there is, should a task fail
            scores = downstream(config, config.evaluate.tasks, mae, judged, self.videos, folder, self.console)
            self.results[name] |= top1_figures(scores, config)
            if config.evaluate.points:
                probe_points(config, self.videos, folder, self.console, self.results[name])

    def write_summary(self, **more: Any) -> None:
        """Write summary.json, each sampler's figures under its name and what they were made on; the bad videos anew."""
        write_bad_videos(self.folder, *self.videos.opened())
        packages = ("torch", "gymnasium", "stable-baselines3", "timm", "numpy")
        versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
        about = {
            "wall_seconds": time.perf_counter() - self.start,
            "device": device_name(resolve_device(self.config.device)),
            "versions": versions,
        }
        summary = {**self.results, **about, **more}
        with whole(self.folder / "summary.json") as partial:  # who resumes goes by it
            partial.write_text(json.dumps(summary, indent=2) + "\n")

    def report(self) -> bool:
        """Write report.html if it is wanted, or say why it can't be: the run is worth what it is without."""
        if not self.config.evaluate.pictures:
            return False
        try:
            from experiments.report import write_report

            write_report([self.folder])
            return True
        except Exception as error:  # whatever lies in the folder
            self.console.print(
                f"report.html could not be written ({type(error).__name__}: {error}); the run has all else, and "
                f"tats report {self.folder} tries again",
                style="yellow", soft_wrap=True,
            )  # fmt: skip
            return False

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


def run(config: RunConfig, resumed: Path | None = None) -> int:
    """Carry out a run; returns the exit code, 130 after Ctrl-C, which leaves what there is in the run's folder.

    Args:
        config: what to do.
        resumed: the folder of a run to go on with; None begins one.

    Raises:
        SystemExit: with 143, after SIGTERM: what is in training then waits for its next line of metrics, and leaves a
            checkpoint.

    Each of the processes that torchrun started is to call this. All samplers are trained first; then process 0 goes on
    alone, so that nobody waits for it through hours of evaluation.
    """
    if config.deterministic:
        make_deterministic()
    device = join(config)
    console = Console(quiet=process_index() > 0)
    with led_by_first(), Termination() as termination, ExitStack() as stack:
        this = first_then_others(lambda folder: Run(config, console, device, folder, resumed), lambda made: made.folder)
        this.termination = termination
        if this.leads:
            stack.callback(this.lock.release)
        console.print(f"Run folder: {this.folder}", soft_wrap=True)
        progress = RunProgress(console, config.steps * config.rounds * len(this.makers))
        try:
            for name in this.makers:
                this.train(name, progress)
            bad = part(this.train_set.bad_videos)
            if not this.leads:
                return 0
            this.train_set.bad_videos = list(dict(found for theirs in bad for found in theirs).items())
            progress.close()
            for name in this.makers:
                this.evaluate(name)
        except KeyboardInterrupt:
            progress.close()
            this.write_summary(interrupted=True)
            this.lock.release()  # or the report would have it that somebody is at work
            told = "; report.html shows them" if this.report() else ""
            console.print(f"Interrupted; weights and metrics so far are in {this.folder}{told}", soft_wrap=True)
            return 130
        finally:
            progress.close()
        this.write_summary()
        this.report()
        console.print(this.table())
        written = sorted(
            path.name
            for path in this.folder.iterdir()
            if path.is_file() and path.suffix and "tfevents" not in path.name
        )
        console.print(f"Written to {this.folder}: {', '.join(written)}", soft_wrap=True)
        return 0
