"""Frames out of video files, scaled and cropped to one size, through decord."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """A set of videos that cannot be opened or used as asked; the message says what would be right."""


class UnreadableVideo(DataError):
    """A file that does not decode into the frames asked for. ``reason`` is one line."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class VideoInfo(NamedTuple):
    """Length in frames, and height and width in pixels as displayed (after any rotation flag)."""

    num_frames: int
    height: int
    width: int


def num_cores() -> int:
    """Cores this process may use: what decoding and rendering are spread over."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _decord() -> ModuleType:
    import decord  # slow to load, and not needed to look at a folder

    decord.logging.set_level(decord.logging.QUIET)
    return decord


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into UnreadableVideo: decord's failures have no common base class."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableVideo(path, "the file is empty")
        yield
    except UnreadableVideo:
        raise
    except FileNotFoundError:
        raise UnreadableVideo(path, "no such file") from None
    except Exception as error:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        line = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)  # decord's clock and C++ source line
        if line.startswith("Error reading"):
            line = "cannot be opened as a video (another kind of file, or cut off before its index)"
        elif "cannot find video stream" in line:
            line = "has no video stream"
        raise UnreadableVideo(path, line) from error


def probe(path: Path) -> VideoInfo:
    """Length and displayed size of a video; decodes its first frame.

    Raises:
        UnreadableVideo: if it has none.
    """
    with _decoding(path):
        decord = _decord()
        video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        height, width, _ = video[0].shape
        return VideoInfo(len(video), height, width)


def cover(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """How a picture is made to cover ``size`` (H, W): scaled with its aspect kept, then cropped at the centre.

    Returns:
        (scaled height, scaled width, top, left) in pixels of the scaled picture.
    """
    scale = max(size[0] / height, size[1] / width)
    rows, columns = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return rows, columns, (rows - size[0]) // 2, (columns - size[1]) // 2


def read_frames(
    path: Path, size: tuple[int, int], indices: np.ndarray | None = None, info: VideoInfo | None = None
) -> np.ndarray:
    """Decode frames [n] of a video (all of them if ``indices`` is None) into RGB, uint8 [n, H, W, 3].

    ``info`` saves a second opening of the file if the caller has probed it. Safe to call from several threads:
    decord lets go of the interpreter while it decodes.

    Raises:
        UnreadableVideo: if the file cannot be decoded, or yields fewer frames than asked for.
    """
    num_frames, height, width = info or probe(path)
    rows, columns, top, left = cover(height, width, size)
    wanted = np.arange(num_frames) if indices is None else indices
    with _decoding(path):
        decord = _decord()
        video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, width=columns, height=rows)
        try:
            frames = video.get_batch(wanted).asnumpy()
        except decord.DECORDError as error:
            if "from_size == to_size" not in str(error):
                raise
            # dmlc/decord#336: rows padded to a whole number of pixels (48 wide, say) pass for rows of more channels
            padded = np.stack([video[int(i)].asnumpy() for i in wanted]).reshape(len(wanted), rows, -1)
            frames = padded[:, :, : 3 * columns].reshape(len(wanted), rows, columns, 3)
        if frames.shape != (len(wanted), rows, columns, 3):
            raise UnreadableVideo(path, f"{len(wanted)} frames asked for, {len(frames)} came")
    return frames[:, top : top + size[0], left : left + size[1]]
