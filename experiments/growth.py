"""How time and memory of our step grow, and what a long pre-training costs, worked out for H100s without one.

``python -m experiments.growth`` prints the tables, of ViT-B on Kinetics-400's recipe; what is predicted, and from which
measurements, is said in ``operations.py`` and ``estimate.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch

from agents.attention import TrajectoryAttention
from experiments.config import load_config
from experiments.estimate import HELD, MAE_PARTS, Step, seconds
from experiments.operations import H100_BYTES, H100_FLOPS, count
from experiments.schema import RunConfig

RECIPE = "kinetics400"
NODE = 8
"""GPUs in a node."""
NVLINK_BYTES, NETWORK_BYTES = 450e9, 50e9
"""Bytes a second that one GPU sends within a node (H100's NVLink, by its data sheet) and between nodes (one port of 400
gigabits a second a GPU)."""
PUBLISHED = 64, 27.0
"""V100s, and hours, of VideoMAE's own pre-training of ViT-B for 800 epochs on Kinetics-400, as one of its authors has
it (https://github.com/MCG-NJU/VideoMAE/issues/5)."""
GROWTH: dict[str, list[tuple[str, list[str]]]] = {
    "batch": [(str(b), ["--batch-size", str(b)]) for b in (32, 64, 128, 256)],
    "frames": [(str(t), ["--batch-size", "64", "--clip.num-frames", str(t)]) for t in (16, 32, 64)],
    "pixels": [(str(p), ["--batch-size", "64", "--clip.size", str(p)]) for p in (224, 384)],
    "model": [(m, ["--batch-size", "64", "--mae.size", m]) for m in ("small", "base", "large")],
}
MASKING = ("0.75", "random"), ("0.9", "random"), ("0.95", "random"), ("0.95", "ppo")
"""Mask ratios and samplers whose memory is compared: a standard MAE's, and ours."""


class Predicted(NamedTuple):
    """One joint step on an H100."""

    config: RunConfig
    num_tokens: int
    parameters: int
    """Of MAE and sampler."""
    parts: dict[str, float]
    """Seconds."""
    peak_bytes: float
    flops: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def mae_seconds(self) -> float:
        """Of a step of the MAE alone, under masks that cost nothing."""
        return sum(self.parts[name] for name in MAE_PARTS)

    @property
    def utilisation(self) -> float:
        """Share of a matrix product's speed."""
        return self.flops / self.seconds / H100_FLOPS


def predicted(config: RunConfig) -> Predicted:
    """What a step of a run of our PPO takes."""
    step = Step(config)
    parts = step.parts()
    networks = [step.mae.model, *([] if step.policy is None else [step.policy])]
    return Predicted(
        config,
        step.mae.grid.num_tokens,
        sum(p.numel() for network in networks for p in network.parameters()),
        {name: seconds(part) for name, part in parts.items()},
        HELD * max(part.peak_bytes for part in parts.values()),
        sum(part.flops for part in parts.values()),
    )


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of the power law y = a * x^b that fits best in logarithms."""
    return float(np.polyfit([log(v) for v in x], [log(v) for v in y], 1)[0])


def all_reduce_seconds(parameters: int, num_gpus: int) -> float:
    """Averaging float32 gradients in one message after the backward pass, which nothing overlaps.

    A ring passes 2 (R - 1) / R of the message through each GPU, at the speed of its slowest link; copying the gradients
    into one piece, dividing it and copying back goes six times through memory.
    """
    if num_gpus == 1:
        return 0.0
    message, link = 4 * parameters, NVLINK_BYTES if num_gpus <= NODE else NETWORK_BYTES
    return 2 * (num_gpus - 1) / num_gpus * message / link + 6 * message / H100_BYTES


def hours(step: Predicted, num_gpus: int) -> float:
    """A whole pre-training with as many clips on each GPU, in the same number of epochs, data not counted."""
    steps = step.config.steps / num_gpus
    return steps * (step.seconds + all_reduce_seconds(step.parameters, num_gpus)) / 3600


def _table(*rows: Sequence[object]) -> Iterator[str]:
    yield from (f"| {' | '.join(map(str, row))} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    yield ""


def _alone() -> Iterator[list[object]]:
    """Trajectory attention with its gradient, and the environment under random scores while nothing learns."""
    attention = TrajectoryAttention(768, 12).to("meta")
    tokens = torch.empty(16, 8, 196, 768, device="meta", requires_grad=True)
    step = Step(load_config(RECIPE, ["--batch-size", "64"]))
    step.mae.train(False)
    step.env.reset(seed=0)
    scores = torch.empty((64, step.mae.grid.num_tokens), device="meta")
    for what, clips, act in (
        ("trajectory attention, 768 wide, 12 heads, 16 clips", 16, lambda: attention(tokens).sum().backward()),
        ("environment, batch 64", 64, lambda: step.env.step(scores)),
    ):
        time = seconds(count(act))
        yield [what, f"{1e3 * time:.1f}", f"{clips / time:.0f}"]


def report() -> Iterator[str]:
    """The tables, in Markdown, line by line."""
    steps = {
        (batch, ratio): predicted(load_config(RECIPE, ["--batch-size", batch, "--mae.decode-ratio", ratio]))
        for batch in ("64", "256")
        for ratio in ("1.0", "0.5")
    }
    names = next(iter(steps.values())).parts
    yield from _table(
        ["ms of a step", *(f"batch {batch}, decode_ratio {ratio}" for batch, ratio in steps)],
        *([name, *(f"{1e3 * step.parts[name]:.1f}" for step in steps.values())] for name in names),
        ["joint step", *(f"{1e3 * step.seconds:.1f}" for step in steps.values())],
        ["joint step, clips/s", *(f"{step.config.batch_size / step.seconds:.0f}" for step in steps.values())],
        ["MAE alone, clips/s", *(f"{step.config.batch_size / step.mae_seconds:.0f}" for step in steps.values())],
        ["cost of the sampler", *(f"{step.seconds / step.mae_seconds - 1:.0%}" for step in steps.values())],
        ["matrix utilisation", *(f"{step.utilisation:.0%}" for step in steps.values())],
        ["peak GiB", *(f"{step.peak_bytes / 2**30:.1f}" for step in steps.values())],
    )
    yield from _table(["alone", "ms", "clips/s"], *_alone())
    rows: list[list[object]] = [["growth with", "", "tokens", "M parameters", "ms a step", "clips/s", "GiB"]]
    for what, settings in GROWTH.items():
        found = [predicted(load_config(RECIPE, overrides)) for _, overrides in settings]
        for (value, _), step in zip(settings, found, strict=True):
            size = step.config.batch_size
            rows.append([what, value, step.num_tokens, f"{step.parameters / 1e6:.0f}", f"{1e3 * step.seconds:.1f}"])
            rows[-1] += [f"{size / step.seconds:.0f}", f"{step.peak_bytes / 2**30:.1f}"]
        by = {"batch": "clips", "model": "parameters"}.get(what, "tokens")
        x = [{"clips": y.config.batch_size, "parameters": y.parameters}.get(by, y.num_tokens) for y in found]
        time, memory = (exponent(x, y) for y in ([s.seconds for s in found], [s.peak_bytes for s in found]))
        rows.append([what, f"exponent in {by}", "", "", f"{time:.2f}", "", f"{memory:.2f}"])
    yield from _table(*rows)
    masking: list[list[object]] = [["share hidden", "agent", "small, GiB", "clips/s", "base, GiB", "clips/s"]]
    for hidden, agent in MASKING:
        masking.append([hidden, agent])
        for model in ("small", "base"):
            asked = ["--mae.size", model, "--mask-ratio", hidden, "--agent.class", agent, "--batch-size", "64"]
            masked = predicted(load_config(RECIPE, asked))
            masking[-1] += [f"{masked.peak_bytes / 2**30:.1f}", f"{64 / masked.seconds:.0f}"]
    yield from _table(*masking)
    step = steps["256", "1.0"]
    gpus, published = PUBLISHED
    yield from _table(
        ["Kinetics-400, 800 epochs", "hours", "GPU hours", "averaging of gradients in a step"],
        *(
            [
                f"{n} H100",
                f"{hours(step, n):.1f}",
                f"{n * hours(step, n):.0f}",
                f"{1e3 * all_reduce_seconds(step.parameters, n):.1f} ms beside {1e3 * step.seconds:.1f}",
            ]
            for n in (1, 8, 64)
        ),
        [f"published VideoMAE, no sampler, 90 % hidden: {gpus} V100", f"{published:g}", f"{gpus * published:.0f}", ""],
    )


if __name__ == "__main__":
    for line in report():
        print(line)
