"""``tats compare``: a grid of runs as processes, resumable, and what it says with means, spread and intervals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import bootstrap

from experiments.checkpoints import Termination
from experiments.config import dump_config, load_config
from experiments.folder import LOCK, hold
from experiments.grid import Cell, CompareConfig
from experiments.metrics import heading, in_digits, shown
from experiments.points import FILE as POINTS
from experiments.reach import reaches, said
from experiments.refusals import ConfigError
from experiments.resume import is_finished
from experiments.schema import RunConfig

CURVES = {
    "error": "mask/random_mask_error",
    "motion_lift": "mask/motion_lift",
    "effective_tokens": "mask/effective_tokens",
}
"""What is followed over training, and its column in metrics.csv; the first is there for every agent."""
CONFIDENCE = 0.95
RESAMPLES = 10_000
POLL_SECONDS = 0.3
CAPTION = (
    "Mean ± standard deviation over seeds, on the same validation clips. Last but one: the error under uniform random "
    "masks less that of the agent called random with the same seed; bootstrap interval over seeds, too narrow with few "
    "of them. "
)
WIDTH = 140
"""Columns where there is no terminal that has a width of its own."""
_START = "import sys; sys.path.pop(0); from experiments.cli import main; raise SystemExit(main())"


class Comparison:
    """A grid's folder, and the runs in it.

    Args:
        config: the grid.
        console: where to tell of it.

    Raises:
        ConfigError: if the folder holds runs of another configuration, or another process is at work in it.
    """

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.runs = config.runs(config.name)
        self.folder = Path(config.out) / config.name
        self.cells = self.folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        self.lock = hold(self.folder)
        for run in self.runs.values():
            found = self._path(run) / "config.yaml"
            if self.finished(run) and load_config(str(found)) != run:
                raise ConfigError(
                    f"{self.folder}: holds runs of another configuration ({found} differs from the grid); "
                    "give --name for a new comparison, or delete that folder"
                )
        (self.folder / "config.yaml").write_text(dump_config(config))

    def _path(self, run: RunConfig) -> Path:
        return self.cells / run.name

    def finished(self, run: RunConfig) -> bool:
        """Whether the run came to its end."""
        return is_finished(self._path(run))

    def carry_out(self, minutes: float | None) -> list[Cell]:
        """Run what is not finished, several at a time, and return the cells that failed.

        Args:
            minutes: stop what is still running after that long, to be gone on with, and before it start no run that is
                not likely to fit, unless it is longer than that.
        """
        start = time.monotonic()
        deadline = start + 60 * (float("inf") if minutes is None else minutes)
        waiting = [cell for cell, run in self.runs.items() if not self.finished(run)]
        running: dict[Cell, subprocess.Popen[bytes]] = {}
        failed: list[Cell] = []
        display = _Display(self.console, len(self.runs), len(self.runs) - len(waiting))
        try:
            while waiting or running:
                now = time.monotonic()
                while waiting and len(running) < self.config.processes and self._fits(waiting[0], start, now, deadline):
                    cell = waiting.pop(0)
                    running[cell] = self._start(cell)
                if now > deadline or not running:
                    break
                for cell, process in list(running.items()):
                    display.show(cell, self._clips_seen(cell), self._clips(cell))
                    if process.poll() is None:
                        continue
                    del running[cell]
                    ended = self.finished(self.runs[cell])
                    failed += [] if ended else [cell]
                    display.end(cell, self._line(cell) if ended else f"failed: {self._last_words(cell)}")
                time.sleep(POLL_SECONDS)
        finally:
            display.close()
            if running:
                names = "; ".join(map(_name, running))
                self.console.print(f"Stopped before the end, to be gone on with: {names}", soft_wrap=True)
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
        return failed

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        run = self.runs[cell]
        path = self._path(run)
        stored, resume = path / "config.yaml", []
        if path.exists():
            try:
                with FileLock(path / LOCK, blocking=False):  # it was stopped before its end
                    if stored.is_file() and load_config(str(stored)) == run:
                        resume = ["--resume", str(path)]
                    else:
                        shutil.rmtree(path)
            except Timeout:
                raise ConfigError(f"{path}: a process of an earlier comparison still runs here; wait for it") from None
        grid_file = path.with_suffix(f"{path.suffix}.yaml")
        grid_file.write_text(dump_config(run))
        threads = str(max(1, (os.cpu_count() or 1) // self.config.processes))
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with path.with_suffix(f"{path.suffix}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _START, "run", str(grid_file), *resume],
                env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _last_words(self, cell: Cell) -> str:
        path = self._path(self.runs[cell])
        log = path.with_suffix(f"{path.suffix}.log")
        lines = log.read_text(errors="replace").split("\n")
        return f"{next((line.strip() for line in reversed(lines) if line.strip()), 'no word')} ({log})"

    def _fits(self, cell: Cell, start: float, now: float, deadline: float) -> bool:
        """Whether to start a run: not if it would end in a later slice, unless it is longer than any."""
        seconds = self._seconds(cell)
        return now < deadline and (now + seconds <= deadline or seconds > deadline - start)

    def _seconds(self, cell: Cell) -> float:
        """How long that run is likely to take: as long as the longest but for the seed so far; 0 if none has ended."""
        runs = [run for other, run in self.runs.items() if other[:3] == cell[:3] and self.finished(run)]
        return max((self.summary(run)["wall_seconds"] for run in runs), default=0.0)

    def _clips(self, cell: Cell) -> int:
        run = self.runs[cell]
        return run.steps * run.batch_size

    def _clips_seen(self, cell: Cell) -> int:
        clips = self.curve(cell)["clips"]
        return int(clips[-1]) if len(clips) else 0

    def curve(self, cell: Cell) -> dict[str, np.ndarray]:
        """Clips seen and, of ``CURVES``, what was logged: each [L]."""
        run = self.runs[cell]
        path = self._path(run) / "metrics.csv"
        if not path.is_file():
            return {"clips": np.zeros(0)}
        with path.open() as file:
            # A row that is still being written is short, which DictReader fills with None
            rows = [row for row in csv.DictReader(file) if None not in row.values() and row.get(CURVES["error"])]
        found = {"clips": np.array([float(row["time/total_timesteps"]) / run.rounds for row in rows])}
        there = {name: column for name, column in CURVES.items() if rows and rows[0].get(column)}
        return found | {name: np.array([float(row[column]) for row in rows]) for name, column in there.items()}

    def points(self, cell: Cell) -> dict[str, np.ndarray]:
        """What the run's points.csv says, each [M]; nothing if it has none."""
        path = self._path(self.runs[cell]) / POINTS
        if not path.is_file():
            return {}
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}

    def summary(self, run: RunConfig) -> dict[str, Any]:
        """What a finished run left in its summary.json."""
        found: dict[str, Any] = json.loads((self._path(run) / "summary.json").read_text())
        return found

    def results(self) -> dict[Cell, dict[str, float | None]]:
        """Figures of the finished runs."""
        return {
            cell: self.summary(run)[run.agent.class_] for cell, run in self.runs.items() if self.finished(run)
        }  # fmt: skip

    def _line(self, cell: Cell) -> str:
        summary = self.summary(self.runs[cell])
        figures = summary[self.runs[cell].agent.class_]
        said = [f"{heading(key)} {in_digits(figures, key)}" for key in shown([figures]) if "@" not in key]
        return f"{', '.join(said)} ({summary['wall_seconds']:.0f} s)"

    def write(self) -> list[Statistic]:
        """Write tables, curves and plots of what is finished; returns the table's statistics."""
        from experiments.plots import plot_comparison

        results = self.results()
        rows = [{**cell._asdict(), **figures} for cell, figures in results.items()]
        _write_csv(self.folder / "cells.csv", rows)
        statistics = summarise(results)
        _write_csv(self.folder / "table.csv", [statistic._asdict() for statistic in statistics])
        (self.folder / "table.md").write_text(markdown(statistics), encoding="utf-8")
        curves = {cell: self.curve(cell) for cell in results}
        _write_csv(self.folder / "curves.csv", _rows(curves))
        points = {cell: columns for cell in results if (columns := self.points(cell))}
        if points:
            _write_csv(self.folder / POINTS, _rows(points))
            found = reaches(points)
            _write_csv(self.folder / "reach.csv", [reach._asdict() for reach in found])
            (self.folder / "reach.md").write_text(said(found), encoding="utf-8")
        plot_comparison(self.folder, statistics, curves, points)
        return statistics


class Statistic(NamedTuple):
    """One metric of one agent on one data set at one mask ratio over its seeds."""

    agent: str
    data: str
    mask_ratio: float
    metric: str
    seeds: int
    mean: float
    std: float
    """Sample standard deviation over seeds; NaN for one seed."""
    low: float
    high: float
    """Bootstrap confidence interval of the mean (percentile, 95 %); NaN for one seed."""
    gain: float
    """Mean difference to the agent called ``random`` with the same seeds; NaN without one."""
    gain_low: float
    gain_high: float
    """Its bootstrap interval, seeds resampled in pairs."""


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentile-bootstrap confidence interval of a mean; (NaN, NaN) for less than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def summarise(results: dict[Cell, dict[str, float | None]], baseline: str = "random") -> list[Statistic]:
    """Mean, spread and intervals over seeds of every metric, for each agent on each data set at each mask ratio."""
    statistics = []
    for agent, data, ratio in dict.fromkeys(cell[:3] for cell in results):
        for metric in shown(results.values()):
            values = {
                cell.seed: figures[metric] for cell, figures in results.items()
                if cell[:3] == (agent, data, ratio) and figures.get(metric) is not None
            }  # fmt: skip
            if not values:
                continue
            x = np.array(list(values.values()), float)
            others = {seed: results.get(Cell(baseline, data, ratio, seed), {}).get(metric) for seed in values}
            pairs = [values[seed] - other for seed, other in others.items() if other is not None]  # type: ignore[operator]
            std = float(x.std(ddof=1)) if len(x) > 1 else float("nan")
            gain = float(np.mean(pairs)) if pairs and agent != baseline else float("nan")
            gains = interval(pairs) if agent != baseline else (float("nan"),) * 2
            found = len(x), float(x.mean()), std, *interval(x)
            statistics.append(Statistic(agent, data, ratio, metric, *found, gain, *gains))
    return statistics


def _cells(statistics: Sequence[Statistic]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table: a row for each agent, data set and mask ratio, a column for each metric."""
    metrics = [metric for metric in shown({s.metric: s.mean} for s in statistics) if "@" not in metric]
    found = {(s.agent, s.data, s.mask_ratio, s.metric): s for s in statistics}
    several = len({s.data for s in statistics}) > 1
    rows = []
    for agent, data, ratio in dict.fromkeys((s.agent, s.data, s.mask_ratio) for s in statistics):
        row = [agent, *[data] * several, f"{ratio:g}"]
        row += [_mean(found.get((agent, data, ratio, metric))) for metric in metrics]
        row.append(_gain(found.get((agent, data, ratio, "random_mask_error"))))
        row.append(str(max(s.seeds for key, s in found.items() if key[:3] == (agent, data, ratio))))
        rows.append(row)
    first = ["agent", *["pre-trained on"] * several, "mask ratio"]
    return [*first, *map(heading, metrics), "error over random's [95 %]", "seeds"], rows


def _downstream_cells(statistics: Sequence[Statistic]) -> tuple[list[str], list[list[str]]]:
    """The same of accuracies on the data sets that ``evaluate.data`` names: a row more for each of them."""
    metrics = [metric for metric in shown({s.metric: s.mean} for s in statistics) if "@" in metric]
    tasks = list(dict.fromkeys(metric.partition("@")[0] for metric in metrics))
    found = {(s.data, s.metric.partition("@")[2], s.mask_ratio, s.agent, s.metric): s for s in statistics}
    rows = []
    for data, evaluated, ratio, agent in dict.fromkeys(key[:4] for key in found if key[1]):
        cells = [found.get((data, evaluated, ratio, agent, f"{task}@{evaluated}")) for task in tasks]
        figures = [text for s in cells for text in (_mean(s), _gain(s))]
        rows.append([data, evaluated, f"{ratio:g}", agent, *figures])
    headings = [text for task in tasks for text in (heading(task), "over random's [95 %]")]
    return ["pre-trained on", "evaluated on", "mask ratio", "agent", *headings], sorted(rows, key=lambda row: row[:3])


def _mean(s: Statistic | None) -> str:
    return "-" if s is None else f"{s.mean:.3f} ± {s.std:.3f}" if s.seeds > 1 else f"{s.mean:.3f}"


def _gain(s: Statistic | None) -> str:
    return "-" if s is None or np.isnan(s.gain_low) else f"{s.gain:+.3f} [{s.gain_low:+.3f}, {s.gain_high:+.3f}]"


def tables(statistics: Sequence[Statistic]) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and rows of what there is to show: the samplers, and what their encoders are worth downstream."""
    return [table for table in (_cells(statistics), _downstream_cells(statistics)) if table[1]]


def markdown(statistics: Sequence[Statistic]) -> str:
    """The tables in Markdown."""
    texts = []
    for headings, rows in tables(statistics):
        lines = [headings, ["---"] * len(headings), *rows]
        texts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(texts)


def _rows(columns: Mapping[Cell, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """A row for each of a cell's positions."""
    return [
        {**cell._asdict(), **dict(zip(found, (x.item() for x in row), strict=True))}
        for cell, found in columns.items() for row in zip(*found.values(), strict=True)
    ]  # fmt: skip


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


class _Display:
    """One bar for the grid and one for each run on its way; lines where there is no terminal."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.whole = self.progress.add_task("runs", total=total, completed=done)
        self.tasks: dict[Cell, TaskID] = {}
        self.progress.start()

    def show(self, cell: Cell, clips: int, total: int) -> None:
        """How far a run is."""
        if cell not in self.tasks:
            self.tasks[cell] = self.progress.add_task(_name(cell), total=total)
        self.progress.update(self.tasks[cell], completed=clips)

    def end(self, cell: Cell, said: str) -> None:
        """A run has ended."""
        self.done += 1
        self.progress.remove_task(self.tasks.pop(cell))
        self.progress.update(self.whole, completed=self.done)
        self.console.print(f"[{self.done}/{self.total}] {_name(cell)}: {said}", soft_wrap=True, markup=False)

    def close(self) -> None:
        """Take the bars away."""
        self.progress.stop()


def _name(cell: Cell) -> str:
    return f"{cell.agent} on {cell.data}, mask ratio {cell.mask_ratio:g}, seed {cell.seed}"


def compare(config: CompareConfig, minutes: float | None = None) -> int:
    """Carry out a comparison, or go on with it; returns the exit code: 1 if a run failed, 130 after Ctrl-C.

    Raises:
        SystemExit: with 143, after SIGTERM: the runs in progress have left their checkpoints.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    this = Comparison(config, console)
    console.print(f"Comparison folder: {this.folder}, {len(this.runs)} runs", soft_wrap=True)
    code, failed = 0, []
    try:
        with Termination():
            failed = this.carry_out(minutes)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on with the runs that are not finished.")
        code = 130
    results = this.results()
    if results:
        caption = CAPTION
        if len({figures.get("mae_updates") for figures in results.values()}) > 1:
            caption += "The MAEs did not all make the same number of updates: see mae_updates in cells.csv."
        for headings, rows in tables(this.write()):
            table = Table(*headings, title=config.name, caption=caption, caption_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            caption = (
                "Top-1, mean ± standard deviation over seeds, and the mean difference to random with its interval."
            )
        console.print(f"Written to {this.folder}: table.md, table.csv, cells.csv, curves.csv and plots", soft_wrap=True)
    left = len(this.runs) - len(results) - len(failed)
    if failed:
        console.print(f"{len(failed)} runs failed; the same command tries them again.")
    if left and not code:
        console.print(f"{left} of {len(this.runs)} runs are left: the same command goes on with them.")
    return code or (1 if failed else 0)
