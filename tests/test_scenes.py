from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tats_env.data import motion, scenes
from tats_env.data.listing import RENDERED
from tats_env.data.reader import read_frames
from tats_env.data.rendered import FRAMES, SIZE, load_set

CLASSES = len(scenes.CLASS_NAMES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TATS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def paths(cache: Path) -> list[Path]:
    return scenes.render(0, "train", 2 * CLASSES)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))


def energy_ratio(name: str, index: int) -> float:
    """The foreground's share of the energy of frame differences over its share of the area."""
    module = load_set(name)
    mask = module.foreground_masks(0, "train", index, (SIZE, SIZE))[1:]
    energy = np.square(np.diff(module.frames(0, "train", index).astype(float), axis=0)).sum(axis=-1)
    return float(energy[mask].sum() / energy.sum() / mask.mean())


@pytest.mark.parametrize("name", RENDERED)
def test_each_rendered_set_keeps_the_contract_of_its_files(name: str) -> None:
    module = load_set(name)
    assert module.NAME == module.VERSION.split("-")[0] == name
    assert len(set(module.CLASS_NAMES)) == len(module.CLASS_NAMES) >= 12
    frames, masks = module.frames(0, "train", 1), module.foreground_masks(0, "train", 1, (32, 48))
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert masks.shape == (FRAMES, 32, 48) and masks.dtype == bool and masks.any()


def test_the_two_sets_share_no_class_and_no_folder(cache: Path, paths: list[Path]) -> None:
    assert not set(scenes.CLASS_NAMES) & set(motion.CLASS_NAMES)
    assert paths[3] == cache / "scenes-v1" / "0" / "train" / "00003.mp4"
    assert motion.render(0, "train", 1) == [cache / "motion-v1" / "0" / "train" / "00000.mp4"]


def test_decoded_files_are_the_frames_that_were_rendered(paths: list[Path]) -> None:
    for index in range(0, len(paths), 5):
        assert psnr(read_frames(paths[index], (SIZE, SIZE)), scenes.frames(0, "train", index)) > 30


def test_a_video_depends_on_nothing_but_seed_split_and_index(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = scenes.frames(0, "train", 17)
    assert np.array_equal(reference, scenes.frames(0, "train", 17))
    for other in ((1, "train", 17), (0, "validation", 17), (0, "train", 17 + CLASSES)):
        assert psnr(reference, scenes.frames(*other)) < 20
    monkeypatch.setenv("TATS_CACHE", str(tmp_path))  # other videos are neighbours in the encoder now
    for ours, theirs in zip(scenes.render(0, "train", 3), paths, strict=False):
        assert ours != theirs
        assert np.array_equal(read_frames(ours, (SIZE, SIZE)), read_frames(theirs, (SIZE, SIZE)))


def test_the_renderer_loads_no_torch() -> None:
    code = "import sys, tats_env.data.scenes, tats_env.data.rendered; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_foreground_is_where_the_video_differs_from_itself_without_its_target() -> None:
    hidden = []
    for index in range(CLASSES):
        s = scenes.scene(0, "train", index)
        bare = scenes.picture(s, target=False).astype(float)
        difference = np.abs(scenes.frames(0, "train", index) - bare).max(axis=-1)
        mask = scenes.foreground_masks(0, "train", index, (SIZE, SIZE))
        near = np.any([np.roll(mask, (y, x), axis=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
        assert (difference[~near] > 0).mean() < 0.002, "distractors, water and occluders are not foreground"
        assert (difference[mask] > 10).mean() > 0.9
        assert mask.any(axis=(1, 2)).all()
        clear = replace(s, occluders=[])
        whole = (scenes.picture(clear) != scenes.picture(clear, target=False)).any(axis=-1)
        hidden.append(1 - (difference > 0).sum() / whole.sum())
        assert hidden[-1] < 0.7
    assert 0.05 < np.mean(hidden) < 0.3, "occluders hide part of the target"


def test_the_target_is_what_has_the_strongest_colour(paths: list[Path]) -> None:
    circle = np.exp(2j * np.pi * (np.arange(SIZE) + 0.5) / SIZE)
    away = []
    for index, path in enumerate(paths):
        strength = np.clip(np.ptp(read_frames(path, (SIZE, SIZE)).astype(float), axis=-1) - 70, 0, 60)
        found = [np.angle(strength.sum(axis=axis) @ circle) * SIZE / (2 * np.pi) for axis in (2, 1)]
        centre = scenes.scene(0, "train", index).target.centre
        away.append(np.abs((np.stack(found, axis=1) - centre + SIZE / 2) % SIZE - SIZE / 2))
    assert np.median(away) < 1 and np.quantile(away, 0.9) < 5


def test_frame_differences_point_at_the_foreground_of_motion_but_not_of_scenes() -> None:
    assert np.mean([energy_ratio("scenes", i) for i in range(CLASSES)]) < 1.5
    assert np.mean([energy_ratio("motion", i) for i in range(1, 15)]) > 10


def single_frame_features(index: int, frame: int) -> np.ndarray:
    """What can be seen in one frame: all that the scene draws, and where and how the target is then."""
    s = scenes.scene(0, "train", index)
    t, w = s.target, s.world
    y, x = 2 * np.pi * t.centre[frame] / SIZE
    place = [np.sin(y), np.cos(y), np.sin(x), np.cos(x), np.sin(t.angle[frame]), np.cos(t.angle[frame])]
    pattern = [t.pattern == name for name in ("rings", "fan", "dots")]
    looks = [*t.colours.ravel(), t.outline.mean(), t.outline.std(), *pattern, *t.knobs, np.log(t.radius[frame])]
    others = [len(s.distractors), len(s.occluders), s.distractors[0].radius[0], *s.occluders[0].place[frame]]
    camera = [*w.tones.ravel(), *w.tint, w.land.mean(), w.flicker.std(), np.log(w.zoom[-1]), *np.ptp(w.pan, axis=0)]
    return np.array([*place, *looks, *others, *camera])


def test_a_single_frame_says_nothing_about_the_class() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([single_frame_features(i, int(rng.integers(FRAMES))) for i in range(64 * CLASSES)])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    for power in (1, 2):  # means and spreads of each class against those of all
        values = features**power
        z = (values.reshape(64, CLASSES, -1).mean(axis=0) - values.mean(axis=0)) / values.std(axis=0) * 8
        assert np.abs(z).max() < 4.5


def track_features(index: int, first: int) -> np.ndarray:
    """The target's own motion in a window of 16 frames, the camera's shake taken off."""
    s = scenes.scene(0, "validation", index)
    window = slice(first, first + 16)
    steps = (np.diff((s.target.centre - s.world.shake)[window], axis=0) + SIZE / 2) % SIZE - SIZE / 2
    speed, change = np.hypot(*steps.T), np.diff(steps, axis=0)
    velocity = steps @ np.array([1j, 1])
    bends = np.angle(velocity[1:] * velocity[:-1].conj()) * (np.minimum(speed[1:], speed[:-1]) > 0.3)
    across, along = np.square(change).sum(axis=0) + 0.3
    return np.array([
        np.hypot(*steps.sum(axis=0)) / (speed.sum() + 1), np.log((speed[7:].sum() + 1) / (speed[:7].sum() + 1)),
        np.tanh(bends.sum() / 3), np.tanh(np.abs(bends.sum()) / 3), np.abs(bends).mean(), (speed < 0.25).mean(),
        np.log(across / along), np.cbrt((change[:, 0].clip(-6, 6) ** 3).mean()), np.log(speed.max() + 1),
        np.log(s.target.radius[window]).std(), np.ptp(s.target.angle[window]),
    ])  # fmt: skip


def test_the_class_can_be_read_off_the_track_in_any_window() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([track_features(i, int(rng.integers(FRAMES - 15))) for i in range(40 * CLASSES)])
    features /= features.std(axis=0)
    known, asked = np.split(features, 2)
    nearest = np.square(asked[:, None] - known).sum(axis=-1).argmin(axis=1)
    hits = (nearest % CLASSES == np.arange(len(asked)) % CLASSES).reshape(-1, CLASSES).mean(axis=0)
    assert hits.mean() > 0.95 and hits.min() > 0.75
