"""A native decoder that crashes or hangs costs one video, wherever it does so; real processes and real files."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from deadly import Deadly

from experiments.data import data
from tats_env.data import list_videos, open_dataset, video_set, workers
from tats_env.data.index import index_file, probe_all
from tats_env.data.listing import Listing
from tats_env.data.miniature import place
from tats_env.data.reader import DECODERS, UnreadableVideo, read_frames
from tats_env.data.shards import list_shards, write_shards

TESTS = Path(__file__).parent
CRASHED, HUNG = "decoding it ends the process (exit code -11)", "decoding it takes too long"
SECONDS = 1.5
DEADLY = {"crash-opened": CRASHED, "hang-opened": HUNG, "crash-read": CRASHED, "hang-read": HUNG}


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Decord, but for files of certain names, with little patience."""
    monkeypatch.setitem(DECODERS, "decord", Deadly)
    monkeypatch.setattr(workers, "SECONDS", SECONDS)
    monkeypatch.setattr(workers, "FRAMES_A_SECOND", 1000)
    monkeypatch.setenv("TATS_CACHE", str(tmp_path / "cache"))


def videos(folder: Path, names: list[str]) -> list[Path]:
    return [place(folder / f"{name}.mp4", i) for i, name in enumerate(names)]


def listed(folder: Path) -> str:
    """A data set of 16 good videos and four deadly ones; for validation eight and one."""
    for split, names in (
        ("train", [*map(str, range(8)), *DEADLY, *map(str, range(8, 16))]),
        ("val", ["crash-read", *map(str, range(8))]),
    ):
        paths = videos(folder / split, names)
        (folder / f"{split}.csv").write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(paths)))
    return f"list:{folder}"


def left(pid: int, folder: Path | None = None) -> set[str]:
    """Shared memory of a process, and the processes that decode for it: its children, or once it is gone by folder."""
    found = {path.name for path in Path("/dev/shm").glob(f"tats-{pid}-*")}
    for process in psutil.process_iter() if folder else psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "popen_loky" in " ".join(process.cmdline()) and (folder is None or process.cwd() == str(folder)):
                found.add(f"process {process.pid}")
    return found


def nothing_is_left(pid: int, folder: Path | None = None, before: frozenset[str] = frozenset()) -> bool:
    """Whether all that came after ``before`` is gone in a while."""
    until = time.monotonic() + 10
    while left(pid, folder) - before and time.monotonic() < until:
        time.sleep(0.1)
    return not left(pid, folder) - before


@pytest.mark.usefixtures("deadly")
@pytest.mark.parametrize("limit", [2 << 30, 0], ids=["memory", "streamed"])
def test_a_decoder_that_crashes_or_hangs_costs_one_video(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = frozenset(left(os.getpid()))
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", limit)
    opened = open_dataset(listed(tmp_path), workers=3)
    every = np.arange(len(opened))
    clips = opened.clips(every, np.zeros(len(every), int), torch.device("cpu")).numpy()
    assert {Path(path).stem: reason for path, reason in opened.bad_videos} == DEADLY
    assert len(opened) == (16 if limit else 18), "those that fail when streaming are replaced"
    for v, clip in enumerate(clips):
        stem = opened.paths[v].stem
        good = opened.paths[v] if stem not in DEADLY else opened.paths[v].with_stem("8")  # the next one
        assert np.array_equal(clip, read_frames(good, (32, 32), np.arange(16)))
    remembered = json.loads(index_file(list_videos(f"list:{tmp_path}").paths).read_text())["files"]
    assert remembered["crash-opened.mp4"][2] == CRASHED and "hang-opened.mp4" not in remembered, "time-outs may pass"
    del opened
    gc.collect()
    assert nothing_is_left(os.getpid(), before=before)


@pytest.mark.parametrize(
    "limit", [pytest.param(2 << 30, id="memory"), pytest.param(0, id="streamed", marks=pytest.mark.slow)]
)
def test_a_run_ends_well_and_names_the_videos_that_crash_or_hang(limit: int, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from deadly import Deadly\n"
        "from experiments.cli import main\n"
        "from tats_env.data import video_set, workers\n"
        "from tats_env.data.reader import DECODERS\n"
        f"DECODERS['decord'], video_set.MEMORY_LIMIT = Deadly, {limit}\n"
        f"workers.SECONDS, workers.FRAMES_A_SECOND = {SECONDS}, 1000\n"
        "sys.exit(main())\n"
    )
    options = ["--loader.workers", "3", "--steps", "8", "--batch-size", "8", "--log-interval", "4"]
    options += ["--evaluate.baseline", "false", "--evaluate.pictures", "false", "--evaluate.tasks"]
    options += ["--evaluate.clips", "32"] if limit else ["--evaluate.clips", "64"]
    run = subprocess.Popen(
        [sys.executable, "main.py", "run", "quickstart", "--data", listed(tmp_path / "videos"), *options],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "TATS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    said = run.communicate(timeout=200)[1]
    assert run.returncode == 0, said
    (folder,) = (tmp_path / "runs").iterdir()
    bad = [line.split("\t") for line in (folder / "bad_videos.txt").read_text().splitlines()]
    assert sorted((Path(path).stem, reason) for path, reason in bad) == sorted(
        [*DEADLY.items(), ("crash-read", CRASHED)]
    )
    assert "left out" in said or not limit
    assert nothing_is_left(run.pid, tmp_path)


@pytest.mark.usefixtures("deadly")
def test_a_check_and_a_packing_report_the_video_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["0", "crash-opened", "1", "crash-read", "2"]
    for split in ("train", "val"):
        paths = videos(tmp_path / split, names)
        (tmp_path / f"{split}.csv").write_text("".join(f"{path} 0\n" for path in paths))
    assert data(["check", f"list:{tmp_path}", "--decode", "--json", str(tmp_path / "report.json")]) == 0
    for report in json.loads((tmp_path / "report.json").read_text())["splits"].values():
        assert report["videos"] == 3
        assert [(Path(p).stem, why) for p, why in report["unreadable"].items()] == [("crash-opened", CRASHED)]
        assert [(Path(p).stem, why) for p, why in report["undecodable"].items()] == [("crash-read", CRASHED)]
    bad = write_shards(Listing(paths, [0] * 5, ["a"]), tmp_path / "shards", "train", (16, 16), workers=2)
    assert [(error.path.stem, error.reason) for error in bad] == [("crash-opened", CRASHED), ("crash-read", CRASHED)]
    packed = list_shards(tmp_path / "shards", "train").paths
    assert [path.name for path in packed] == ["000000.npy", "000002.npy", "000004.npy"]
    assert np.array_equal(read_frames(packed[1], (16, 16)), read_frames(paths[2], (16, 16)))
    assert sorted(p.name for p in (tmp_path / "shards" / "train").iterdir()) == [".lock", "shard-000000.tar"]


@pytest.mark.usefixtures("deadly")
def test_a_process_that_is_killed_by_others_is_no_verdict_to_remember(tmp_path: Path) -> None:
    paths = videos(tmp_path, ["0", "killed-opened", "exit-opened"])
    found = probe_all(paths, workers=1)
    reasons = [info.reason for info in found if isinstance(info, UnreadableVideo)]
    assert reasons == ["decoding it ends the process (exit code -9)", HUNG]
    assert list(json.loads(index_file(paths).read_text())["files"]) == ["0.mp4"]
    DECODERS["decord"] = Deadly.__base__  # the fixture puts it right
    assert not any(isinstance(info, UnreadableVideo) for info in probe_all(paths, workers=1)), "what others stand by"


def test_idle_processes_serve_the_next_user_and_then_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "STAND_BY", 60.0)

    def pids() -> set[int]:
        items = [(tmp_path, 10.0)] * 8
        found = workers.on_all_cores(lambda item: (time.sleep(0.02), os.getpid())[1], items, "", False, 2, lambda x: x)
        return {pid for pid in found if isinstance(pid, int)}

    first = pids()
    assert pids() == first and os.getpid() not in first
    monkeypatch.setattr(workers, "STAND_BY", 0.0)
    assert pids() == first
    assert not psutil.wait_procs([psutil.Process(pid) for pid in first if psutil.pid_exists(pid)], timeout=10)[1]
