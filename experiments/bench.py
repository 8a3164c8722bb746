"""``tats bench``: a training step, its parts and what they are measured against, side by side in one process."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import bench_report as report
from experiments.bench_rows import (
    JOINT,
    MAE,
    PARTS,
    Group,
    Row,
    Setting,
    changed,
    fed,
    feeding,
    joint_step,
    mae_step,
    named,
    table,
)
from experiments.bench_schema import BenchConfig, FeedConfig
from experiments.build import token_grid
from experiments.checkpoints import whole
from experiments.config import dump_config, to_values
from experiments.folder import hold, stored
from experiments.growth import predicted
from experiments.machine import device_name
from experiments.operations import Counts, count
from experiments.refusals import ConfigError
from experiments.schema import RunConfig
from experiments.stopwatch import Step, Stopwatch, Timing
from experiments.videos import Videos
from tats_env.data import VideoSet
from tats_env.mae import SIZES, VideoMAE
from tats_env.mae.learner import resolve_device

WIDTH = 160
"""Columns where there is no terminal that has a width of its own."""
PROFILED = 3
"""Steps in a trace."""
PACKAGES = "torch", "timm", "transformers", "numpy"
_CODE = (
    "tats_env/**/*.py",
    "agents/**/*.py",
    *(f"experiments/{name}.py" for name in ("bench_rows", "feed", "operations", "references", "run", "stopwatch")),
)


def versions() -> dict[str, str]:
    """Of what a measurement depends on, our own code by its digest."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    root = Path(__file__).parents[1]
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    found["code"] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return found


class Bench:
    """A bench's folder, and the rows in it.

    Args:
        config: what to measure.
        run: whose step.
        console: where to tell of it.

    Raises:
        ConfigError: if another process is at work in the folder.
    """

    def __init__(self, config: BenchConfig, run: RunConfig, console: Console) -> None:
        self.config, self.run, self.console = config, run, console
        try:
            self.device = resolve_device(run.device)
        except ValueError as error:
            raise ConfigError(f"run.device: {error}") from error
        self.on_gpu = self.device.type == "cuda"
        self.groups = table(config, run)
        self.names = [row.name for group in self.groups for row in group.rows]
        self.folder = Path(config.out) / config.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = hold(self.folder)
        (self.folder / "config.yaml").write_text(dump_config(config))
        self.about = {"device": device_name(self.device), "versions": versions()}
        name = str(self.about["device"])
        self.place = "CPU" if not self.on_gpu else "H100" if "H100" in name else name
        self.keys = {row.name: self._key(group, row) for group in self.groups for row in group.rows}
        self.results = self._found()
        self._videos: tuple[Any, VideoSet | None] = None, None

    def _key(self, group: Group, row: Row) -> str:
        """What a measurement of the row holds for."""
        run = {key: value for key, value in to_values(group.run).items() if key not in ("name", "out")}
        bench = self.config
        how: list[Any] = [bench.warmup, bench.repeats, bench.matrix, bench.copy_mib, to_values(bench.attention)]
        how += [to_values(group.feed)] if group.feed is not None else []
        text = json.dumps([row.name, run, how, self.about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def _path(self) -> Path:
        return self.folder / "bench.json"

    def _found(self) -> dict[str, report.Result]:
        """Rows of bench.json that hold here and now."""
        rows = stored(self._path).get("rows", {})
        return {name: row for name, row in rows.items() if row["key"] == self.keys.get(name)}

    def in_order(self) -> dict[str, report.Result]:
        """The results so far, in the table's order."""
        return {name: self.results[name] for name in self.names if name in self.results}

    def main(self, command: str, profile: bool) -> int:
        """As of ``bench``."""
        if profile:
            self.profile()
            return 0
        minutes = float("inf") if self.config.minutes is None else self.config.minutes
        deadline = time.monotonic() + 60 * minutes
        head = f"Folder: {self.folder}, {len(self.names)} rows, {len(self.left())} to measure"
        self.console.print(head, soft_wrap=True, highlight=False)
        code = 0
        try:
            self.carry_out(deadline, command)
        except KeyboardInterrupt:
            code = 130
        finally:
            self.write()
            self.finish(command)
        return code or int(any("error" in row for row in self.results.values()))

    def write(self) -> None:
        """Write bench.json: whole or not there, for who goes on goes by it."""
        results = self.in_order()
        more = report.derived(results)
        content = {
            **self.about,
            "config": to_values(self.config),
            "goals": report.judge(results, self.run, self.place),
            "rows": {name: row | more.get(name, {}) for name, row in results.items()},
            "growth": report.growth(results, self.config, self.run),
        }
        with whole(self._path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def left(self) -> list[str]:
        """Rows without a result, failures not among them."""
        return [name for name in self.names if name not in self.results]

    def waiting(self) -> list[Group]:
        """Groups of rows still to be measured: what failed before comes last."""
        fresh, again = [], []
        for group in self.groups:
            rows = [row for row in group.rows if row.name not in self.results]
            failed = [row for row in group.rows if "error" in self.results.get(row.name, {})]
            fresh += [group._replace(rows=rows)] if rows else []
            again += [group._replace(rows=failed)] if failed else []
        return fresh + again

    def carry_out(self, deadline: float, command: str) -> None:
        """Measure what is not measured, and write down each row as it is done; no row is started after the deadline.

        The tables are shown once all that goals are read off is measured, and not only at the very end.
        """
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        done = len(self.names) - len(self.left())
        task = progress.add_task("rows", total=len(self.names), completed=done)
        with progress:
            goals_before = False
            for group in self.waiting():
                if time.monotonic() >= deadline:
                    break
                if goals_before and not group.goals:
                    self.finish(command)
                goals_before = group.goals
                for name, result, seconds in self._measured(
                    group, deadline, lambda name: progress.update(task, description=name)
                ):
                    self.results[name] = {"key": self.keys[name], **result}
                    self.write()
                    done = len(self.names) - len(self.left())
                    progress.update(task, completed=done)
                    text = f"[{done}/{len(self.names)}] {name}: {_said(result)} ({seconds:.0f} s)"
                    self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _measured(
        self, group: Group, deadline: float, begins: Callable[[str], None]
    ) -> Iterator[tuple[str, report.Result, float]]:
        """(name, result, seconds it took) of the group's rows; those timed in turn come together."""
        try:
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
            if group.run.compile:
                torch.compiler.reset()  # else compiled forms of earlier groups count against the limit of one function
            setting = None if group.predicted else Setting(group.run, self._open(group.run))
            before = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        except Exception as error:  # videos that can't be made, a GPU that is lost
            yield from ((row.name, _failure(error), 0.0) for row in group.rows)
            return
        together = not self.on_gpu or group.feed is not None
        # In turn on a CPU, whose speed drifts; alone on a GPU, whose memory is counted.
        for rows in [group.rows] if together else [[row] for row in group.rows]:
            if time.monotonic() >= deadline:
                return
            begins(rows[0].name)
            start = time.monotonic()
            if setting is None:
                results = self._predict(group.run, rows)
            elif group.feed is not None:
                results = self._feed(setting, group.feed, rows)
            else:
                results = self._time(setting, rows, before)
            for name, result in results.items():
                yield name, result, (time.monotonic() - start) / len(results)

    def _open(self, run: RunConfig) -> VideoSet:
        """Where the run's clips come from; the newest set is kept."""
        key = run.data, run.num_videos, run.clip
        kept, videos = self._videos
        if videos is None or key != kept:
            self._videos = None, None
            videos = Videos(run)(run.data, "train", None, run.clip.augment, run.clip.flip)
            # A set in memory moves to the GPU with the first clips, which is no memory that a step takes
            videos.clips(np.zeros(1, int), np.zeros(1, int), self.device)
            self._videos = key, videos
        return videos

    def _time(self, setting: Setting, rows: list[Row], before: int) -> dict[str, report.Result]:
        """Warm up, time in turn, count. What a row raises is its result, and the others go on.

        Args:
            before: bytes allocated on a GPU before there was anything of the setting.
        """
        results: dict[str, report.Result] = {row.name: {} for row in rows}
        watches: dict[str, Stopwatch] = {}

        def attempt(row: Row, work: Callable[[Row], None]) -> None:
            if "error" in results[row.name]:
                return
            try:
                work(row)
            except Exception as error:  # whatever it is: a compiler's, out of memory, a package that is not there
                results[row.name] = _failure(error)
                watches.pop(row.name, None)

        def begin(row: Row) -> None:
            watch = watches[row.name] = Stopwatch(row.make(setting), self.device)
            first = watch.warm_up(self.config.warmup)
            results[row.name] |= {"first_seconds": first, "peak_bytes": watch.peak_bytes(before)}

        def repeat(row: Row) -> None:
            watches[row.name].once()

        def end(row: Row) -> None:
            found, watch = results[row.name], watches[row.name]
            found |= self._about(row, setting.run) | {"flops": None, "bytes": None}
            found["seconds"] = watch.timing()._asdict()
            try:
                counts = operations(row, setting, watch.step)
            except Exception as error:  # it leans on what torch does inside, and the time holds without it
                found["not_counted"] = _failure(error)["error"]
                return
            found["peak_bytes"] = found["peak_bytes"] or counts.peak_bytes
            found |= {"flops": counts.flops, "bytes": counts.bytes}

        for work in (begin, *[repeat] * self.config.repeats, end):
            for row in rows:
                attempt(row, work)
        return results

    def _feed(self, setting: Setting, config: FeedConfig, rows: list[Row]) -> dict[str, report.Result]:
        """What a loader brings, and the step makes of it; all at once, whichever of the rows are left."""
        from experiments.feed import feed_rates

        run = setting.run
        try:
            rates = feed_rates(
                fed(setting), batch_size=run.batch_size, num_frames=run.clip.num_frames, size=run.clip.size,
                frame_stride=run.clip.frame_stride, repeats=config.repeats, key_frame_every=config.key_frame_every,
                seconds=config.seconds, device=self.device,
            )  # fmt: skip
        except Exception as error:  # as of ``_time``
            return {row.name: _failure(error) for row in rows}
        names = feeding(config, run.batch_size)
        found: dict[str, report.Result] = {}
        for name, rate in zip(names, (rates.loader, rates.loader_repeated, rates.both), strict=True):
            seconds = run.batch_size / (rate or float("inf"))
            found[name] = {"seconds": Timing(seconds, seconds, seconds, 1)._asdict(), "flops": None, "peak_bytes": None}
        found[names[-1]]["data_wait"] = rates.data_wait
        return {row.name: found[row.name] | self._about(row, run) for row in rows}

    def _predict(self, run: RunConfig, rows: list[Row]) -> dict[str, report.Result]:
        try:
            step = predicted(run)
        except Exception as error:  # as of ``_time``
            return {row.name: _failure(error) for row in rows}
        found = {}
        for row in rows:
            alone = row.make is mae_step
            seconds = step.mae_seconds if alone else step.seconds
            found[row.name] = self._about(row, run) | {
                "seconds": Timing(seconds, seconds, seconds, 0)._asdict(),
                "flops": None if alone else step.flops,
                "peak_bytes": None if alone else step.peak_bytes,
            }
        return found

    def _about(self, row: Row, run: RunConfig) -> report.Result:
        grid = token_grid(run)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VideoMAE(grid, SIZES[run.mae.size]).parameters())
        return {
            "clips": row.clips, "against": list(row.against), "part_of": row.part_of, "batch_size": run.batch_size,
            "mask_ratio": run.mask_ratio, "num_tokens": grid.num_tokens, "parameters": parameters,
        }  # fmt: skip

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, headings and cells of what there is to show."""
        results = self.in_order()
        found = [
            (f"{self.config.name} on {self.about['device']}", list(report.HEADINGS), report.cells(results)),
            (
                "goals",
                ["goal", "bound", "measured", ""],
                report.goal_cells(report.judge(results, self.run, self.place)),
            ),
            (
                "growth",
                ["step", "unit", "with", "measured", "exponent"],
                report.growth_cells(report.growth(results, self.config, self.run)),
            ),
        ]
        return [each for each in found if each[2]]

    def finish(self, command: str) -> None:
        """Write bench.md and plots, and print the tables."""
        texts = []
        for title, headings, rows in self.tables():
            shown = Table(*headings, title=title, title_justify="left")
            for row in rows:
                shown.add_row(*row)
            self.console.print(shown)
            texts.append(f"## {title}\n\n{report.markdown(headings, rows)}")
        notes = [report.CAPTION, *self._sums()]
        if left := self.left():
            notes.append(f"{len(left)} of {len(self.names)} rows are left: {command} goes on with {'; '.join(left)}.")
        for note in notes:
            self.console.print(note, soft_wrap=True, markup=False)
        (self.folder / "bench.md").write_text("\n".join([*texts, *(f"{note}\n" for note in notes)]), encoding="utf-8")
        report.plot(self.folder, report.growth(self.in_order(), self.config, self.run))

    def _sums(self) -> list[str]:
        """What parts come to beside the whole step, and what all steps of a run take."""
        known = {name: row["seconds"]["median"] for name, row in self.results.items() if "seconds" in row}
        steps, said = self.run.steps, []
        for batch in self.config.batches:
            joint, alone = named(JOINT, batch), named(MAE, batch)
            parts = [named(part, batch) for part in PARTS]
            if joint in known and all(part in known for part in parts):
                total = 1e3 * sum(known[part] for part in parts)
                said.append(f"{joint}: {1e3 * known[joint]:.4g} ms, its parts together {total:.4g} ms.")
            if joint in known and alone in known:
                learned, random = (f"{steps * known[name] / 60:.1f} minutes" for name in (joint, alone))
                what = f"{steps} steps of {batch} clips, a run's start and evaluation apart"
                said.append(f"{what}: {learned}, under random masks {random}.")
        return said

    def profile(self) -> None:
        """Write trace.json, of a few joint steps, and print what took longest in them."""
        from torch.profiler import ProfilerActivity

        run = changed(self.run, batch_size=self.config.batches[0])
        watch = Stopwatch(joint_step(Setting(run, self._open(run))), self.device)
        watch.warm_up(self.config.warmup)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu]
        with torch.profiler.profile(activities=activities) as profiler:
            watch.warm_up(PROFILED)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
        self.console.print(f"{PROFILED} joint steps, for chrome://tracing: {self.folder / 'trace.json'}")


def operations(row: Row, setting: Setting, step: Step) -> Counts:
    """A step's operations; those of a compiled one, which does not show them, from its like."""
    like = setting.like
    if row.needs_values and like.device.type == "meta":
        like = Setting(changed(like.run, device="cpu"), like.videos)
    scale = setting.run.batch_size // like.run.batch_size if row.per_clip else 1
    if like is not setting:
        step = row.make(like)
        step()  # the first makes the optimiser's state
    # All of it, less what is not timed: a backward pass counts as on a GPU if its forward pass did
    fused = setting.run.compile and not row.eager
    whole, before = count(lambda: step(), fused=fused), count(step.prepare, fused=fused)
    flops, moved = (scale * (getattr(whole, name) - getattr(before, name)) for name in ("flops", "bytes"))
    return whole._replace(flops=flops, bytes=moved)


def _failure(error: Exception) -> report.Result:
    return {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}


def _said(result: report.Result) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    seconds = result["seconds"]["median"]
    speed = f", {result['clips'] / seconds:.4g} clips/s" if result["clips"] else ""
    return f"{1e3 * seconds:.4g} ms{speed}"


def bench(config: BenchConfig, run: RunConfig, command: str, profile: bool = False) -> int:
    """Measure what is left of a bench; returns the exit code: 1 if a row failed, 130 after Ctrl-C.

    Args:
        command: what goes on with it.
        profile: write a trace instead.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    this = Bench(config, run, console)
    try:
        return this.main(command, profile)
    finally:
        this.lock.release()
