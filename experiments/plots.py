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


def _style(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each agent; the baseline is black."""
    others = [agent for agent in agents if agent != "random"]
    styles = {
        agent: {"color": _COLOURS[i % 10], "linestyle": "-" if i < 10 else "--"} for i, agent in enumerate(others)
    }
    return {agent: styles.get(agent, {"color": "black", "linestyle": ":"}) for agent in agents}


def plot_comparison(
    folder: Path, statistics: Sequence[Statistic], curves: Mapping[Cell, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write error.png, against clips seen, and one against the mask ratio for each metric in ``PLOTTED`` that is known.

    Args:
        folder: where to.
        statistics: of ``summarise``.
        curves: (clips seen, error under uniform random masks) of each run.
    """
    agents = list(dict.fromkeys(s.agent for s in statistics))
    places = list(dict.fromkeys((s.data, s.mask_ratio) for s in statistics))
    several = len({data for data, _ in places}) > 1
    names = [f"{data}, {ratio:g}" if several else f"{ratio:g}" for data, ratio in places]
    style = _style(agents)

    figure = Figure((5.5 * len(places) + 1.5, 4), layout="constrained")
    panels = figure.subplots(1, len(places), squeeze=False)[0]
    for axes, place, name in zip(panels, places, names, strict=True):
        for agent in agents:
            runs = [curve for cell, curve in curves.items() if cell[:3] == (agent, *place) and len(curve[0])]
            if not runs:
                continue
            length = min(len(x) for x, _ in runs)
            clips, errors = runs[0][0][:length], np.stack([y[:length] for _, y in runs])
            mean, spread = errors.mean(0), errors.std(0, ddof=1 if len(runs) > 1 else 0)
            axes.plot(clips, mean, label=agent, **style[agent])
            axes.fill_between(clips, mean - spread, mean + spread, color=style[agent]["color"], alpha=0.12, lw=0)
        axes.set(
            title=f"mask ratio {name}" if not several else name,
            xlabel="clips seen",
            ylabel="error under uniform random masks",
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(folder / "error.png", dpi=110)

    for metric in dict.fromkeys(s.metric for s in statistics):
        kind, _, data = metric.partition("@")
        if kind not in PLOTTED:
            continue
        found = [s for s in statistics if s.metric == metric]
        figure = Figure((1.6 + max(5.0, 0.5 * len(agents) * len(places)), 4), layout="constrained")
        axes = figure.subplots()
        for i, agent in enumerate(agents):
            own = {(s.data, s.mask_ratio): s for s in found if s.agent == agent}
            # Side by side at each place, so that intervals don't hide one another
            x = [places.index(place) + 0.8 * ((i + 0.5) / len(agents) - 0.5) for place in own]
            mean = np.array([s.mean for s in own.values()])
            ends = np.array([[s.mean - s.low, s.high - s.mean] for s in own.values()]).T
            axes.errorbar(x, mean, np.nan_to_num(ends).clip(0), fmt="o", ms=5, capsize=3, label=agent,
                          color=style[agent]["color"])  # fmt: skip
        axes.set_xticks(range(len(places)), names)
        axes.set(xlabel="pre-trained on, mask ratio" if several else "mask ratio", ylabel=heading(metric))
        axes.set_title("mean and 95 % interval", fontsize="medium")
        if kind == "motion_lift":
            axes.axhline(1, color="black", lw=0.8, ls=":")
        figure.legend(loc="outside right upper", frameon=False)
        slug = re.sub(r"\W+", "_", f"{kind.removesuffix('_top1')}_{data}").strip("_")
        figure.savefig(folder / f"{slug}.png", dpi=110)
