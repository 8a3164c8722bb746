"""Work on videos on all cores, in threads or, since a native decoder may crash or hang, in processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tats_env.data.reader import DECODERS, DataError, UnreadableVideo, num_cores

SECONDS = 60.0
"""A worker process that takes longer for a piece of work is ended; long videos are given more."""
FRAMES_A_SECOND, BYTES_A_SECOND = 10.0, 10e6
"""Of a slow machine and a slow disk: how much more."""
STAND_BY = 2.0
"""Seconds after which processes end that nobody wants any more."""
LOST_AFTER = 1.0
"""Seconds without news after which a pool is asked whether it is still there: it ends when all its processes were
killed while they had nothing to do."""
ENDED = "the processes that decode end as soon as they are started; decode in threads, workers=0"
_IN_LINE = 4
"""Pieces of work a process that are given out at a time."""
_FAULTS = tuple(-getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL") if hasattr(signal, name))
"""Exit codes of a process that made a mistake, rather than was ended by others, or by a disk that failed."""
_T = TypeVar("_T")
_R = TypeVar("_R")


def seconds_for(num_frames: int = 0, num_bytes: int = 0) -> float:
    """How long a process may take to decode so many frames, or to read so much."""
    return SECONDS + num_frames / FRAMES_A_SECOND + num_bytes / BYTES_A_SECOND


def num_workers(wanted: int) -> int:
    """How many processes to start: none in a daemonic one, which may start none."""
    return 0 if multiprocessing.current_process().daemon else wanted


class Processes:
    """A pool of processes, for one user at a time, that know our ``DECODERS`` and call ``begin(*args)`` first.

    They do not import the main module anew, so that a script needs no ``if __name__ == "__main__":``. Those of a user
    who has done with them stand by for the next, since it takes some time to start others.
    """

    _spare: ClassVar[Processes | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, workers: int, begin: Callable[..., None], *args: Any) -> None:
        import cloudpickle
        from loky.backend import get_context
        from pebble import ProcessPool

        self._pool: Any
        self._setup = uuid.uuid4().hex, cloudpickle.dumps((dict(DECODERS), begin, args))
        self._kind = workers, os.getpid(), os.getcwd()
        with self._lock:
            spare, Processes._spare = Processes._spare, None
        if spare is not None and spare._kind == self._kind and spare.active:
            spare._end.detach()
            self._pool = spare._pool
        else:
            self._pool = ProcessPool(workers, context=get_context("loky"))
        self._end: Any = weakref.finalize(self, _end, self._pool, os.getpid())

    @property
    def active(self) -> bool:
        """Whether they are still there."""
        return bool(self._pool.active)

    def schedule(self, function: Callable[..., _R], args: Sequence[Any], seconds: float) -> Future[_R]:
        """Have one of them call ``function(*args)``; one that takes longer is ended.

        Raises:
            BrokenProcessPool: if all of them are gone; so may the future.
        """
        try:
            future: Future[_R] = self._pool.schedule(_run, args=(*self._setup, function, args), timeout=seconds)
        except RuntimeError as error:
            raise BrokenProcessPool from error
        return future

    def end(self) -> None:
        """End them at once, whatever they do."""
        self._end()

    def stand_by(self) -> None:
        """Leave them, who have nothing to do, to the next user, or to their end after a while."""
        with self._lock:
            Processes._spare = self
        timer = threading.Timer(STAND_BY, self._expire)
        timer.daemon = True
        timer.start()

    def _expire(self) -> None:
        with self._lock:
            if Processes._spare is not self:
                return
            Processes._spare = None
        self.end()


def _end(pool: Any, process: int) -> None:
    if process == os.getpid():
        pool.stop()
        pool.join()


_user = ""  # in a worker process


def _run(user: str, setup: bytes, function: Callable[..., _R], args: Sequence[Any]) -> _R:
    global _user
    if user != _user:
        decoders, begin, arguments = pickle.loads(setup)  # of our own
        DECODERS.update(decoders)
        begin(*arguments)
        _user = user
    return function(*args)


def verdict(path: Path, error: Exception) -> UnreadableVideo:
    """What is said of a video whose decoding ended its process, or took too long, twice."""
    if isinstance(error, TimeoutError):  # a busy machine, or a disk far away, may be to blame
        return UnreadableVideo(path, "decoding it takes too long", passes=True)
    code = getattr(error, "exitcode", None)
    return UnreadableVideo(path, f"decoding it ends the process (exit code {code})", passes=code not in _FAULTS)


def on_all_cores(
    work: Callable[[_T], _R],
    items: Sequence[_T],
    say: str,
    progress: bool,
    workers: int = 0,
    about: Callable[[_T], tuple[Path, float]] | None = None,
) -> Iterator[_R | UnreadableVideo]:
    """``work`` on every item, in order; a video that cannot be read yields its error.

    With processes, so does one at which they crash or hang twice. What goes to and fro is pickled: keep it small.

    Args:
        say: beside the progress bar, if ``progress``.
        workers: processes; 0 means threads.
        about: of an item, the video and the seconds that the work may take; goes with ``workers``.
    """
    from rich.progress import track

    if about is not None and (workers := min(num_workers(workers), len(items))):
        results = _in_processes(work, items, workers, about)
    else:
        results = _in_threads(work, items)
    # Not track(disable=True), with which rich 14 prints an empty line
    yield from track(results, say, total=len(items)) if progress and items else results


def _in_threads(work: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R | UnreadableVideo]:
    def attempt(item: _T) -> _R | UnreadableVideo:
        try:
            return work(item)
        except UnreadableVideo as error:
            return error

    pool = ThreadPoolExecutor(num_cores())
    try:
        yield from pool.map(attempt, items)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: do not wait for the rest of the work


_work: Callable[[Any], Any]  # in a worker process


def _begin_work(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _do(item: Any) -> Any:
    return _work(item)


@dataclass
class _Task(Generic[_T]):
    item: _T
    future: Future[Any] = field(default_factory=Future)
    again: bool = False


def _in_processes(
    work: Callable[[_T], _R], items: Sequence[_T], workers: int, about: Callable[[_T], tuple[Path, float]]
) -> Iterator[_R | UnreadableVideo]:
    from pebble import ProcessExpired

    def give_out(task: _Task[_T]) -> None:
        task.future = pool.schedule(_do, (task.item,), about(task.item)[1])

    pool, renewed = Processes(workers, _begin_work, work), False
    line, rest = deque[_Task[_T]](), iter(items)
    try:
        while True:
            result: _R | UnreadableVideo
            try:
                for item in islice(rest, _IN_LINE * workers - len(line)):
                    line.append(_Task(item))
                    give_out(line[-1])
                if not line:
                    return pool.stand_by()
                first = line[0]
                if not wait([first.future], LOST_AFTER).done:
                    if pool.active:
                        continue
                    raise BrokenProcessPool
                result = first.future.result()
            except BrokenProcessPool:
                if renewed:
                    raise DataError(ENDED) from None
                pool.end()
                pool, renewed = Processes(workers, _begin_work, work), True
                for task in line:
                    give_out(task)
                continue
            except UnreadableVideo as error:
                result = error
            except (TimeoutError, ProcessExpired) as error:
                if not first.again:  # it may have been the machine's fault
                    first.again, first.future = True, Future()
                    with suppress(BrokenProcessPool):  # of which more above
                        give_out(first)
                    continue
                result = verdict(about(first.item)[0], error)
            renewed = False
            line.popleft()
            yield result
    except BaseException:
        pool.end()
        raise
