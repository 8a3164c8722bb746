"""Clips made ready on a device ahead of time, and for how long that device had to wait for them."""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tats_env.data.reader import UnreadableVideo
from tats_env.data.stream import Batch, ClipRequest, ClipStream

AHEAD = 2
"""Batches on their way beside the one in use, so that workers have others to take up while the last clips of one are
decoded. In batches of four clips a worker they did 79 % of what they could with 1, 93 % with 2 and 92 % with 3; in
batches of one clip a worker 58, 83 and 90 %. Each batch takes up memory on the device."""


class WaitClock:
    """For how long devices waited for clips.

    On a GPU that is time on its own line: from where it had done all it was given before the clips, to where they were
    there. A host that runs ahead makes no difference, and nobody waits for the device to find out.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open = deque[tuple[torch.cuda.Event, torch.cuda.Event]]()  # that the GPU has yet to come to

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Count what is done inside as waiting."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        yield
        end.record(stream)
        self._open.append((begin, end))
        self._close()

    def seconds(self) -> float:
        """Seconds since last asked; of a GPU's waits those that it has come to the end of."""
        self._close()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _close(self) -> None:
        while self._open and self._open[0][1].query():
            begin, end = self._open.popleft()
            self._seconds += begin.elapsed_time(end) / 1000


class _Coming(NamedTuple):
    """A batch on its way to a device."""

    requests: list[ClipRequest]
    device: torch.device
    batch: Batch
    moved: Future[tuple[Tensor, torch.cuda.Event | None]]
    """Each distinct clip once, and when they are there."""


class Stage:
    """Clips of a stream on their way to devices: decoded and moved in a thread while others are used.

    A clip that is asked for several times in a batch is decoded, and sent to the device, once.

    Args:
        stream: what decodes.
        waits: takes down how long devices wait.
    """

    def __init__(self, stream: ClipStream, waits: WaitClock) -> None:
        self.stream, self.waits = stream, waits
        self._process = 0

    def begin(self, requests: list[ClipRequest], device: torch.device) -> None:
        """Start on clips that will be asked for; of more than ``AHEAD`` batches the oldest is given up."""
        device = self._here(device)
        if any(coming.requests == requests and coming.device == device for coming in self._ahead):
            return
        if len(self._ahead) == AHEAD:
            self.stream.drop(self._ahead.popleft().batch)
        self._ahead.append(self._start(requests, device))

    def take(self, requests: list[ClipRequest], device: torch.device) -> tuple[Tensor, dict[int, UnreadableVideo]]:
        """The clips, on their way already or decoded now.

        Returns:
            uint8 [B, T, h, w, 3] on ``device``; why not, by video, for those that cannot be decoded.
        """
        device = self._here(device)
        fits = [coming.requests == requests and coming.device == device for coming in self._ahead]
        if any(fits):
            for _ in range(fits.index(True)):
                self.stream.drop(self._ahead.popleft().batch)
        with self.waits.waiting(device):
            coming = self._ahead.popleft() if any(fits) else self._start(requests, device)
            clips, ready = coming.moved.result()
            if ready is not None:  # moved on a stream of its own
                torch.cuda.current_stream(device).wait_event(ready)
                clips.record_stream(torch.cuda.current_stream(device))
        if len(clips) < len(requests):
            place = {request: i for i, request in enumerate(coming.batch.rows)}
            which = torch.tensor([place[request] for request in requests])
            clips = clips.index_select(0, which.to(device, non_blocking=True))
        return clips, coming.batch.failed

    def _here(self, device: torch.device) -> torch.device:
        """Begin anew in a forked process, where threads do not live on; the device as other threads have to name it."""
        if self._process != os.getpid():
            self._thread, self._ahead = ThreadPoolExecutor(1, "tats-stage"), deque[_Coming]()
            self._process = os.getpid()
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _start(self, requests: Sequence[ClipRequest], device: torch.device) -> _Coming:
        distinct = list(dict.fromkeys(requests))
        shape = (len(distinct), *self.stream.clip_shape)
        with torch.inference_mode(False):  # bad ones may be written over, in whatever mode
            clips = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        batch = self.stream.begin(distinct, clips.numpy())
        return _Coming(list(requests), device, batch, self._thread.submit(self._move, batch, clips, device))

    def _move(self, batch: Batch, clips: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        self.stream.finish(batch)
        if device.type != "cuda":
            return clips.to(device), None
        with torch.cuda.stream(_copies(device)):
            moved = clips.to(device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return moved, ready


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to a device. One for all, since memory freed on a stream is kept for that stream."""
    return torch.cuda.Stream(device)
