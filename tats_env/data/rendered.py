"""Sets of videos that are rendered when first asked for: how files are made of a set's frames.

A set is a module of this package, named in ``tats_env.data.listing.RENDERED``, that says what is in its videos
(``RenderedSet``). Format of every set: 64 x 64 pixels, 40 frames, 24 a second; H.264 in mp4, a key frame every 8.
Video i has class i % the number of classes, so that every prefix is balanced. A video is a function of (seed, split,
index) alone: its own random stream, and a constant quantiser, under which a coded frame does not depend on its
neighbours in the encoder.

Files: ``cache_folder()/<version>/<seed>/<split>/00000.mp4`` and so on, rendered on all cores. Starting an ffmpeg for
each video would cost more than the rest, so a worker process sends many videos through one and lets the segment muxer
cut them. Several processes may ask at once (a lock file), and a render that is killed leaves whole files only (each
is moved into place when done).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from tats_env.data.reader import DataError, cover, num_cores

FRAMES, SIZE, FPS, KEY_FRAME_EVERY = 40, 64, 24, 8
_VIDEOS_PER_ENCODER = 32


class RenderedSet(Protocol):
    """What a set's module gives."""

    NAME: str
    """Also the module's."""
    VERSION: str
    """Of its files in the cache: a change to the picture needs a new one."""
    CLASS_NAMES: tuple[str, ...]

    def frames(self, seed: int, split: str, index: int) -> np.ndarray:
        """A video before it is encoded, uint8 [FRAMES, SIZE, SIZE, 3]."""

    def foreground_masks(self, seed: int, split: str, index: int, size: tuple[int, int]) -> np.ndarray:
        """What moves as the class says, when the video is scaled and cropped to ``size``: bool [FRAMES, H, W]."""


def load_set(name: str) -> RenderedSet:
    """The module of a rendered set."""
    return cast(RenderedSet, importlib.import_module(f"tats_env.data.{name}"))


def scale_masks(covered: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale and crop as the reader does with frames.

    Args:
        covered: the share of each pixel that is foreground, float32 [T, SIZE, SIZE].
        size: (H, W).

    Returns:
        The pixels of which at least half is foreground, bool [T, H, W].
    """
    rows, columns, top, left = cover(SIZE, SIZE, size)
    down, across = (_area_average(n) for n in (rows, columns))
    return (down[top : top + size[0]] @ covered @ across[left : left + size[1]].T) >= 0.5


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


def render(name: str, seed: int, split: str, num_videos: int, *, progress: bool = False) -> list[Path]:
    """Paths of the first ``num_videos`` videos of a set's split; renders those that are not in the cache yet.

    Raises:
        DataError: if the cache cannot be written, or a worker process fails (with what it said).
    """
    folder = cache_folder() / load_set(name).VERSION / str(seed) / split
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
        _run_workers(name, seed, split, paths, progress)
    return paths


def _run_workers(name: str, seed: int, split: str, paths: list[Path], progress: bool) -> None:
    """Have worker processes render what is missing, and wait for them.

    Plain subprocesses, since ``multiprocessing`` would import the user's main module again in each, and is refused
    to daemonic processes. All write the number of videos done to one pipe, which ends when the last of them does.
    """
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(quiet=not progress))  # with disable=True rich 14 prints an empty line

    missing = sum(not path.exists() for path in paths)
    num_workers = min(num_cores(), -(-missing // 4))
    command = [
        sys.executable, "-m", "tats_env.data.rendered",
        name, str(seed), split, str(paths[0].parent), str(len(paths)),
    ]  # fmt: skip
    package_root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    workers: list[subprocess.Popen[bytes]] = []
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as errors, os.fdopen(read_end) as counts, bar:
        task = bar.add_task(f"rendering {name} ({split})", total=missing)
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


def _encode(name: str, seed: int, split: str, indices: list[int], folder: Path) -> None:
    """Render videos through one ffmpeg and move them into ``folder``."""
    from imageio_ffmpeg import get_ffmpeg_exe

    frames = load_set(name).frames
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
    name, seed, split, folder, num_videos, w, n = sys.argv[1:]
    mine = range(int(w), int(num_videos), int(n))
    missing = [i for i in mine if not (Path(folder) / _file_name(i)).exists()]
    for first in range(0, len(missing), _VIDEOS_PER_ENCODER):
        batch = missing[first : first + _VIDEOS_PER_ENCODER]
        _encode(name, int(seed), split, batch, Path(folder))
        os.write(1, f"{len(batch)}\n".encode())  # at once: print may write the line's end by itself, after another's


if __name__ == "__main__":
    main()
