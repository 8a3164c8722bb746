"""Length and size of videos, remembered: a large set is opened once, not at every start.

An index is a file ``index/<hash>.json`` in the cache folder, one for the folder that all the videos asked for lie in
and for the decoder. An entry stands for a file of a certain size and time of change; a changed file is opened anew.
What is unreadable, or makes the decoder crash, is remembered with the reason, unless the reason may pass (a file that
is not there or may not be read, a decoder that takes too long or is killed). Several processes may use an index at
once: each adds what it found, under a lock, and moves a whole new file into place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tats_env.data.reader import UnreadableVideo, VideoInfo, probe, shard_of
from tats_env.data.workers import on_all_cores, seconds_for

SAVE_EVERY = 60.0  # seconds; what a start that is killed can lose
LOCK_TIMEOUT = 60.0  # seconds

_VERSION = 1
_MOST = 1 << 31  # frames, or pixels: more is damage
_STATS_AT_ONCE = 16  # more than cores, since a network drive is waited for
_log = logging.getLogger("tats_env.data")
_Stamp = tuple[int, int]  # size in bytes, time of change in ns


def index_file(paths: Sequence[Path], decoder: str = "decord") -> Path:
    """Where the index of these videos is, whether or not it exists."""
    return _index_file(_root([os.path.abspath(path) for path in paths]), decoder)


def probe_all(
    paths: Sequence[Path], decoder: str = "decord", progress: bool = False, workers: int = 0
) -> list[VideoInfo | UnreadableVideo]:
    """Length and size of each video, or why it cannot be read; opens those that the index does not know.

    A cache folder that cannot be written to is a warning.

    Args:
        workers: processes that open them, so that a decoder which crashes or hangs costs one video; 0 means threads.
    """
    if not paths:
        return []
    names = [os.path.abspath(path) for path in paths]
    root = _root(names)
    file = _index_file(root, decoder)
    keys = [name[len(root) :].lstrip(os.sep) for name in names]
    entries, stamps = _load(file), _stamps(names)
    recalled = [_recall(entries.get(key), stamp, path) for key, stamp, path in zip(keys, stamps, paths, strict=True)]
    unknown = [i for i, info in enumerate(recalled) if info is None]

    # Some decoders read the whole file
    orders = [(paths[i], seconds_for(num_bytes=int(stamps[i][0]))) for i in unknown]
    found = on_all_cores(
        partial(_open_video, decoder), orders, "opening videos", progress, workers, lambda order: order
    )

    fresh: dict[str, list[Any]] = {}
    save_at = time.monotonic() + SAVE_EVERY
    opened: dict[int, VideoInfo | UnreadableVideo] = {}
    try:
        for i, info in zip(unknown, found, strict=True):
            opened[i] = info
            if not isinstance(info, UnreadableVideo):
                fresh[keys[i]] = [*stamps[i], *info]
            elif not info.passes:
                fresh[keys[i]] = [*stamps[i], info.reason]
            if time.monotonic() > save_at:
                save_at = time.monotonic() + SAVE_EVERY if _save(file, fresh) else float("inf")
                fresh = {}
    finally:
        if fresh and save_at < float("inf"):
            _save(file, fresh)
    return [opened[i] if info is None else info for i, info in enumerate(recalled)]


def _open_video(decoder: str, order: tuple[Path, float]) -> VideoInfo:
    path, _ = order
    try:
        return probe(path, decoder)
    except UnreadableVideo:  # for a decoder it is all the same what kept it from reading
        try:
            (shard_of(path) or path).open("rb").close()
        except OSError as error:
            raise UnreadableVideo(path, error.strerror or type(error).__name__, passes=True) from error
        raise


def _root(names: Sequence[str]) -> str:
    """The folder that all the absolute paths lie in."""
    return os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])


def _index_file(root: str, decoder: str) -> Path:
    from tats_env.data.rendered import cache_folder

    return cache_folder() / "index" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{decoder}.json"


def _stamps(names: Sequence[str]) -> list[_Stamp | str]:
    """Of each file, or why there is none."""
    chunks = [names[i : i + 1000] for i in range(0, len(names), 1000)]
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return list(chain.from_iterable(pool.map(lambda chunk: list(map(_stamp, chunk)), chunks)))


def _stamp(name: str) -> _Stamp | str:
    try:
        status = os.stat(name)
    except NotADirectoryError:  # inside a tar file, which then stands for it
        return _stamp(os.path.dirname(name))
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or type(error).__name__
    return status.st_size, status.st_mtime_ns


def _recall(entry: Any, stamp: _Stamp | str, path: Path) -> VideoInfo | UnreadableVideo | None:
    """What an index's entry says of a file as it is now; None if the file has to be opened."""
    if isinstance(stamp, str):
        return UnreadableVideo(path, stamp)
    match entry:
        case [size, changed, str(reason)] if (size, changed) == stamp:
            return UnreadableVideo(path, reason)
        case [size, changed, int(num_frames), int(height), int(width), int(fps) | float(fps)] if (
            (
                size,
                changed,
            )
            == stamp
            and min(num_frames, height, width) > 0
            and max(num_frames, height, width) < _MOST
        ):
            return VideoInfo(num_frames, height, width, fps)
    return None


def _load(file: Path) -> dict[str, Any]:
    """The entries of an index by path within its root; none if there is no index that can be used."""
    try:
        stored = json.loads(file.read_bytes())
        if stored["version"] == _VERSION:
            return dict(stored["files"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        _log.warning("the index of videos %s cannot be read (%s); the videos are opened", file, error.strerror)
    except (ValueError, TypeError, KeyError, RecursionError):
        _log.warning("the index of videos %s is damaged; it is built anew", file)
    return {}


def _save(file: Path, fresh: dict[str, list[Any]]) -> bool:
    """Add entries to the index; False, with a warning, if it cannot be written."""
    from filelock import FileLock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCK_TIMEOUT):
            whole = {"version": _VERSION, "files": _load(file) | fresh}
            # One name for all, since only the lock's holder writes: what a kill leaves is overwritten
            beside = file.with_name(f".{file.name}.part")
            beside.write_text(json.dumps(whole, separators=(",", ":")), encoding="ascii")
            os.replace(beside, file)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _log.warning("the index of videos %s cannot be written (%s); the next start opens them again", file, error)
        return False
    return True
