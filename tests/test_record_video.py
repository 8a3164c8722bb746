"""Gymnasium's RecordVideo on the environments: what the mp4 that it writes holds."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from decord import VideoReader
from gymnasium.wrappers import RecordVideo
from gymnasium.wrappers.vector import RecordVideo as RecordVideoVector
from imageio_ffmpeg import get_ffmpeg_exe

import tats_env  # noqa: F401 (registers the environments)
from tats_env.rendering import GAP, HIDDEN_GREY, LABEL_PIXELS

pytest.importorskip("moviepy", reason="Gymnasium writes videos with it")
pytestmark = pytest.mark.filterwarnings("ignore:.*(Overwriting existing videos|autoreset mode is same-step)")

OPTIONS: dict[str, Any] = {"num_videos": 5, "device": "cpu", "render_mode": "rgb_array", "num_frames": 6}
COLUMNS = 3  # tubelets of 2 frames


def frames_of(path: Path) -> np.ndarray:
    """[n, height, width, 3]"""
    return VideoReader(str(path))[:].asnumpy()


def shown(picture: np.ndarray, size: int = 64) -> np.ndarray:
    """Which of 16 tokens in each column are no blank, in the second of a picture's rows: bool [columns, 16]."""
    row = picture[size + GAP : 2 * size + GAP].astype(int)
    tiles = [row[:, LABEL_PIXELS + c * (size + GAP) :][:, :size] for c in range(COLUMNS)]
    tokens = np.stack(tiles).reshape(COLUMNS, 4, size // 4, 4, size // 4, 3)
    return (abs(tokens - HIDDEN_GREY).max(-1) > 24).mean((2, 4)).reshape(COLUMNS, 16) > 0.3


def test_a_video_of_an_episode_shows_the_clip_and_then_the_decision(tmp_path: Path) -> None:
    env = RecordVideo(gym.make("TATSMasking-v0", **OPTIONS), str(tmp_path), episode_trigger=lambda episode: True)
    visible, clips = [], []
    for seed in range(2):
        env.reset(seed=seed)
        clips.append(env.unwrapped.task.clips[0].numpy()[::2].repeat(2, 1).repeat(2, 2))
        visible.append(env.step(env.action_space.sample())[4]["visible"])
    env.close()
    assert {path.name for path in tmp_path.iterdir()} == {f"rl-video-episode-{i}.mp4" for i in range(2)}
    for i in range(2):
        before, after = frames_of(tmp_path / f"rl-video-episode-{i}.mp4")
        assert before.shape == (4 * (64 + GAP) - GAP, LABEL_PIXELS + COLUMNS * (64 + GAP) - GAP, 3)
        for picture in (before, after):  # within what H.264 makes of it
            first = picture[:64, LABEL_PIXELS : LABEL_PIXELS + 64].astype(int)
            assert abs(first - clips[i][0]).mean() < 8
        assert not shown(before).any()
        assert np.array_equal(shown(after).flatten(), visible[i])


def test_a_video_in_rounds_shows_the_mask_as_it_grows(tmp_path: Path) -> None:
    env = RecordVideo(gym.make("TATSMaskingSequential-v0", rounds=4, mask_ratio=0.5, **OPTIONS), str(tmp_path))
    env.reset(seed=0)
    visible = [env.step(env.action_space.sample())[4]["visible"] for _ in range(4)]
    env.close()
    frames = frames_of(tmp_path / "rl-video-episode-0.mp4")
    assert [int(shown(frame).sum()) for frame in frames] == [0, 6, 12, 18, 24]
    assert all(np.array_equal(shown(frame).flatten(), mask) for frame, mask in zip(frames[1:], visible, strict=True))


def test_a_vectors_video_of_some_length_shows_every_environments_decisions(tmp_path: Path) -> None:
    env = gym.make_vec("TATSMasking-v0", 4, "vector_entry_point", **OPTIONS)
    env = RecordVideoVector(env, str(tmp_path), episode_trigger=lambda episode: episode == 0, video_length=3)
    env.reset(seed=0)
    visible = [env.step(env.action_space.sample())[4]["visible"] for _ in range(4)]
    env.close()
    frames = frames_of(tmp_path / "rl-video-episode-0.mp4")
    assert len(frames) == 4
    tall, wide = (frames.shape[1] // (n := env.frame_rows)), frames.shape[2] // env.frame_cols
    assert n * env.frame_cols == 4
    for i in range(4):
        y, x = i // env.frame_cols * tall, i % env.frame_cols * wide
        pictures = frames[:, y : y + tall, x : x + wide]
        assert not shown(pictures[0]).any()
        assert all(np.array_equal(shown(pictures[t + 1]).flatten(), visible[t][i]) for t in range(3))


def test_a_video_of_an_odd_size_plays_everywhere(tmp_path: Path) -> None:
    env = gym.make("TATSMasking-v0", **{**OPTIONS, "size": 65, "patch_size": 13, "num_frames": 2})
    with RecordVideo(env, str(tmp_path)) as recorded:
        recorded.reset(seed=0)
        recorded.step(recorded.action_space.sample())
        picture = recorded.render()
    path = tmp_path / "rl-video-episode-0.mp4"
    assert frames_of(path).shape == (2, *picture.shape)
    said = subprocess.run([get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    assert "Video: h264" in said and "yuv420p" in said  # what browsers and phones can show
