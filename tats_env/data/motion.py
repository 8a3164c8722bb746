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

Format: 64 x 64 pixels, 40 frames, 24 a second; H.264 in mp4, a key frame every 8. Video i has class i % 15, so every
prefix is balanced. A video is a function of (seed, split, index) alone: its own random stream, and a constant
quantiser, under which a coded frame does not depend on its neighbours in the encoder.

Files: ``cache_folder()/motion-v1/<seed>/<split>/00000.mp4`` and so on, rendered when first asked for, on all cores.
Starting an ffmpeg for each video would cost more than the rest, so a worker process sends many videos through one
and lets the segment muxer cut them. Several processes may ask at once (a lock file), and a render that is killed
leaves whole files only (each is moved into place when done).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tats_env.data import SPLITS
from tats_env.data.reader import DataError, cover, num_cores

CLASS_NAMES = (
    "static", "left", "right", "up", "down", "up_right", "down_left", "rotate_clockwise", "rotate_counterclockwise",
    "grow", "shrink", "bounce_horizontal", "bounce_vertical", "orbit_clockwise", "orbit_counterclockwise",
)  # fmt: skip
VERSION = "motion-v1"  # of the files in the cache: a change to the picture needs a new one
FRAMES, SIZE, FPS, KEY_FRAME_EVERY = 40, 64, 24, 8
RADIUS = (7.0, 13.0)  # of the circle round the sprite, in pixels
_DIRECTIONS = {
    "left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0),
    "up_right": (-(0.5**0.5), 0.5**0.5), "down_left": (0.5**0.5, -(0.5**0.5)),
}  # fmt: skip
_OUTLINE_ANGLES = 256
_VIDEOS_PER_ENCODER = 32


@dataclass(frozen=True)
class Scene:
    """All that defines a video. Coordinates are (y, x) in pixels, y down, modulo the picture's size."""

    label: int
    noise: np.ndarray  # white, to be made into the background [4, SIZE, SIZE]
    tint: np.ndarray  # the background's mean colour [3]
    outline: np.ndarray  # the sprite's edge as a share of its radius, by angle [_OUTLINE_ANGLES]
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
    angle = np.arange(_OUTLINE_ANGLES) * (2 * np.pi / _OUTLINE_ANGLES)
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


def _sprite_window(s: Scene) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray, np.ndarray]:
    """The pixels round the sprite: their index into [FRAMES, SIZE, SIZE], how much of each the sprite covers
    [FRAMES, n, n], and where they lie in the sprite's own frame of reference, y and x in radii.
    """
    reach = int(RADIUS[1]) + 1
    offset = np.arange(-reach, reach + 1)
    corner = np.floor(s.centre).astype(np.int64)
    pixel = (corner[:, :, None] + offset) % SIZE  # [FRAMES, 2, n]
    index = (np.arange(FRAMES)[:, None, None], pixel[:, 0, :, None], pixel[:, 1, None, :])
    away = (corner[:, :, None] + offset + 0.5 - s.centre[:, :, None]).astype(np.float32)  # from the pixel's middle
    dy, dx = away[:, 0, :, None], away[:, 1, None, :]
    radius = s.radius.astype(np.float32)[:, None, None]
    cos, sin = (f(s.angle).astype(np.float32)[:, None, None] / radius for f in (np.cos, np.sin))
    y, x = cos * dy - sin * dx, sin * dy + cos * dx
    bearing = np.arctan2(y, x) * np.float32(_OUTLINE_ANGLES / (2 * np.pi))
    edge = s.outline.astype(np.float32)[np.rint(bearing).astype(np.int64) % _OUTLINE_ANGLES]
    covered = np.clip((edge - np.hypot(y, x)) * radius + 0.5, 0, 1)  # antialiased: a ramp one pixel wide
    return index, covered, y, x


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
    where, covered, y, x = _sprite_window(s)
    dark, bright = s.colours.astype(np.float32)
    sprite = dark + (bright - dark) * _brightness(s.pattern, s.waves, y, x)[..., None]
    behind = picture[where]
    picture[where] = behind + covered[..., None] * (sprite - behind)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def foreground_masks(seed: int, split: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels of the moving sprite when the video is scaled and cropped to ``size``: bool [FRAMES, H, W].

    A pixel counts when at least half covered. False everywhere for the class ``static``.
    """
    s = scene(seed, split, index)
    if CLASS_NAMES[s.label] == "static":
        return np.zeros((FRAMES, *size), dtype=bool)
    where, covered, _, _ = _sprite_window(s)
    whole = np.zeros((FRAMES, SIZE, SIZE), dtype=np.float32)
    whole[where] = covered
    rows, columns, top, left = cover(SIZE, SIZE, size)
    down, across = (_area_average(n) for n in (rows, columns))
    return (down[top : top + size[0]] @ whole @ across[left : left + size[1]].T) >= 0.5


def _area_average(n: int) -> np.ndarray:
    """The matrix [n, SIZE] that averages SIZE pixels into n by the area they share."""
    edges = np.arange(n + 1) * (SIZE / n)
    pixel = np.arange(SIZE)
    shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.maximum(shared, 0) * (n / SIZE)).astype(np.float32)


def cache_folder() -> Path:
    """Where rendered videos are kept: ``$TATS_CACHE``, or the user's cache folder."""
    if os.environ.get("TATS_CACHE"):
        return Path(os.environ["TATS_CACHE"]).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tats-env"))


def _file_name(index: int) -> str:
    return f"{index:05d}.mp4"


def render(seed: int, split: str, num_videos: int, *, progress: bool = False) -> list[Path]:
    """Paths of the first ``num_videos`` videos of a split; renders those that are not in the cache yet.

    Raises:
        DataError: if the cache cannot be written, or a worker process fails (with what it said).
    """
    folder = cache_folder() / VERSION / str(seed) / split
    paths = [folder / _file_name(i) for i in range(num_videos)]
    if all(path.exists() for path in paths):
        return paths
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise DataError(f"cannot write rendered videos to {folder}: {error}; set TATS_CACHE elsewhere") from error
    with lock:
        for leftover in folder.glob(".render-*"):  # of a render that was killed: nobody else holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        _run_workers(seed, split, paths, progress)
    return paths


def _run_workers(seed: int, split: str, paths: list[Path], progress: bool) -> None:
    """Have worker processes render what is missing, and wait for them.

    Plain subprocesses, since ``multiprocessing`` would import the user's main module again in each, and is refused
    to daemonic processes. All write the number of videos done to one pipe, which ends when the last of them does.
    """
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(quiet=not progress))  # with disable=True rich 14 prints an empty line

    missing = sum(not path.exists() for path in paths)
    num_workers = min(num_cores(), -(-missing // 4))
    command = [sys.executable, "-m", "tats_env.data.motion", str(seed), split, str(paths[0].parent), str(len(paths))]
    package_root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    workers: list[subprocess.Popen[bytes]] = []
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as errors, os.fdopen(read_end) as counts, bar:
        task = bar.add_task(f"rendering motion ({split})", total=missing)
        try:
            with os.fdopen(write_end, "wb") as written:
                for w in range(num_workers):
                    worker = subprocess.Popen(
                        [*command, str(w), str(num_workers)],
                        stdin=subprocess.DEVNULL, stdout=written, stderr=errors,
                        env={**os.environ, "PYTHONPATH": search_path},
                    )  # fmt: skip
                    workers.append(worker)
            for count in counts:
                bar.advance(task, int(count))
        except BaseException:  # interrupted: do not wait for the rest of the work
            for worker in workers:
                worker.kill()
            raise
        finally:
            for worker in workers:
                worker.wait()
        if any(worker.returncode for worker in workers):
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-2000:]
            raise DataError(f"rendering to {paths[0].parent} failed; the worker process said:\n{said}")


def _encode(seed: int, split: str, indices: list[int], folder: Path) -> None:
    """Render videos through one ffmpeg and move them into ``folder``."""
    from imageio_ffmpeg import get_ffmpeg_exe

    cuts = ",".join(str(FRAMES * (i + 1)) for i in range(len(indices)))
    command = [
        get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", str(FPS), "-i", "-",
        "-c:v", "libx264", "-preset", "veryfast", "-qp", "18", "-pix_fmt", "yuv420p", "-threads", "1",
        # FRAMES is a multiple of the GOP, so that every video starts on a key frame of its own
        "-g", str(KEY_FRAME_EVERY), "-keyint_min", str(KEY_FRAME_EVERY), "-sc_threshold", "0", "-bf", "0",
        "-flags", "+cgop",
        "-f", "segment", "-segment_frames", cuts, "-segment_format", "mp4", "-reset_timestamps", "1", "%05d.mp4",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".render-", dir=folder) as work:
        encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=work)
        with contextlib.suppress(BrokenPipeError), encoder.stdin:  # type: ignore[union-attr]
            for index in indices:
                encoder.stdin.write(frames(seed, split, index).data)  # type: ignore[union-attr]
        encoder.wait()
        segments = sorted(Path(work).iterdir())
        if encoder.returncode or len(segments) != len(indices):
            raise RuntimeError(
                f"ffmpeg ended with code {encoder.returncode} and {len(segments)} files for {len(indices)} videos"
            )
        for index, segment in zip(indices, segments, strict=True):
            os.replace(segment, folder / _file_name(index))


def main() -> None:
    """Worker process w of n: renders those of videos w, w + n, ... that are missing; prints how many as it goes."""
    seed, split, folder, num_videos, w, n = sys.argv[1:]
    mine = range(int(w), int(num_videos), int(n))
    missing = [i for i in mine if not (Path(folder) / _file_name(i)).exists()]
    for first in range(0, len(missing), _VIDEOS_PER_ENCODER):
        batch = missing[first : first + _VIDEOS_PER_ENCODER]
        _encode(int(seed), split, batch, Path(folder))
        print(len(batch), flush=True)


if __name__ == "__main__":
    main()
