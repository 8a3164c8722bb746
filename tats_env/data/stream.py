"""Clips decoded by worker processes into shared memory, or by threads."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tats_env.data.reader import DataError, UnreadableVideo, VideoInfo, num_cores, read_frames
from tats_env.data.workers import (
    ENDED,
    LOST_AFTER,
    Processes,
    num_workers,
    seconds_for,
    verdict,
)

if TYPE_CHECKING:
    from tats_env.data.cache import FrameCache

SLOTS_PER_WORKER = 2
"""Clips on their way at a time: one that is decoded, one that follows at once."""
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
_slots: np.ndarray | None = None
_memory: SharedMemory | None = None


def _begin_worker(reader: ClipReader, memory: str, shape: tuple[int, ...]) -> None:
    global _reader, _slots, _memory
    _slots = None
    if _memory is not None:  # of another stream
        _memory.close()
    _memory = SharedMemory(memory)
    _reader, _slots = reader, np.ndarray(shape, np.uint8, _memory.buf)


def _work(slot: int, path: Path, info: VideoInfo, frames: Sequence[int], position: float) -> None:
    assert _slots is not None
    _slots[slot, : len(frames)] = _reader(path, info, frames, position)


Clips = np.ndarray | Sequence[np.ndarray]
"""Where clips go: uint8 [B, T, H, W, 3], or B of [T, H, W, 3] with a T of their own."""


class Batch:
    """Clips of one batch on their way into ``clips``; made by ``ClipStream.begin``.

    Attributes:
        failed: why not, by video, for those that cannot be decoded.
    """

    def __init__(self, requests: Sequence[ClipRequest], clips: Clips) -> None:
        self.clips = clips
        self.rows: dict[ClipRequest, list[int]] = {}
        for i, request in enumerate(requests):
            self.rows.setdefault(request, []).append(i)
        self.waiting, self.running = deque(self.rows), 0
        self.failed: dict[int, UnreadableVideo] = {}
        self.defect: Exception | None = None
        self.dropped = False
        self._tried: set[ClipRequest] = set()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.dropped or self.defect is not None or not (self.waiting or self.running)

    def fail(self, video: int, error: UnreadableVideo) -> None:
        """Take down why a video cannot be decoded, and ask for no more of it."""
        self.failed[video] = error
        self.waiting = deque(request for request in self.waiting if request.video != video)

    def tries_again(self, request: ClipRequest) -> bool:
        """Whether it may have been the machine's fault: so once for each clip."""
        first = request not in self._tried
        self._tried.add(request)
        return first


class ClipStream:
    """A pool that decodes clips, each into a slot of one block of memory.

    With processes, a decoder that crashes or hangs costs one clip: its process is started anew, the clip is tried once
    more, and then its video is reported as unreadable. Nothing depends on how many workers there are or on who
    decodes what. Workers go on to the next batch while the last clips of one are decoded. To be used from one thread;
    another may ``begin`` and ``drop`` batches.

    Args:
        paths, infos: the videos.
        reader: how to decode.
        clip_shape: (T, H, W) of its clips; some may have fewer frames.
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
        self.workers = num_workers(workers)
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
                self._forget = weakref.finalize(self, _forget, self._memory.name, os.getpid())
            except OSError as error:
                _log.warning("no shared memory for decoded clips (%s; docker run has --shm-size): using threads", error)
                self.workers = 0
        if not self.workers:
            self._slots = np.empty((SLOTS_PER_WORKER * num_cores(), *self.clip_shape), np.uint8)
        self._batches = deque[Batch]()  # in the order in which workers turn to them
        self._news = SimpleQueue[Future[None] | None]()  # a clip that is over; None for a batch that came or went
        self._start_pool()
        self._process = os.getpid()

    def _start_pool(self) -> None:
        """Start the workers, with every slot free."""
        self._pool: Any
        if self.workers:
            self._pool = Processes(self.workers, _begin_worker, self.reader, self._memory.name, self._slots.shape)
        else:
            self._pool = ThreadPoolExecutor(num_cores(), "tats-decode")
        self._free = list(range(len(self._slots)))
        self._running: dict[Future[None], tuple[Batch, ClipRequest, int]] = {}
        self._renewed = False

    def close(self) -> None:
        """Let go of processes, which have nothing to do, and memory; the next batch takes others."""
        if self._process == os.getpid() and self.workers:
            self._pool.stand_by()
            self._forget()
            del self._slots  # which lie in the memory
            self._memory.close()
            self._process = 0

    def begin(self, requests: Sequence[ClipRequest], clips: Clips) -> Batch:
        """Put a batch in line, to be written into ``clips``; equal requests are decoded once."""
        self._start()
        batch = Batch(requests, clips)
        self._batches.append(batch)
        self._news.put(None)
        return batch

    def finish(self, batch: Batch) -> dict[int, UnreadableVideo]:
        """Wait for a batch, while those after it are begun.

        Returns:
            why not, by video, for those that cannot be decoded.
        """
        try:
            while not batch.done:
                self._hand_out()
                self._take_in()
        finally:  # interrupted, it may be
            batch.dropped = True
        if batch.defect is not None:
            raise batch.defect
        return batch.failed

    def take(self, requests: Sequence[ClipRequest], clips: Clips) -> dict[int, UnreadableVideo]:
        """``begin`` and ``finish`` in one."""
        return self.finish(self.begin(requests, clips))

    def drop(self, batch: Batch) -> None:
        """Decode no more of a batch that nobody wants."""
        batch.dropped = True
        self._news.put(None)

    def _hand_out(self) -> None:
        """Give clips to the workers, as many as there are free slots."""
        while self._free and self._batches:
            batch = self._batches[0]
            if batch.done or not batch.waiting:
                self._batches.popleft()
                continue
            request = batch.waiting[0]
            try:
                future = self._submit(request, self._free[-1])
            except BrokenProcessPool:
                self._renew_pool()
                continue
            self._running[future] = batch, batch.waiting.popleft(), self._free.pop()
            batch.running += 1
            future.add_done_callback(self._news.put)

    def _submit(self, request: ClipRequest, slot: int) -> Future[None]:
        path, info, frames = self.paths[request.video], self.infos[request.video], request.frames
        order = path, info, frames, request.position
        if not self.workers:
            return self._pool.submit(lambda: self._slots[slot].__setitem__(slice(len(frames)), self.reader(*order)))
        seconds = seconds_for(info.num_frames if self.reader.cache is not None else len(frames))
        future: Future[None] = self._pool.schedule(_work, (slot, *order), seconds)
        return future

    def _take_in(self) -> None:
        """Wait for a clip that is over, however it ended, and free its slot."""
        from pebble import ProcessExpired

        try:
            future = self._news.get(timeout=LOST_AFTER)
        except Empty:
            if self.workers and not self._pool.active:
                self._renew_pool()
            return
        if future is None or future not in self._running:
            return
        batch, request, slot = self._running[future]
        try:
            future.result()
            if not batch.done:
                for row in batch.rows[request]:
                    batch.clips[row][:] = self._slots[slot, : len(request.frames)]
        except BrokenProcessPool:
            return self._renew_pool()
        except UnreadableVideo as error:
            batch.fail(request.video, error)
        except (TimeoutError, ProcessExpired) as error:
            if batch.tries_again(request):
                self._wait_again(batch, request)
            else:
                batch.fail(request.video, verdict(self.paths[request.video], error))
        except Exception as error:
            batch.defect = error
        del self._running[future]
        self._free.append(slot)
        batch.running -= 1
        self._renewed = False

    def _wait_again(self, batch: Batch, request: ClipRequest) -> None:
        """Put a clip back, before all that wait."""
        batch.waiting.appendleft(request)
        self._batches.appendleft(batch)

    def _renew_pool(self) -> None:
        """Start anew after all workers were killed while they had nothing to do, which ends pebble's pool."""
        if self._renewed:
            raise DataError(ENDED)
        self._pool.end()
        for batch, request, _ in reversed(self._running.values()):
            batch.running -= 1
            self._wait_again(batch, request)
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
    memory = SharedMemory(f"tats-{os.getpid()}-{secrets.token_hex(4)}", create=True, size=size)
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


def _forget(memory: str, process: int) -> None:
    """Let go of shared memory, in the process that made it."""
    if process == os.getpid():
        SharedMemory(memory).unlink()
