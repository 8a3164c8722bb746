"""Decoding ahead in worker processes: the same clips as in threads, whatever happens to a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from deadly import DeadlyReader, SlowReader

from tats_env.data import VideoSet, motion, open_dataset, stream, video_set, workers
from tats_env.data.cache import FrameCache
from tats_env.data.reader import VideoInfo
from tats_env.data.stream import ClipReader, ClipRequest, ClipStream

CPU = torch.device("cpu")
SHAPE = (16, 32, 32)
INFO = VideoInfo(40, 64, 64, 24.0)


@pytest.fixture(scope="module")
def paths(video_cache: None) -> list[Path]:
    return motion.render(0, "train", 30)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> VideoSet:
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    return open_dataset("motion", num_videos=30, workers=2)


def draws(seed: int, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 30, count), rng.integers(0, 25, count)


def windows(video: np.ndarray, start: np.ndarray) -> list[ClipRequest]:
    pairs = zip(video.tolist(), start.tolist(), strict=True)
    return [ClipRequest(v, tuple(range(s, s + 16))) for v, s in pairs]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "popen_loky" in " ".join(child.cmdline())]


def pool(paths: list[Path], num_workers: int, reader: ClipReader | None = None) -> ClipStream:
    return ClipStream(paths, [INFO] * 30, reader or ClipReader((32, 32)), SHAPE, num_workers)


def decoded(paths: list[Path], requests: list[ClipRequest]) -> np.ndarray:
    return np.stack([ClipReader((32, 32))(paths[v], INFO, frames, place) for v, frames, place in requests])


def test_worker_processes_give_the_same_clips_as_memory_in_any_number(
    streamed: VideoSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 2 << 30)
    resident = open_dataset("motion", num_videos=30)
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    alone = open_dataset("motion", num_videos=30, workers=1)
    for seed in range(3):
        streamed.prefetch(*draws(seed + 1), CPU)
        streamed.prefetch(*draws(seed), CPU)
        expected = resident.clips(*draws(seed), CPU)
        assert torch.equal(streamed.clips(*draws(seed), CPU), expected)
        assert torch.equal(alone.clips(*draws(seed), CPU), expected)
    assert len(workers_of(psutil.Process())) >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_larger_than_the_memory_for_clips_is_decoded_all_the_same(
    paths: list[Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLOTS_PER_WORKER", 1)
    requests, clips = windows(*draws(5, 60)), np.zeros((60, *SHAPE, 3), np.uint8)
    assert pool(paths, workers).take(requests, clips) == {}
    assert np.array_equal(clips, decoded(paths, requests))


def test_a_decoder_that_crashes_or_hangs_costs_one_clip(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "SECONDS", 1)
    deadly = pool(paths, 2, DeadlyReader((32, 32), folder=str(tmp_path)))
    requests = [ClipRequest(v, tuple(range(16))) for v in range(30) if v != 5]
    clips = np.zeros((29, *SHAPE, 3), np.uint8)
    failed = deadly.take(requests, clips)
    assert failed.keys() == {3, 4} and (tmp_path / "tried").exists(), "what goes well the second time is good"
    assert "ends the process (exit code -11)" in failed[3].reason and "too long" in failed[4].reason
    good = [i for i, request in enumerate(requests) if request.video not in failed]
    assert np.array_equal(clips[good], decoded(paths, [requests[i] for i in good]))
    with pytest.raises(ZeroDivisionError):
        deadly.take([ClipRequest(v, tuple(range(16))) for v in (0, 1, 5, 2)], clips[:4])
    assert deadly.take(requests[:3] + requests[10:], clips[3:]) == {}, "an error leaves the pool usable"


@pytest.mark.parametrize("pause", [0, 1])
def test_a_worker_that_is_killed_is_replaced(streamed: VideoSet, pause: int) -> None:
    whole = streamed.clips(*draws(0), CPU)
    for worker in workers_of(psutil.Process()):
        worker.kill()
    time.sleep(pause)  # nothing to do: the pool itself ends
    assert torch.equal(streamed.clips(*draws(0), CPU), whole)
    assert not streamed.bad_videos


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_go_on_to_the_next_batches_while_a_clip_of_one_takes_long(
    paths: list[Path], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "num_cores", lambda: 2)
    slow = pool(paths, workers, SlowReader((32, 32), folder=str(tmp_path)))
    requests = [[ClipRequest(v, tuple(range(16))) for v in part] for part in ((0, 1), range(2, 12), range(12, 20))]
    clips = [np.zeros((len(part), *SHAPE, 3), np.uint8) for part in requests]
    batches = [slow.begin(*pair) for pair in zip(requests, clips, strict=True)]
    assert slow.finish(batches[0]) == {}
    assert batches[1].done and batches[2].done
    for batch, part, taken in zip(batches, requests, clips, strict=True):
        assert slow.finish(batch) == {}
        assert np.array_equal(taken, decoded(paths, part))


def test_a_batch_that_nobody_wants_any_more_is_not_decoded(paths: list[Path], tmp_path: Path) -> None:
    slow = pool(paths, 1, SlowReader((32, 32), folder=str(tmp_path)))
    requests = [[ClipRequest(v, tuple(range(16))) for v in part] for part in ((0,), range(1, 20), (20,))]
    clips = [np.zeros((len(part), *SHAPE, 3), np.uint8) for part in requests]
    _, unwanted, last = (slow.begin(*pair) for pair in zip(requests, clips, strict=True))
    slow.drop(unwanted)
    assert slow.finish(last) == {} and np.array_equal(clips[2], decoded(paths, requests[2]))
    assert {path.stem for path in tmp_path.iterdir()} == {"00000", "00020"}
    assert slow.finish(unwanted) == {} and not clips[1].any()


def test_too_little_shared_memory_is_a_warning_and_threads(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = f"tats-{os.getpid()}-*"
    before = set(Path("/dev/shm").glob(own))
    with pytest.raises(OSError):
        stream._shared_memory(1 << 50)
    assert set(Path("/dev/shm").glob(own)) == before
    monkeypatch.setattr(stream, "_free_shared_memory", lambda: 1000)
    requests, clips = windows(*draws(1)), np.zeros((24, *SHAPE, 3), np.uint8)
    threads = pool(paths, 2)
    assert threads.take(requests, clips) == {} and threads.workers == 0
    assert np.array_equal(clips, decoded(paths, requests)) and "--shm-size" in caplog.text


def test_a_script_needs_no_guard_around_its_main_part(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import numpy as np, torch\n"
        "from tats_env.data import open_dataset, video_set\n"
        "from tats_env.data.reader import DECODERS, DecordReader\n"
        "class Mine(DecordReader):\n"
        "    def frames(self, indices):\n"
        "        return 255 - super().frames(indices)\n"
        "DECODERS['mine'] = Mine\n"
        "kept = []\n"
        "for video_set.MEMORY_LIMIT in (1 << 30, 0):\n"
        "    for decoder in ('decord', 'mine'):\n"
        "        videos = open_dataset('motion', num_videos=4, workers=1, decoder=decoder)\n"
        "        kept.append(videos.clips(np.arange(4), np.zeros(4, int), torch.device('cpu')))\n"
        "assert all(torch.equal(kept[0], clips) for clips in (255 - kept[1], kept[2], 255 - kept[3]))\n"
        "print('once')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")


def test_workers_and_shared_memory_go_when_the_run_is_killed(tmp_path: Path) -> None:
    script = (
        "import numpy as np, torch, time\n"
        "from tats_env.data import open_dataset, video_set\n"
        "if __name__ == '__main__':\n"
        "    video_set.MEMORY_LIMIT = 0\n"
        "    videos = open_dataset('motion', num_videos=30, workers=2)\n"
        "    videos.clips(np.arange(30), np.zeros(30, int), torch.device('cpu'))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    (tmp_path / "main.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 2
        run.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not list(Path("/dev/shm").glob(f"tats-{run.pid}-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_flat_over_thousands_of_clips(paths: list[Path], workers: int, tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 1 << 30) if workers else None
    busy = pool(paths, workers, ClipReader((32, 32), cache=cache))
    clips = np.zeros((50, *SHAPE, 3), np.uint8)
    rng = np.random.default_rng(0)

    def used() -> int:
        everyone = [psutil.Process(), *workers_of(psutil.Process())]
        return sum(process.memory_info().rss for process in everyone)

    def take(count: int) -> None:
        for _ in range(count // 50):
            requests = windows(rng.integers(0, 30, 50), rng.integers(0, 25, 50))
            assert busy.take(requests, clips) == {}

    take(1000)
    before = used()
    take(4000)
    assert used() - before < 30 << 20
