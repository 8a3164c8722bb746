"""The curves of a report: what is drawn, how to read it, and its geometry as SVG."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

POINTS = 400
"""Of a longer curve, means over this many stretches are drawn, and a band from the lowest to the highest value."""
WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24


class Curve(NamedTuple):
    """A column of metrics.csv and how to read it."""

    key: str
    heading: str
    healthy: str
    within: tuple[float, ...] = ()
    """Values that the axis reaches in any case, so that noise is not blown up."""


CURVES = (
    Curve(
        "rollout/ep_rew_mean", "Reward",
        "What the agent is paid for a clip. The MAE learns meanwhile, so a reward made of its error may well fall; a "
        "healthy one moves slowly, without jumps.",
    ),
    Curve(
        "train/value_loss", "Value loss",
        "How far off the critic's forecast of the reward is. Healthy: falls early and stays low.", (0,),
    ),
    Curve(
        "train/explained_variance", "Explained variance",
        "Share of the reward's variance that the critic forecasts. Healthy: above 0 and rising towards 1. Where credit "
        "goes by token nothing hangs on it.", (0,),
    ),
    Curve(
        "train/entropy_loss", "Entropy",
        "Of a draw from the policy, in nats; higher is broader. Healthy: falls slowly, then levels off.",
    ),
    Curve(
        "mask/effective_tokens", "Effective tokens",
        "exp(entropy): among how many tokens the policy really chooses. Healthy: levels off well above K, the number "
        "kept visible; a plunge below it is a collapse.", (0,),
    ),
    Curve(
        "train/approx_kl", "KL divergence",
        "How far one update moves the policy. Healthy: small and level, around target_kl at most.", (0,),
    ),
    Curve(
        "train/clip_fraction", "Clip fraction",
        "Share of the probability ratios that PPO cuts off. Healthy: below some 0.3.", (0, 0.1),
    ),
    Curve(
        "mae/loss", "MAE loss",
        "What the MAE is trained on, under its own sampler's masks. Healthy: falls below 1, which is what each patch's "
        "mean as the guess would get, and goes on falling.",
    ),
    Curve(
        "mask/reconstruction_error", "Error, own masks",
        "Error of the hidden tokens under the sampler's masks. It says as much of how hard the masks are as of the "
        "MAE: compare samplers by the yardstick instead.",
    ),
    Curve(
        "mask/random_mask_error", "Error, random masks",
        "The yardstick: the same MAE on fresh clips under uniform random masks. Healthy: falls, and not far behind the "
        "baseline's.",
    ),
    Curve(
        "mask/motion_lift", "Motion lift",
        "Share of moving foreground among the visible tokens over its share among all. 1 is chance; a sampler that "
        "follows what moves rises above it.", (1,),
    ),
    Curve(
        "time/fps", "Clips a second",
        "How fast training goes. Healthy: level; a sag is a busy machine, or videos that are slow to read.", (0,),
    ),
    Curve(
        "time/data_wait", "Data wait",
        "Share of the time in which the device waited for clips. Healthy: below 0.05; otherwise more "
        "loader.workers or a loader.cache help.", (0, 0.1),
    ),
)  # fmt: skip
_COUNTS = ("time/iterations", "time/total_timesteps", "time/time_elapsed")


class Line(NamedTuple):
    """One sampler's values over the course of training."""

    label: str
    colour: str
    dashes: str
    """SVG's stroke-dasharray."""
    x: np.ndarray
    y: np.ndarray


class DrawnLine(NamedTuple):
    """A line as SVG: of what colour, which path, within which band, and its last value in words."""

    label: str
    colour: str
    dashes: str
    path: str
    band: str
    last: str


class Panel(NamedTuple):
    """A curve of several samplers, ready for the page."""

    heading: str
    healthy: str
    lines: list[DrawnLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    mark: tuple[float, str] | None
    """Height and name of a line across."""
    x_label: str


def values_of(metrics: Mapping[str, np.ndarray], key: str) -> np.ndarray | None:
    """A column of metrics.csv, None if there is nothing in it; infinite ones count as gaps."""
    if key not in metrics:
        return None
    values = np.where(np.isfinite(metrics[key]), metrics[key], np.nan)
    return None if np.isnan(values).all() else -values if key == "train/entropy_loss" else values


def other_keys(metrics: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Columns that are no curve of their own here and no mere count of time."""
    known = {curve.key for curve in CURVES} | {*_COUNTS}
    return sorted({key for table in metrics for key in table} - known)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, lowest and highest of y over at most ``POINTS`` stretches; NaN where a stretch has no value."""
    if len(x) <= POINTS:
        return x, y, y, y
    starts = np.linspace(0, len(x), POINTS, endpoint=False).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch without a value is a gap
        parts = [(np.mean(a), np.nanmean(b), np.nanmin(b), np.nanmax(b)) for a, b in _stretches(x, y, starts)]
    return tuple(np.array(parts).T)  # type: ignore[return-value]


def _stretches(x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.split(x, starts[1:]), np.split(y, starts[1:]), strict=True))


def panel(
    curve: Curve, lines: Sequence[Line], x_label: str, mark: tuple[float, str] | None = None, ends: bool = True
) -> Panel | None:
    """A panel with these lines; None if none has a value.

    Args:
        curve: what is drawn.
        lines: of values, NaN where there is none.
        x_label: what x counts.
        mark: a value that stands out, and what it is.
        ends: say how each line ends.
    """
    found = [(line, thinned(line.x, line.y)) for line in lines if not np.isnan(line.y).all()]
    if not found:
        return None
    marked = (mark[0],) if mark else ()
    low, high = _reach([*(y for _, (_, _, *ends) in found for y in ends), np.array([*curve.within, *marked])])
    left, right = _reach([line.x for line, _ in found])

    def across(x: np.ndarray | float) -> np.ndarray:
        return _LEFT + (np.asarray(x) - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)

    def up(y: np.ndarray | float) -> np.ndarray:
        return HEIGHT - _BOTTOM - (np.asarray(y) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    drawn = []
    for line, (x, mean, least, most) in found:
        values = line.y[~np.isnan(line.y)]
        band = _band(across(x), up(least), up(most)) if len(line.x) > POINTS else ""
        last = text(values[-1]) if ends else ""
        drawn.append(DrawnLine(line.label, line.colour, line.dashes, _path(across(x), up(mean)), band, last))
    return Panel(
        curve.heading,
        curve.healthy,
        drawn,
        [(float(across(x)), label) for x, label in _ticks(left, right)],
        [(float(up(y)), label) for y, label in _ticks(low, high)],
        (float(up(mark[0])), mark[1]) if mark else None,
        x_label,
    )


def _reach(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """From the lowest to the highest value, and never nothing."""
    low, high = float(min(map(np.nanmin, filter(len, values)))), float(max(map(np.nanmax, filter(len, values))))
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round values and what to write beside them, in as many digits as it takes to tell them apart."""
    found = [float(value) for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    for digits in range(3, 12):
        labels = [text(value, digits) for value in found]
        if len(set(labels)) == len(labels):
            break
    return list(zip(found, labels, strict=True))


def text(value: float, digits: int = 3) -> str:
    """A number in a few digits: 12.5k, 3.4M, 2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through the points, broken where y is NaN; a point alone is drawn as a dot."""
    steps = []
    there = ~np.isnan(y)
    for i in np.flatnonzero(there):
        joined = i > 0 and there[i - 1]
        steps.append(f"{'L' if joined else 'M'}{x[i]:.1f} {y[i]:.1f}")
        if not joined and (i + 1 == len(y) or not there[i + 1]):
            steps.append("h.1")
    return "".join(steps)


def _band(x: np.ndarray, bottom: np.ndarray, top: np.ndarray) -> str:
    """Closed shapes between two lines, one a stretch without NaN."""
    there = np.flatnonzero(~np.isnan(top))
    shapes = []
    for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
        around = [*zip(x[run], top[run], strict=True), *zip(x[run][::-1], bottom[run][::-1], strict=True)]
        shapes.append("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in around) + "Z")
    return "".join(shapes)
