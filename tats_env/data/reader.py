"""Frames out of video files, scaled and cropped to one size, through decord or torchcodec.

Frames are counted as they are coded, in the order in which they are shown: a variable frame rate makes no difference.
They come as a player shows them, turned by the file's rotation flag (but decord 0.6 does not see that of an mkv or webm
file, and a mirroring flag is passed over), and with their pixels taken as square, whatever the file says. Grey and
10-bit pictures come as RGB of 8 bits.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np


class DataError(ValueError):
    """A set of videos that cannot be opened or used as asked; the message says what would be right."""


class UnreadableVideo(DataError):
    """A file that does not decode into the frames asked for.

    Args:
        reason: one line.
        passes: whether it may well be the machine's fault and not the file's, so that another try makes sense.
    """

    def __init__(self, path: Path, reason: str, passes: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.passes = path, reason, passes

    def __reduce__(self) -> tuple[type[UnreadableVideo], tuple[Path, str, bool]]:
        return type(self), (self.path, self.reason, self.passes)  # it travels home from worker processes


class VideoInfo(NamedTuple):
    """What is known of a video before its frames are wanted."""

    num_frames: int
    height: int
    """In pixels, as displayed (after any rotation flag); so is the width."""
    width: int
    fps: float = 0.0
    """Frames a second on average, as the file says; 0.0 where it does not."""


class VideoReader(Protocol):
    """An open video. A decoder is a class that makes one of these from a path or a whole file's bytes."""

    def info(self) -> VideoInfo:
        """Of the video as ``frames`` gives it; may decode a frame to find out."""

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Frames [n] as RGB, uint8 [n, rows, columns, 3]."""


def num_cores() -> int:
    """Cores this process may use: what decoding and rendering are spread over."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _decord() -> ModuleType:
    import decord  # slow to load, and not needed to look at a folder

    decord.logging.set_level(decord.logging.QUIET)
    return decord


FAULTS = 1e-6
"""Share of the frames that decord may replace by copies of others, where it cannot decode them, before it fails."""


class DecordReader(VideoReader):
    """A video through decord, scaled to ``size`` (rows, columns) if given. It lets go of the interpreter meanwhile."""

    def __init__(self, source: Path | bytes, size: tuple[int, int] | None = None) -> None:
        decord = _decord()
        rows, columns = size or (-1, -1)
        self._size = size
        self._video = decord.VideoReader(
            BytesIO(source) if isinstance(source, bytes) else str(source),
            ctx=decord.cpu(0), num_threads=1, width=columns, height=rows,
            fault_tol=FAULTS,
        )  # fmt: skip

    def info(self) -> VideoInfo:
        height, width, _ = self._video[0].shape
        fps = self._video.get_avg_fps()
        return VideoInfo(len(self._video), height, width, fps if math.isfinite(fps) else 0.0)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        try:
            return self._video.get_batch(indices).asnumpy()
        except _decord().DECORDError as error:
            if "from_size == to_size" not in str(error):
                raise
            # dmlc/decord#336: rows padded to a whole number of pixels (48 wide, say) pass for rows of more channels
            rows, columns = self._size or self.info()[1:3]
            padded = np.stack([self._video[int(i)].asnumpy() for i in indices]).reshape(len(indices), rows, -1)
            return padded[:, :, : 3 * columns].reshape(len(indices), rows, columns, 3)


@functools.cache
def _torchcodec() -> ModuleType:
    try:
        import torchcodec.decoders
        import torchcodec.transforms
    except Exception as error:  # beside ImportError, RuntimeError and OSError for a library that does not load
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"decoder 'torchcodec' cannot be loaded ({reason}): it takes pip install 'tats-env[torchcodec]', in the "
            "version that fits torch's, and the system's FFmpeg libraries (apt-get install ffmpeg)"
        ) from error
    return torchcodec


class TorchcodecReader(VideoReader):
    """A video through torchcodec (0.10 or later) on the CPU, scaled to ``size`` (rows, columns) if given.

    Of an avi file with B-frames, torchcodec 0.17 misses the last frame: the whole of it is unreadable.
    """

    def __init__(self, source: Path | bytes, size: tuple[int, int] | None = None) -> None:
        torchcodec = _torchcodec()
        self._video = torchcodec.decoders.VideoDecoder(
            source, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", seek_mode="exact",
            transforms=[torchcodec.transforms.Resize(size)] if size else None,
        )  # fmt: skip

    def info(self) -> VideoInfo:
        height, width, _ = self._video[0].shape
        return VideoInfo(len(self._video), height, width, float(self._video.metadata.average_fps or 0.0))

    def frames(self, indices: np.ndarray) -> np.ndarray:
        return self._video.get_frames_at(indices.tolist()).data.numpy()


class NpyReader(VideoReader):
    """Decoded frames [L, h, w, 3] in npy format, read in place, scaled to ``size`` (rows, columns) if given.

    They are ``length`` bytes from ``offset`` of the file; to its end if None. Only the frames asked for are read: read
    and not mapped, since a disk that fails is an OSError then, where a mapping would end the process.

    Raises:
        ValueError: if they are something else, or the file ends before they do.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int] | None = None,
        *,
        offset: int = 0,
        length: int | None = None,
        fps: float = 0.0,
    ) -> None:
        self._path, self._size, self._fps = path, size, fps
        with path.open("rb") as stream:
            stream.seek(offset)
            self.shape, dtype = self._header(stream)
            self._start = stream.tell()
            end = os.fstat(stream.fileno()).st_size
            if length is not None:
                end = min(end, offset + length)
        if len(self.shape) != 4 or self.shape[3] != 3 or dtype != np.uint8 or 0 in self.shape:
            raise ValueError(f"frames are uint8 [L, height, width, 3]; here is {dtype} {list(self.shape)}")
        if end < self._start + math.prod(self.shape):
            raise ValueError("the frames end before the last one")

    @staticmethod
    def _header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, columns_first, dtype = read(stream)
        except Exception as error:  # of many kinds, for numpy reads it as Python
            raise ValueError(f"not a header of npy format: {error}") from error
        if columns_first:
            raise ValueError("frames are stored in C order; these are in Fortran's")
        return shape, dtype

    def info(self) -> VideoInfo:
        height, width = self._size or self.shape[1:3]
        return VideoInfo(self.shape[0], height, width, self._fps)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.shape[0]:
            raise IndexError(f"frames {indices.min()} to {indices.max()} of {self.shape[0]}")
        frames = np.empty((len(indices), *self.shape[1:]), np.uint8)
        with self._path.open("rb", buffering=0) as stream:
            for frame, i in zip(frames, indices.tolist(), strict=True):
                stream.seek(self._start + i * frame.nbytes)
                at, view = 0, memoryview(frame).cast("B")
                while at < frame.nbytes:
                    if not (read := stream.readinto(view[at:])):
                        raise ValueError("the frames end before the last one")
                    at += read
        if self._size is None or self._size == self.shape[1:3]:
            return frames
        from PIL import Image

        rows, columns = self._size
        scaled = (Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR) for frame in frames)
        return np.stack([np.asarray(frame) for frame in scaled])


DECODERS: dict[str, Callable[..., VideoReader]] = {"decord": DecordReader, "torchcodec": TorchcodecReader}
"""By the name that users give: (path or bytes, size=(rows, columns) or None) -> VideoReader."""


def shard_of(path: Path) -> Path | None:
    """The tar file that a video lies in; None for a file of its own."""
    return next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), None)


def _open(path: Path, decoder: str, size: tuple[int, int] | None = None) -> VideoReader:
    if decoder not in DECODERS:
        raise DataError(f"decoder {decoder!r} is unknown; give one of {', '.join(DECODERS)}")
    if shard := shard_of(path):
        from tats_env.data.shards import open_member

        return open_member(shard, path.relative_to(shard).as_posix(), decoder, size)
    if path.stat().st_size == 0:
        raise UnreadableVideo(path, "the file is empty")
    return DECODERS[decoder](path, size)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into UnreadableVideo: the decoders' failures have no common base class."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise UnreadableVideo(path, "no such file") from None
    except Exception as error:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        line = re.sub(r"^((\[[\d:]+\]|\w+,) \S+:\d+[:,] )+", "", line)  # where in decord's or torchcodec's C++ source
        if line.startswith(("Error reading", "Could not open input file")):
            line = "cannot be opened as a video (another kind of file, or cut off before its index)"
        elif "cannot find video stream" in line or "best video stream is unknown" in line:
            line = "has no video stream"
        elif "recovered from nearest frames" in line:
            line = "has frames that cannot be decoded"
        raise UnreadableVideo(path, line, passes=isinstance(error, (OSError, MemoryError))) from error


def probe(path: Path, decoder: str = "decord") -> VideoInfo:
    """Length, displayed size and frame rate of a video; decodes its first frame.

    Raises:
        UnreadableVideo: if it has none.
    """
    with _decoding(path):
        return _open(path, decoder).info()


def cover(height: int, width: int, size: tuple[int, int], position: float = 0.5) -> tuple[int, int, int, int]:
    """How a picture is made to cover ``size`` (H, W): scaled with its aspect kept, then cropped.

    ``position`` says where along the side that is too long: from 0 (left or top) by 0.5 (centre) to 1.

    Returns:
        (scaled height, scaled width, top, left) in pixels of the scaled picture.
    """
    if not 0 <= position <= 1:
        raise DataError(f"position={position}: must be from 0 to 1")
    scale = max(size[0] / height, size[1] / width)
    rows, columns = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return rows, columns, int((rows - size[0]) * position), int((columns - size[1]) * position)


def read_frames(
    path: Path,
    size: tuple[int, int],
    indices: np.ndarray | None = None,
    info: VideoInfo | None = None,
    *,
    position: float = 0.5,
    decoder: str = "decord",
) -> np.ndarray:
    """Decode frames [n] of a video (all of them if ``indices`` is None) into RGB, uint8 [n, H, W, 3].

    ``info`` saves a second opening of the file if the caller has probed it; ``position`` is ``cover``'s. Safe to call
    from several threads. A ``path`` through a tar file (``x/shard-000000.tar/000123.npy``) is read out of it.

    Raises:
        UnreadableVideo: if the file cannot be decoded, or yields fewer frames than asked for.
        DataError: for a decoder that is unknown or not installed.
    """
    info = info or probe(path, decoder)
    rows, columns, top, left = cover(info.height, info.width, size, position)
    frames = read_scaled(path, (rows, columns), np.arange(info.num_frames) if indices is None else indices, decoder)
    return frames[:, top : top + size[0], left : left + size[1]]


def read_scaled(path: Path, size: tuple[int, int], indices: np.ndarray, decoder: str = "decord") -> np.ndarray:
    """Decode frames [n] of a video, scaled to (rows, columns) whatever its aspect: uint8 [n, rows, columns, 3].

    Errors as for ``read_frames``.
    """
    with _decoding(path):
        frames = _open(path, decoder, size).frames(indices)
        if frames.shape != (len(indices), *size, 3):
            raise UnreadableVideo(path, f"{len(indices)} frames asked for, {len(frames)} came")
    return frames
