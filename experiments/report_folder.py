"""What a run's folder holds, read without torch: whatever there is of it, in the midst of training as well."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from experiments.folder import LOCK, hold
from experiments.refusals import ConfigError

BASELINE = "random"
TASKS = ("linear", "attentive", "knn", "finetune")
_MARKS = ("config.yaml", "metrics.csv", "summary.json", "trained.json")
"""Files of which a run's folder has one at least."""
_BEYOND = ("wall_seconds", "device", "versions", "interrupted")
"""What summary.json holds beside the samplers."""


class Snapshots(NamedTuple):
    """The same clips under the sampler's masks at M moments of training."""

    clips: np.ndarray
    """uint8 [C, T, H, W, 3]."""
    steps: np.ndarray
    """int [M], batches trained so far."""
    visible: np.ndarray
    """bool [M, C, T', H', W']."""
    heat: np.ndarray | None
    """float [M, C, T', H', W'], each token's probability under the policy; None for agents without one."""


class Task(NamedTuple):
    """What one downstream task on one data set came to."""

    data: str
    name: str
    scores: Mapping[str, Any]
    """As in the task's JSON; of fine-tuning with what there is in confusion.json."""
    pictures: Mapping[str, Path]
    """Confusion matrix and tokens kept, by what they are."""
    epochs: Mapping[str, np.ndarray]
    """Of fine-tuning, a column of its metrics.csv by name."""


@dataclass
class Sampler:
    """What one sampler's training and evaluation left behind."""

    name: str
    folder: Path
    figures: Mapping[str, float | None]
    metrics: Mapping[str, np.ndarray]
    snapshots: Snapshots | None
    positions: np.ndarray | None
    """[T', H', W']: how often each token was visible over the evaluation clips."""
    gallery: list[Path]
    tasks: list[Task]
    warnings: list[tuple[str, str, str]]
    """Step, guard, message."""


@dataclass
class Run:
    """A run, its own sampler first, then the baseline if there is one.

    Args:
        folder: of a run, or of the baseline within one.

    Raises:
        ConfigError: if it is neither.
    """

    folder: Path
    label: str = ""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, and why."""

    def __post_init__(self) -> None:
        folder = self.folder
        if not any((folder / mark).is_file() for mark in _MARKS):
            raise ConfigError(f"{folder}: {_no_run(folder)}")
        self.is_baseline = not (folder / "config.yaml").is_file() and (folder.parent / "config.yaml").is_file()
        home = folder.parent if self.is_baseline else folder
        self.config_text = self._text(home / "config.yaml")
        self.config = self._config()
        summary = self._json(home / "summary.json")
        self.wall_seconds, self.versions = summary.get("wall_seconds"), summary.get("versions") or {}
        self.device = summary.get("device") or self.setting("device")
        self.state = _state(home, summary)
        results = {name: figures for name, figures in summary.items() if name not in _BEYOND}
        own = folder.name if self.is_baseline else str(self.setting("agent.class") or next(iter(results), "sampler"))
        self.samplers = [self._sampler(own, folder, results)]
        if not self.is_baseline and own != BASELINE and (folder / BASELINE).is_dir():
            self.samplers.append(self._sampler(BASELINE, folder / BASELINE, results))
        lines = self._text(home / "bad_videos.txt").splitlines()
        self.bad_videos = [line.partition("\t")[::2] for line in lines]

    def setting(self, path: str) -> Any:
        """A value of the configuration by its dotted path, None where there is none."""
        found: Any = self.config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, path: str) -> float | None:
        """A setting, if it is a positive number."""
        value = self.setting(path)
        return value if isinstance(value, int | float) and value > 0 else None

    def _sampler(self, name: str, folder: Path, results: Mapping[str, Any]) -> Sampler:
        figures = results.get(name)
        gallery = sorted(folder.glob("gallery/*.webp"), key=lambda path: (len(path.name), path.name))
        warnings = [line.split("\t", 2) for line in self._text(folder / "warnings.txt").splitlines()]
        return Sampler(
            name,
            folder,
            figures if isinstance(figures, dict) else {},
            self._table(folder / "metrics.csv"),
            self._snapshots(folder / "snapshots.npz"),
            self._positions(folder / "positions.json"),
            gallery or [path for path in [folder / "masks.gif"] if path.is_file()],
            list(self._tasks(folder / "downstream")),
            [(line[0], line[1], line[2]) for line in warnings if len(line) == 3],
        )

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.problems.append(f"{path.name}: {error.strerror}")
            return ""

    def _json(self, path: Path) -> dict[str, Any]:
        text = self._text(path)
        try:
            found = json.loads(text) if text else {}
            if not isinstance(found, dict):
                raise ValueError("holds no object")
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{_within(path)}: {error}")
            return {}
        return found

    def _config(self) -> dict[str, Any]:
        try:
            found = yaml.safe_load(self.config_text)
        except yaml.YAMLError as error:
            self.problems.append(f"config.yaml: {str(error).splitlines()[0]}")
            return {}
        return found if isinstance(found, dict) else {}

    def _table(self, path: Path) -> dict[str, np.ndarray]:
        """Columns of a CSV file, NaN where there is no number; a last line that is being written is left out."""
        header, *rows = list(csv.reader(self._text(path).rpartition("\n")[0].splitlines())) or [[]]
        cells = [[_number(value) for value in row[: len(header)]] for row in rows if row]
        table = np.array([row + [np.nan] * (len(header) - len(row)) for row in cells], float)
        return dict(zip(header, table.T, strict=True)) if len(cells) else {}

    def _snapshots(self, path: Path) -> Snapshots | None:
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                clips, steps, visible = file["clips"], file["steps"], file["visible"]
                heat = file.get("heat")
            num_clips, t, h, w, _ = clips.shape
            tubelet, patch = self.setting("clip.tubelet_size"), self.setting("clip.patch_size")
            grid = (len(steps), num_clips, t // tubelet, h // patch, w // patch)
            heat = None if heat is None else heat.reshape(grid)
            return Snapshots(clips, steps, visible.reshape(grid), heat) if len(steps) else None
        except Exception as error:  # of many kinds where it is damaged: numpy reads a header as Python
            self.problems.append(f"{_within(path)}: {error}")
            return None

    def _positions(self, path: Path) -> np.ndarray | None:
        found = self._json(path)
        try:
            return np.array(found["share"], float).reshape(found["grid"]) if found else None
        except (KeyError, ValueError, TypeError) as error:
            self.problems.append(f"{_within(path)}: {error!r}")
            return None

    def _tasks(self, folder: Path) -> Iterator[Task]:
        for where in sorted(path for path in folder.glob("*") if path.is_dir()):
            for name in TASKS:
                tuned = name == "finetune"
                path = where / name / "finetune.json" if tuned else where / f"{name}.json"
                epochs = self._table(path.parent / "metrics.csv") if tuned else {}
                scores = self._json(path)
                if not scores and not epochs:
                    continue
                pictures = {"confusion": path.parent / ("confusion.png" if tuned else f"{name}.png")}
                if tuned:
                    scores = self._json(path.parent / "confusion.json") | scores
                    pictures["tokens kept"] = path.parent / "tokens_kept.png"
                there = {what: picture for what, picture in pictures.items() if picture.is_file()}
                yield Task(where.name, name, scores, there, epochs)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _within(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{'a file' if folder.exists() else 'not there'}; give the folder of a run, such as runs/quickstart"
    runs = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/metrics.csv"))
    near = f"; there are runs in it, such as {runs[0]}" if runs else ""
    return f"not the folder of a run: it holds none of {', '.join(_MARKS)}{near}"


def _state(folder: Path, summary: Mapping[str, Any]) -> str:
    if summary and "interrupted" not in summary:
        return "finished"
    if (folder / LOCK).exists():
        try:
            hold(folder).release()
        except ConfigError:
            return "at work"
        except (OSError, RuntimeError):  # a folder that can't be written to, or one that this process holds
            pass
    return "interrupted"
