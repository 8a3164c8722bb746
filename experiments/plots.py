"""Plots of a comparison, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from experiments.compare import Cell, Statistic

# Ten colours that the colour-blind can tell apart as well (Petroff, 2021), then the same with dashes
_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip


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
    """Write error.png (against clips seen), probe.png (against the mask ratio) and motion_lift.png, where known.

    Args:
        folder: where to.
        statistics: of ``summarise``.
        curves: (clips seen, error under uniform random masks) of each run.
    """
    agents = list(dict.fromkeys(s.agent for s in statistics))
    ratios = list(dict.fromkeys(s.mask_ratio for s in statistics))
    style = _style(agents)

    figure = Figure((5.5 * len(ratios) + 1.5, 4), layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for agent in agents:
            runs = [curve for (name, r, _), curve in curves.items() if (name, r) == (agent, ratio) and len(curve[0])]
            if not runs:
                continue
            length = min(len(x) for x, _ in runs)
            clips, errors = runs[0][0][:length], np.stack([y[:length] for _, y in runs])
            mean, spread = errors.mean(0), errors.std(0, ddof=1 if len(runs) > 1 else 0)
            axes.plot(clips, mean, label=agent, **style[agent])
            axes.fill_between(clips, mean - spread, mean + spread, color=style[agent]["color"], alpha=0.12, lw=0)
        axes.set(title=f"mask ratio {ratio:g}", xlabel="clips seen", ylabel="error under uniform random masks")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(folder / "error.png", dpi=110)

    for metric, name, label in (("probe_top1", "probe", "probe top-1"), ("motion_lift", "motion_lift", "motion lift")):
        found = [s for s in statistics if s.metric == metric]
        if not found:
            continue
        figure = Figure((1.6 + max(5.0, 0.5 * len(agents) * len(ratios)), 4), layout="constrained")
        axes = figure.subplots()
        for i, agent in enumerate(agents):
            own = {s.mask_ratio: s for s in found if s.agent == agent}
            # Side by side at each ratio, so that intervals don't hide one another
            x = [ratios.index(ratio) + 0.8 * ((i + 0.5) / len(agents) - 0.5) for ratio in own]
            mean = np.array([s.mean for s in own.values()])
            ends = np.array([[s.mean - s.low, s.high - s.mean] for s in own.values()]).T
            axes.errorbar(x, mean, np.nan_to_num(ends).clip(0), fmt="o", ms=5, capsize=3, label=agent,
                          color=style[agent]["color"])  # fmt: skip
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set(xlabel="mask ratio", ylabel=f"{label}, mean and 95 % interval")
        if metric == "motion_lift":
            axes.axhline(1, color="black", lw=0.8, ls=":")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=110)
