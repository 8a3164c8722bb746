"""A set of videos as clips on a device: all frames in memory where they fit, decoded on demand where they don't."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tats_env.data.augment import crop_and_flip, crop_boxes, flips
from tats_env.data.index import probe_all
from tats_env.data.listing import Listing
from tats_env.data.reader import DataError, UnreadableVideo, VideoInfo
from tats_env.data.sampling import dense_frames, test_starts, uniform_frames
from tats_env.data.staging import Stage, WaitClock
from tats_env.data.stream import ClipReader, ClipRequest, ClipStream
from tats_env.keyed import keyed_uniform

if TYPE_CHECKING:
    from tats_env.data.cache import FrameCache

MEMORY_LIMIT = 2 << 30  # bytes of decoded frames kept in memory; a set with more is streamed
CHUNK_BYTES = 8 << 20  # of decoded frames that a worker hands over at a time
MARGIN = 8 / 7  # of what is decoded over what a random crop makes of it: 256 pixels for 224
POSITIONS = 5  # along the longer side, from which a random crop is taken
CENTRE = 0.5

_LISTED = 10  # files named in one message
_log = logging.getLogger("tats_env.data")


def _listed(bad: Iterable[tuple[str, str]]) -> str:
    lines = [f"\n  {path}: {reason}" for path, reason in bad]
    more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "".join(lines[:_LISTED]) + more


class VideoSet:
    """V videos, of which clips of T frames are taken; made by ``open_dataset``.

    With dense sampling a clip is frames ``start + t * stride`` of its video, modulo the video's length: a video
    shorter than ``clip_span`` frames is looped. With uniform sampling it is one frame out of each of T equal parts of
    the video, and ``start_frame`` is the number of the draw. Frames are counted as they are coded, also where the
    frame rate varies. They are scaled to cover H x W and cropped at the centre; a clip that comes with a key is
    cropped and mirrored by it, all its frames alike, if the set was opened so.

    If all frames fit in ``MEMORY_LIMIT``, each video is decoded once, here, and a clip is an index into one tensor,
    which moves to the GPU once when there is room. Otherwise clips are decoded when asked for, by worker processes or
    on threads, and ``prefetch`` does it ahead of time.

    A file that cannot be decoded is left out, logged and listed in ``bad_videos``. One that first fails when
    streaming is listed then, and the next good video plays in its place from then on (with its label).

    Attributes:
        name: what ``open_dataset`` was given.
        split: ``"train"`` or ``"validation"``.
        paths: the V files.
        labels: class of each video, int64 [V]; -1 where unknown.
        class_names: the name of each class.
        lengths: frames in each video, int64 [V].
        bad_videos: (path, reason) of each file that could not be decoded.
        augments: whether a key changes anything about a clip.
        clip_shape: (T, H, W).
        clip_span: frames of a video from the first to the last of a clip, ``(num_frames - 1) * frame_stride + 1``.
        has_foreground: whether ``foreground`` knows the truth.
        waits: for how long devices waited for clips.

    Raises:
        DataError: if more than half of the files cannot be decoded.
    """

    def __init__(
        self,
        name: str,
        split: str,
        listing: Listing,
        *,
        num_frames: int,
        frame_stride: int,
        size: tuple[int, int],
        sampling: str = "dense",
        augment: str = "none",
        flip: bool = False,
        decoder: str = "decord",
        workers: int = 0,
        cache: FrameCache | None = None,
        truth: Callable[[Path, tuple[int, int]], np.ndarray] | None = None,
        progress: bool = False,
    ) -> None:
        self.name, self.split, self.class_names = name, split, list(listing.class_names)
        self.size, self.sampling, self.augment, self.flip = size, sampling, augment, flip and listing.flips
        # What is decoded: with room around it where a crop is drawn
        self.canvas = size if augment == "none" else (round(MARGIN * size[0]), round(MARGIN * size[1]))
        self.clip_shape = (num_frames, *size)
        self.clip_span = (num_frames - 1) * frame_stride + 1
        self.augments = augment != "none" or self.flip
        self._num_frames, self._stride = num_frames, frame_stride
        self._truth = truth
        self.has_foreground = truth is not None

        paths = listing.paths
        found = probe_all(paths, decoder, progress, workers)
        lengths = np.array([0 if isinstance(info, UnreadableVideo) else info.num_frames for info in found], np.int64)
        offsets = np.cumsum(lengths) - lengths
        shape = (int(lengths.sum()), *self.canvas, 3)
        # Scaled to cover the canvas, a video of its shape has nothing left to choose from
        fits = np.array([not isinstance(info, UnreadableVideo) and self._covers(info) for info in found], bool)
        self._frames: Tensor | None = None
        whole = augment == "none" or all(fits[lengths > 0])  # else most crops would be decoded anew
        if whole and np.prod(shape, dtype=np.int64) <= MEMORY_LIMIT:
            self._frames = torch.empty(shape, dtype=torch.uint8)
            if shape[0]:
                found = self._decode(paths, found, offsets, ClipReader(self.canvas, decoder, cache), workers, progress)

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
        self.labels = np.array([listing.labels[v] for v in good], np.int64)
        self.lengths, self._offsets, self._num_rows = lengths[good], offsets[good], shape[0]
        infos = [info for info in found if not isinstance(info, UnreadableVideo)]
        self._fits = fits[good]
        self._plays = np.arange(len(good))  # which video plays for each: itself, unless it failed when streaming
        reader = ClipReader(self.canvas, decoder, cache)
        self._stream = ClipStream(self.paths, infos, reader, (num_frames, *self.canvas), workers)
        self.waits = WaitClock()
        self._stage = Stage(self._stream, self.waits)
        self._resident: dict[torch.device, Tensor] = {}  # the frames to gather from for each device
        self._masks: dict[torch.device, tuple[Tensor, np.ndarray]] = {}  # all masks, and which are known [V]

    def _decode(
        self,
        paths: Sequence[Path],
        found: Sequence[VideoInfo | UnreadableVideo],
        offsets: np.ndarray,
        reader: ClipReader,
        workers: int,
        progress: bool,
    ) -> list[VideoInfo | UnreadableVideo]:
        """Decode all videos into ``self._frames``, each from its offset; what was found, and then who failed."""
        from rich.progress import track

        assert self._frames is not None
        rows = self._frames.numpy()
        # Whole videos, but for long ones: to go on in the midst of a file takes time
        most = max(1, CHUNK_BYTES // (3 * math.prod(self.canvas)))
        lengths = [x.num_frames if isinstance(x, VideoInfo) else 0 for x in found]
        infos = cast(Sequence[VideoInfo], found)  # of the others nothing is asked
        stream = ClipStream(paths, infos, reader, (min(most, max(lengths)), *self.canvas), min(workers, len(paths)))
        batches = []
        for v, length in enumerate(lengths):
            parts = [range(start, min(start + most, length)) for start in range(0, length, most)]
            places = [rows[offsets[v] + part.start : offsets[v] + part.stop] for part in parts]
            batches.append(stream.begin([ClipRequest(v, tuple(part)) for part in parts], places))
        finished = map(stream.finish, batches)
        failed = list(track(finished, "decoding videos", total=len(batches)) if progress else finished)
        stream.close()
        return [failed[v].get(v, x) for v, x in enumerate(found)]

    def __len__(self) -> int:
        return len(self.paths)

    def __deepcopy__(self, memo: object) -> VideoSet:
        """The set itself: a copy of an environment's specification shares the frames."""
        return self

    def _covers(self, info: VideoInfo) -> bool:
        return 2 * abs(info.height * self.canvas[1] - info.width * self.canvas[0]) <= max(info.height, info.width)

    def starts(self, video_index: np.ndarray, bits: np.ndarray, num_clips: int = 1, nth: int = 0) -> np.ndarray:
        """Where random clips of the given videos [B] start: int64 [B].

        Args:
            bits: uniform random integers of 62 bits, int64 [B].
            num_clips: that follow one another in a video.
            nth: of these.
        """
        if self.sampling == "uniform":
            return (bits + nth) % (1 << 31)
        room = np.maximum(self.lengths[self._plays[video_index]] - num_clips * self.clip_span, 0) + 1
        return bits % room + nth * self.clip_span

    def positions(self, bits: np.ndarray) -> np.ndarray:
        """Where along their longer side videos are cropped before a random crop is made of the rest: [B] in 0 to 1.

        Clips that share video, start and position share what is decoded, whatever their keys.
        """
        return np.full(len(bits), CENTRE) if self.augment == "none" else bits % POSITIONS / (POSITIONS - 1)

    def clips(
        self,
        video_index: np.ndarray,
        start_frame: np.ndarray,
        device: torch.device,
        key: Tensor | None = None,
        position: np.ndarray | None = None,
    ) -> Tensor:
        """Clips of the given videos [B] from the given frames [B]: uint8 [B, T, H, W, 3] on ``device``.

        Args:
            key: int64 [B], on the CPU; crops and mirrors each clip as the set was opened to. None takes the centre.
            position: of ``positions`` [B]; None is the centre.

        Raises:
            DataError: if streaming has left too few videos that can be decoded.
        """
        return self._cropped(self._fetch(self._choice(video_index, start_frame, position), device), key)

    def test_clips(
        self, video_index: np.ndarray, nth: int, num_clips: int, device: torch.device, crop: int | None = None
    ) -> Tensor:
        """The nth of ``num_clips`` clips spread over each of the given videos [B]: uint8 [B, T, H, W, 3] on ``device``.

        Args:
            crop: 0, 1 or 2: the beginning, the middle or the end of the longer side; None is the middle.
        """
        return self._cropped(self._fetch(self._test_choice(video_index, nth, num_clips, crop), device), None)

    def foreground(
        self, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device, key: Tensor | None = None
    ) -> Tensor:
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
                masks = torch.from_numpy(np.zeros((self._num_rows, *self.canvas), dtype=bool)).to(home)
            self._masks[home] = masks, np.zeros(len(self), dtype=bool)
        masks, known = self._masks[home]
        for v in np.unique(self._plays[video_index]):
            if not known[v]:
                rows = slice(self._offsets[v], self._offsets[v] + self.lengths[v])
                masks[rows] = torch.from_numpy(self._truth(self.paths[v], self.canvas)).to(home)
                known[v] = True
        choice = self._choice(video_index, start_frame, None)
        return self._cropped(self._gather(masks, *self._frames_of(choice), device), key)

    def prefetch(
        self,
        video_index: np.ndarray,
        start_frame: np.ndarray,
        device: torch.device,
        position: np.ndarray | None = None,
    ) -> None:
        """Say which clips come next (arguments as of ``clips``): streaming decodes and moves them meanwhile.

        Up to ``staging.AHEAD`` batches may be on their way; to say one of them again changes nothing.
        """
        self._prepare(self._choice(video_index, start_frame, position), device)

    def prefetch_test(
        self, video_index: np.ndarray, nth: int, num_clips: int, device: torch.device, crop: int | None = None
    ) -> None:
        """Say which test clips come next (arguments as of ``test_clips``)."""
        self._prepare(self._test_choice(video_index, nth, num_clips, crop), device)

    def _choice(self, video_index: np.ndarray, start_frame: np.ndarray, position: np.ndarray | None) -> _Choice:
        start = np.asarray(start_frame, np.int64)
        if self.sampling == "uniform":
            draw = torch.from_numpy(start)
            offsets = keyed_uniform(draw[:, None], torch.arange(self._num_frames)).numpy()
            return _Choice(np.asarray(video_index), None, offsets, position)
        return _Choice(np.asarray(video_index), start, None, position)

    def _test_choice(self, video_index: np.ndarray, nth: int, num_clips: int, crop: int | None) -> _Choice:
        position = None if crop is None else np.full(len(video_index), crop / 2)
        if self.sampling == "uniform":
            offsets = np.full((len(video_index), self._num_frames), (nth + 0.5) / num_clips)
            return _Choice(np.asarray(video_index), None, offsets, position)
        starts = test_starts(self.lengths[self._plays[video_index]], self.clip_span, nth, num_clips)
        return _Choice(np.asarray(video_index), starts, None, position)

    def _frames_of(self, choice: _Choice) -> tuple[np.ndarray, np.ndarray]:
        """Which videos play [B], and which of their frames [B, T]."""
        video = self._plays[choice.video_index]
        lengths = self.lengths[video]
        if choice.offsets is not None:
            return video, uniform_frames(lengths, self._num_frames, choice.offsets)
        assert choice.start is not None
        return video, dense_frames(lengths, choice.start, self._num_frames, self._stride)

    def _requests(self, choice: _Choice) -> list[ClipRequest]:
        video, frames = self._frames_of(choice)
        asked = zip(video.tolist(), map(tuple, frames.tolist()), choice.positions.tolist(), strict=True)
        return [ClipRequest(*request) for request in asked]

    def _cropped(self, decoded: Tensor, key: Tensor | None) -> Tensor:
        """What is decoded [B, T, h, w, ...] cropped to H x W: by the key, or at the centre."""
        if key is None or not self.augments:
            top, left = ((whole - part) // 2 for whole, part in zip(self.canvas, self.size, strict=True))
            return decoded[:, :, top : top + self.size[0], left : left + self.size[1]]
        # Boxes are worked out on the CPU, where the key is: constants made on a GPU would wait for it
        if self.augment == "none":
            boxes = torch.tensor([0.0, 0.0, *self.canvas]).expand(len(decoded), 4)
        else:
            boxes = crop_boxes(self.augment, key, self.canvas)  # type: ignore[arg-type]
        mirrored = flips(key) if self.flip else torch.zeros(len(decoded), dtype=torch.bool)
        return crop_and_flip(decoded, boxes, mirrored, self.size)

    def _streams(self, choice: _Choice) -> bool:
        """Whether these are to be decoded: with all frames in memory, those are that are not cropped at the centre."""
        if self._frames is None:
            return True
        return not ((choice.positions == CENTRE) | self._fits[self._plays[choice.video_index]]).all()

    def _prepare(self, choice: _Choice, device: torch.device) -> None:
        if self._streams(choice):
            self._stage.begin(self._requests(choice), device)

    def _fetch(self, choice: _Choice, device: torch.device) -> Tensor:
        """The clips, cropped at their positions: uint8 [B, T, h, w, 3] on ``device``."""
        if not self._streams(choice):
            assert self._frames is not None
            rows = self._frames_for(self._frames, device)
            if rows.device.type == "cuda":
                return self._gather(rows, *self._frames_of(choice), device)
            with self.waits.waiting(device):
                return self._gather(rows, *self._frames_of(choice), device)
        requests = self._requests(choice)
        clips, failed = self._stage.take(requests, device)
        while failed:
            # Only now, so that what plays for whom does not depend on when a clip of a batch was decoded
            for v, error in sorted(failed.items()):
                self._replace(v, error)
            before, requests = requests, self._requests(choice)
            bad = [i for i, (was, now) in enumerate(zip(before, requests, strict=True)) if was != now]
            again, failed = self._stage.take([requests[i] for i in bad], device)
            clips[torch.tensor(bad).to(device)] = again
        return clips

    def _gather(self, rows: Tensor, video: np.ndarray, frames: np.ndarray, device: torch.device) -> Tensor:
        """Take clips [B, T, ...] out of a tensor with a row for every frame of the set."""
        wanted = torch.from_numpy(self._offsets[video][:, None] + frames)
        taken = rows.index_select(0, wanted.flatten().to(rows.device, non_blocking=True))
        return taken.to(device, non_blocking=True).view(*wanted.shape, *rows.shape[1:])

    def _frames_for(self, frames: Tensor, device: torch.device) -> Tensor:
        """The frames on ``device``, moved there once if they take no more than half of its free memory."""
        if device not in self._resident:
            fits = device.type == "cuda" and 2 * frames.nbytes <= torch.cuda.mem_get_info(device)[0]
            self._resident[device] = frames.to(device) if fits else frames
        return self._resident[device]

    def _replace(self, v: int, error: UnreadableVideo) -> None:
        """Let the next video that is still good, one with a label for one with a label, play where video ``v`` did."""
        if self._plays[v] != v:
            return
        good = np.flatnonzero((self._plays == np.arange(len(self))) & (np.arange(len(self)) != v))
        self.bad_videos.append((str(error.path), error.reason))
        if 2 * len(good) < len(self):
            lost = len(self) - len(good)
            raise DataError(
                f"{self.name} ({self.split}): {lost} of {len(self)} files can't be decoded any more; the last: {error}"
            )
        alike = good[(self.labels[good] >= 0) == (self.labels[v] >= 0)]
        good = alike if len(alike) else good
        following = good[np.searchsorted(good, v) % len(good)]
        _log.warning("%s (%s): %s; %s plays in its place", self.name, self.split, error, self.paths[following])
        self.labels[self._plays == v] = self.labels[following]
        self._plays[self._plays == v] = following

    def state(self) -> dict[str, Any]:
        """What streaming found out, for ``restore``: which videos play in the place of others, and what was bad."""
        others = np.flatnonzero(self._plays != np.arange(len(self)))
        plays = [(int(v), int(self._plays[v])) for v in others]
        return {"num_videos": len(self), "plays": plays, "bad": list(self.bad_videos)}

    def restore(self, state: dict[str, Any]) -> None:
        """Let the same videos play for the same others as when ``state`` was asked for.

        Raises:
            DataError: if the set has other videos now, so that other clips would be drawn.
        """
        if state["num_videos"] != len(self):
            raise DataError(
                f"{self.name} ({self.split}): has {len(self)} videos that can be decoded now, but had "
                f"{state['num_videos']} when training was interrupted: bring those back, or start another run"
            )
        for v, other in state["plays"]:
            self.labels[v], self._plays[v] = self.labels[other], other
        self.bad_videos = list(dict([*self.bad_videos, *state["bad"]]).items())


class _Choice(NamedTuple):
    """Which clips are meant, whatever plays in a video's place."""

    video_index: np.ndarray
    start: np.ndarray | None
    """[B] first frame, of dense sampling."""
    offsets: np.ndarray | None
    """[B, T] place within each part of the video, of uniform sampling."""
    position: np.ndarray | None

    @property
    def positions(self) -> np.ndarray:
        """Where each is cropped along its longer side [B]."""
        return np.full(len(self.video_index), CENTRE) if self.position is None else self.position


def write_bad_videos(folder: Path, *sets: VideoSet) -> None:
    """Write the sets' ``bad_videos`` to ``folder/bad_videos.txt``: path, tab, reason a line. No file if none is bad."""
    lines = [f"{path}\t{reason}\n" for videos in sets for path, reason in videos.bad_videos]
    if lines:
        (folder / "bad_videos.txt").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
