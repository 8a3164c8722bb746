"""The rendered scenes: a moving camera, distractors and occluders, so that what changes most is not what matters.

Description: a camera follows a *target* through a busy world. The target is the largest sprite, 16 to 28 pixels
across, and the only thing in strong colour; how it moves relative to the camera, shaking taken off, is the class:

- ``zigzag_horizontal``, ``zigzag_vertical``: along that axis, either way, swinging across it once in 8 to 11 frames;
- ``hop``: left or right in parabolic leaps of 8 to 11 frames;
- ``figure_eight``: an eight of any orientation, 12 to 15 frames a round;
- ``spiral_out``, ``spiral_in``: either way, a turn in 11 to 15 frames, its radius from 1.5 to 9 pixels over the video,
  or back;
- ``curve_left``, ``curve_right``: an arc of 9 to 13 degrees a frame at 1.5 to 2.5 pixels a frame;
- ``accelerate``, ``brake``: a straight line at 0.6 to 4.8 pixels a frame, doubling in 13 frames, or halving;
- ``stop_and_go``: a straight line in bursts, at rest for half of each 8 to 12 frames;
- ``jump``: at rest but for leaps of 9 to 16 pixels, one in 3 to 6 frames, each somewhere else;
- ``pulse``: grows and shrinks between 16 and 28 pixels in place, 9 to 14 frames a cycle;
- ``wobble``: turns to and fro by 30 to 50 degrees each way in place, 7 to 12 frames a cycle.

None is a motion of the set ``motion``. Whatever comes and goes does so within 15 frames, so that the label is true of
every window of 16. As in ``motion`` the picture is a torus to the sprites, the target's place and orientation are
uniform and its size log-uniform in all classes alike, so that a single frame drawn at random says nothing about the
class. A mirrored video can be of another class.

What misleads whoever looks at changes, the same in all classes:

- the camera pans at 1 to 2.75 pixels a frame, zooms by up to 0.6 % and rolls by up to 0.6 degrees a frame about the
  picture's centre, which shows in the world; it shakes by about a pixel, 4 to 9 frames a cycle, which shows in the
  sprites as well;
- the world (flat patches, marble or bricks, with grain) flickers by 8 to 20 %, and in a third of it water runs: two
  gratings that drift at a constant speed, as predictable as they are lively;
- 2 to 4 distractors, shaped like the target but greyish and 7 to 11 pixels across, go straight at 0.5 to 3 pixels a
  frame, some of them turning; the target passes in front of them and has less contrast than they or the world;
- 1 or 2 bars and a disc, at rest in front of the camera or swaying slowly, hide 13 % of the target on average; more
  than half of it is hidden in 3 % of the frames, and never all.

Foreground is what can be seen of the target, 6 % of the area; distractors, water and occluders are not. Its share of
the energy of frame differences is 0.9 times its share of the area; in ``motion`` it is 16 times. Of windows of 16
frames, a nearest neighbour among 700 tells 99 % by the true track, and among 280 it tells 78 % by the track of the
strongest colour in the decoded files.

Format and files: see ``tats_env.data.rendered``; ``cache_folder()/scenes-v1/<seed>/<split>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tats_env.data import SPLITS, rendered
from tats_env.data.rendered import FRAMES, SIZE, scale_masks
from tats_env.data.sprites import OUTLINE_ANGLES, paste, sprite_window

NAME = "scenes"
VERSION = "scenes-v1"  # of the files in the cache: a change to the picture needs a new one
CLASS_NAMES = (
    "zigzag_horizontal", "zigzag_vertical", "hop", "figure_eight", "spiral_out", "spiral_in", "curve_left",
    "curve_right", "accelerate", "brake", "stop_and_go", "jump", "pulse", "wobble",
)  # fmt: skip
RADIUS = (8.0, 14.0)  # of the circle round the target, in pixels
DISTRACTOR_RADIUS = (3.5, 5.5)
WORLD = 128  # the world repeats after so many pixels, down and across
render = partial(rendered.render, NAME)


@dataclass(frozen=True)
class Sprite:
    """Coordinates are (y, x) in pixels of the picture, y down, modulo its size."""

    outline: np.ndarray  # the edge as a share of the radius, by angle [OUTLINE_ANGLES]
    pattern: str
    knobs: np.ndarray  # of the pattern [4], in [0, 1)
    colours: np.ndarray  # dark and bright [2, 3]
    centre: np.ndarray  # [FRAMES, 2]
    angle: np.ndarray  # in radians, clockwise [FRAMES]
    radius: np.ndarray  # [FRAMES]


@dataclass(frozen=True)
class World:
    """What the camera sees of it in frame t at ``p`` from the picture's centre: ``pan + roll(p - shake) / zoom``."""

    land: np.ndarray  # between its tones: dark is 0, bright is 1; float32 [WORLD, WORLD]
    water: np.ndarray  # the share of it in each place, float32 [WORLD, WORLD]
    tones: np.ndarray  # dark and bright [2, 3]
    waves: np.ndarray  # (y frequency, x frequency, speed, phase) in radians, a pixel and a frame [2, 4]
    tint: np.ndarray  # of the water [3]
    flicker: np.ndarray  # factor on the brightness [FRAMES]
    pan: np.ndarray  # [FRAMES, 2]
    shake: np.ndarray  # [FRAMES, 2]
    zoom: np.ndarray  # [FRAMES]
    roll: np.ndarray  # in radians [FRAMES]


@dataclass(frozen=True)
class Occluder:
    """A bar (with a direction across it) or a disc in front of the camera."""

    across: np.ndarray | None  # a unit vector [2], or None for a disc
    place: np.ndarray  # a point of the bar's middle line, or the disc's centre [FRAMES, 2]
    reach: float  # half the bar's width, or the disc's radius
    colours: np.ndarray  # of its edge and its middle [2, 3]


@dataclass(frozen=True)
class Scene:
    """All that defines a video."""

    label: int
    world: World
    distractors: list[Sprite]
    target: Sprite
    occluders: list[Occluder]


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one video. Everything that can be seen in one frame is drawn before the class is looked at."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    world = _world(rng)
    distractors = [_distractor(rng, world.shake) for _ in range(rng.integers(2, 5))]
    occluders = [_occluder(rng, bar=True) for _ in range(rng.integers(1, 3))] + [_occluder(rng, bar=False)]
    looks = _looks(rng, contrast=38, chroma=65)
    start, turn = rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi)
    radius = np.full(FRAMES, RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** rng.uniform())
    label = index % len(CLASS_NAMES)
    path, turning, radius = _own_motion(rng, CLASS_NAMES[label], radius)
    target = Sprite(*looks, (start + path + world.shake) % SIZE, turn + turning, radius)
    return Scene(label, world, distractors, target, occluders)


def _own_motion(rng: np.random.Generator, name: str, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Path [FRAMES, 2] and turning [FRAMES] of a class, relative to the shaken picture, and the radius [FRAMES]."""
    frame = np.arange(FRAMES)
    path, turning = np.zeros((FRAMES, 2)), np.zeros(FRAMES)
    speed, phase, heading, way = rng.uniform(1.5, 2.5), rng.uniform(), rng.uniform(0, 2 * np.pi), rng.choice((-1, 1))
    ahead, aside = np.array([_direction(heading), _direction(heading + np.pi / 2)])
    if name.startswith("zigzag") or name == "hop":
        cycle = frame / rng.uniform(8, 11) + phase
        along = way * speed * 0.7 * frame
        if name == "hop":
            path = np.stack([-rng.uniform(6, 10) * 4 * (cycle % 1) * (1 - cycle % 1), along], axis=1)
        else:
            both = np.stack([rng.uniform(3, 5) * _triangle(cycle), along], axis=1)
            path = both if name.endswith("horizontal") else both[:, ::-1]
    elif name == "figure_eight":
        around = 2 * np.pi * (phase + way * frame / rng.uniform(12, 15))
        path = rng.uniform(6, 9) * (np.sin(around)[:, None] * ahead + 0.5 * np.sin(2 * around)[:, None] * aside)
    elif name.startswith("spiral"):
        around = heading + 2 * np.pi * way * frame / rng.uniform(11, 15)
        path = np.geomspace(1.5, 9, FRAMES)[:: 1 if name.endswith("out") else -1, None] * _direction(around)
    elif name.startswith("curve"):
        bend = np.radians(rng.uniform(9, 13)) * (1 if name.endswith("right") else -1)
        path = np.cumsum(speed * _direction(heading + bend * frame), axis=0)
    elif name in ("accelerate", "brake"):
        steps = np.geomspace(0.6, 4.8, FRAMES)[:: 1 if name == "accelerate" else -1]
        path = np.cumsum(steps)[:, None] * ahead
    elif name == "stop_and_go":
        cycle = frame / rng.uniform(8, 12) + phase
        path = speed * 10 * (np.floor(cycle) + np.minimum(2 * (cycle % 1), 1))[:, None] * ahead
    elif name == "jump":
        leaps = rng.uniform(9, 16, (FRAMES, 1)) * _direction(rng.uniform(0, 2 * np.pi, FRAMES))
        path = np.cumsum(leaps, axis=0)[np.floor(frame / rng.uniform(3, 6) + phase).astype(int)]
    elif name == "pulse":
        radius = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** (0.5 + 0.5 * _triangle(frame / rng.uniform(9, 14) + phase))
    elif name == "wobble":
        turning = np.radians(rng.uniform(30, 50)) * _triangle(frame / rng.uniform(7, 12) + phase)
    return path, turning, radius


def _direction(heading: np.ndarray | float) -> np.ndarray:
    """Unit vectors (y, x) [..., 2]; the heading is in radians, clockwise from the right."""
    return np.stack([np.sin(heading), np.cos(heading)], axis=-1)


def _triangle(cycle: np.ndarray) -> np.ndarray:
    """A wave between -1 and 1 that is uniform over them at a uniform phase."""
    return np.abs(cycle % 1 * 4 - 2) - 1


def _looks(rng: np.random.Generator, contrast: float, chroma: float) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
    """Outline, pattern, its knobs and colours of a sprite: a blob, a cog or a cross; rings, a fan, dots or halves.

    ``contrast`` is between its colours' brightness and their mean, ``chroma`` how far from grey they are, of 255.
    """
    angle = np.arange(OUTLINE_ANGLES) * (2 * np.pi / OUTLINE_ANGLES)
    kind, teeth, phases = rng.integers(3), rng.integers(5, 9), rng.uniform(0, 2 * np.pi, 3)
    blob = 1 + sum(0.12 * np.sin(k * angle + phase) for k, phase in zip((2, 3, 4), phases, strict=True))
    cog = 1 + 0.13 * np.tanh(4 * np.sin(teeth * angle))
    cross = 1 + 0.22 * np.tanh(2 * np.cos(4 * angle))
    outline = (blob, cog, cross)[kind]
    pattern = ("rings", "fan", "dots", "halves")[rng.integers(4)]
    hue = np.cos(rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3)
    colours = 127 + contrast * np.array([[-1], [1]]) + chroma * hue
    return outline / outline.max(), pattern, rng.uniform(size=4), colours


def _distractor(rng: np.random.Generator, shake: np.ndarray) -> Sprite:
    frame = np.arange(FRAMES)
    looks = _looks(rng, contrast=60, chroma=10)
    path = rng.uniform(0.5, 3) * frame[:, None] * _direction(rng.uniform(0, 2 * np.pi))
    turning = rng.choice((-1, 0, 1)) * rng.uniform(0.1, 0.3) * frame
    centre = (rng.uniform(0, SIZE, 2) + path + shake) % SIZE
    return Sprite(*looks, centre, rng.uniform(0, 2 * np.pi) + turning, np.full(FRAMES, rng.uniform(*DISTRACTOR_RADIUS)))


def _occluder(rng: np.random.Generator, bar: bool) -> Occluder:
    heading, swing = rng.uniform(0, 2 * np.pi), rng.uniform(0, 6) * rng.integers(2)
    sway = swing * np.sin(2 * np.pi * (np.arange(FRAMES) / rng.uniform(40, 80) + rng.uniform()))
    place = rng.uniform(0, SIZE, 2) + sway[:, None] * _direction(heading)
    colours = rng.uniform(30, 130) + rng.uniform(-12, 12, 3) + np.array([[0], [70]])
    if bar:
        return Occluder(_direction(heading), place, rng.uniform(2, 3.5), colours)
    return Occluder(None, place, rng.uniform(4, 6.5), colours)


def _world(rng: np.random.Generator) -> World:
    frame = np.arange(FRAMES)
    kind, tones = rng.integers(3), _tones(rng)
    smooth = _smooth_noise(rng)
    if kind == 0:  # flat patches
        level = np.digitize(smooth, (-0.6, 0, 0.6)) / 3
    elif kind == 1:  # marble
        level = 0.5 + 0.5 * np.tanh(3 * np.sin(5 * smooth))
    else:
        level = _bricks(rng)
    land = level + 0.08 * rng.standard_normal((WORLD, WORLD))
    y, x = np.meshgrid(*2 * (2 * np.pi / WORLD * np.arange(WORLD),), indexing="ij")
    lie = ((1, 0), (0, 1), (1, 1), (1, -1))[rng.integers(4)]
    level = np.cos(lie[0] * y + lie[1] * x + rng.uniform(0, 2 * np.pi)) + 0.15 * smooth
    water = np.clip((level - 0.5) * WORLD / 8, 0, 1)  # a third of the world, with shores a few pixels wide
    # Whole numbers of waves, so that they meet where the world repeats
    vectors = np.rint(WORLD / rng.uniform(8, 13, (2, 1)) * _direction(rng.uniform(0, 2 * np.pi, 2)))
    vectors *= 2 * np.pi / WORLD
    speeds = rng.uniform(1, 2.5, 2) * np.hypot(*vectors.T)
    waves = np.stack([*vectors.T, speeds, rng.uniform(0, 2 * np.pi, 2)], axis=1)
    flicker = 1 + rng.uniform(0.08, 0.2) * np.sin(2 * np.pi * (frame / rng.uniform(2.5, 6) + rng.uniform()))
    shake = sum(
        rng.uniform(0.3, 0.7, 2) * np.sin(2 * np.pi * (frame[:, None] / rng.uniform(4, 9, 2) + rng.uniform(size=2)))
        for _ in range(2)
    )
    pan = rng.uniform(0, WORLD, 2) + rng.uniform(1, 2.75) * frame[:, None] * _direction(rng.uniform(0, 2 * np.pi))
    zoom, roll = np.exp(rng.uniform(-0.006, 0.006) * (frame - FRAMES / 2)), np.radians(rng.uniform(-0.6, 0.6)) * frame
    tint = rng.uniform(90, 140) + rng.uniform(-20, 20, 3)
    return World(
        land.astype(np.float32), water.astype(np.float32), tones, waves, tint, flicker, pan, np.asarray(shake), zoom,
        roll + rng.uniform(0, 2 * np.pi),
    )  # fmt: skip


def _tones(rng: np.random.Generator) -> np.ndarray:
    """Two muted colours that differ in brightness [2, 3]."""
    middle, half = rng.uniform(105, 145), rng.uniform(40, 60)
    return np.array([[middle - half], [middle + half]]) + rng.uniform(-20, 20, (2, 3))


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Periodic noise of unit variance, coarser than about 8 pixels [WORLD, WORLD]."""
    y, x = np.fft.fftfreq(WORLD), np.fft.rfftfreq(WORLD)
    cycles = WORLD * np.hypot(y[:, None], x)
    weight = np.where((cycles >= 3) & (cycles <= 16), np.maximum(cycles, 1) ** -1.5, 0)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((WORLD, WORLD))) * weight)
    return noise / noise.std()


def _bricks(rng: np.random.Generator) -> np.ndarray:
    """A wall of bricks, each as bright as it likes, in joints that are dark [WORLD, WORLD] in [0, 1]."""
    height, width = ((8, 16), (16, 16), (8, 32))[rng.integers(3)]
    y, x = np.meshgrid(np.arange(WORLD), np.arange(WORLD), indexing="ij")
    row = y // height
    x = (x + row % 2 * width // 2) % WORLD
    bright = rng.uniform(0.35, 1, (WORLD // height, WORLD // width))[row, x // width]
    return np.where((y % height == 0) | (x % width == 0), 0, bright)


def _draw_world(w: World) -> np.ndarray:
    """What the camera sees, float32 [FRAMES, SIZE, SIZE, 3] in about 0..255."""
    offset = np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2
    shake, pan = w.shake.astype(np.float32)[..., None], w.pan.astype(np.float32)[..., None]
    dy, dx = (offset - shake[:, 0])[:, :, None], (offset - shake[:, 1])[:, None, :]
    cos, sin = ((f(w.roll) / w.zoom).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    y, x = pan[:, 0, :, None] + cos * dy - sin * dx, pan[:, 1, :, None] + sin * dy + cos * dx
    land, water = _sample((w.land, w.water), y, x)
    frame = np.arange(FRAMES)[:, None, None]
    wave = sum(np.sin(np.float32(ky) * y + np.float32(kx) * x - (speed * frame + phase).astype(np.float32))
               for ky, kx, speed, phase in w.waves)  # fmt: skip
    waves = water * (32 * np.asarray(wave))
    whole = np.empty((FRAMES, SIZE, SIZE, 3), dtype=np.float32)
    for i, (dark, bright, tint) in enumerate(zip(*w.tones.astype(np.float32), w.tint.astype(np.float32), strict=True)):
        ground = dark + (bright - dark) * land
        whole[..., i] = w.flicker.astype(np.float32)[:, None, None] * (ground + water * (tint - ground) + waves)
    return whole


def _sample(maps: Sequence[np.ndarray], y: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """Bilinear samples [...] of each of the maps [WORLD, WORLD], which repeat, at y and x [...]."""
    top, left = np.floor(y), np.floor(x)
    fy, fx = y - top, x - left
    rows = [(top.astype(np.int64) + i) % WORLD * WORLD for i in (0, 1)]
    columns = [(left.astype(np.int64) + i) % WORLD for i in (0, 1)]
    corners = [(row + columns[0], row + columns[1]) for row in rows]
    sampled = []
    for flat in (m.ravel() for m in maps):
        upper, lower = (flat[i] + fx * (flat[j] - flat[i]) for i, j in corners)
        sampled.append(upper + fy * (lower - upper))
    return sampled


def _place(s: Sprite) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray, np.ndarray]:
    return sprite_window(s.centre, s.angle, s.radius, s.outline, SIZE)


def _draw_sprite(picture: np.ndarray, s: Sprite) -> None:
    where, covered, y, x = _place(s)
    k = s.knobs.astype(np.float32)
    if s.pattern == "rings":
        swing = np.sin(7 * np.hypot(y - k[0] + 0.5, x - k[1] + 0.5) + 6 * k[2])
    elif s.pattern == "fan":
        swing = np.sin((3 + int(2 * k[0])) * np.arctan2(y - 0.3 * k[1], x - 0.3 * k[2]))
    elif s.pattern == "dots":
        swing = np.sin(6 * y + 6 * k[0]) + np.sin(6 * x + 6 * k[1])
    else:  # halves
        swing = np.sin(2.5 * y + 2 * k[0] - 1)
    dark, bright = s.colours.astype(np.float32)
    paste(picture, where, covered, dark + (bright - dark) * (0.5 + 0.5 * np.tanh(4 * swing))[..., None])


def _inside(o: Occluder) -> np.ndarray:
    """How far each pixel is inside of an occluder's edge in pixels, float32 [FRAMES, SIZE, SIZE]; negative outside."""
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5
    place = o.place.astype(np.float32)[..., None]
    dy, dx = (pixel - place[:, 0])[:, :, None], (pixel - place[:, 1])[:, None, :]
    if o.across is None:
        return np.float32(o.reach) - np.hypot(dy, dx)
    across = o.across.astype(np.float32)
    return np.float32(o.reach) - np.abs(across[0] * dy + across[1] * dx)


def _visible(occluders: Sequence[Occluder]) -> np.ndarray:
    """The share of each pixel that no occluder covers, float32 [FRAMES, SIZE, SIZE]."""
    return np.prod([1 - np.clip(_inside(o) + 0.5, 0, 1) for o in occluders], axis=0)


def picture(s: Scene, *, target: bool = True) -> np.ndarray:
    """The video before it is encoded, with or without its target, uint8 [FRAMES, SIZE, SIZE, 3]."""
    whole = _draw_world(s.world)
    for sprite in [*s.distractors, *([s.target] if target else [])]:
        _draw_sprite(whole, sprite)
    for o in s.occluders:
        inside = _inside(o)
        where = inside > -0.5
        depth = inside[where][:, None]
        edge, middle = o.colours.astype(np.float32)
        colour = edge + (middle - edge) * np.clip(depth / np.float32(o.reach), 0, 1)
        whole[where] += np.minimum(depth + 0.5, 1) * (colour - whole[where])
    return np.rint(whole, out=whole).clip(0, 255, out=whole).astype(np.uint8)


def frames(seed: int, split: str, index: int) -> np.ndarray:
    """The video before it is encoded, uint8 [FRAMES, SIZE, SIZE, 3]."""
    return picture(scene(seed, split, index))


def foreground_masks(seed: int, split: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """What can be seen of the target when the video is scaled and cropped to ``size``: bool [FRAMES, H, W].

    A pixel counts when at least half of it is the target, with no occluder in front.
    """
    s = scene(seed, split, index)
    where, covered, _, _ = _place(s.target)
    whole = np.zeros((FRAMES, SIZE, SIZE), dtype=np.float32)
    whole[where] = covered
    return scale_masks(whole * _visible(s.occluders), size)
