"""How long a step takes on a device, and how much memory: CUDA events on a GPU, the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Step(NamedTuple):
    """Something to time: ``act`` takes what ``prepare``, which is not timed, made for it."""

    act: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> None:
        """Both, once."""
        self.act(self.prepare())


class Timing(NamedTuple):
    """Seconds of a step over its repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    repeats: int


class Stopwatch:
    """Times a step, repetition by repetition, so that several can be timed in turn.

    On a GPU nothing waits for the device between repetitions, as nothing does in a training loop.

    Args:
        step: what to time.
        device: where it runs.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step, self.device = step, device
        self.on_gpu = device.type == "cuda"
        self._times: list[Any] = []

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def warm_up(self, times: int) -> float:
        """Run the step that often, at least once; returns the seconds of the first, which compiles what there is."""
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        first = time.perf_counter() - start
        for _ in range(times - 1):
            self.step()
        self._wait()
        return first

    def peak_bytes(self, before: int) -> int | None:
        """Most memory that the step takes on a GPU, beyond the ``before`` bytes that were allocated without it."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def once(self) -> None:
        """One timed repetition."""
        prepared = self.step.prepare()
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            start.record(stream)
            self.step.act(prepared)
            end.record(stream)
            self._times.append((start, end))
        else:
            began = time.perf_counter()
            self.step.act(prepared)
            self._times.append(time.perf_counter() - began)

    def timing(self) -> Timing:
        """What the repetitions so far took; waits for the device."""
        self._wait()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in self._times] if self.on_gpu else self._times
        low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
        return Timing(float(median), float(low), float(high), len(seconds))
