from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from tats_env.data import cache as cache_module
from tats_env.data.cache import FrameCache
from tats_env.data.reader import DECODERS, DecordReader, NpyReader, UnreadableVideo, probe, read_frames, read_scaled

SIZE = (32, 32)
SCALED = (32, 48)  # what covers SIZE
STORED = 12 * 32 * 48 * 3 + 128  # bytes of one of ``videos``, with npy's header
PLENTY = 1 << 30
ALL = np.arange(12)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six real videos of 12 frames, 96 x 64, all different."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", f"testsrc2=s=96x64:r=24,hue=h={60 * i}",
                   "-frames:v", "12", "-pix_fmt", "yuv420p", "-g", "4", folder / f"{i}.mp4"]  # fmt: skip
        subprocess.run(command, check=True)
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def all_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is stored may make room for others."""
    monkeypatch.setattr(cache_module, "IDLE", 0)


def take(
    cache: FrameCache, path: Path, indices: np.ndarray = ALL, size: tuple[int, int] = SIZE, position: float = 0.5
) -> np.ndarray:
    return cache.frames(path, probe(path), size, position, "decord", indices)


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("decoded")


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.npy"))


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns, p.stat().st_mode) for p in folder.rglob("*")}


def python(code: str) -> subprocess.Popen[str]:
    names = "from pathlib import Path; import numpy as np; from tats_env.data import cache as c; c.IDLE = 0"
    code = f"{names}; FrameCache = c.FrameCache\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_frames_are_the_same_bytes_as_without_the_cache(videos: list[Path], tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, PLENTY)
    wanted = np.array([11, 0, 5, 5, 3])
    for path, size, position in ((videos[0], (32, 32), 0.5), (videos[0], (48, 48), 0.0), (videos[1], (20, 48), 1.0)):
        expected = read_frames(path, size, wanted, position=position)
        for _ in ("decoded", "from the cache"):
            found = take(cache, path, wanted, size, position)
            assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert len(stored(tmp_path)) == 3


def test_a_video_is_decoded_once(videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FrameCache(tmp_path, PLENTY)
    first = take(cache, videos[0], np.array([3]))
    monkeypatch.setattr(cache_module, "read_scaled", refuse)
    assert np.array_equal(take(cache, videos[0])[3], first[0])
    assert np.array_equal(take(FrameCache(tmp_path, PLENTY), videos[0])[3], first[0]), "nor by the next process"


def test_a_long_video_is_decoded_piece_by_piece(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", 5 * 32 * 48 * 3 + 1)
    pieces: list[int] = []

    def counted(path: Path, size: tuple[int, int], indices: np.ndarray, **options: object) -> np.ndarray:
        pieces.append(len(indices))
        return read_scaled(path, size, indices, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "read_scaled", counted)
    assert np.array_equal(take(FrameCache(tmp_path, PLENTY), videos[0]), read_frames(videos[0], SIZE))
    assert pieces == [5, 5, 2]


def test_what_the_frames_depend_on_is_told_apart(videos: list[Path], tmp_path: Path) -> None:
    cache, path = FrameCache(tmp_path / "cache", PLENTY), tmp_path / "video.mp4"
    path.write_bytes(videos[0].read_bytes())
    take(cache, path)
    take(cache, path, size=(48, 48))
    assert len(stored(cache.folder)) == 2
    take(cache, path, position=0.0)
    assert len(stored(cache.folder)) == 2, "of one video there is one copy, wherever it is cropped"
    (tmp_path / "link.mp4").symlink_to(path)
    take(cache, tmp_path / "link.mp4")
    assert len(stored(cache.folder)) == 2, "the same file by another name"
    path.write_bytes(videos[1].read_bytes())
    assert np.array_equal(take(cache, path), read_frames(videos[1], SIZE)), "another file by the same name"
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(before, before + 1))
    take(cache, path)
    assert len(stored(cache.folder)) == 4


# Size and order


def aged(folder: Path) -> None:
    """Make all that is stored look as if it was last used an hour ago, in the order of its use."""
    for i, file in enumerate(sorted(stored(folder), key=lambda file: file.stat().st_mtime_ns)):
        os.utime(file, (time.time() - 3600 + i,) * 2)


def is_stored(cache: FrameCache, path: Path) -> bool:
    file = cache._file(path, SCALED, "decord")
    return file is not None and file.exists()


def test_the_videos_unused_for_longest_make_room(videos: list[Path], tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, int(4.5 * STORED))
    for path in videos[:4]:
        take(cache, path)
        aged(tmp_path)
    take(cache, videos[0], np.array([2]))  # used again: now 1 is the oldest
    take(cache, videos[4])
    assert [is_stored(cache, path) for path in videos] == [True, False, True, True, True, False]
    aged(tmp_path)
    take(cache, videos[5])
    assert [is_stored(cache, path) for path in videos] == [True, False, False, True, True, True]
    assert int((tmp_path / "bytes").read_text()) == 4 * STORED == sum(file.stat().st_size for file in stored(tmp_path))


def test_a_full_cache_keeps_what_is_in_use_and_decodes_no_whole_video_for_nothing(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "IDLE", 3600)
    cache, pieces = FrameCache(tmp_path, int(4.5 * STORED)), list[int]()

    def counted(path: Path, size: tuple[int, int], indices: np.ndarray, **options: object) -> np.ndarray:
        pieces.append(len(indices))
        return read_scaled(path, size, indices, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "read_scaled", counted)
    for _ in range(3):  # epochs
        for path in videos:
            assert np.array_equal(take(cache, path, np.array([3])), read_frames(path, SIZE, np.array([3])))
    assert [is_stored(cache, path) for path in videos] == [True] * 4 + [False] * 2
    assert pieces == [12] * 5 + [1] * 5
    for file in stored(tmp_path):
        os.utime(file, (time.time() - 3601,) * 2)
    take(FrameCache(tmp_path, int(4.5 * STORED)), videos[5])
    assert is_stored(cache, videos[5]) and len(stored(tmp_path)) == 4


def test_the_folder_is_searched_only_when_the_limit_seems_reached(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(FrameCache(tmp_path, PLENTY), videos[0])
    searches: list[int] = []
    make_room = FrameCache._make_room
    monkeypatch.setattr(FrameCache, "_make_room", lambda self, n: searches.append(n) or make_room(self, n))  # type: ignore
    cache = FrameCache(tmp_path, int(5.6 * STORED))
    for path in videos[:5]:
        take(cache, path)
    assert len(stored(tmp_path)) == 5 and not searches
    take(cache, videos[5])
    assert len(searches) == 1 and len(stored(tmp_path)) == 5


def test_a_count_that_is_wrong_or_lost_is_put_right(videos: list[Path], tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, int(4.5 * STORED))
    for path in videos[:3]:
        take(cache, path)
    for wrong in ("", "nonsense", str(PLENTY)):
        (tmp_path / "bytes").write_text(wrong)
        stored(tmp_path)[0].unlink()
        take(cache, videos[3])
        for path in videos[:3]:
            take(cache, path)
        assert len(stored(tmp_path)) == 4 and int((tmp_path / "bytes").read_text()) == 4 * STORED


def test_a_video_of_more_than_half_the_limit_is_not_stored(videos: list[Path], tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 2 * STORED - 300)
    assert np.array_equal(take(cache, videos[0]), read_frames(videos[0], SIZE))
    assert not everything(tmp_path)


# Several processes, kills, damage


def many(videos: list[Path], folder: Path, limit: int, seed: int, rounds: int = 60) -> str:
    """A process that reads at random and compares."""
    return f"""
from tats_env.data.reader import probe, read_frames
videos = [Path(p) for p in {list(map(str, videos))}]
infos, whole = [probe(p) for p in videos], [read_frames(p, {SIZE}) for p in videos]
cache, rng = FrameCache(Path({str(folder)!r}), {limit}), np.random.default_rng({seed})
for _ in range({rounds}):
    v, wanted = rng.integers(len(videos)), rng.integers(12, size=4)
    assert np.array_equal(cache.frames(videos[v], infos[v], {SIZE}, 0.5, "decord", wanted), whole[v][wanted])
print("all equal", cache._writes)
"""


@pytest.mark.parametrize("room", [100.0, 3.5])  # for all, and so little that each removes what the other reads
def test_two_processes_may_fill_one_folder_at_once(room: float, videos: list[Path], tmp_path: Path) -> None:
    both = [python(many(videos, tmp_path, int(room * STORED), seed)) for seed in (0, 1)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["all equal True\n"] * 2
    files = stored(tmp_path)
    assert len(files) == min(len(videos), int(room)) and not list((tmp_path / "unfinished").iterdir())
    assert int((tmp_path / "bytes").read_text()) == len(files) * STORED


def test_a_file_that_goes_just_before_it_is_read_is_decoded_anew(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, frames = FrameCache(tmp_path, PLENTY), NpyReader.frames
    expected = take(cache, videos[0])
    (file,) = stored(tmp_path)

    def after_removal(self: NpyReader, indices: np.ndarray) -> np.ndarray:
        file.unlink(missing_ok=True)
        return frames(self, indices)

    monkeypatch.setattr(NpyReader, "frames", after_removal)
    assert np.array_equal(take(cache, videos[0]), expected)
    monkeypatch.setattr(NpyReader, "frames", frames)
    assert stored(tmp_path) == [file]


@pytest.mark.parametrize(
    ("moment", "strike"),
    [
        ("half is written", "cache.read_scaled = lambda *a, **k: read(*a, **k) if next(calls) < 2 else kill()"),
        ("all is written", "cache.os.fsync = lambda descriptor: kill()"),
        ("it is counted", "Path.rename = lambda self, target: kill()"),
    ],
)
def test_a_killed_writer_leaves_whole_files_within_the_limit_and_its_remains_go(
    moment: str, strike: str, videos: list[Path], tmp_path: Path
) -> None:
    limit = int(3.5 * STORED)
    process = python(f"""
import itertools, os, signal
from tats_env.data import cache
from tats_env.data.reader import probe
calls, read, kill = itertools.count(1), cache.read_scaled, lambda: os.kill(os.getpid(), signal.SIGKILL)
videos = [Path(p) for p in {list(map(str, videos))}]
infos = [probe(path) for path in videos]
for i in range(4):
    if i == 3:
        calls, cache.CHUNK = itertools.count(1), {STORED // 3}
        {strike}
    FrameCache(Path({str(tmp_path)!r}), {limit}).frames(videos[i], infos[i], {SIZE}, 0.5, "decord", np.arange(12))
""")
    assert process.communicate(timeout=60)[0] == "" and process.returncode == -signal.SIGKILL
    left = list((tmp_path / "unfinished").iterdir())
    assert len(left) == 1 and left[0].stat().st_size <= STORED
    cache, there = FrameCache(tmp_path, limit), stored(tmp_path)
    assert len(there) == (2 if moment == "it is counted" else 3)
    assert all(np.load(file).shape == (12, *SCALED, 3) for file in there)
    for path in videos:
        assert np.array_equal(take(cache, path), read_frames(path, SIZE))
        assert sum(file.stat().st_size for file in stored(tmp_path)) <= limit
    assert not list((tmp_path / "unfinished").iterdir())


def test_kills_at_random_leave_whole_files_within_the_limit(videos: list[Path], tmp_path: Path) -> None:
    limit = int(3.5 * STORED)
    for seed in range(3):
        process, before = python(many(videos, tmp_path, limit, seed, rounds=100_000)), time.time()
        while not (tmp_path / "bytes").exists() or (tmp_path / "bytes").stat().st_mtime < before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(0.03 * seed)
        process.kill()
        process.communicate()
        assert all(np.load(file).shape == (12, *SCALED, 3) for file in stored(tmp_path))
        assert sum(file.stat().st_size for file in stored(tmp_path)) <= limit


def test_what_killed_writers_left_is_removed_and_a_living_one_s_is_not(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FrameCache(tmp_path, PLENTY)
    with python("import time; print('ready', flush=True); time.sleep(60)") as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: other.pid)
            with cache._unfinished() as theirs:
                pass
        theirs.write_text("half of a video")
        elsewhere, old = (theirs.with_name(f"{name}.1.abc") for name in ("elsewhere", "old.elsewhere"))
        for file in (elsewhere, old):
            file.touch()
        os.utime(old, (time.time() - 3700,) * 2)
        take(FrameCache(tmp_path, PLENTY), videos[0])
        assert set(theirs.parent.iterdir()) == {theirs, elsewhere}
        other.kill()
        other.wait()
    take(FrameCache(tmp_path, PLENTY), videos[1])
    assert set(theirs.parent.iterdir()) == {elsewhere}


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "other shape"])
def test_a_damaged_file_is_logged_and_replaced(
    damage: str, videos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(tmp_path, PLENTY)
    expected = take(cache, videos[0])
    file = stored(tmp_path)[0]
    whole = file.read_bytes()
    if damage == "other shape":
        np.save(file, expected[:5])
    else:
        file.write_bytes({"cut off": whole[:-1], "empty": b"", "text": b"not frames" * 9}[damage])
    with caplog.at_level(logging.WARNING, logger="tats_env.data"):
        for _ in range(2):
            assert np.array_equal(take(cache, videos[0]), expected)
    assert file.read_bytes() == whole
    assert len(caplog.records) == 1 and str(file) in caplog.text and "cannot be used" in caplog.text


# Where nothing can or may be written


def test_a_read_only_cache_is_used_and_left_untouched(
    videos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = take(FrameCache(tmp_path, PLENTY), videos[0])
    take(FrameCache(tmp_path, PLENTY), videos[1])
    aged(tmp_path)
    (tmp_path / "unfinished" / "left.1.over").touch()
    reader, broken = FrameCache(tmp_path, 0), FrameCache(tmp_path, 0)._file(videos[1], SCALED, "decord")
    assert broken is not None
    broken.write_bytes(b"damaged")
    before = everything(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "read_scaled", refuse)
        assert np.array_equal(take(reader, videos[0]), expected), "from the cache"
    for _ in range(2):
        for path in videos:
            assert np.array_equal(take(reader, path), read_frames(path, SIZE))
    assert everything(tmp_path) == before
    assert caplog.text.count("cannot be used") == 1


def test_a_folder_that_cannot_be_written_is_one_warning(
    videos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = FrameCache(tmp_path / "file" / "cache", PLENTY)
    for path in videos[:3]:
        assert np.array_equal(take(cache, path), read_frames(path, SIZE))
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text


def test_a_disk_that_fills_up_is_one_warning_and_leaves_nothing_half(videos: list[Path], tmp_path: Path) -> None:
    # A limit on the size of files fails a write midway, as a full disk does
    process = python(f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tats_env.data.reader import probe, read_frames
cache, videos = FrameCache(Path({str(tmp_path)!r}), {PLENTY}), [Path(p) for p in {list(map(str, videos))}]
infos = [probe(path) for path in videos]
cache.frames(videos[0], infos[0], {SIZE}, 0.5, "decord", np.arange(12))
resource.setrlimit(resource.RLIMIT_FSIZE, ({STORED // 2},) * 2)
for path, info in zip(videos, infos):
    assert np.array_equal(cache.frames(path, info, {SIZE}, 0.5, "decord", np.arange(12)), read_frames(path, {SIZE}))
""")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and said.count("cannot be written") == said.count("\n") == 1, said
    assert len(stored(tmp_path)) == 1 and not list((tmp_path / "unfinished").iterdir())


def test_a_lock_that_is_never_let_go_costs_one_wait_and_later_videos_are_stored(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LOCK_TIMEOUT", 2)
    from filelock import FileLock

    cache = FrameCache(tmp_path, PLENTY)
    with FileLock(tmp_path / ".lock"):
        start = time.monotonic()
        for path in videos:
            assert np.array_equal(take(cache, path), read_frames(path, SIZE))
        assert time.monotonic() - start < 8
    assert not stored(tmp_path) and not list((tmp_path / "unfinished").iterdir())
    monkeypatch.setattr(cache, "_pause_until", 0)
    take(cache, videos[0])
    assert len(stored(tmp_path)) == 1


def test_what_is_stored_may_be_read_by_others_as_the_umask_says(videos: list[Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        take(FrameCache(tmp_path, PLENTY), videos[0])
    finally:
        os.umask(before)
    assert stat.S_IMODE(stored(tmp_path)[0].stat().st_mode) == 0o640


# Videos that cannot be decoded


class FirstHalf(DecordReader):
    """A decoder that stumbles in the middle of every video. (decord itself reads ahead, and so stumbles by chance.)"""

    def frames(self, indices: np.ndarray) -> np.ndarray:
        if indices.max() >= 6:
            raise RuntimeError("stumbled")
        return super().frames(indices)


def test_a_video_of_which_only_a_part_decodes_gives_that_part_as_without_the_cache(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DECODERS, "first_half", FirstHalf)
    cache, info, early = FrameCache(tmp_path, PLENTY), probe(videos[0]), np.arange(6)
    for _ in range(2):
        found = cache.frames(videos[0], info, SIZE, 0.5, "first_half", early)
        assert np.array_equal(found, read_frames(videos[0], SIZE, early))
        with pytest.raises(UnreadableVideo, match="stumbled"):
            cache.frames(videos[0], info, SIZE, 0.5, "first_half", ALL)
    assert not stored(tmp_path) and not list((tmp_path / "unfinished").iterdir())


def test_a_missing_file_is_unreadable_though_it_is_stored(videos: list[Path], tmp_path: Path) -> None:
    path, cache = tmp_path / "video.mp4", FrameCache(tmp_path / "cache", PLENTY)
    path.write_bytes(videos[0].read_bytes())
    info = probe(path)
    cache.frames(path, info, SIZE, 0.5, "decord", ALL)
    path.unlink()
    with pytest.raises(UnreadableVideo, match="no such file"):
        cache.frames(path, info, SIZE, 0.5, "decord", ALL)


# In worker processes


def test_a_cache_travels_to_worker_processes(videos: list[Path], tmp_path: Path) -> None:
    cache, info = FrameCache(tmp_path, PLENTY), probe(videos[0])
    expected = take(cache, videos[0])
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(take(again, videos[0]), expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = [(path, info, SIZE, 0.5, "decord", ALL) for path in videos[:2]]
        found = pool.starmap(cache.frames, arguments)
    assert np.array_equal(found[0], expected) and len(stored(tmp_path)) == 2


def test_memory_and_open_files_stay_flat_over_many_reads(videos: list[Path], tmp_path: Path) -> None:
    cache, infos, rng = FrameCache(tmp_path, PLENTY), [probe(path) for path in videos], np.random.default_rng(0)
    process = psutil.Process()

    def read(times: int) -> tuple[int, int]:
        for _ in range(times):
            v = rng.integers(len(videos))
            cache.frames(videos[v], infos[v], SIZE, 0.5, "decord", rng.integers(12, size=4))
        return process.memory_info().rss, process.num_fds()

    before, after = read(200), read(2000)
    assert after[0] - before[0] < 8 << 20 and after[1] == before[1]
