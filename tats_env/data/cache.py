"""Decoded videos on disk, scaled to the size they are wanted in: for sets that are read many times.

A video is one npy file of uint8 [L, rows, columns, 3], not cropped, named by a hash of all that its bytes depend on. It
is written under another name and renamed when whole, so that a kill leaves whole files only. When the cache is full,
videos make room that have not been used for ``IDLE`` seconds, those unused for longest first, and others stay: a set
that is read epoch by epoch and does not fit would else throw out each video before its next turn.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from tats_env.data.reader import NpyReader, UnreadableVideo, VideoInfo, cover, read_scaled, shard_of

CHUNK = 64 << 20  # bytes decoded at a time while a whole video is stored
LEFT_OVER = 3600  # seconds after which a file not renamed has been left by a writer that is no more
LOCK_TIMEOUT = 5  # seconds to wait for another process that makes room; then a video is not stored
IDLE = 6 * 3600  # seconds after which a video may make room for others
PAUSE = 60  # seconds for which nothing is stored once the cache was found full, or its lock taken
TOUCH = 60  # seconds for which a video counts as just used: it is not marked at every clip
KEPT = 0.9  # share of the limit that making room leaves in use, so that the folder is not searched at every write

_log = logging.getLogger("tats_env.data")


class FrameCache:
    """Whole videos, decoded and scaled, in ``folder``; at most ``limit_bytes`` of them (and what is being written).

    Safe for several processes at once, one of which may read a file while another removes it. May be pickled. With
    ``limit_bytes=0`` it is read-only: what is there is used, and nothing is written, removed or marked as used. A
    folder that cannot be written (a full disk, a read-only file system) is one warning, and reads go on.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._writes = limit_bytes > 0
        self._swept = False  # whether what killed writers left has been looked for
        self._pause_until = 0.0
        self._passed_over: set[Path] = set()  # files that this process has found damaged or cannot write

    def frames(
        self, path: Path, info: VideoInfo, size: tuple[int, int], position: float, decoder: str, indices: np.ndarray
    ) -> np.ndarray:
        """What ``read_frames`` gives for frames [n]: uint8 [n, H, W, 3], the same bytes.

        On first use the whole video is decoded and stored. Not so frames that lie decoded in a tar file, nor a video
        of more than half the limit, nor one of which only a part can be decoded.

        Raises:
            UnreadableVideo: if the file cannot be decoded, or yields fewer frames than asked for.
        """
        rows, columns, top, left = cover(info.height, info.width, size, position)
        shape = (info.num_frames, rows, columns, 3)
        read = partial(read_scaled, path, (rows, columns), decoder=decoder)
        found = None
        if not (path.suffix == ".npy" and shard_of(path)) and (file := self._file(path, (rows, columns), decoder)):
            found = self._load(file, shape, indices)
            room = 2 * math.prod(shape) <= self.limit_bytes and time.time() >= self._pause_until
            if found is None and self._writes and room and file not in self._passed_over:
                found = self._store(file, shape, indices, read)
        frames = read(indices) if found is None else found
        return frames[:, top : top + size[0], left : left + size[1]]

    def _file(self, path: Path, size: tuple[int, int], decoder: str) -> Path | None:
        """Where the video is kept; None if it is not there to be asked for its size and date."""
        try:
            real = path.resolve()
            status = (shard_of(real) or real).stat()
        except OSError:
            return None
        key = f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0{size[0]}x{size[1]}\0{decoder}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:40]
        return self.folder / name[:2] / f"{name[2:]}.npy"  # 256 folders: none grows long

    def _load(self, file: Path, shape: tuple[int, ...], indices: np.ndarray) -> np.ndarray | None:
        """The frames, if the video is there and whole."""
        try:
            video = NpyReader(file)
            if video.shape != shape:
                raise ValueError(f"{list(video.shape)} found, {list(shape)} expected")
            frames = video.frames(indices)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            if file not in self._passed_over:
                _log.warning("%s: cannot be used (%s): the video is decoded instead", file, error)
            if self._writes:
                with suppress(OSError):
                    file.unlink()
            else:
                self._passed_over.add(file)
            return None
        if self._writes:
            with suppress(OSError):  # gone by now, or another's: used all the same
                if time.time() - file.stat().st_mtime > TOUCH:
                    os.utime(file)
        return frames

    def _store(
        self, file: Path, shape: tuple[int, ...], indices: np.ndarray, read: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray | None:
        """Decode the whole video into ``file`` and take the frames from it; None if that cannot be done."""
        step = max(1, CHUNK // math.prod(shape[1:]))
        try:
            with self._unfinished() as temporary:
                with temporary.open("xb") as stream:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                    for start in range(0, shape[0], step):
                        stream.write(read(np.arange(start, min(start + step, shape[0]))).tobytes())
                    stream.flush()
                    os.fsync(stream.fileno())  # or a power cut may leave a whole file of zeros
                frames = NpyReader(temporary).frames(indices)
                self._keep(temporary, file)
            return frames
        except UnreadableVideo:
            self._passed_over.add(file)  # the frames asked for may be among those that can be decoded
        except (OSError, NotImplementedError) as error:  # the second from filelock: a file system without locks
            self._writes = False
            _log.warning(
                "the cache in %s cannot be written (%s): videos are decoded anew each time", self.folder, error
            )
        return None

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """The name of a new file, with its writer's in it; gone afterwards unless it was renamed."""
        folder = self.folder / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            self._swept = True
            _remove_left_over(folder)
        path = folder / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink()

    def _keep(self, temporary: Path, file: Path) -> None:
        """Rename a whole file into place, after making room for it.

        How much there is stands in a file of its own, which is written first: a kill between the two leaves it too
        high, never too low, and a search of the folder, when the limit seems reached, puts it right.
        """
        from filelock import FileLock, Timeout

        counter, new = self.folder / "bytes", temporary.stat().st_size
        try:
            lock = FileLock(self.folder / ".lock", timeout=LOCK_TIMEOUT).acquire()
        except Timeout:
            self._pause_until = time.time() + PAUSE
            return
        with lock:
            if file.exists():  # another process was faster
                return
            try:
                total = int(counter.read_text())
            except (FileNotFoundError, ValueError):
                total = self._make_room(self.limit_bytes - new)
            if total + new > self.limit_bytes:
                total = self._make_room(int(KEPT * self.limit_bytes) - new)
            if total + new <= self.limit_bytes:
                _replace_text(counter, str(total + new))
                file.parent.mkdir(exist_ok=True)
                temporary.rename(file)
            else:
                self._pause_until = time.time() + PAUSE

    def _make_room(self, target: int) -> int:
        """Remove idle videos, unused for longest first, until ``target`` bytes are left; returns how many are left."""
        found, idle = [], time.time_ns() - IDLE * 10**9
        for folder in os.scandir(self.folder):
            if len(folder.name) == 2:
                for entry in os.scandir(folder.path):
                    with suppress(FileNotFoundError):  # damaged, and removed by another process
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total <= target or used > idle:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def _remove_left_over(folder: Path) -> None:
    """Remove what writers left that were killed: those of this machine that are no more, and all from long ago."""
    from psutil import pid_exists

    for entry in os.scandir(folder):
        host, _, pid = entry.name.rpartition(".")[0].rpartition(".")
        dead = host == socket.gethostname() and pid.isdecimal() and not pid_exists(int(pid))
        with suppress(FileNotFoundError):
            if dead or time.time() - entry.stat().st_mtime > LEFT_OVER:
                os.unlink(entry.path)
