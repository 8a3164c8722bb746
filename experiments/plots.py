"""Plots of a comparison, drawn without a display."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from experiments.metrics import heading

if TYPE_CHECKING:
    from experiments.compare import Statistic
    from experiments.grid import Cell

# Ten colours that the colour-blind can tell apart as well (Petroff, 2021), then the same with dashes
_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip

PLOTTED = ("motion_lift", "linear_top1", "attentive_top1", "knn_top1", "finetune_top1")
"""Metrics drawn against the mask ratio."""
_FOLLOWED = {"error": "error", "motion_lift": "motion_lift_by_clips", "effective_tokens": "effective_tokens_by_clips"}
"""What is drawn of the curves, and the file's name."""
_LABELS = {
    "error": "error under uniform random masks",
    "motion_lift": "motion lift",
    "effective_tokens": "effective tokens of a draw",
}


def _style(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each agent; the baseline is black."""
    others = [agent for agent in agents if agent != "random"]
    styles = {
        agent: {"color": _COLOURS[i % 10], "linestyle": "-" if i < 10 else "--"} for i, agent in enumerate(others)
    }
    return {agent: styles.get(agent, {"color": "black", "linestyle": ":"}) for agent in agents}


def plot_comparison(
    folder: Path,
    statistics: Sequence[Statistic],
    curves: Mapping[Cell, Mapping[str, np.ndarray]],
    points: Mapping[Cell, Mapping[str, np.ndarray]],
) -> None:
    """Draw what was followed over training, and against the mask ratio each metric in ``PLOTTED`` that is known.

    Args:
        folder: where to: error.png and the like against clips seen, attentive_by_clips.png and attentive_by_seconds.png
            and the like where there are points (of agents without, a line at their end's value), motion_lift.png and
            the like against the mask ratio.
        statistics: of ``summarise``.
        curves: of each run, columns by name, clips among them.
        points: of each run, columns by name, clips and seconds among them.
    """
    agents = list(dict.fromkeys(s.agent for s in statistics))
    places = list(dict.fromkeys((s.data, s.mask_ratio) for s in statistics))
    several = len({data for data, _ in places}) > 1
    names = [f"{data}, {ratio:g}" if several else f"{ratio:g}" for data, ratio in places]
    style = _style(agents)

    drawn = [(curves, "clips", name, file) for name, file in _FOLLOWED.items()]
    for metric in dict.fromkeys(name for columns in points.values() for name in columns):
        if metric not in ("clips", "seconds"):
            drawn += [(points, axis, metric, f"{_slug(metric)}_by_{axis}") for axis in ("clips", "seconds")]
    for series, axis, metric, file in drawn:
        known = {cell: (x[axis], x[metric]) for cell, x in series.items() if metric in x and len(x[axis])}
        if not known:
            continue
        figure = Figure((5.5 * len(places) + 1.5, 4), layout="constrained")
        panels = figure.subplots(1, len(places), squeeze=False)[0]
        for axes, place, name in zip(panels, places, names, strict=True):
            for agent in agents:
                runs = [run for cell, run in known.items() if cell[:3] == (agent, *place)]
                if not runs:
                    # Such as an encoder that is not trained: a floor below the others
                    end = [s.mean for s in statistics if s[:4] == (agent, *place, metric)] if series is points else []
                    for value in end:
                        axes.axhline(value, label=agent, **style[agent] | {"linestyle": "-."})
                    continue
                length = min(len(x) for x, _ in runs)
                x, y = (np.stack([run[i][:length] for run in runs]) for i in (0, 1))
                mean, spread = y.mean(0), y.std(0, ddof=1 if len(runs) > 1 else 0)
                marker = {"marker": "o", "ms": 3} if series is points else {}
                axes.plot(x.mean(0), mean, label=agent, **style[agent], **marker)
                axes.fill_between(
                    x.mean(0), mean - spread, mean + spread, color=style[agent]["color"], alpha=0.12, lw=0
                )
            axes.set(
                title=f"mask ratio {name}" if not several else name,
                xlabel="clips seen" if axis == "clips" else "seconds of training",
                ylabel=_LABELS.get(metric) or heading(metric),
            )
        handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        figure.savefig(folder / f"{file}.png", dpi=110)

    for metric in dict.fromkeys(s.metric for s in statistics):
        kind = metric.partition("@")[0]
        if kind not in PLOTTED:
            continue
        found = [s for s in statistics if s.metric == metric]
        figure = Figure((1.6 + max(5.0, 0.5 * len(agents) * len(places)), 4), layout="constrained")
        axes = figure.subplots()
        for i, agent in enumerate(agents):
            own = {(s.data, s.mask_ratio): s for s in found if s.agent == agent}
            # Side by side at each place, so that intervals don't hide one another
            at = [places.index(place) + 0.8 * ((i + 0.5) / len(agents) - 0.5) for place in own]
            mean = np.array([s.mean for s in own.values()])
            ends = np.array([[s.mean - s.low, s.high - s.mean] for s in own.values()]).T
            axes.errorbar(at, mean, np.nan_to_num(ends).clip(0), fmt="o", ms=5, capsize=3, label=agent,
                          color=style[agent]["color"])  # fmt: skip
        axes.set_xticks(range(len(places)), names)
        axes.set(xlabel="pre-trained on, mask ratio" if several else "mask ratio", ylabel=heading(metric))
        axes.set_title("mean and 95 % interval", fontsize="medium")
        if kind == "motion_lift":
            axes.axhline(1, color="black", lw=0.8, ls=":")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(folder / f"{_slug(metric)}.png", dpi=110)


def _slug(metric: str) -> str:
    """A file's name for a metric's."""
    kind, _, data = metric.partition("@")
    return re.sub(r"\W+", "_", f"{kind.removesuffix('_top1')}_{data}").strip("_")
