"""The rendered motion set: videos whose class is how something moves, and never what it looks like.

Description: a textured sprite (ellipse, polygon or star; stripes, checks or smooth noise) over a textured background.
The background pans as under a moving camera (0 to 0.6 pixels a frame, any direction, whatever the class); the sprite
moves with it and has a motion of its own, which is the class:

- ``static``: none of its own;
- ``left``, ``right``, ``up``, ``down``, ``up_right``, ``down_left``: a straight line, 1 to 2.5 pixels a frame;
- ``rotate_clockwise``, ``rotate_counterclockwise``: about its centre, the rim at 1 to 2.5 pixels a frame;
- ``grow``, ``shrink``: from 14 to 26 pixels across over the video, or back;
- ``bounce_horizontal``, ``bounce_vertical``: to and fro at 1 to 2.5 pixels a frame, 12 to 16 frames a cycle;
- ``orbit_clockwise``, ``orbit_counterclockwise``: round a circle at 1 to 2.5 pixels a frame, 14 to 24 frames a turn.

The picture is a torus: what leaves on one side enters on the other. So the sprite never leaves, the label is true of
every window of a video, and the sprite's place is uniform whatever its motion. Its size is log-uniform from 14 to 26
pixels and its orientation uniform in all classes alike (``grow`` sweeps that very range once), so that a single frame
drawn at random says nothing about the class.

Format and files: see ``tats_env.data.rendered``; ``cache_folder()/motion-v1/<seed>/<split>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from tats_env.data import SPLITS, rendered
from tats_env.data.rendered import FRAMES, SIZE, scale_masks
from tats_env.data.sprites import OUTLINE_ANGLES, paste, sprite_window

NAME = "motion"
VERSION = "motion-v1"  # of the files in the cache: a change to the picture needs a new one
CLASS_NAMES = (
    "static", "left", "right", "up", "down", "up_right", "down_left", "rotate_clockwise", "rotate_counterclockwise",
    "grow", "shrink", "bounce_horizontal", "bounce_vertical", "orbit_clockwise", "orbit_counterclockwise",
)  # fmt: skip
RADIUS = (7.0, 13.0)  # of the circle round the sprite, in pixels
_DIRECTIONS = {
    "left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0),
    "up_right": (-(0.5**0.5), 0.5**0.5), "down_left": (0.5**0.5, -(0.5**0.5)),
}  # fmt: skip
render = partial(rendered.render, NAME)


@dataclass(frozen=True)
class Scene:
    """All that defines a video. Coordinates are (y, x) in pixels, y down, modulo the picture's size."""

    label: int
    noise: np.ndarray  # white, to be made into the background [4, SIZE, SIZE]
    tint: np.ndarray  # the background's mean colour [3]
    outline: np.ndarray  # the sprite's edge as a share of its radius, by angle [OUTLINE_ANGLES]
    pattern: str
    waves: np.ndarray  # (y frequency, x frequency, phase) in radians a radius [M, 3]
    colours: np.ndarray  # dark and bright [2, 3]
    pan: np.ndarray  # displacement of the world [FRAMES, 2]
    centre: np.ndarray  # of the sprite [FRAMES, 2]
    angle: np.ndarray  # of the sprite, in radians, clockwise [FRAMES]
    radius: np.ndarray  # of the sprite [FRAMES]


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one video. Everything that can be seen in one frame is drawn before the class is looked at."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    noise, tint = rng.standard_normal((4, SIZE, SIZE), dtype=np.float32), rng.uniform(90, 165, 3)
    outline = _outline(rng)
    pattern, waves = _pattern(rng)
    colours = np.stack([rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)])
    frame = np.arange(FRAMES)
    heading = rng.uniform(0, 2 * np.pi)
    pan = rng.uniform(0, 0.6) * frame[:, None] * np.array([np.sin(heading), np.cos(heading)])
    start, turn = rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi)
    radius = np.full(FRAMES, RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** rng.uniform())
    label = index % len(CLASS_NAMES)
    path, turning, radius = _own_motion(rng, CLASS_NAMES[label], radius)
    centre = (start + pan + path) % SIZE
    return Scene(label, noise, tint, outline, pattern, waves, colours, pan, centre, turn + turning, radius)


def _own_motion(rng: np.random.Generator, name: str, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Path [FRAMES, 2] and turning [FRAMES] of a class, relative to the world, and the radius [FRAMES]."""
    frame = np.arange(FRAMES)
    path, turning = np.zeros((FRAMES, 2)), np.zeros(FRAMES)
    speed, phase = rng.uniform(1, 2.5), rng.uniform()
    sense = -1 if name.endswith("counterclockwise") else 1
    if name in _DIRECTIONS:
        path = speed * frame[:, None] * np.array(_DIRECTIONS[name])
    elif name.startswith("rotate"):
        turning = sense * speed / radius * frame
    elif name in ("grow", "shrink"):
        radius = np.geomspace(*RADIUS, FRAMES)[:: 1 if name == "grow" else -1]
    elif name.startswith("bounce"):
        period = rng.uniform(12, 16)
        triangle = np.abs((frame / period + phase) % 1 * 4 - 2) - 1
        path[:, 1 if name.endswith("horizontal") else 0] = speed * period / 4 * triangle
    elif name.startswith("orbit"):
        period = rng.uniform(14, 24)
        around = 2 * np.pi * (phase + sense * frame / period)
        path = speed * period / (2 * np.pi) * np.stack([np.sin(around), np.cos(around)], axis=1)
    return path, turning, radius


def _outline(rng: np.random.Generator) -> np.ndarray:
    """A random ellipse, polygon or star."""
    angle = np.arange(OUTLINE_ANGLES) * (2 * np.pi / OUTLINE_ANGLES)
    kind, corners, aspect = rng.integers(3), rng.integers(3, 7), rng.uniform(0.6, 0.9)
    if kind == 0:
        return aspect / np.hypot(aspect * np.cos(angle), np.sin(angle))
    sector = 2 * np.pi / corners
    if kind == 1:
        return np.cos(sector / 2) / np.cos(angle % sector - sector / 2)
    return 1 - 0.7 * (1 - aspect) * (1 - np.cos(angle * corners))


def _pattern(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Random stripes, checks or smooth noise as plane waves."""
    name = ("stripes", "checks", "noise")[rng.integers(3)]
    length, heading, phase = rng.uniform(0.7, 1.2, 4), rng.uniform(0, 2 * np.pi, 4), rng.uniform(0, 2 * np.pi, 4)
    if name == "checks":
        length[1], heading[1] = length[0], heading[0] + np.pi / 2
    waves = np.stack([np.sin(heading) / length, np.cos(heading) / length, phase / (2 * np.pi)], axis=1)
    return name, 2 * np.pi * waves[: {"stripes": 1, "checks": 2, "noise": 4}[name]]


def _brightness(pattern: str, waves: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The pattern in [0, 1] at points of the sprite, in radii from its centre."""
    swings = [np.sin(ky * y + kx * x + phase) for ky, kx, phase in waves.astype(np.float32)]
    swing = swings[0] * swings[1] * 2 if pattern == "checks" else sum(swings)
    return 0.5 + 0.5 * np.tanh(1.5 * swing)


def background(s: Scene) -> np.ndarray:
    """The scene without its sprite, float32 [FRAMES, SIZE, SIZE, 3] in 0..255.

    Noise of four octaves, from 4 to 64 pixels, with contrast in each so that no patch is flat. Filtered in Fourier
    space, where it is periodic and a shift by a fraction of a pixel is exact.
    """
    y, x = np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE)
    cycles = SIZE * np.hypot(y[:, None], x)
    octaves = np.where((cycles >= 1) & (cycles <= 16), np.maximum(cycles, 1) ** -2, 0)
    noise = np.fft.rfft2(s.noise) * octaves
    noise *= SIZE / np.sqrt(np.square(np.fft.irfft2(noise)).sum(axis=(1, 2), keepdims=True))
    spectrum = 40 * noise[:1] + 15 * noise[1:]  # brightness, and some colour
    spectrum[:, 0, 0] = s.tint * SIZE**2
    down, across = (np.exp(-2j * np.pi * s.pan[:, i, None] * f).astype(np.complex64) for i, f in enumerate((y, x)))
    shifted = spectrum.astype(np.complex64) * (down[:, :, None] * across[:, None, :])[:, None]
    return np.stack(list(np.moveaxis(np.fft.irfft2(shifted), 1, 0)), axis=-1).astype(np.float32, copy=False)


def frames(seed: int, split: str, index: int) -> np.ndarray:
    """The video before it is encoded, uint8 [FRAMES, SIZE, SIZE, 3]."""
    s = scene(seed, split, index)
    picture = background(s)
    where, covered, y, x = sprite_window(s.centre, s.angle, s.radius, s.outline, SIZE)
    dark, bright = s.colours.astype(np.float32)
    sprite = dark + (bright - dark) * _brightness(s.pattern, s.waves, y, x)[..., None]
    paste(picture, where, covered, sprite)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def foreground_masks(seed: int, split: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels of the moving sprite when the video is scaled and cropped to ``size``: bool [FRAMES, H, W].

    A pixel counts when at least half covered. False everywhere for the class ``static``.
    """
    s = scene(seed, split, index)
    if CLASS_NAMES[s.label] == "static":
        return np.zeros((FRAMES, *size), dtype=bool)
    where, covered, _, _ = sprite_window(s.centre, s.angle, s.radius, s.outline, SIZE)
    whole = np.zeros((FRAMES, SIZE, SIZE), dtype=np.float32)
    whole[where] = covered
    return scale_masks(whole, size)
