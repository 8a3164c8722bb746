"""Clips decoded ahead of time, by worker processes into shared memory or by threads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tats_env.data.reader import DataError, UnreadableVideo, VideoInfo, num_cores, read_frames

if TYPE_CHECKING:
    from tats_env.data.cache import FrameCache

CLIP_SECONDS = 60
"""A worker process that takes longer for one clip is ended, and the clip's video counts as unreadable."""
AHEAD_BYTES = 1 << 30
"""Of clips decoded ahead."""


class ClipRequest(NamedTuple):
    """Which frames of which video, and where it is cropped along its longer side: 0 to 1, 0.5 is the centre."""

    video: int
    frames: tuple[int, ...]
    position: float = 0.5


@dataclass(frozen=True)
class ClipReader:
    """What a worker needs to decode a clip."""

    paths: Sequence[Path]
    infos: Sequence[VideoInfo]
    size: tuple[int, int]
    decoder: str = "decord"
    cache: FrameCache | None = None

    def __call__(self, request: ClipRequest) -> np.ndarray:
        """The request's frames, uint8 [T, H, W, 3].

        Raises:
            UnreadableVideo: if they cannot be decoded.
        """
        path, info, frames = self.paths[request.video], self.infos[request.video], np.array(request.frames)
        if self.cache is not None:
            return self.cache.frames(path, info, self.size, request.position, self.decoder, frames)
        return read_frames(path, self.size, frames, info, position=request.position, decoder=self.decoder)


# In a worker process: what to read with, and where to write
_reader: ClipReader
_slots: np.ndarray
_memory: SharedMemory


def _begin_worker(reader: ClipReader, memory: str, shape: tuple[int, ...]) -> None:
    global _reader, _slots, _memory
    _memory = SharedMemory(memory)
    _reader, _slots = reader, np.ndarray(shape, np.uint8, _memory.buf)


def _work(request: ClipRequest, slot: int) -> str | None:
    """Decode into a slot; returns why not, since an exception of ours would not survive pickling."""
    try:
        _slots[slot] = _reader(request)
    except UnreadableVideo as error:
        return error.reason
    return None


class ClipStream:
    """A pool that decodes clips of one shape, each into a slot of one block of memory.

    With processes, a decoder that crashes or hangs costs one clip: its process is started anew, and the clip's video
    is reported as unreadable. Nothing depends on how many workers there are or on who decodes what.

    Args:
        reader: how to decode.
        clip_shape: (T, H, W) of its clips.
        workers: processes; 0, or a daemonic process of our own, which may start none, means threads.
    """

    def __init__(self, reader: ClipReader, clip_shape: tuple[int, ...], workers: int) -> None:
        self.reader, self.clip_shape = reader, (*clip_shape, 3)
        self.workers = 0 if multiprocessing.current_process().daemon else workers
        self._process = 0

    def _start(self) -> None:
        """Make pool and slots in this process, once: threads and locks do not live on in a forked one."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        clip_bytes = int(np.prod(self.clip_shape))
        room = AHEAD_BYTES
        if self.workers and os.path.isdir("/dev/shm"):  # containers often have little, and writing past it is fatal
            room = min(room, shutil.disk_usage("/dev/shm").free // 2)
        count = max(room // clip_bytes, 2 * (self.workers or num_cores()))
        shape = (count, *self.clip_shape)
        if self.workers:
            self._memory = SharedMemory(create=True, size=count * clip_bytes)
            self._slots = np.ndarray(shape, np.uint8, self._memory.buf)
        else:
            self._slots = np.empty(shape, np.uint8)
        self._renewed = False
        self._start_pool()

    def _start_pool(self) -> None:
        """Start the workers, with every slot free."""
        self._pool: Any
        if self.workers:
            from pebble import ProcessPool

            self._pool = ProcessPool(
                self.workers, initializer=_begin_worker, initargs=(self.reader, self._memory.name, self._slots.shape),
                context=multiprocessing.get_context("spawn"),
            )  # fmt: skip
            self._end = weakref.finalize(self, _end, self._pool, self._memory.name, os.getpid())
        else:
            self._pool = ThreadPoolExecutor(num_cores(), "tats-decode")
        self._ahead: dict[ClipRequest, tuple[Future[str | None], int]] = {}  # oldest first
        self._free = list(range(len(self._slots) - 1, -1, -1))

    def _in_thread(self, request: ClipRequest, slot: int) -> str | None:
        try:
            self._slots[slot] = self.reader(request)
        except UnreadableVideo as error:
            return error.reason
        return None

    def _claim(self, request: ClipRequest) -> tuple[Future[str | None], int] | None:
        """A clip on its way, started now unless it was before; None if every slot is in use."""
        if request in self._ahead:
            return self._ahead.pop(request)
        if not self._free and self._ahead:
            future, slot = self._ahead.pop(next(iter(self._ahead)))  # nobody took it
            if not (future.cancel() if not self.workers else future.done()):
                self._reason(future)  # its worker may still write
            self._free.append(slot)
        if not self._free:
            return None
        if self.workers and not self._pool.active:
            raise BrokenProcessPool
        slot = self._free.pop()
        if self.workers:
            return self._pool.schedule(_work, args=(request, slot), timeout=CLIP_SECONDS), slot
        return self._pool.submit(self._in_thread, request, slot), slot

    def _reason(self, future: Future[str | None]) -> str | None:
        """Wait for a clip; returns why there is none, if so."""
        from pebble import ProcessExpired

        try:
            return future.result()
        except TimeoutError:
            return f"decoding it took more than {CLIP_SECONDS} s"
        except ProcessExpired as error:
            return f"decoding it ended its process (exit code {error.exitcode})"

    def prefetch(self, requests: Sequence[ClipRequest]) -> None:
        """Start on these; drop the oldest that nobody took to make room."""
        self._start()
        with suppress(BrokenProcessPool):  # left to ``take``
            for request in requests[: len(self._slots)]:
                claimed = self._claim(request)
                if claimed is not None:
                    self._ahead[request] = claimed

    def take(self, requests: Sequence[ClipRequest], clips: np.ndarray) -> dict[int, UnreadableVideo]:
        """Write the clips into ``clips`` [B, T, H, W, 3], waiting for those that are not there yet.

        Returns:
            why not, by video, for those that cannot be decoded.
        """
        self._start()
        rows: dict[ClipRequest, list[int]] = {}
        for i, request in enumerate(requests):
            rows.setdefault(request, []).append(i)
        waiting, started = deque(rows), deque[tuple[ClipRequest, Future[str | None], int]]()
        failed: dict[int, UnreadableVideo] = {}
        while waiting or started:
            try:
                while waiting and (claimed := self._claim(waiting[0])) is not None:
                    started.append((waiting.popleft(), *claimed))
                reason = self._reason(started[0][1])
            except BrokenProcessPool:
                waiting.extendleft(request for request, _, _ in reversed(started))
                started.clear()
                self._renew_pool()
                continue
            request, _, slot = started.popleft()
            if reason is None:
                clips[rows[request]] = self._slots[slot]
            else:
                failed[request.video] = UnreadableVideo(self.reader.paths[request.video], reason)
            self._free.append(slot)
            self._renewed = False
        return failed

    def _renew_pool(self) -> None:
        """Start anew after all workers were killed while they had nothing to do, which ends pebble's pool."""
        if self._renewed:
            raise DataError("the processes that decode end as soon as they are started; try loader.workers: 0")
        self._end.detach()
        self._pool.stop()
        self._pool.join()
        self._start_pool()
        self._renewed = True


def _end(pool: Any, memory: str, process: int) -> None:
    """Let go of worker processes and shared memory, in the process that made them."""
    if process == os.getpid():
        pool.stop()
        pool.join()
        SharedMemory(memory).unlink()
