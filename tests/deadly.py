"""What tests have worker processes do, decoders that crash and hang among it: they import this and nothing heavy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tats_env.data.reader import DecordReader, VideoInfo, probe, read_frames
from tats_env.data.stream import ClipReader


class Deadly(DecordReader):
    """What a file does is in its name: crash or hang, and whether when it is opened or when its frames are read."""

    def __init__(self, source: Path | bytes, size: tuple[int, int] | None = None) -> None:
        super().__init__(source, size)
        self.name = source.stem if isinstance(source, Path) else ""

    def info(self) -> VideoInfo:
        """As decord's."""
        self._act("opened")
        return super().info()

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """As decord's."""
        self._act("read")
        return super().frames(indices)

    def _act(self, when: str) -> None:
        if self.name == f"crash-{when}":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.name == f"hang-{when}":
            time.sleep(1000)
        if self.name == f"killed-{when}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == f"exit-{when}":
            os._exit(0)


@dataclass(frozen=True)
class DeadlyReader(ClipReader):
    """Video 3 kills whoever decodes it, video 4 never ends, video 5 is a defect, video 6 fails the first time."""

    folder: str = ""

    def __call__(self, path: Path, info: VideoInfo, frames: Sequence[int], position: float) -> np.ndarray:
        video = int(path.stem)
        if video == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if video == 4:
            time.sleep(1000)
        if video == 5:
            raise ZeroDivisionError("a defect is not a bad video")
        if video == 6 and not Path(self.folder, "tried").exists():
            Path(self.folder, "tried").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(path, info, frames, position)


@dataclass(frozen=True)
class SlowReader(ClipReader):
    """Video 0 takes two seconds, and each of the others leaves a file behind."""

    folder: str = ""

    def __call__(self, path: Path, info: VideoInfo, frames: Sequence[int], position: float) -> np.ndarray:
        if int(path.stem) == 0:
            time.sleep(2)
        Path(self.folder, path.stem).touch()
        return super().__call__(path, info, frames, position)


def decode(item: tuple[Path, float], size: tuple[int, int]) -> tuple[VideoInfo, np.ndarray]:
    """A small video as a whole, uint8 [L, H, W, 3], in some seconds."""
    info = probe(item[0])
    return info, read_frames(item[0], size, info=info)
