"""A set of videos as clips on a device: all frames in memory where they fit, decoded on demand where they don't."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tats_env.data.reader import DataError, UnreadableVideo, VideoInfo, num_cores, probe, read_frames

MEMORY_LIMIT = 2 << 30  # bytes of decoded frames kept in memory; a set with more is streamed
PREFETCH_LIMIT = 1 << 30  # bytes of clips decoded ahead when streaming

_LISTED = 10  # unreadable files named in one message
_log = logging.getLogger("tats_env.data")
_T = TypeVar("_T")
_R = TypeVar("_R")
_Request = tuple[int, int]  # video, first frame


def _each(work: Callable[[_T], _R], items: Sequence[_T], say: str, progress: bool) -> list[_R | UnreadableVideo]:
    """``work`` on every item on all cores, in order; a video that cannot be read yields its error."""
    from rich.progress import track

    def attempt(item: _T) -> _R | UnreadableVideo:
        try:
            return work(item)
        except UnreadableVideo as error:
            return error

    with ThreadPoolExecutor(num_cores()) as pool:
        results = pool.map(attempt, items)
        # Not track(disable=True), with which rich 14 prints an empty line
        return list(track(results, say, total=len(items)) if progress else results)


def _listed(bad: Iterable[tuple[str, str]]) -> str:
    lines = [f"\n  {path}: {reason}" for path, reason in bad]
    more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "".join(lines[:_LISTED]) + more


class VideoSet:
    """V videos, of which clips of T frames are taken; made by ``open_dataset``.

    A clip is frames ``start + t * stride`` of its video, modulo the video's length: a video shorter than
    ``clip_span`` frames is looped. Frames are scaled to cover H x W and cropped at the centre.

    If all frames fit in ``MEMORY_LIMIT``, each video is decoded once, here, and a clip is an index into one tensor,
    which moves to the GPU once when there is room. Otherwise clips are decoded when asked for, on all cores, and
    ``prefetch`` does it ahead of time.

    A file that cannot be decoded is left out, logged and listed in ``bad_videos``. One that first fails when
    streaming is listed then, and from the next call on the next good video plays in its place (with its label).

    Attributes:
        name: what ``open_dataset`` was given.
        split: ``"train"`` or ``"validation"``.
        paths: the V files.
        labels: class of each video, int64 [V]; -1 where unknown.
        class_names: the name of each class.
        lengths: frames in each video, int64 [V].
        bad_videos: (path, reason) of each file that could not be decoded.
        clip_shape: (T, H, W).
        clip_span: frames of a video from the first to the last of a clip, ``(num_frames - 1) * frame_stride + 1``.
        has_foreground: whether ``foreground`` knows the truth.

    Raises:
        DataError: if more than half of the files cannot be decoded.
    """

    def __init__(
        self,
        name: str,
        split: str,
        paths: Sequence[Path],
        labels: Sequence[int],
        class_names: Sequence[str],
        *,
        num_frames: int,
        frame_stride: int,
        size: tuple[int, int],
        truth: Callable[[Path], np.ndarray] | None = None,
        progress: bool = False,
    ) -> None:
        self.name, self.split, self.class_names = name, split, list(class_names)
        self.size = size
        self.clip_shape = (num_frames, *size)
        self.clip_span = (num_frames - 1) * frame_stride + 1
        self._steps = np.arange(num_frames) * frame_stride
        self._truth = truth
        self.has_foreground = truth is not None

        found = _each(probe, paths, "opening videos", progress)
        lengths = np.array([0 if isinstance(info, UnreadableVideo) else info.num_frames for info in found], np.int64)
        offsets = np.cumsum(lengths) - lengths
        shape = (int(lengths.sum()), *size, 3)
        self._frames: Tensor | None = None
        if np.prod(shape, dtype=np.int64) <= MEMORY_LIMIT:
            self._frames = torch.empty(shape, dtype=torch.uint8)
            rows = self._frames.numpy()

            def decode(v: int) -> VideoInfo:
                info = found[v]
                if isinstance(info, UnreadableVideo):
                    raise info
                rows[offsets[v] : offsets[v] + info.num_frames] = read_frames(paths[v], size, info=info)
                return info

            found = _each(decode, range(len(paths)), "decoding videos", progress)

        good = [v for v, info in enumerate(found) if not isinstance(info, UnreadableVideo)]
        self.bad_videos = [(str(e.path), e.reason) for e in found if isinstance(e, UnreadableVideo)]
        if 2 * len(self.bad_videos) > len(paths):
            raise DataError(
                f"{name} ({split}): {len(self.bad_videos)} of {len(paths)} files cannot be decoded:"
                + _listed(self.bad_videos)
            )
        if self.bad_videos:
            _log.warning(
                "%s (%s): left out %d of %d files that cannot be decoded:%s",
                name, split, len(self.bad_videos), len(paths), _listed(self.bad_videos),
            )  # fmt: skip
        self.paths = [paths[v] for v in good]
        self.labels = np.array([labels[v] for v in good], np.int64)
        self.lengths, self._offsets, self._num_rows = lengths[good], offsets[good], shape[0]
        self._infos = [info for info in found if not isinstance(info, UnreadableVideo)]
        self._plays = np.arange(len(good))  # which video plays for each: itself, unless it failed when streaming
        self._stream = _ClipStream(self._read_clip, PREFETCH_LIMIT // (num_frames * size[0] * size[1] * 3))
        self._resident: dict[torch.device, Tensor] = {}  # the frames to gather from for each device
        self._masks: dict[torch.device, tuple[Tensor, np.ndarray]] = {}  # all masks, and which are known [V]

    def __len__(self) -> int:
        return len(self.paths)

    def __deepcopy__(self, memo: object) -> VideoSet:
        """The set itself: a copy of an environment's specification shares the frames."""
        return self

    def clips(self, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device) -> Tensor:
        """Clips of the given videos [B] from the given frames [B]: uint8 [B, T, H, W, 3] on ``device``.

        Raises:
            DataError: if streaming has left no video that can be decoded.
        """
        if self._frames is not None:
            return self._gather(self._frames_for(self._frames, device), video_index, start_frame, device)
        return self._streamed(video_index, start_frame, device)

    def foreground(self, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device) -> Tensor:
        """Which pixels of the same clips are moving foreground: bool [B, T, H, W] on ``device``.

        Raises:
            DataError: where the truth is not known: for all but rendered videos.
        """
        if self._truth is None:
            raise DataError(f"{self.name}: which pixels are moving foreground is known for rendered videos only")
        home = torch.device("cpu") if self._frames is None else self._frames_for(self._frames, device).device
        if home not in self._masks:
            # From numpy, whose zeros take up no memory until written
            with torch.inference_mode(False):  # they are written into later, in whatever mode
                masks = torch.from_numpy(np.zeros((self._num_rows, *self.size), dtype=bool)).to(home)
            self._masks[home] = masks, np.zeros(len(self), dtype=bool)
        masks, known = self._masks[home]
        for v in np.unique(self._plays[video_index]):
            if not known[v]:
                rows = slice(self._offsets[v], self._offsets[v] + self.lengths[v])
                masks[rows] = torch.from_numpy(self._truth(self.paths[v])).to(home)
                known[v] = True
        return self._gather(masks, video_index, start_frame, device)

    def prefetch(self, video_index: np.ndarray, start_frame: np.ndarray) -> None:
        """Say that the clips of these videos [B] from these frames [B] come next: streaming decodes them meanwhile."""
        if self._frames is None:
            self._stream.prefetch(self._requests(video_index, start_frame))

    def _frame_numbers(self, video: np.ndarray, start_frame: np.ndarray) -> np.ndarray:
        """Frames of their videos [B] that make up the clips, int64 [B, T]."""
        return (np.asarray(start_frame)[:, None] + self._steps) % self.lengths[video][:, None]

    def _gather(self, rows: Tensor, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device) -> Tensor:
        """Take clips [B, T, ...] out of a tensor with a row for every frame of the set."""
        video = self._plays[video_index]
        wanted = torch.from_numpy(self._offsets[video][:, None] + self._frame_numbers(video, start_frame))
        taken = rows.index_select(0, wanted.flatten().to(rows.device, non_blocking=True))
        return taken.to(device, non_blocking=True).view(*wanted.shape, *rows.shape[1:])

    def _frames_for(self, frames: Tensor, device: torch.device) -> Tensor:
        """The frames on ``device``, moved there once if they take no more than half of its free memory."""
        if device not in self._resident:
            fits = device.type == "cuda" and 2 * frames.nbytes <= torch.cuda.mem_get_info(device)[0]
            self._resident[device] = frames.to(device) if fits else frames
        return self._resident[device]

    def _requests(self, video_index: np.ndarray, start_frame: np.ndarray) -> list[_Request]:
        video = self._plays[video_index]
        return list(zip(video.tolist(), (np.asarray(start_frame) % self.lengths[video]).tolist(), strict=True))

    def _read_clip(self, request: _Request) -> np.ndarray:
        v, start = request
        numbers = self._frame_numbers(np.array([v]), np.array([start]))[0]
        return read_frames(self.paths[v], self.size, numbers, self._infos[v])

    def _streamed(self, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device) -> Tensor:
        shape = (len(video_index), len(self._steps), *self.size, 3)
        clips = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        rows = clips.numpy()
        missing = np.arange(len(video_index))
        while len(missing):
            requests = self._requests(np.asarray(video_index)[missing], np.asarray(start_frame)[missing])
            taken = self._stream.take(requests)
            for i, request in zip(missing, requests, strict=True):
                if not isinstance(clip := taken[request], UnreadableVideo):
                    rows[i] = clip
            # Only now, so that what plays for whom does not depend on which clip of a batch was decoded first
            for (v, _), clip in sorted(taken.items()):
                if isinstance(clip, UnreadableVideo):
                    self._replace(v, clip)
            missing = missing[[isinstance(taken[request], UnreadableVideo) for request in requests]]
        return clips.to(device, non_blocking=True)

    def _replace(self, v: int, error: UnreadableVideo) -> None:
        """Let the next video that is still good play wherever video ``v`` did."""
        if self._plays[v] != v:
            return
        good = np.flatnonzero((self._plays == np.arange(len(self))) & (np.arange(len(self)) != v))
        self.bad_videos.append((str(error.path), error.reason))
        if not len(good):
            raise DataError(f"{self.name} ({self.split}): no file can be decoded any more; the last was {error}")
        following = good[np.searchsorted(good, v) % len(good)]
        _log.warning("%s (%s): %s; %s plays in its place", self.name, self.split, error, self.paths[following])
        self.labels[self._plays == v] = self.labels[following]
        self._plays[self._plays == v] = following


def write_bad_videos(folder: Path, *sets: VideoSet) -> None:
    """Write the sets' ``bad_videos`` to ``folder/bad_videos.txt``: path, tab, reason a line. No file if none is bad."""
    lines = [f"{path}\t{reason}\n" for videos in sets for path, reason in videos.bad_videos]
    if lines:
        (folder / "bad_videos.txt").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


class _ClipStream:
    """Clips decoded by a pool of threads, some of them ahead of time: at most ``limit``."""

    def __init__(self, read: Callable[[_Request], np.ndarray], limit: int) -> None:
        self._read, self._limit = read, max(1, limit)
        self._ahead: dict[_Request, Future[np.ndarray]] = {}  # oldest first
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def _claim(self, request: _Request) -> Future[np.ndarray]:
        """A clip on its way, started now unless it was before; no longer among those decoded ahead."""
        if self._pool is None or self._process != os.getpid():  # threads do not live on in a forked process
            self._ahead.clear()
            self._pool, self._process = ThreadPoolExecutor(num_cores(), "tats-decode"), os.getpid()
        return self._ahead.pop(request) if request in self._ahead else self._pool.submit(self._read, request)

    def prefetch(self, requests: Sequence[_Request]) -> None:
        """Start on these; drop the oldest that nobody took to make room."""
        for request in requests[: self._limit]:
            self._ahead[request] = self._claim(request)
        while len(self._ahead) > self._limit:
            self._ahead.pop(next(iter(self._ahead))).cancel()

    def take(self, requests: Sequence[_Request]) -> dict[_Request, np.ndarray | UnreadableVideo]:
        """The clips, or why not, waiting for those that are not there yet."""
        futures = {request: self._claim(request) for request in dict.fromkeys(requests)}
        taken: dict[_Request, np.ndarray | UnreadableVideo] = {}
        for request, future in futures.items():
            try:
                taken[request] = future.result()
            except UnreadableVideo as error:
                taken[request] = error
        return taken
