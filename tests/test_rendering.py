"""Pictures of decisions: their size, their rows, and what each row shows."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import tats_env  # noqa: F401 (registers the environment)
from tats_env.grid import TokenGrid
from tats_env.rendering import GAP, LABEL_PIXELS, animation, decision_rows, strip


def make(**options: Any) -> Any:
    return gym.make("TATSMasking-v0", num_videos=5, device="cpu", render_mode="rgb_array", **options)


def stepped(**options: Any) -> Any:
    env = make(**options)
    env.reset(seed=0)
    env.step(np.random.default_rng(0).uniform(-1, 1, env.action_space.shape))
    return env


@pytest.mark.parametrize(
    ("options", "columns", "pixels"),
    [
        ({}, 8, 64),  # 8 tubelets, enlarged twice
        ({"num_frames": 36}, 8, 64),  # 18 tubelets, of which 8 are shown
        ({"num_frames": 2}, 1, 64),
        ({"size": 48, "patch_size": 16, "num_frames": 4}, 2, 96),
        ({"size": 100, "patch_size": 20, "num_frames": 6, "tubelet_size": 1}, 6, 100),
        ({"size": 224, "patch_size": 32, "num_frames": 4}, 2, 112),  # made half as large
    ],
)
def test_a_picture_has_four_rows_of_frames_before_and_after_the_decision(
    options: dict[str, Any], columns: int, pixels: int
) -> None:
    env = make(mask_ratio=0.75, **options)
    width = LABEL_PIXELS + columns * (pixels + GAP) - GAP
    for episode in range(2):
        env.reset(seed=episode)
        for decided in (False, True):
            if decided:
                env.step(env.action_space.sample())
            picture = env.render()
            assert picture.dtype == np.uint8 and picture.shape == (4 * (pixels + GAP) - GAP, width, 3)


def test_the_first_row_shows_the_first_frame_of_each_tubelet_of_the_clip() -> None:
    env = make()
    env.reset(seed=0)
    picture, clip = env.render(), env.unwrapped.task.clips[0].numpy()
    for column in range(8):
        left = LABEL_PIXELS + column * (64 + GAP)
        assert np.array_equal(picture[:64, left : left + 64], clip[2 * column].repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(("size", "columns"), [(65, 1), (65, 2), (129, 1), (32, 1)])
def test_pictures_have_even_sides_as_videos_want_them(size: int, columns: int) -> None:
    grid = TokenGrid(columns, size, size, 1, size)
    clip = np.full((columns, size, size, 3), 7, np.uint8)
    for rows in ({"clip": clip}, {"clip": clip, "visible": clip}):
        picture = strip(rows, grid)
        assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
        shown = 64 if size == 32 else 65
        assert (picture[:, LABEL_PIXELS:] == 7).all(-1).sum() == len(rows) * columns * shown**2


def test_labels_fit_beside_their_rows() -> None:
    clip = np.zeros((1, 64, 64, 3), np.uint8)
    labels = ("clip", "visible", "reconstruction", "error", "policy")
    picture = strip(dict.fromkeys(labels, clip), TokenGrid(1, 64, 64, 1, 64))
    ink = picture[:, :LABEL_PIXELS].min(-1) < 128
    for r in range(len(labels)):
        assert ink[r * (64 + GAP) : (r + 1) * (64 + GAP)].sum() > 20
    assert not ink[:, -4:].any()


def test_without_a_render_mode_there_is_no_picture() -> None:
    env = gym.make("TATSMasking-v0", num_videos=5, device="cpu").unwrapped
    env.reset(seed=0)
    assert env.render() is None


def test_a_vector_gives_the_picture_of_each_environments_last_decision() -> None:
    options: dict[str, Any] = {"num_videos": 5, "device": "cpu", "render_mode": "rgb_array"}
    batch = gym.make_vec("TATSMasking-v0", 2, "vector_entry_point", **options)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 128))
    batch.reset(seed=3)
    batch.step(actions)
    pictures = batch.render()
    assert isinstance(pictures, tuple) and len(pictures) == 2
    for i, picture in enumerate(pictures):
        env = make()
        env.reset(seed=3 + i)
        env.step(actions[i])
        # All but the reconstruction and the error's shades, whose rounding depends on the batch
        assert np.array_equal(env.render()[:130], picture[:130])
        assert np.abs(env.render().astype(int) - picture).max() <= 2


def test_the_policys_heat_is_brightest_where_its_logit_is_highest() -> None:
    env = stepped()
    task, logits = env.unwrapped.task, torch.zeros(128)
    logits[77] = 5.0
    rows = decision_rows(task, 0, heat=logits)
    assert list(rows) == ["clip", "visible", "reconstruction", "error", "policy"]
    brightness = task.grid.patchify(torch.from_numpy(rows["policy"])[None])[0].float().mean(1)
    assert brightness.argmax() == 77 and brightness[77] > 250 and brightness[:77].max() < 50


def test_an_animation_has_a_picture_a_frame_with_a_column_an_example() -> None:
    env = stepped()
    rows = decision_rows(env.unwrapped.task, 0)
    pictures = animation([rows, rows, rows])
    height = strip(rows, env.unwrapped.task.grid).shape[0]
    assert [p.shape for p in pictures] == [(height, LABEL_PIXELS + 3 * (64 + GAP) - GAP, 3)] * 16
    left = LABEL_PIXELS + 64 + GAP
    assert np.array_equal(pictures[5][:64, left : left + 64], rows["clip"][5].repeat(2, 0).repeat(2, 1))
