"""How early an agent's encoder is as good as that of random masks is in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from experiments.grid import Cell

Points = Mapping[str, np.ndarray]
"""Columns of a run's points.csv, each [M]: clips, seconds, and accuracies by metric."""


class Reach(NamedTuple):
    """When one run came to an accuracy."""

    agent: str
    data: str
    mask_ratio: float
    seed: int
    metric: str
    goal: float
    """Mean of the baseline's seeds at their end."""
    clips: float
    """Share of the baseline's clips, linear between points; NaN if it never came there."""
    seconds: float
    """Share of the baseline's seconds of training, likewise."""


def reaches(points: Mapping[Cell, Points], baseline: str = "random") -> list[Reach]:
    """For each run and accuracy, when it came to what the baseline, on its data and at its ratio, has in the end."""
    found = []
    for cell, own in points.items():
        others = [x for other, x in points.items() if (other.agent, *other[1:3]) == (baseline, *cell[1:3])]
        for metric in own.keys() - {"clips", "seconds"} if others else ():
            goal = float(np.mean([x[metric][-1] for x in others]))
            shares = [
                _crossing(own[axis], own[metric], goal) / float(np.mean([x[axis][-1] for x in others]))
                for axis in ("clips", "seconds")
            ]
            found.append(Reach(*cell, metric, goal, *shares))
    return sorted(found, key=lambda x: (x.metric, x.data, x.mask_ratio, x.agent, x.seed))


def _crossing(x: np.ndarray, y: np.ndarray, goal: float) -> float:
    """Where y first is at the goal, on straight lines between the points; NaN if nowhere."""
    above = np.flatnonzero(y >= goal)
    if not len(above):
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(x[0])  # or before it
    share = (goal - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def said(reaches: Sequence[Reach]) -> str:
    """The same in Markdown: a row for each agent, its seeds side by side."""
    rows: dict[tuple[str, str, float, str], list[Reach]] = {}
    for reach in reaches:
        rows.setdefault((reach.metric, reach.data, reach.mask_ratio, reach.agent), []).append(reach)
    lines = ["| metric | data | mask ratio | agent | accuracy to reach | share of the clips | share of the seconds |"]
    lines += ["|" + "---|" * 7]
    for (metric, data, ratio, agent), row in rows.items():
        shares = (
            ", ".join("never" if np.isnan(x) else f"{x:.2f}" for x in (getattr(reach, axis) for reach in row))
            for axis in ("clips", "seconds")
        )
        lines.append(f"| {metric} | {data} | {ratio:g} | {agent} | {row[0].goal:.3f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"
