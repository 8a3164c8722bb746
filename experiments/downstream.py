"""What an encoder is worth downstream: probes on frozen features and fine-tuning, on one data set or several."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.finetune import finetune
from experiments.probes import PROBES, has_classes, run_probes
from experiments.refusals import ConfigError
from experiments.schema import RunConfig
from experiments.videos import Videos
from tats_env.mae import MAELearner

FOLDER = "downstream"
"""In a run's folder: one folder a data set, with scores, confusion matrices, features and the fine-tuned classifier."""
FIGURES = ("top1", "top5", "mean_class")
AT_CHANCE = 0.99
"""Share of the logarithm of the number of classes from which on a training loss is that of guessing."""
LEFT_BY = {
    "attentive": "more probe.epochs, another seed or probe.restarts",
    "finetune": "more finetune.epochs, a lower finetune.layer_decay, which trains the head first, or less augmentation",
}
"""By task, what leaves the plateau on which a training begins."""


def downstream(
    config: RunConfig,
    tasks: Sequence[str],
    mae: MAELearner,
    agent: Any,
    videos: Videos,
    folder: Path,
    console: Console,
) -> dict[str, dict[str, dict[str, float]]]:
    """Carry out tasks on each data set of ``evaluate.data``, or on the run's own.

    Args:
        config: of the run; ``probe`` and ``finetune`` are what is done.
        tasks: of linear, attentive, knn and finetune.
        mae: whose encoder; left as it is.
        agent: the run's sampler, for ``finetune.sampler: policy``.
        videos: opens the data sets.
        folder: of the run.
        console: where to show progress.

    Returns:
        top1, top5 and mean_class by task by data set; no task of a set without two classes to tell apart.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for data in config.evaluate.data or [config.data]:
        where = folder / FOLDER / slug(data)
        where.mkdir(parents=True, exist_ok=True)
        found[data] = {}
        settings = config.finetune
        probes = [task for task in tasks if task in PROBES]
        try:
            if probes:
                sets = videos(data, "train"), videos(data, "validation")
                cache = where if config.probe.keep_features else None
                scores = run_probes(mae, *sets, probes, config.probe, config.seed, cache, console.is_terminal)
                for task, score in scores.items():
                    score.write(where, task)
                    found[data][task] = score.row()
                    _tell_of_chance(console, data, task, score.losses[-1:], len(score.class_names))
            if "finetune" in tasks:
                train = videos(data, "train", settings.sampling, settings.augment, settings.flip)
                test = videos(data, "validation", settings.sampling)
                if has_classes(train, test):
                    result = finetune(
                        mae, train, test, settings, where / "finetune", agent=agent, seed=config.seed, console=console
                    )
                    found[data]["finetune"] = {name: result[name] for name in FIGURES}
                    _tell_of_chance(console, data, "finetune", [result["train_loss"]], len(train.class_names))
        except ValueError as error:
            raise ConfigError(f"{data}: {error}") from error
    return found


def _tell_of_chance(console: Console, data: str, task: str, loss: Sequence[float], num_classes: int) -> None:
    guess = math.log(num_classes)
    if task in LEFT_BY and loss and loss[0] > AT_CHANCE * guess:
        console.print(
            f"{data}, {task}: still on the plateau of guessing after the last epoch (training loss {loss[0]:.2f}, and "
            f"{guess:.2f} for {num_classes} classes alike), so that the accuracy says nothing of the encoder; try "
            f"{LEFT_BY[task]}",
            style="yellow", soft_wrap=True, markup=False,
        )  # fmt: skip


def top1_figures(found: dict[str, dict[str, dict[str, float]]], config: RunConfig) -> dict[str, float]:
    """Top-1 accuracies as a summary has them: ``linear_top1``, with ``@`` and the set's name where sets were named."""
    return {
        f"{task}_top1" + (f"@{data}" if config.evaluate.data else ""): scores["top1"]
        for data, by_task in found.items()
        for task, scores in by_task.items()
    }


def downstream_table(found: dict[str, dict[str, dict[str, float]]], title: str) -> Table:
    """A row for each data set and task."""
    table = Table("data set", "task", "top-1", "top-5", "mean class", title=title)
    for data, by_task in found.items():
        for task, scores in by_task.items():
            table.add_row(data, task, *(f"{scores[name]:.3f}" for name in FIGURES))
    return table


def slug(data: str) -> str:
    """A folder's name for a data set's: its kind, where it ends, and a few digits that tell it from others."""
    kind, colon, rest = data.partition(":")
    if not colon:
        return kind
    end = re.sub(r"[^\w.-]+", "-", Path(rest).name)
    return f"{kind}-{end}-{hashlib.sha256(data.encode(errors='surrogateescape')).hexdigest()[:6]}"
