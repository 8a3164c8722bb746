"""What stands in the sections of a report, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.metrics import heading, in_digits, shown
from experiments.plots import _COLOURS as COLOURS
from experiments.refusals import items
from experiments.report_curves import Curve, Line, Panel, other_keys, panel, values_of
from experiments.report_folder import BASELINE, Run, Sampler, Task
from experiments.report_pictures import TILE, Picture, heat_map, masks_over_training, read_picture

ACCENT = COLOURS[0]
READING = {
    "reconstruction_error": "Error of the hidden tokens under the sampler's own masks, in units of a patch's variance. "
    "Masks differ in how hard they are, so it ranks no samplers.",
    "random_mask_error": "The yardstick: the same clips under uniform random masks. The lower, the better the MAE.",
    "motion_lift": "Share of moving foreground among the visible tokens over its share among all; 1 is chance.",
    "linear_top1": "Share of validation videos that a linear classifier on the frozen encoder's mean gets right.",
    "attentive_top1": "The same for a classifier that attends to all of the frozen encoder's tokens.",
    "knn_top1": "The same by a vote of the nearest training videos, with nothing trained.",
    "finetune_top1": "The same after training encoder and classifier together.",
    "seconds_per_step": "Time of one step of training, evaluation left out.",
}
"""How to read each of ``experiments.metrics.METRICS``."""
STATES = {
    "finished": "Finished",
    "interrupted": "Interrupted; tats run with --resume goes on",
    "at work": "At work; this is what there is so far",
}


class Positions(NamedTuple):
    """Which positions one sampler favours."""

    sampler: str
    maps: list[tuple[str, str, Picture]]
    """Heading, range in words and picture of the mean over time, then of each time slot."""
    most: float
    most_at: str
    least: float
    least_at: str
    evenness: float
    """Effective number of positions, exp(entropy), over their number."""


class Favoured(NamedTuple):
    """Which positions a run's samplers favour."""

    samplers: list[Positions]
    expected: float
    """Share of tokens that is visible."""
    brightest: float
    """Share that the full colour stands for."""
    collapse: float
    """``evenness`` below which a sampler has collapsed."""
    slots: Panel | None


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def _steps(run: Run, sampler: Sampler) -> float:
    """Batches that the sampler trained on, as far as its metrics tell."""
    clips = values_of(sampler.metrics, "time/total_timesteps")
    return 0 if clips is None else float(np.nanmax(clips)) / _per_step(run)


def _per_step(run: Run) -> float:
    """Timesteps in a batch of clips."""
    return (run.number("batch_size") or 1) * (run.number("rounds") or 1)


def facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What a run was, by heading: one text a run."""

    def of(run: Run) -> dict[str, str]:
        credit, total, batch = run.setting("agent.credit"), run.setting("steps"), run.number("batch_size")
        steps = [(sampler, _steps(run, sampler)) for sampler in run.samplers]
        elapsed = max((_last(sampler, "time/time_elapsed") for sampler in run.samplers), default=0)
        seconds = run.wall_seconds or elapsed
        return {
            "State": STATES[run.state],
            "Data set": str(run.setting("data") or ""),
            "Mask ratio": str(run.setting("mask_ratio") or ""),
            "Agent": run.samplers[0].name + (f", credit {credit}" if credit and not run.is_baseline else ""),
            "Steps": "; ".join(
                f"{sampler.name} {count:,.0f}" + (f" of {total:,}" if isinstance(total, int) else "")
                for sampler, count in steps
            ),
            "Clips": f"{steps[0][1] * batch:,.0f}, {batch:g} a step" if batch else "",
            "Seed": str(run.setting("seed") if run.setting("seed") is not None else ""),
            "Device": str(run.device or ""),
            "Wall time": _duration(seconds) if isinstance(seconds, int | float) and seconds > 0 else "",
            "Versions": ", ".join(f"{name} {version}" for name, version in dict(run.versions).items()),
        }

    found = [of(run) for run in runs]
    return [(term, texts) for term in found[0] if any(texts := [facts[term] for facts in found])]


def _last(sampler: Sampler, key: str) -> float:
    values = values_of(sampler.metrics, key)
    return 0 if values is None else float(values[~np.isnan(values)][-1])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def results(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The table of samplers, and how to read its columns."""
    rows = [(run, sampler) for run in runs for sampler in run.samplers if sampler.figures]
    metrics = shown(sampler.figures for _, sampler in rows)
    if not metrics:
        return None
    return {
        "headings": [heading(metric) for metric in metrics],
        "rows": [
            (run, sampler, [in_digits(sampler.figures, metric) for metric in metrics]) for run, sampler in rows
        ],
        "reading": {heading(m).partition(" on ")[0]: READING[m.partition("@")[0]] for m in metrics},
    }  # fmt: skip


def _lines(runs: Sequence[Run]) -> Iterator[tuple[Run, Sampler, str, str, str]]:
    """Run, sampler, label, colour and dashes of each line: the baseline of a run alone is the page's ink."""
    for i, run in enumerate(runs):
        for sampler in run.samplers:
            baseline = sampler.name == BASELINE and (len(runs) == 1 or sampler is not run.samplers[0])
            names = [run.label] * (len(runs) > 1) + [sampler.name] * (len(runs) == 1 or len(run.samplers) > 1)
            colour = "var(--ink)" if baseline and len(runs) == 1 else COLOURS[i % len(COLOURS)]
            yield run, sampler, ", ".join(names), colour, "2 4" if baseline else "" if i < len(COLOURS) else "9 3"


def panels(runs: Sequence[Run], curves: Sequence[Curve]) -> list[Panel]:
    """The curves of which there is something, over steps; of several runs over clips, for their batches may differ."""
    found = []
    for curve in curves:
        drawn = []
        for run, sampler, label, colour, dashes in _lines(runs):
            x, y = values_of(sampler.metrics, "time/total_timesteps"), values_of(sampler.metrics, curve.key)
            if x is None or y is None:
                continue
            per = _per_step(run) if len(runs) == 1 else run.number("rounds") or 1
            known = ~np.isnan(x)
            drawn.append(Line(label, colour, dashes, x[known] / per, y[known]))
        counted = "steps" if len(runs) == 1 and runs[0].number("batch_size") else "clips"
        found.append(panel(curve, drawn, counted, _mark(runs, curve.key)))
    return [each for each in found if each]


def other_curves(runs: Sequence[Run]) -> list[Curve]:
    """What else metrics.csv has, as it is called there."""
    return [Curve(key, key, "") for key in other_keys([sampler.metrics for run in runs for sampler in run.samplers])]


def _mark(runs: Sequence[Run], key: str) -> tuple[float, str] | None:
    """What a curve is to be held against."""
    if key == "mask/motion_lift":
        return 1, "chance"
    if key == "mask/effective_tokens":
        return _alike(runs, _num_visible, "K, visible")
    if key == "train/approx_kl":
        return _alike(runs, lambda run: run.number("agent.target_kl"), "target_kl")
    return None


def _alike(runs: Sequence[Run], value: Callable[[Run], float | None], name: str) -> tuple[float, str] | None:
    """A value that all runs share."""
    found = {value(run) for run in runs}
    only = found.pop()
    return None if found or only is None else (only, name)


def _num_visible(run: Run) -> float | None:
    """K, the tokens of a clip that stay visible."""
    clip = [run.number(f"clip.{key}") for key in ("num_frames", "tubelet_size", "size", "patch_size")]
    ratio = run.number("mask_ratio")
    if ratio is None or None in clip:
        return None
    frames, tubelet, size, patch = (x or 1 for x in clip)
    return int(frames // tubelet * (size // patch) ** 2 * (1 - ratio) + 1e-9)


def _pictures(run: Run, paths: Mapping[str, Path]) -> list[tuple[str, Picture]]:
    """Those of the picture files that can be read, by what they show."""
    found = []
    for what, path in paths.items():
        try:
            found.append((what, read_picture(path)))
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow says that a file is broken
            run.problems.append(f"{path.parent.name}/{path.name}: {error}")
    return found


def gallery(run: Run) -> list[tuple[str, Picture]]:
    """The examples of the run's own sampler."""
    return _pictures(run, {f"example {i}": path for i, path in enumerate(run.samplers[0].gallery, 1)})


def moments(run: Run) -> dict[str, Any] | None:
    """How the own sampler's mask moves over training."""
    found = run.samplers[0].snapshots
    if found is None:
        return None
    return {
        "steps": [int(step) for step in found.steps],
        "heat": found.heat is not None,
        "small": max(found.clips.shape[2:4]) <= TILE,
        "clips": masks_over_training(found),
    }


def favoured(run: Run) -> Favoured | None:
    """Which positions a run's samplers favour, on one scale."""
    known = [(sampler, sampler.positions) for sampler in run.samplers if sampler.positions is not None]
    if not known:
        return None
    expected = float(known[0][1].mean())
    brightest = max(float(np.nanmax(shares)) for _, shares in known) or 1.0
    samplers = []
    lines = []
    for sampler, shares in known:
        samplers.append(_positions(sampler, shares, brightest))
        slots = shares.mean((1, 2)) / max(shares.mean((1, 2)).sum(), 1e-12)
        own = sampler is run.samplers[0]
        colour, dashes = (ACCENT, "") if own else ("var(--ink)", "2 4")
        lines.append(Line(sampler.name, colour, dashes, np.arange(1, len(slots) + 1), slots))
    even = 1 / len(known[0][1])
    curve = Curve("", "Share of the visible tokens by time slot", "Level means that all times are shown alike.", (0,))
    return Favoured(
        samplers, expected, brightest, expected**0.5,  # midway, by ratio, between the same K tokens and all N
        panel(curve, lines, "time slots", (even, "even"), ends=False)
    )  # fmt: skip


def _positions(sampler: Sampler, shares: np.ndarray, brightest: float) -> Positions:
    """One sampler's favoured positions, of its shares [T', H', W']."""
    where = [np.unravel_index(i, shares.shape) for i in (shares.argmax(), shares.argmin())]
    most_at, least_at = (f"time slot {t + 1}, row {r + 1}, column {c + 1}" for t, r, c in where)
    each = [("mean", shares.mean(0))] + [(f"slot {t + 1}", of) for t, of in enumerate(shares)]
    maps = [
        (name, f"{100 * x.min():.1f} to {share(x.max())}", heat_map(x, brightest, ACCENT)) for name, x in each
    ]  # fmt: skip
    p = shares.ravel() / max(shares.sum(), 1e-12)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    evenness = float(np.exp(entropy) / p.size)
    return Positions(
        sampler.name, maps, float(shares.max()), most_at, float(shares.min()), least_at, evenness
    )  # fmt: skip


def tasks(run: Run) -> list[dict[str, Any]]:
    """What the downstream tasks came to: figures, pictures and fine-tuning's loss."""
    found = []
    for sampler in run.samplers:
        for task in sampler.tasks:
            scores = [task.scores.get(name) for name in ("top1", "top5", "mean_class")]
            classes = task.scores.get("class_names") or []
            found.append({
                "sampler": sampler.name,
                "task": task,
                "scores": [f"{x:.3f}" if isinstance(x, int | float) else "-" for x in scores],
                "chance": f"{1 / len(classes):.3f}" if classes else "-",
                "pictures": _pictures(run, task.pictures),
                "mistakes": _mistakes(task, classes),
                "panel": _loss(task),
            })  # fmt: skip
    return found


def _loss(task: Task) -> Panel | None:
    epochs, losses = values_of(task.epochs, "epoch"), values_of(task.epochs, "loss")
    if epochs is None or losses is None:
        return None
    curve = Curve("", f"Fine-tuning on {task.data}", "Training loss. Healthy: falls, and level by the last epochs.")
    return panel(curve, [Line("loss", ACCENT, "", epochs, losses)], "epochs")


def _mistakes(task: Task, classes: Sequence[str]) -> str:
    """The three most frequent mistakes."""
    try:
        wrong = np.array(task.scores.get("confusion"), int)
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:3]
        pairs = [
            (wrong[i, j], classes[i], classes[j]) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        ]
    except (TypeError, ValueError, IndexError):
        return ""
    return "; ".join(f"{a} taken for {b} ({count})" for count, a, b in pairs if count)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: path, and its value in each."""
    flat = [dict(items(run.config)) for run in runs]
    paths = dict.fromkeys(path for settings in flat for path, value in settings.items() if not isinstance(value, dict))
    table = [(path, [str(settings.get(path, "-")) for settings in flat]) for path in paths]
    return [(path, values) for path, values in table if len(set(values)) > 1]
