"""What the rows of ``tats bench`` say: goals, ratios, growth, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.bench_rows import (
    ATTENTION,
    AXES,
    BARE,
    COPY,
    JOINT,
    LITERAL,
    MAE,
    MATRIX,
    STEPPING,
    curves,
    named,
)
from experiments.bench_schema import BenchConfig
from experiments.growth import exponent
from experiments.schema import RunConfig

Result = dict[str, Any]
"""Of a row: ``seconds`` (median, low, high, repeats), ``clips``, ``flops``, ``peak_bytes``, ...; or ``error``."""
Results = Mapping[str, Result]
GIB = 2**30
FIGURES = {"seconds": "s", "peak_bytes": "GiB"}


def median(results: Results, name: str) -> float:
    """A row's seconds; KeyError if it was not measured."""
    seconds: float = results[name]["seconds"]["median"]
    return seconds


def clips_a_second(results: Results, name: str) -> float:
    """A row's throughput; KeyError if it was not measured."""
    clips: float = results[name]["clips"] / median(results, name)
    return clips


def flops_a_second(results: Results, name: str) -> float:
    """A row's operations a second; KeyError if it was not measured, or could not be counted."""
    flops: float | None = results[name]["flops"]
    if flops is None:
        raise KeyError(name)
    return flops / median(results, name)


class Goal(NamedTuple):
    """What is to be reached, and how it is read off the rows."""

    what: str
    bound: float
    measure: Callable[[Results], float]
    """Raises KeyError where a row that it needs is not measured."""
    unit: str
    at_least: bool = False
    place: str = "H100"

    @property
    def text(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}"


def _clips(name: str) -> Callable[[Results], float]:
    return lambda results: clips_a_second(results, name)


def _ratio(name: str, reference: str, scale: float = 1.0, less: float = 0.0) -> Callable[[Results], float]:
    return lambda results: scale * (median(results, name) / median(results, reference) - less)


GOALS = (
    Goal("joint step, batch 64", 1500, _clips(named(JOINT, 64)), "clips/s", True),
    Goal("joint step, batch 256", 1800, _clips(named(JOINT, 256)), "clips/s", True),
    Goal("joint step, batch 256, half decoded", 2200, _clips(named(JOINT, 256, "50 % decoded")), "clips/s", True),
    Goal("cost of the sampler, batch 64", 15, _ratio(named(JOINT, 64), named(MAE, 64), 100, 1), "%"),
    Goal("cost of the sampler, batch 256", 15, _ratio(named(JOINT, 256), named(MAE, 256), 100, 1), "%"),
    Goal("peak memory, batch 64", 10, lambda results: results[named(JOINT, 64)]["peak_bytes"] / GIB, "GiB"),
    Goal("trajectory attention, 16 clips", 8, lambda results: 1e3 * median(results, ATTENTION), "ms"),
    Goal("stepping without learning, batch 64", 4000, _clips(named(STEPPING, 64)), "clips/s", True),
    Goal(
        "share of the matrix ceiling, joint step, batch 256",
        40,
        lambda results: 100 * flops_a_second(results, named(JOINT, 256)) / flops_a_second(results, MATRIX),
        "%",
        True,
    ),
    Goal("MAE step over the bare one", 1.3, _ratio(named(MAE, 32), named(BARE, 32)), "x", place="CPU"),
)
_PLACES = {"H100": ("base", 16, 224, 16, 0.95), "CPU": ("tiny", 16, 32, 8, 0.9)}
"""MAE, frames, pixels, patch and mask ratio that the goals are set for."""


def judge(results: Results, run: RunConfig, place: str) -> list[dict[str, Any]]:
    """Each goal with what was measured, and whether it is met; None with a reason where that can't be said.

    Args:
        place: ``H100``, ``CPU`` or another GPU's name.
    """
    clip = run.clip
    shape = run.mae.size, clip.num_frames, clip.size, clip.patch_size, run.mask_ratio
    judged = []
    for goal in GOALS:
        verdict: dict[str, Any] = {"goal": goal.what, "bound": goal.text, "measured": None, "met": None}
        if goal.place != place:
            verdict["why"] = f"needs {'an H100' if goal.place == 'H100' else 'a CPU'}"
        elif shape != _PLACES[goal.place]:
            size, frames, pixels, patch, ratio = _PLACES[goal.place]
            verdict["why"] = f"needs {size}, {frames}x{pixels}x{pixels} in patches of {patch}, {100 * ratio:g} % hidden"
        else:
            try:
                value = goal.measure(results)
                verdict |= {
                    "measured": value, "met": value >= goal.bound if goal.at_least else value <= goal.bound
                }  # fmt: skip
            except KeyError:
                verdict["why"] = "not measured"
        judged.append(verdict | {"unit": goal.unit})
    return judged


def growth(results: Results, config: BenchConfig, run: RunConfig) -> list[dict[str, Any]]:
    """How each step's time and memory grow along ``AXES``: points and fitted exponents, None for a single point."""
    found = []
    for axis, groups in curves(config, run).items():
        for kind in (MAE, JOINT):
            rows = [row.name for group in groups for row in group.rows if row.name.startswith(f"{kind},")]
            known = [results[name] for name in rows if "seconds" in results.get(name, {})]
            x = [result[axis] for result in known]
            for figure in FIGURES if x else ():
                y = [result["seconds"]["median"] if figure == "seconds" else result["peak_bytes"] for result in known]
                power = exponent(x, y) if len(set(x)) > 1 else None
                found.append({"axis": axis, "step": kind, "figure": figure, "x": x, "y": y, "exponent": power})
    return found


def derived(results: Results) -> dict[str, Result]:
    """What each measured row comes to: throughput, share of the ceiling, and ratios to references."""
    found = {}
    for name, result in results.items():
        if "seconds" not in result:
            continue
        more: Result = {}
        seconds = result["seconds"]
        if result["clips"]:
            more["clips_per_second"] = clips_a_second(results, name)
        if result["flops"]:
            more["tflops_per_second"] = flops_a_second(results, name) / 1e12
            if results.get(MATRIX, {}).get("flops") and seconds["repeats"]:
                more["share_of_ceiling"] = flops_a_second(results, name) / flops_a_second(results, MATRIX)
        if name == COPY and result["bytes"]:
            more["gigabytes_per_second"] = result["bytes"] / median(results, name) / 1e9
        more["ratios"] = {
            other: clips_a_second(results, name) / clips_a_second(results, other)
            for other in result["against"] if "seconds" in results.get(other, {})
        }  # fmt: skip
        if "seconds" in results.get(result["part_of"], {}):
            more["share_of_step"] = median(results, name) / median(results, result["part_of"])
        found[name] = more
    return found


HEADINGS = ("", "ms", "quartiles", "clips/s", "GFLOP", "TFLOP/s", "of ceiling", "GiB", "compared")
CAPTION = (
    "Median and quartiles of the repetitions. GFLOP: operations of matrix products and attention in a step, counted. "
    "Of ceiling: share of the measured matrix product's rate. Compared: clips a second over those of a reference in "
    "this table, or share of the joint step's time. A part alone may take longer than within the step, or less."
)


def cells(results: Results) -> list[list[str]]:
    """The table's rows, under ``HEADINGS``."""
    more, rows = derived(results), []
    for name, result in results.items():
        if "error" in result:
            rows.append([name, "failed: " + result["error"], *[""] * (len(HEADINGS) - 2)])
            continue
        extra, seconds = more[name], result["seconds"]
        said = [f"{ratio:.2f} x {_short(other)}" for other, ratio in extra["ratios"].items()]
        if "share_of_step" in extra:
            said.append(f"{extra['share_of_step']:.1%} of the step")
        if "not_counted" in result:
            said.append(f"operations not counted: {result['not_counted']}")
        if "data_wait" in result:
            said.append(f"waits for clips {result['data_wait']:.0%} of the time")
        if "gigabytes_per_second" in extra:
            said.append(f"{extra['gigabytes_per_second']:.0f} GB/s")
        spread = "" if seconds["repeats"] < 2 else f"{1e3 * seconds['low']:.3g} to {1e3 * seconds['high']:.3g}"
        rows.append([
            name,
            f"{1e3 * seconds['median']:.4g}",
            spread,
            f"{extra['clips_per_second']:.4g}" if "clips_per_second" in extra else "",
            f"{result['flops'] / 1e9:.4g}" if result["flops"] else "",
            f"{extra['tflops_per_second']:.3g}" if "tflops_per_second" in extra else "",
            f"{extra['share_of_ceiling']:.0%}" if "share_of_ceiling" in extra else "",
            f"{result['peak_bytes'] / GIB:.3g}" if result["peak_bytes"] else "",
            ", ".join(said),
        ])  # fmt: skip
    return rows


def _short(name: str) -> str:
    return "literal" if name == LITERAL else name.partition(",")[0]


def goal_cells(judged: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Goal, bound, measured, verdict."""
    return [
        [
            goal["goal"],
            goal["bound"],
            "-" if goal["measured"] is None else f"{goal['measured']:.4g} {goal['unit']}",
            goal.get("why") or ("met" if goal["met"] else "not met"),
        ]
        for goal in judged
    ]


def growth_cells(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Step, figure, axis, points, exponent; nothing for the mask ratio, along which nothing is a power law."""
    rows = []
    for curve in found:
        if curve["axis"] == "mask_ratio":
            continue
        scale = GIB if curve["figure"] == "peak_bytes" else 1
        points = ", ".join(f"{x:.3g}: {y / scale:.3g}" for x, y in zip(curve["x"], curve["y"], strict=True))
        power = "-" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
        rows.append([curve["step"], FIGURES[curve["figure"]], AXES[curve["axis"]], points, power])
    return rows


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _scaled(scale: float, _: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y / scale


def plot(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Write throughput.png against the batch, memory.png against the mask ratio, and growth.png."""

    def draw(axes: Any, axis: str, figure: str, transform: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        for curve in found:
            if curve["axis"] == axis and curve["figure"] == figure:
                x, y = np.array(curve["x"], float), np.array(curve["y"], float)
                order = x.argsort()
                fitted = axes.get_xscale() == "log" and curve["exponent"] is not None
                label = curve["step"] + (f", exponent {curve['exponent']:.2f}" if fitted else "")
                axes.plot(x[order], transform(x, y)[order], "o-", label=label)
        axes.set_xlabel(AXES[axis])
        if axes.lines and axes.get_xscale() == "log":
            values = sorted({x for curve in found if curve["axis"] == axis for x in curve["x"]})
            axes.set_xticks(values, [f"{x:.3g}" for x in values])
            axes.set_xticks([], minor=True)
        if axes.lines:
            axes.legend(frameon=False)

    single: dict[str, tuple[str, str, str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
        "throughput": ("batch_size", "seconds", "clips/s", lambda x, y: x / y),
        "memory": ("mask_ratio", "peak_bytes", "peak memory, GiB", lambda x, y: y / GIB),
    }
    for name, (axis, value, label, transform) in single.items():
        if any(curve["axis"] == axis for curve in found):
            figure = Figure((5.5, 4), layout="constrained")
            axes = figure.subplots()
            draw(axes, axis, value, transform)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            figure.savefig(folder / f"{name}.png", dpi=110)
    grown = [axis for axis in AXES if axis != "mask_ratio" and any(curve["axis"] == axis for curve in found)]
    if grown:
        figure = Figure((4.5 * len(grown), 7), layout="constrained")
        for row, value in zip(figure.subplots(2, len(grown), squeeze=False), FIGURES, strict=True):
            for axes, axis in zip(row, grown, strict=True):
                axes.set(xscale="log", yscale="log", ylabel={"seconds": "s a step", "peak_bytes": "GiB"}[value])
                scale = GIB if value == "peak_bytes" else 1
                draw(axes, axis, value, partial(_scaled, scale))
        figure.savefig(folder / "growth.png", dpi=110)
