"""How long a device waits for clips, and what the feeding of a step is measured to be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

import tats_env  # noqa: F401
from agents.heuristics import RandomMask
from agents.hooks import Hook, LogHook
from experiments import feed
from tats_env.data import VideoSet, open_dataset, stream
from tats_env.data.reader import probe, read_frames
from tats_env.data.staging import WaitClock

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def short_videos() -> Iterator[None]:
    """Five videos of 48 frames: encoded in two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "FILES", 5)
        patch.setattr(feed, "FRAMES", 48)
        patch.setattr(feed, "_VERSION", "feed-test-1")
        yield


class Lines(KVWriter):
    def __init__(self) -> None:
        self.waits: list[float] = []

    def write(self, key_values: dict, key_excluded: dict, step: int = 0) -> None:  # type: ignore[type-arg]
        self.waits.append(key_values["time/data_wait"])

    def close(self) -> None:
        pass


class Sleep(Hook):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, agent: object) -> None:
        time.sleep(self.seconds)


def logged_waits(videos: VideoSet, pause: float = 0.0) -> list[float]:
    """What a run of three log lines says."""
    env = gym.make_vec(
        "tats_env:TATSMasking-v0", num_envs=4, vectorization_mode="vector_entry_point", dataset=videos, output="torch",
        reward="reconstruction_error",
        device="cpu",
    )  # fmt: skip
    lines = Lines()
    RandomMask(env).learn(4 * 6, [Sleep(pause), LogHook(Logger(None, [lines]), every=2)])
    assert len(lines.waits) == 3
    return lines.waits


def test_files_have_a_key_frame_as_often_as_asked_and_are_made_once() -> None:
    folders = [feed._videos(every) for every in (4, 250)]
    files = [sorted(folder.glob("*.mp4")) for folder in folders]
    assert [len(found) for found in files] == [5, 5]
    assert probe(files[0][0])[:3] == (48, 256, 340)
    assert files[0][0].stat().st_size > files[1][0].stat().st_size, "key frames take room"
    made = files[0][0].stat().st_mtime_ns
    assert feed._videos(4) == folders[0] and files[0][0].stat().st_mtime_ns == made


def test_a_run_logs_the_share_of_the_time_that_it_waits_for_clips() -> None:
    videos = open_dataset(f"folder:{feed._videos(250)}", augment="multi_scale", frame_stride=3, workers=1)
    assert videos._frames is None
    start = time.perf_counter()
    waits = logged_waits(videos)
    assert all(0.3 < wait <= 1 for wait in waits[1:]), waits
    waits = logged_waits(videos, pause=3 * (time.perf_counter() - start) / 6)
    assert all(0 <= wait < 0.15 for wait in waits[1:]), waits


def test_frames_in_memory_are_hardly_waited_for() -> None:
    videos = open_dataset("motion", num_videos=20)
    videos.waits._seconds = 1e6  # of others that used the set
    waits = logged_waits(videos, 0.05)
    assert all(0 <= wait < 0.2 for wait in waits), waits


def test_a_step_that_does_nothing_waits_and_one_slower_than_decoding_does_not() -> None:
    options = {
        "batch_size": 4,
        "num_frames": 8,
        "size": 32,
        "repeats": 2,
        "workers": 1,
        "seconds": 0.2,
        "frame_stride": 1,
    }
    fast = feed.feed_rates(lambda clips: None, **options)  # type: ignore[arg-type]
    assert fast.both is not None and fast.step is not None and fast.data_wait is not None
    assert 0.7 < fast.data_wait <= 1 and fast.both < fast.step / 10
    assert fast.loader > 0 and fast.loader_repeated > 0
    assert 1e-3 < fast.decode_seconds < 2 and fast.workers == 1
    seen: list[torch.Size] = []

    def slow(clips: torch.Tensor) -> None:
        seen.append(clips.shape)
        time.sleep(8 * options["batch_size"] / min(fast.loader, fast.loader_repeated))

    patient = feed.feed_rates(slow, **options)  # type: ignore[arg-type]
    assert patient.both is not None and patient.step is not None and patient.data_wait is not None
    assert 0 <= patient.data_wait < 0.3 and patient.both > 0.6 * patient.step
    assert set(seen) == {(4, 8, 32, 32, 3)}


def test_clips_that_share_a_video_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    videos = open_dataset(f"folder:{feed._videos(250)}", num_frames=4, size=(32, 32), augment="multi_scale", workers=0)
    assert videos._frames is None
    decoded: list[Path] = []

    def counted(path: Path, *args: Any, **options: Any) -> np.ndarray:
        decoded.append(path)
        return read_frames(path, *args, **options)

    monkeypatch.setattr(stream, "read_frames", counted)
    assert len(feed._Feed(videos, 6, 3, CPU).next(ahead=0)) == 6 and len(decoded) == 2
    feed._Feed(videos, 6, 1, CPU).next(ahead=0)
    assert len(decoded) == 2 + 6


def test_the_loader_is_measured_without_a_step() -> None:
    rates = feed.feed_rates(None, batch_size=2, num_frames=4, size=32, repeats=1, workers=0, seconds=0.1)
    assert rates.loader == rates.loader_repeated > 0 and rates.workers == 0
    assert rates.step is rates.both is rates.data_wait is None
    with pytest.raises(ValueError, match="repeats=3: must divide the batch, 4"):
        feed.feed_rates(None, batch_size=4, repeats=3)


def test_a_clock_counts_what_was_waited_since_last_asked() -> None:
    clock = WaitClock()
    most = 0.0
    for seconds in (0.05, 0.1):
        start = time.perf_counter()
        with clock.waiting(CPU):
            time.sleep(seconds)
        most += time.perf_counter() - start
    time.sleep(0.1)
    assert 0.15 <= clock.seconds() <= most
    assert clock.seconds() == 0


@GPU
def test_a_gpu_with_work_left_does_not_wait_however_long_its_host_does() -> None:
    device, clock = torch.device("cuda"), WaitClock()
    torch.cuda.synchronize()
    with clock.waiting(device):
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert 0.09 < clock.seconds() < 0.2
    torch.cuda._sleep(10**9)  # cycles: half a second
    with clock.waiting(device):
        time.sleep(0.1)
    assert clock.seconds() == 0, "nobody waits to find out"
    torch.cuda.synchronize()
    assert clock.seconds() < 0.01


@GPU
def test_a_gpu_gets_the_clips_that_a_cpu_gets() -> None:
    videos = open_dataset(f"folder:{feed._videos(250)}", augment="multi_scale", workers=2)
    video, start = np.arange(8) // 2 % len(videos), np.arange(8) // 2
    wanted = videos.clips(video, start, CPU)
    for _ in range(3):
        videos.prefetch(video, start, torch.device("cuda"))
        assert torch.equal(videos.clips(video, start, torch.device("cuda")).cpu(), wanted)
