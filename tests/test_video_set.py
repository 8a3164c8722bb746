"""Clips of a set: how frames are sampled, how crops follow a key, and that both come out the same streamed or not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from torch import Tensor

from tats_env.data import VideoSet, open_dataset, video_set
from tats_env.data.augment import crop_boxes
from tats_env.data.listing import Listing
from tats_env.data.miniature import list_tree, ssv2_tree
from tats_env.data.reader import read_frames

CPU = torch.device("cpu")
EVERY = np.arange(12)
START = np.arange(12) % 7
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real mp4, avi and webm files of 64 x 48 pixels and 24 frames, twelve for training."""
    return list_tree(tmp_path_factory.mktemp("list"))


def both(monkeypatch: pytest.MonkeyPatch, spec: str, **options: object) -> tuple[VideoSet, VideoSet]:
    """The set in memory, and streamed by two worker processes."""
    resident = open_dataset(spec, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    return resident, open_dataset(spec, workers=2, **options)  # type: ignore[arg-type]


def keys(seed: int = 0, count: int = 12) -> Tensor:
    return torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(seed))


def test_uniform_sampling_takes_a_frame_of_each_part_and_another_with_another_draw(spec: str) -> None:
    videos = open_dataset(spec, sampling="uniform", num_frames=8)
    whole = [read_frames(path, (32, 32)) for path in videos.paths]
    drawn = []
    for draw in range(40):
        clips = videos.clips(EVERY, np.full(12, draw), CPU).numpy()
        for clip, frames in zip(clips[:3], whole, strict=False):
            parts = frames.reshape(8, 3, 32, 32, 3)  # 24 frames: three to a part
            hits = [[np.array_equal(clip[t], parts[t, i]) for i in range(3)] for t in range(8)]
            assert all(any(row) for row in hits)
            drawn.append(tuple(row.index(True) for row in hits))
    assert {part for clip in drawn for part in clip} == {0, 1, 2} and len(set(drawn)) > 20
    middle = videos.test_clips(EVERY, 0, 1, CPU).numpy()
    assert np.array_equal(middle[0], whole[0][1::3])
    starts = videos.starts(EVERY, np.arange(12) + (1 << 40))
    assert len(set(starts.tolist())) == 12 and (starts >= 0).all()


def test_test_clips_are_spread_over_the_video_and_crops_over_its_longer_side(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for videos in both(monkeypatch, spec, num_frames=8, frame_stride=2):
        assert videos.lengths[0] == 24 and videos.clip_span == 15
        whole = read_frames(videos.paths[0], (32, 32))
        for nth, firsts in ((0, (0,)), (1, (4, 5)), (2, (9,))):
            clip = videos.test_clips(EVERY, nth, 3, CPU)[0].numpy()
            assert any(np.array_equal(clip, whole[first + 2 * np.arange(8)]) for first in firsts)
        for crop in (0, 1, 2):
            frames = read_frames(videos.paths[0], (32, 32), position=crop / 2)
            clip = videos.test_clips(EVERY, 0, 3, CPU, crop)[0].numpy()
            assert np.array_equal(clip, frames[2 * np.arange(8)])
        left, right = (videos.test_clips(EVERY, 0, 1, CPU, crop) for crop in (0, 2))
        assert not torch.equal(left, right)


@pytest.mark.parametrize("augment", ["multi_scale", "random_resized"])
def test_crops_follow_the_key_alone_in_memory_and_streamed(
    spec: str, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"augment": augment, "flip": True, "num_frames": 4}
    resident, streamed = both(monkeypatch, spec, **options)
    for videos in (resident, streamed):
        whole = videos.clips(EVERY, START, CPU, keys())
        assert whole.shape == (12, 4, 32, 32, 3)
        videos.prefetch(EVERY[::-1].copy(), START[::-1].copy(), CPU)
        assert torch.equal(videos.clips(EVERY[::-1].copy(), START[::-1].copy(), CPU, keys().flip(0)), whole.flip(0))
        assert torch.equal(videos.clips(EVERY[5:6], START[5:6], CPU, keys()[5:6]), whole[5:6])
        other = videos.clips(EVERY, START, CPU, keys(1))
        assert sum(torch.equal(a, b) for a, b in zip(whole, other, strict=True)) <= 2
        plain = videos.clips(EVERY, START, CPU)
        assert torch.equal(plain, videos.clips(EVERY, START, CPU)) and plain.shape == whole.shape
    assert torch.equal(resident.clips(EVERY, START, CPU, keys()), streamed.clips(EVERY, START, CPU, keys()))


def test_crops_are_taken_from_the_whole_width_of_the_video(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, streamed = both(monkeypatch, spec, augment="multi_scale", num_frames=1)
    assert resident._frames is None, "most crops would be decoded anew"
    place = streamed.positions(np.arange(1 << 40, (1 << 40) + 12))
    assert set(place) == {0.0, 0.25, 0.5, 0.75, 1.0}
    whole = np.stack([read_frames(p, (48, 64), np.array([5]), decoder="decord") for p in streamed.paths])
    clips = streamed.clips(EVERY, np.full(12, 5), CPU, None, np.linspace(0, 1, 12)).numpy()
    edges = [abs(clips[0].mean() - whole[0][:, :, :48].mean()), abs(clips[0].mean() - whole[0][:, :, 16:].mean())]
    assert edges[0] != edges[1]
    assert (resident.positions(np.arange(5)) != 0.5).any()
    assert (open_dataset(spec, num_frames=1).positions(np.arange(5)) == 0.5).all()


def test_a_video_that_fails_is_replaced_by_clips_of_the_others_own_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, frames in (("a/long.mp4", 60), ("a/short.mp4", 24), ("a/other.mp4", 24), ("a/last.mp4", 24)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture = ("-f", "lavfi", "-i", f"testsrc2=s=64x64:r=12:duration={frames / 12}", "-frames:v", str(frames))
        subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *picture, str(tmp_path / name)], check=True)
    listing = Listing([tmp_path / f"a/{n}.mp4" for n in ("long", "short", "other", "last")], [0] * 4, ["a"])
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    for sampling in ("dense", "uniform"):
        videos = VideoSet("a", "train", listing, num_frames=8, frame_stride=1, size=(32, 32), sampling=sampling)
        index, start = np.zeros(1, int), np.full(1, 50)
        content = listing.paths[0].read_bytes()
        listing.paths[0].unlink()
        for _ in ("in the call that fails", "and in the next"):
            clip = videos.clips(index, start, CPU)
            assert torch.equal(clip, videos.clips(np.ones(1, int), start, CPU))
        bits = np.arange(1000)
        assert videos.starts(np.zeros(1000, int), bits).max() <= 24 - 8 or sampling == "uniform"
        assert len(videos.bad_videos) == 1
        listing.paths[0].write_bytes(content)


@pytest.mark.parametrize("device", DEVICES)
def test_clips_that_share_a_video_are_decoded_and_sent_once_and_come_out_as_each_alone(
    spec: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = both(monkeypatch, spec, augment="multi_scale", flip=True, num_frames=4)
    sent: list[int] = []
    begin = streamed._stream.begin
    monkeypatch.setattr(
        streamed._stream, "begin", lambda requests, clips: sent.append(len(clips)) or begin(requests, clips)
    )
    video, start, key = EVERY.repeat(4)[::-1] % 5, START.repeat(4), keys(1, 48)
    distinct = len(set(zip(video.tolist(), start.tolist(), strict=True)))
    assert 12 <= distinct < 24
    streamed.prefetch(video, start, torch.device(device))
    clips = streamed.clips(video, start, torch.device(device), key).cpu()
    assert sent == [distinct]
    assert torch.equal(clips, resident.clips(video, start, CPU, key))
    for i in (0, 17, 47):
        assert torch.equal(clips[i], streamed.clips(video[[i]], start[[i]], CPU, key[[i]])[0])


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_what_plays_for_a_video_that_fails_does_not_depend_on_how_far_ahead_clips_are_decoded(
    tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, videos = both(monkeypatch, list_tree(tmp_path), num_frames=4)
    batches = [(EVERY[i : i + 4], START[i : i + 4]) for i in (0, 4, 2, 6, 3, 5, 1)]
    for video, start in batches[:ahead]:
        videos.prefetch(video, start, CPU)
    for failing in (5, 6):
        videos.paths[failing].unlink()
    played = []
    for i, batch in enumerate(batches):
        played.append(videos.clips(*batch, CPU))
        for video, start in batches[i + 1 : i + 1 + ahead]:
            videos.prefetch(video, start, CPU)
    assert [reason for _, reason in videos.bad_videos] == ["no such file"] * 2
    assert videos._plays[[5, 6]].tolist() == [7, 7]
    for (video, start), clips in zip(batches[1:], played[1:], strict=True):
        assert torch.equal(clips, videos.clips(np.where((video == 5) | (video == 6), 7, video), start, CPU))


def test_foreground_follows_the_crops_of_its_clips() -> None:
    videos = open_dataset("motion", num_videos=30, size=(64, 64), augment="multi_scale")
    video, start = np.arange(1, 15), np.zeros(14, int)
    key = keys(3, 14)
    masks = videos.foreground(video, start, CPU, key)
    assert masks.shape == (14, 16, 64, 64) and masks.dtype == torch.bool
    assert 0.01 < masks.float().mean() < 0.4
    boxes = crop_boxes("multi_scale", key, videos.canvas)
    whole = torch.from_numpy(videos._truth(videos.paths[1], videos.canvas))  # type: ignore[misc]
    top, left, height, width = boxes[0].tolist()
    rows = (top + (torch.arange(64) + 0.5) * height / 64).long()
    columns = (left + (torch.arange(64) + 0.5) * width / 64).long()
    assert (masks[0] != whole[:16][:, rows][:, :, columns]).float().mean() < 0.01


def test_left_and_right_are_never_swapped_where_they_are_the_label(tmp_path: Path) -> None:
    for spec in ("motion", ssv2_tree(tmp_path)):
        videos = open_dataset(spec, num_videos=12, flip=True, num_frames=2)
        assert not videos.augments
        assert torch.equal(videos.clips(EVERY, START, CPU, keys()), videos.clips(EVERY, START, CPU))


def test_environments_that_repeat_share_the_clip_and_nothing_else(spec: str) -> None:
    videos = open_dataset(spec, augment="multi_scale", num_frames=8)
    options = {"dataset": videos, "num_frames": 8, "mask_ratio": 0.75, "vectorization_mode": "vector_entry_point"}
    env = gym.make_vec("tats_env:TATSMasking-v0", num_envs=12, repeats=3, output="torch", **options)
    _, info = env.reset(seed=0)
    same = info["video_index"].view(4, 3), info["start_frame"].view(4, 3)
    assert all((x == x[:, :1]).all() for x in same) and len(set(same[0][:, 0].tolist())) > 1
    clips = env.unwrapped.task.clips
    assert not torch.equal(clips[0], clips[1]), "each has a crop of its own"
    env.step(torch.zeros(12, 64))
    visible = env.unwrapped.task.decision.visible
    assert not torch.equal(visible[0], visible[1])
    with pytest.raises(ValueError, match="must divide the number of environments, 12"):
        gym.make_vec("tats_env:TATSMasking-v0", num_envs=12, repeats=5, **options)
