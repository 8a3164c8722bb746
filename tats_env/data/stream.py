"""Clips decoded by worker processes into shared memory, or by threads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tats_env.data.reader import DataError, UnreadableVideo, VideoInfo, num_cores, read_frames

if TYPE_CHECKING:
    from tats_env.data.cache import FrameCache

CLIP_SECONDS = 60.0
"""A worker process that takes longer for one clip is ended."""
CACHED_FRAMES_A_SECOND = 10.0
"""With a cache, which decodes whole videos, the time allowed grows by a second for each ten frames."""
SLOTS_PER_WORKER = 4
"""Clips on their way at a time: enough that none waits for the one that is taken next."""
_log = logging.getLogger("tats_env.data")


class ClipRequest(NamedTuple):
    """Which frames of which video, and where it is cropped along its longer side: 0 to 1, 0.5 is the centre."""

    video: int
    frames: tuple[int, ...]
    position: float = 0.5


@dataclass(frozen=True)
class ClipReader:
    """How clips are decoded."""

    size: tuple[int, int]
    decoder: str = "decord"
    cache: FrameCache | None = None

    def __call__(self, path: Path, info: VideoInfo, frames: Sequence[int], position: float) -> np.ndarray:
        """Frames of a video, uint8 [T, H, W, 3].

        Raises:
            UnreadableVideo: if they cannot be decoded.
        """
        wanted = np.array(frames)
        if self.cache is not None:
            return self.cache.frames(path, info, self.size, position, self.decoder, wanted)
        return read_frames(path, self.size, wanted, info, position=position, decoder=self.decoder)


# In a worker process: what to read with, and where to write
_reader: ClipReader
_slots: np.ndarray
_memory: SharedMemory


def _begin_worker(reader: ClipReader, memory: str, shape: tuple[int, ...]) -> None:
    global _reader, _slots, _memory
    _memory = SharedMemory(memory)
    _reader, _slots = reader, np.ndarray(shape, np.uint8, _memory.buf)


def _work(slot: int, *request: Any) -> None:
    _slots[slot] = _reader(*request)


class ClipStream:
    """A pool that decodes clips of one shape, each into a slot of one block of memory.

    With processes, a decoder that crashes or hangs costs one clip: its process is started anew, the clip is tried once
    more, and then its video is reported as unreadable. Nothing depends on how many workers there are or on who
    decodes what. Not to be used from two threads at once.

    Args:
        paths, infos: the videos.
        reader: how to decode.
        clip_shape: (T, H, W) of its clips.
        workers: processes; 0, or a daemonic process of our own, which may start none, means threads.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        infos: Sequence[VideoInfo],
        reader: ClipReader,
        clip_shape: tuple[int, ...],
        workers: int,
    ) -> None:
        self.paths, self.infos, self.reader, self.clip_shape = paths, infos, reader, (*clip_shape, 3)
        self.workers = 0 if multiprocessing.current_process().daemon else workers
        self._process = 0

    def _start(self) -> None:
        """Make pool and slots in this process, once: threads and locks do not live on in a forked one."""
        if self._process == os.getpid():
            return
        clip_bytes = int(np.prod(self.clip_shape))
        if self.workers:
            count = min(SLOTS_PER_WORKER * self.workers, _free_shared_memory() // clip_bytes)
            try:
                self._memory = _shared_memory(count * clip_bytes)
                self._slots = np.ndarray((count, *self.clip_shape), np.uint8, self._memory.buf)
            except OSError as error:
                _log.warning("no shared memory for decoded clips (%s; docker run has --shm-size): using threads", error)
                self.workers = 0
        if not self.workers:
            self._slots = np.empty((SLOTS_PER_WORKER * num_cores(), *self.clip_shape), np.uint8)
        self._start_pool()
        self._process = os.getpid()

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
        self._free = list(range(len(self._slots)))
        self._renewed = False

    def _submit(self, request: ClipRequest, slot: int) -> Future[None]:
        path, info = self.paths[request.video], self.infos[request.video]
        order = path, info, request.frames, request.position
        if not self.workers:
            return self._pool.submit(lambda: self._slots.__setitem__(slot, self.reader(*order)))
        if not self._pool.active:
            raise BrokenProcessPool
        seconds = CLIP_SECONDS
        if self.reader.cache is not None:
            seconds += info.num_frames / CACHED_FRAMES_A_SECOND
        future: Future[None] = self._pool.schedule(_work, args=(slot, *order), timeout=seconds)
        return future

    def take(self, requests: Sequence[ClipRequest], clips: np.ndarray) -> dict[int, UnreadableVideo]:
        """Write the clips into ``clips`` [B, T, H, W, 3]; equal requests are decoded once.

        Returns:
            why not, by video, for those that cannot be decoded.
        """
        from pebble import ProcessExpired

        self._start()
        rows: dict[ClipRequest, list[int]] = {}
        for i, request in enumerate(requests):
            rows.setdefault(request, []).append(i)
        waiting, started = deque(rows), deque[tuple[ClipRequest, Future[None], int]]()
        failed: dict[int, UnreadableVideo] = {}
        tried: set[ClipRequest] = set()

        def fails(request: ClipRequest, reason: str) -> None:
            """Report the video, unless it may have been the machine's fault and not tried again yet."""
            if request in tried:
                failed[request.video] = UnreadableVideo(self.paths[request.video], reason)
            else:
                tried.add(request)
                waiting.appendleft(request)

        try:
            while waiting or started:
                try:
                    while waiting and self._free:
                        future = self._submit(waiting[0], self._free[-1])
                        started.append((waiting.popleft(), future, self._free.pop()))
                    request, future, slot = started[0]
                    future.result()
                    clips[rows[request]] = self._slots[slot]
                except BrokenProcessPool:
                    waiting.extendleft(request for request, _, _ in reversed(started))
                    started.clear()
                    self._renew_pool()
                    continue
                except UnreadableVideo as error:
                    failed[request.video] = error
                except TimeoutError:
                    fails(request, "decoding a clip of it takes too long")
                except ProcessExpired as error:
                    fails(request, f"decoding it ends the process (exit code {error.exitcode})")
                started.popleft()
                self._free.append(slot)
                self._renewed = False
        finally:
            for _, future, slot in started:  # interrupted, or a defect: what runs may still write
                future.add_done_callback(lambda _, slot=slot: self._free.append(slot))  # type: ignore[misc]
        return failed

    def _renew_pool(self) -> None:
        """Start anew after all workers were killed while they had nothing to do, which ends pebble's pool."""
        if self._renewed:
            raise DataError(
                "the processes that decode end as soon as they are started: a script that is run directly needs "
                "if __name__ == '__main__': around what it does; or decode in threads, workers=0"
            )
        self._end.detach()
        self._pool.stop()
        self._pool.join()
        self._start_pool()
        self._renewed = True


def _free_shared_memory() -> int:
    """Bytes that a run may take of /dev/shm, of which containers often have little."""
    return shutil.disk_usage("/dev/shm").free // 2 if os.path.isdir("/dev/shm") else 1 << 30


def _shared_memory(size: int) -> SharedMemory:
    """Shared memory that is there: writing past what there is would be fatal, and without an error to catch.

    Raises:
        OSError: if there is too little.
    """
    if not size:
        raise OSError("/dev/shm is full")
    memory = SharedMemory(create=True, size=size)
    place = Path("/dev/shm", memory.name)
    try:
        if place.exists():
            with place.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        memory.close()
        memory.unlink()
        raise
    return memory


def _end(pool: Any, memory: str, process: int) -> None:
    """Let go of worker processes and shared memory, in the process that made them."""
    if process == os.getpid():
        pool.stop()
        pool.join()
        SharedMemory(memory).unlink()
