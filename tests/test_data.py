from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from tats_env.data import DataError, VideoSet, list_videos, motion, open_dataset, video_set, write_bad_videos
from tats_env.data.folder import EXTENSIONS, list_folder
from tats_env.data.reader import UnreadableVideo, probe, read_frames

CPU = torch.device("cpu")
ROOT = str(Path(motion.__file__).parents[2])
CLASSES = len(motion.CLASS_NAMES)


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process that finds the package through sys.path only."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); {code}"
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", env={**keep, **environment},
    )  # fmt: skip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TATS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def rendered(cache: Path) -> VideoSet:
    return open_dataset("motion", size=(64, 64))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real video of 48 frames, 96 x 64, with its index at the front."""
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=24", "-frames:v", "48", "-pix_fmt", "yuv420p", "-g", "8",
           "-movflags", "faststart", path)  # fmt: skip
    return path


def spread(good: Path, folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(good.read_bytes())
    return folder


# The rendered motion set


def test_decoded_files_are_the_frames_that_were_rendered(rendered: VideoSet) -> None:
    assert len(rendered) == 60 and set(rendered.lengths) == {motion.FRAMES}
    video = np.arange(0, 60, 4)
    clips = rendered.clips(video, np.full(15, 24), CPU).numpy()
    for v, clip in zip(video, clips, strict=True):
        assert psnr(clip, motion.frames(0, "train", int(v))[24:40]) > 30


def test_a_video_depends_on_nothing_but_seed_split_and_index(rendered: VideoSet, tmp_path: Path) -> None:
    reference = motion.frames(0, "train", 17)
    assert np.array_equal(reference, motion.frames(0, "train", 17))
    for other in ((1, "train", 17), (0, "validation", 17), (0, "train", 32)):
        assert psnr(reference, motion.frames(*other)) < 20
    # The files too: here videos 0, 1 and 2 are neighbours in the encoder, in the fixture 0 and 1 never met
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TATS_CACHE", str(tmp_path))
        again = motion.render(0, "train", 3)
    for ours, theirs in zip(again, rendered.paths[:3], strict=True):
        assert ours != theirs
        assert np.array_equal(read_frames(ours, (64, 64)), read_frames(theirs, (64, 64)))


def test_more_videos_begin_with_the_same_files_and_render_only_the_rest(cache: Path) -> None:
    few = motion.render(3, "validation", 6)
    before = [path.stat().st_mtime_ns for path in few]
    many = motion.render(3, "validation", 9)
    assert many[:6] == few and [path.stat().st_mtime_ns for path in few] == before
    assert all(path.stat().st_mtime_ns > max(before) for path in many[6:])
    assert set(few[0].parent.iterdir()) - {few[0].parent / ".lock"} == set(many), "nothing else is left in the folder"


def test_every_rendered_file_has_40_frames_and_a_key_frame_every_8(rendered: VideoSet) -> None:
    import decord

    for path in rendered.paths[::10]:
        video = decord.VideoReader(str(path), ctx=decord.cpu(0))
        assert len(video) == 40 and video.get_key_indices() == [0, 8, 16, 24, 32]
        assert video.get_avg_fps() == 24


def test_foreground_is_where_the_video_differs_from_itself_without_sprite() -> None:
    for index in range(1, 31):
        picture = motion.frames(0, "train", index).astype(float)
        bare = np.clip(motion.background(motion.scene(0, "train", index)), 0, 255)
        difference = np.abs(picture - bare).max(axis=-1)
        mask = motion.foreground_masks(0, "train", index, (64, 64))
        if index % CLASSES == 0:  # static
            assert (difference > 30).any() and not mask.any()
            continue
        near = np.any([np.roll(mask, (y, x), axis=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
        assert difference[~near].max() < 10, "beyond the sprite's edge (but for the finest tips) is background"
        assert (difference[mask] > 10).mean() > 0.95
        assert mask.any(axis=(1, 2)).all(), "the sprite never leaves the picture"


def test_foreground_follows_the_clips_through_scaling_and_cropping(rendered: VideoSet) -> None:
    fine = motion.foreground_masks(0, "train", 8, (64, 64))
    half = motion.foreground_masks(0, "train", 8, (32, 32))
    shares = fine.reshape(40, 32, 2, 32, 2).mean(axis=(2, 4))
    assert half[shares >= 0.75].all() and not half[shares <= 0.25].any()
    assert half.mean() == pytest.approx(fine.mean(), rel=0.03)
    assert np.array_equal(motion.foreground_masks(0, "train", 8, (32, 64)), fine[:, 16:48])
    assert np.array_equal(motion.foreground_masks(0, "train", 8, (128, 128)), fine.repeat(2, 1).repeat(2, 2))
    wide = open_dataset("motion", size=(16, 48), num_videos=15)
    video, start = np.array([8, 0, 3]), np.array([0, 5, 30])
    found = wide.foreground(video, start, CPU)
    assert found.shape == (3, 16, 16, 48) and found.dtype == torch.bool
    for b, (v, s) in enumerate(zip(video, start, strict=True)):
        truth = motion.foreground_masks(0, "train", int(v), (16, 48))
        assert np.array_equal(found[b].numpy(), truth[(s + np.arange(16)) % 40])
    assert not found[1].any() and found[0].any()


def test_labels_are_balanced_in_every_prefix(rendered: VideoSet) -> None:
    assert len(set(rendered.class_names)) == CLASSES >= 12
    assert np.array_equal(rendered.labels, np.arange(60) % CLASSES)
    assert rendered.labels.dtype == rendered.lengths.dtype == np.int64


def single_frame_features(index: int, frame: int) -> np.ndarray:
    """What can be seen in one frame: all that the scene draws, and where and how the sprite is then."""
    s = motion.scene(0, "train", index)
    y, x = 2 * np.pi * s.centre[frame] / motion.SIZE
    place = [np.sin(y), np.cos(y), np.sin(x), np.cos(x), np.sin(s.angle[frame]), np.cos(s.angle[frame])]
    pattern = [s.pattern == name for name in ("stripes", "checks")]
    looks = [*s.tint, *s.colours.ravel(), s.outline.mean(), s.outline.std(), *pattern, np.abs(s.waves).mean()]
    return np.array([*looks, *place, np.log(s.radius[frame]), *s.pan[-1]])


def test_a_single_frame_says_nothing_about_the_class() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([single_frame_features(i, rng.integers(40)) for i in range(1500)])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    for power in (1, 2):  # means and spreads of each class against those of all
        values = features**power
        z = (values.reshape(100, CLASSES, -1).mean(axis=0) - values.mean(axis=0)) / values.std(axis=0) * 10
        assert np.abs(z).max() < 4.5


def track_features(index: int, first: int) -> np.ndarray:
    """The sprite's own motion in a window of 16 frames, the camera's taken off."""
    s = motion.scene(0, "validation", index)
    steps = (np.diff(s.centre - s.pan, axis=0)[first : first + 15] + 32) % 64 - 32
    path = np.cumsum(steps, axis=0)
    swept = path[:-1, 1] @ steps[1:, 0] - path[:-1, 0] @ steps[1:, 1]  # twice the area, clockwise
    net = path[-1] / (np.abs(steps).sum() + 1e-6)
    moves = np.abs(steps).sum(axis=0) > 5
    turned, grown = (np.sign(round(x[first + 15] - x[first], 6)) for x in (s.angle, s.radius))
    return np.array([*net, *moves, turned, grown, np.tanh(swept / 20)])


def test_the_class_can_be_read_off_the_track_in_any_window() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([track_features(i, rng.integers(25)) for i in range(900)])
    features /= features.std(axis=0)
    centroids = features[:450].reshape(30, CLASSES, -1).mean(axis=0)
    distance = np.square(features[450:, None] - centroids).sum(axis=-1)
    hits = distance.argmin(axis=1) == np.arange(450, 900) % CLASSES
    assert hits.mean() > 0.95


def test_two_processes_may_render_into_one_cache_at_once(tmp_path: Path) -> None:
    code = "from tats_env.data import motion; print(len(motion.render(0, 'train', 12)))"
    folder = tmp_path / motion.VERSION / "0" / "train"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        both = [python(code, TATS_CACHE=str(tmp_path)) for _ in range(2)]
        time.sleep(1)
        assert [path.name for path in folder.iterdir()] == [".lock"], "whoever comes second waits"
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert said == [["12"], ["12"]]
    files = sorted(folder.glob("[!.]*"))
    assert [path.name for path in files] == [f"{i:05d}.mp4" for i in range(12)]
    assert all(len(read_frames(path, (64, 64))) == 40 for path in files)


def test_a_killed_render_leaves_whole_files_only_and_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / motion.VERSION / "0" / "train"
    code = "from tats_env.data import motion; motion.render(0, 'train', 150)"
    process = python(code, TATS_CACHE=str(tmp_path))
    while not list(folder.glob("*.mp4")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = list(folder.glob("*.mp4"))
    assert 0 < len(left) < 150
    assert all(len(read_frames(path, (32, 32))) == 40 for path in left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TATS_CACHE", str(tmp_path))
        paths = motion.render(0, "train", len(left) + 4)
    assert all(probe(path) == (40, 64, 64, 24) for path in paths)


def test_a_failing_encoder_is_reported_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TATS_CACHE", str(tmp_path))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with pytest.raises(DataError, match="ffmpeg ended with code 1"):
        open_dataset("motion", num_videos=3)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TATS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set TATS_CACHE"):
        open_dataset("motion")


def test_the_renderer_loads_no_torch() -> None:
    said = python("import tats_env.data.motion; print('torch' in sys.modules)").communicate()[0]
    assert said == "False\n"


# Clips


def test_a_clip_is_every_strideth_frame_and_short_videos_are_looped(good: Path, tmp_path: Path) -> None:
    videos = open_dataset(f"folder:{spread(good, tmp_path, ['a.mp4', 'b.mp4'])}", num_frames=8, frame_stride=11)
    assert videos.clip_span == 78 > videos.lengths[0] == 48
    frames = read_frames(videos.paths[0], (32, 32))
    clips = videos.clips(np.array([0, 0]), np.array([3, 100]), CPU)
    assert clips.dtype == torch.uint8 and clips.shape == (2, 8, 32, 32, 3)
    for clip, start in zip(clips.numpy(), (3, 100), strict=True):
        assert np.array_equal(clip, frames[(start + 11 * np.arange(8)) % 48])


def stream(monkeypatch: pytest.MonkeyPatch, *arguments: str, **options: int | str | tuple[int, int]) -> VideoSet:
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    videos = open_dataset(*arguments, **options)  # type: ignore[arg-type]
    assert videos._frames is None
    return videos


def test_streaming_gives_the_same_clips_as_memory(rendered: VideoSet, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = stream(monkeypatch, "motion", size=(64, 64))
    rng = np.random.default_rng(0)
    for ahead in (False, True, True):
        video, start = rng.integers(0, 60, 16), rng.integers(0, 40, 16)
        video[3], start[3] = video[2], start[2]
        if ahead:
            streamed.prefetch(rng.integers(0, 60, 4), rng.integers(0, 25, 4), CPU)  # a hint that nobody takes up
            streamed.prefetch(video, start, CPU)
        assert torch.equal(streamed.clips(video, start, CPU), rendered.clips(video, start, CPU))
        assert torch.equal(streamed.foreground(video, start, CPU), rendered.foreground(video, start, CPU))


def test_what_was_said_to_come_next_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, video = stream(monkeypatch, "motion", size=(64, 64)), np.arange(10)
    taken: list[int] = []
    begin = streamed._stream.begin
    monkeypatch.setattr(
        streamed._stream, "begin", lambda requests, clips: taken.append(len(requests)) or begin(requests, clips)
    )
    streamed.prefetch(video, video, CPU)
    streamed.clips(video, video, CPU)
    assert taken == [10]
    streamed.clips(video, video, CPU)
    assert taken == [10, 10], "what was taken is dropped"


def test_a_file_that_vanishes_while_streaming_is_replaced_by_the_next_good_one(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ffmpeg("-i", good, "-vf", "negate", tmp_path / "negative.mp4")
    spread(good, tmp_path / "videos", [f"a/{i}.mp4" for i in range(4)])
    spread(tmp_path / "negative.mp4", tmp_path / "videos", [f"b/{i}.mp4" for i in range(4)])
    videos = stream(monkeypatch, f"folder:{tmp_path / 'videos'}", num_frames=4)
    every, first = np.arange(len(videos)), np.zeros(len(videos), int)
    whole, labels = videos.clips(every, first, CPU), videos.labels.copy()
    last_a = int(np.flatnonzero(labels == 0)[-1])
    assert labels[last_a + 1] == 1
    videos.paths[last_a].unlink()
    with caplog.at_level(logging.WARNING, logger="tats_env.data"):
        for start in (first, first + 7):
            videos.prefetch(every, start, CPU)
            clips = videos.clips(every, start, CPU)
            assert torch.equal(clips[last_a], clips[last_a + 1])
    others = np.delete(every, last_a)
    assert torch.equal(videos.clips(every, first, CPU)[others], whole[others])
    assert videos.labels[last_a] == 1 and np.array_equal(videos.labels[others], labels[others])
    assert videos.bad_videos == [(str(videos.paths[last_a]), "no such file")]
    assert len(caplog.records) == 1 and "plays in its place" in caplog.text
    for path in videos.paths:
        path.unlink(missing_ok=True)
    with pytest.raises(DataError, match="files can't be decoded any more"):
        videos.clips(every, first + 1, CPU)


def test_foreground_of_real_videos_is_refused(good: Path, tmp_path: Path) -> None:
    videos = open_dataset(f"folder:{spread(good, tmp_path, ['a.mp4', 'b.mp4'])}", num_frames=2)
    assert not videos.has_foreground
    with pytest.raises(DataError, match="rendered videos only"):
        videos.foreground(np.array([0]), np.array([0]), CPU)


def test_a_copied_specification_shares_the_frames(rendered: VideoSet) -> None:
    assert copy.deepcopy({"dataset": rendered})["dataset"] is rendered


# Files and folders


@pytest.mark.parametrize("size", [(32, 32), (30, 30), (17, 31), (64, 40), (48, 48), (100, 20)])
@pytest.mark.parametrize("shape", ["96x64", "64x96", "97x51", "64x64"])
def test_frames_are_scaled_to_cover_and_cropped_at_the_centre(
    shape: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "gradient.mkv"
    ffmpeg("-f", "lavfi", "-i", f"gradients=s={shape}:c0=red:c1=blue:x0=0:y0=0:x1=96:y1=64:n=2:speed=0.0001",
           "-frames:v", "2", "-c:v", "ffv1", "-pix_fmt", "bgr0", path)  # fmt: skip
    width, height = (int(n) for n in shape.split("x"))
    assert probe(path)[:3] == (2, height, width)
    scale = max(size[0] / height, size[1] / width)
    top, left = (height - size[0] / scale) / 2, (width - size[1] / scale) / 2
    native = Image.fromarray(read_frames(path, (height, width))[0])
    assert np.ptp(native) > 150
    box = (left, top, width - left, height - top)
    expected = np.asarray(native.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)).astype(float)
    found = read_frames(path, size, np.array([1, 0, 1]))
    assert np.array_equal(found[0], found[2])
    # Half a pixel of the scaled picture is what rounding may shift it by
    slope = max(np.abs(np.diff(expected, axis=axis)).max() for axis in (0, 1))
    assert np.abs(found[1] - expected).max() <= slope + 3


def test_classes_are_the_first_level_folders(tmp_path: Path) -> None:
    videos = ("b/deep/er/1.MP4", "a/1.webm", "a/2.avi", "loose.mkv")
    for name in (*videos, "a/notes.txt", "c/thumb.jpg", ".b/x.mp4", "a/._1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)  # a link that goes round in circles
    found = {}
    for split in ("train", "validation"):
        listing = list_folder(tmp_path, split)
        paths, labels, names = listing.paths, listing.labels, listing.class_names
        assert names == ["a", "b"]
        found.update({str(path.relative_to(tmp_path)): label for path, label in zip(paths, labels, strict=True)})
    assert found == {"a/1.webm": 0, "a/2.avi": 0, "b/deep/er/1.MP4": 1, "loose.mkv": -1}


def test_the_split_is_disjoint_complete_stratified_and_the_same_in_every_place(tmp_path: Path) -> None:
    names = [f"{c}/{i}.mp4" for c, n in (("big", 20), ("five", 5), ("x", 1), ("y", 3)) for i in range(n)]
    found = []
    for root in (tmp_path / "here", tmp_path / "there"):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        splits = [[str(p.relative_to(root)) for p in list_folder(root, s).paths] for s in ("train", "validation")]
        found.append(splits)
    assert found[0] == found[1]
    train, validation = found[0]
    assert sorted(train + validation) == sorted(names)
    held_out = [name.split("/")[0] for name in validation]
    assert (held_out.count("big"), held_out.count("five"), len(validation)) == (4, 1, 6)


def test_num_videos_is_a_choice_by_seed_with_every_class_still_named(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}" / f"{i}.mp4").touch()
    name = f"folder:{tmp_path}"
    picks = [list_videos(name, "train", 5, seed).paths for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert set(picks[0]) < set(list_videos(name, "train").paths) and len(set(picks[0])) == 5
    assert list_videos(name, "train", 1).class_names == ["0", "1"]
    assert len(list_videos(name, "train", 1000).paths) == 32


def test_one_video_serves_for_both_splits_with_a_warning(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spread(good, tmp_path, ["only.mp4"])
    both = [open_dataset(f"folder:{tmp_path}", split=split, num_frames=2) for split in ("train", "validation")]
    assert both[0].paths == both[1].paths == [tmp_path / "only.mp4"] and both[0].labels.tolist() == [-1]
    assert "both training and validation" in caplog.text


def break_file(kind: str, good: Path, path: Path) -> None:
    whole = good.read_bytes()
    payload = whole.find(b"mdat") + 4
    if kind == "audio only":
        ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)
    elif kind == "wav renamed":
        ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-f", "wav", path)
    else:
        path.write_bytes({
            "empty": b"",
            "text": b"I am not a video.\n" * 50,
            "no index": whole[payload:],
            "truncated": whole[: payload + (len(whole) - payload) // 2],
            "wiped": whole[:payload] + bytes(len(whole) - payload),
        }[kind])  # fmt: skip


BROKEN = ("empty", "text", "no index", "truncated", "wiped", "audio only", "wav renamed")


@pytest.fixture(scope="module")
def partly_broken(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partly_broken")
    spread(good, folder, [f"good/{i}.mp4" for i in range(20)])
    for kind in BROKEN:
        (folder / kind).mkdir()
        break_file(kind, good, folder / kind / "broken.mp4")
    (folder / "good" / "README.txt").write_text("not a video, and not said to be one")
    return folder


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_unreadable_for_a_reason_of_one_line(kind: str, partly_broken: Path) -> None:
    path = partly_broken / kind / "broken.mp4"
    with pytest.raises(UnreadableVideo) as caught:
        read_frames(path, (32, 32))
    assert caught.value.path == path and str(path) in str(caught.value)
    reason = caught.value.reason
    assert reason and "\n" not in reason and "/github/workspace" not in reason
    if kind in ("text", "no index"):
        assert "cannot be opened as a video" in reason
    elif kind in ("audio only", "wav renamed"):
        assert "no video stream" in reason


def test_flipped_bits_never_crash(good: Path, tmp_path: Path) -> None:
    whole = bytearray(good.read_bytes())
    payload = whole.find(b"mdat") + 4
    rng = np.random.default_rng(0)
    for flips in (0, 3, 30, 300, 3000):
        damaged = whole.copy()
        for at in rng.integers(payload, len(whole), flips):
            damaged[at] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.mp4").write_bytes(damaged)
        try:
            assert read_frames(tmp_path / "flipped.mp4", (32, 32)).shape == (48, 32, 32, 3)
        except UnreadableVideo:
            assert flips


def test_broken_files_are_left_out_logged_once_and_written_down(
    partly_broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [open_dataset(f"folder:{partly_broken}", split=split, num_frames=4) for split in ("train", "validation")]
    assert len(sets[0]) + len(sets[1]) == 20
    assert sorted(Path(path).parent.name for s in sets for path, _ in s.bad_videos) == sorted(BROKEN)
    assert len(caplog.records) == 2, "one warning an opened set"
    for s in sets:
        assert {s.class_names[label] for label in s.labels} == {"good"}
        clips = s.clips(np.arange(len(s)), np.zeros(len(s), int), CPU)
        assert torch.equal(clips, clips[:1].expand_as(clips)), "rows of good videos are not mixed up by the bad"
        write_bad_videos(tmp_path, s)
        written = (tmp_path / "bad_videos.txt").read_text()
        assert written == "".join(f"{path}\t{reason}\n" for path, reason in s.bad_videos)


def test_nothing_is_written_down_if_nothing_is_bad(rendered: VideoSet, tmp_path: Path) -> None:
    write_bad_videos(tmp_path, rendered)
    assert not list(tmp_path.iterdir())


def test_more_than_half_broken_is_an_error_that_lists_ten(good: Path, tmp_path: Path) -> None:
    spread(good, tmp_path, [f"{i}.mp4" for i in range(8)])
    for i in range(32):
        (tmp_path / f"x{i}.mp4").write_text("text")
    with pytest.raises(DataError, match="files cannot be decoded") as caught:
        open_dataset(f"folder:{tmp_path}")
    assert str(caught.value).count("cannot be opened as a video") == 10 and " more" in str(caught.value)


def test_what_cannot_be_opened_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for spec, options, says in (
        ("ssv2", {}, "write ssv2:/path/to/it"),
        ("folder:", {}, "write folder:/path/to/it"),
        ("motion:x", {}, "write motion"),
        ("moton", {}, "did you mean motion?"),
        ("/videos", {}, "did you mean folder:/videos?"),
        ("ucf101:/x?fold=2", {}, "has no option 'fold'; it has split"),
        ("motion", {"sampling": "sparse"}, "dense, uniform"),
        ("motion", {"augment": "crop"}, "none, multi_scale, random_resized"),
        ("motion", {"split": "test"}, "train, validation"),
        (f"folder:{tmp_path / 'none'}", {}, "is not a folder"),
        (f"folder:{tmp_path}", {}, " ".join(EXTENSIONS)),
        ("motion", {"num_frames": 0}, "num_frames=0"),
        ("motion", {"frame_stride": 0}, "frame_stride=0"),
        ("motion", {"num_videos": 0}, "num_videos=0"),
        ("motion", {"size": (32, 0)}, r"size=(32, 0)"),
        ("motion", {"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(DataError) as caught:
            open_dataset(spec, **options)  # type: ignore[arg-type]
        assert says in str(caught.value)
