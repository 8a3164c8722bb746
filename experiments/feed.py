"""How fast clips come from video files, how fast a step uses them up, and what both do together."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tats_env.data import VideoSet, open_dataset
from tats_env.data.reader import num_cores, probe, read_frames
from tats_env.data.rendered import cache_folder
from tats_env.data.staging import AHEAD
from tats_env.data.workers import on_all_cores
from tats_env.keyed import keyed_bits

WIDTH, HEIGHT, FPS, FRAMES = 340, 256, 25, 250  # Kinetics as it is usually kept: ten seconds
FILES = 20  # a fifth is held out
_VERSION = "feed-1"
_RUNS_AHEAD = 2  # steps that the host may be ahead of a GPU: without CUDA graphs a training loop is hardly more
_DECODES = 20  # clips decoded to find what one takes


class FeedRates(NamedTuple):
    """Clips a second, on the device and cropped, unless it says otherwise."""

    decode_seconds: float
    """CPU seconds in which one core decodes one clip."""
    cores: int
    """Cores there are."""
    workers: int
    """Processes that decode."""
    loader: float
    """The loader alone, each clip decoded for itself."""
    loader_repeated: float
    """The loader alone, where ``repeats`` clips share what is decoded."""
    step: float | None
    """The step alone, on clips that are there."""
    both: float | None
    """The step on what the loader brings, repeated."""
    data_wait: float | None
    """Share of the time for which the device waits for clips then."""


def feed_rates(
    step: Callable[[Tensor], Any] | None,
    *,
    batch_size: int,
    num_frames: int = 16,
    size: int = 224,
    repeats: int = 4,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    seconds: float = 10.0,
    frame_stride: int = 4,
    key_frame_every: int = 250,
) -> FeedRates:
    """Measure the feeding of ``step`` from H.264 files of 340 x 256, which are made on first use.

    Clips are drawn and cropped as the Kinetics recipe has it. Decoding a clip begins at the key frame before it, so
    how often there is one makes a large difference: 250 is what ffmpeg does unless told otherwise (beside one at each
    cut, of which these files have one); sets that were encoded for training have more.

    Args:
        step: what is done with clips uint8 [B, T, H, W, 3] on ``device``; None leaves it out.
        size: H and W.
        repeats: clips of a batch that share one decoded video; divides ``batch_size``.
        workers: processes that decode, 0 for threads; None is one a core.
        seconds: for which each of the rates is measured, at least.
    """
    if repeats < 1 or batch_size % repeats:
        raise ValueError(f"repeats={repeats}: must divide the batch, {batch_size}")
    device = torch.device(device)
    folder = _videos(key_frame_every)
    videos = open_dataset(
        f"folder:{folder}", num_frames=num_frames, frame_stride=frame_stride, size=(size, size),
        augment="multi_scale", flip=True, workers=num_cores() if workers is None else workers,
    )  # fmt: skip
    decode_seconds = _decode_seconds(videos, frame_stride)

    single, repeated = (_Feed(videos, batch_size, n, device) for n in (1, repeats))
    loader, _ = _measure(single, None, seconds)
    loader_repeated, _ = _measure(repeated, None, seconds) if repeats > 1 else (loader, 0.0)
    alone = both = data_wait = None
    if step is not None:
        alone, _ = _measure(_Still(repeated), step, seconds)
        both, data_wait = _measure(repeated, step, seconds)
    return FeedRates(
        decode_seconds, num_cores(), videos._stream.workers, loader, loader_repeated, alone, both, data_wait
    )


class _Feed:
    """Batches of random clips, as an environment asks for them."""

    def __init__(self, videos: VideoSet, batch_size: int, repeats: int, device: torch.device) -> None:
        self.videos, self.batch_size, self.repeats, self.device = videos, batch_size, repeats, device
        self.count = 0

    def _ask(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first = torch.arange(batch * self.batch_size, (batch + 1) * self.batch_size, self.repeats)
        bits = keyed_bits(first[:, None], self.repeats, torch.arange(3)).numpy() & ((1 << 62) - 1)
        video, more, place = bits.repeat(self.repeats, axis=0).T
        video = video % len(self.videos)
        return video, self.videos.starts(video, more), self.videos.positions(place)

    def next(self, ahead: int = AHEAD) -> Tensor:
        """The next batch, while so many after it are begun."""
        video, start, place = self._ask(self.count)
        keys = keyed_bits(torch.arange(self.batch_size), self.count)
        clips = self.videos.clips(video, start, self.device, keys, place)
        self.count += 1
        for i in range(ahead):
            video, start, place = self._ask(self.count + i)
            self.videos.prefetch(video, start, self.device, place)
        return clips


class _Still(_Feed):
    """One batch over and over."""

    def __init__(self, feed: _Feed) -> None:
        super().__init__(feed.videos, feed.batch_size, feed.repeats, feed.device)
        self.clips = super().next(0)

    def next(self, ahead: int = AHEAD) -> Tensor:
        return self.clips


def _measure(feed: _Feed, step: Callable[[Tensor], Any] | None, seconds: float) -> tuple[float, float]:
    """Clips a second, and the share of the time for which the device waited."""
    given: deque[torch.cuda.Event] = deque()

    def batch() -> None:
        clips = feed.next()
        if step is not None:
            step(clips)
        if feed.device.type == "cuda":
            if len(given) == _RUNS_AHEAD:
                given.popleft().synchronize()
            given.append(torch.cuda.current_stream(feed.device).record_event())

    def wait() -> None:
        if feed.device.type == "cuda":
            torch.cuda.synchronize(feed.device)

    for _ in range(AHEAD + 1):  # starts the workers, and whatever the step compiles
        batch()
    wait()
    feed.videos.waits.seconds()
    start, count = time.perf_counter(), 0
    while count < AHEAD + 1 or time.perf_counter() - start < seconds:
        batch()
        count += 1
    wait()
    elapsed = time.perf_counter() - start
    waited = feed.videos.waits.seconds()
    for _ in range(AHEAD):  # so that nothing is decoded meanwhile, whatever is measured next
        feed.next(0)
    return count * feed.batch_size / elapsed, waited / elapsed


def _decode_seconds(videos: VideoSet, frame_stride: int) -> float:
    """CPU seconds for one clip, by this process with all its threads."""
    wanted = frame_stride * np.arange(videos.clip_shape[0])
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(videos), _DECODES)
    infos = [probe(videos.paths[v]) for v in picks]
    start = time.process_time()
    for v, info in zip(picks, infos, strict=True):
        first = rng.integers(0, max(1, info.num_frames - wanted[-1]))
        read_frames(videos.paths[v], videos.canvas, (first + wanted) % info.num_frames, info)
    return (time.process_time() - start) / _DECODES


def _videos(key_frame_every: int) -> Path:
    """A folder of videos in the cache: two shots each, of a moving pattern that costs about what real ones do."""
    from filelock import FileLock

    folder = cache_folder() / _VERSION / str(key_frame_every)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key_frame_every}.lock")):
        missing = [i for i in range(FILES) if not (folder / f"{i:02d}.mp4").exists()]
        for _ in on_all_cores(lambda i: _encode(folder / f"{i:02d}.mp4", i, key_frame_every), missing, "", False):
            pass
    return folder


def _encode(path: Path, number: int, key_frame_every: int) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    shots = [
        f"testsrc2=s={WIDTH}x{HEIGHT}:r={FPS}:d={FRAMES / FPS / 2},hue=h={18 * number + 160 * shot},"
        f"scroll=horizontal={0.004 + 0.0005 * number}:vertical={0.006 * shot - 0.0003 * number}[{shot}]"
        for shot in (0, 1)
    ]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as beside:
        unfinished = Path(beside, path.name)
        command = [
            get_ffmpeg_exe(), "-loglevel", "error", "-filter_complex", ";".join([*shots, "[0][1]concat=n=2"]),
            "-frames:v", str(FRAMES), "-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1",
            "-g", str(key_frame_every), str(unfinished),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        unfinished.rename(path)
