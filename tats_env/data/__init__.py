"""Sets of videos, decoded into clips: the rendered motion set, and folders of video files.

Importing this loads neither torch nor decord: the renderer's worker processes come through here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tats_env.data.reader import DataError

if TYPE_CHECKING:
    import numpy as np

    from tats_env.data.video_set import VideoSet, write_bad_videos

__all__ = ["DataError", "VideoSet", "open_dataset", "write_bad_videos"]

SPLITS = ("train", "validation")
MOTION_VIDEOS = 60  # a short prefix, rendered in a few seconds: four videos a class


def __getattr__(name: str) -> Any:
    if name in ("VideoSet", "write_bad_videos"):
        from tats_env.data import video_set

        return getattr(video_set, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_dataset(
    spec: str,
    *,
    split: str = "train",
    num_frames: int = 16,
    frame_stride: int = 1,
    size: tuple[int, int] = (32, 32),
    num_videos: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> VideoSet:
    """Open the set of videos that ``spec`` names.

    - ``"motion"``: 15 classes of motion rendered into real H.264 files on first use (see ``tats_env.data.motion``).
      ``num_videos`` is how many of the split there are, 60 if None; more of them begin with the same ones.
      ``seed`` chooses the set.
    - ``"folder:/path"``: every video file under a folder; the first-level subfolder is the class (see
      ``tats_env.data.folder``). ``num_videos`` is how many there are at most, a choice by ``seed``; None takes all.

    Args:
        split: ``"train"`` or ``"validation"``.
        num_frames: frames in a clip, T.
        frame_stride: frames of the video from one frame of a clip to the next.
        size: (H, W) of the clips in pixels; a video is scaled to cover it and cropped at the centre.
        progress: show progress bars while rendering and decoding.

    Raises:
        DataError: for an unknown spec or split, an impossible size, a folder that is missing or holds no video, or
            one of which more than half cannot be decoded.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; give one of {', '.join(SPLITS)}")
    for name, value in (
        ("num_frames", num_frames), ("frame_stride", frame_stride), ("size", min(size)), ("num_videos", num_videos)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise DataError(f"{name}={size if name == 'size' else value}: must be at least 1")
    if seed < 0:
        raise DataError(f"seed={seed}: must not be negative")
    from tats_env.data.video_set import VideoSet

    kind, _, path = spec.partition(":")
    truth: Callable[[Path], np.ndarray] | None = None
    if spec == "motion":
        from tats_env.data import motion

        indices = range(num_videos or MOTION_VIDEOS)
        paths = motion.render(seed, split, len(indices), progress=progress)
        labels, class_names = [i % len(motion.CLASS_NAMES) for i in indices], list(motion.CLASS_NAMES)
        truth = lambda path: motion.foreground_masks(seed, split, int(path.stem), size)  # noqa: E731
    elif kind == "folder" and path:
        from tats_env.data.folder import list_videos

        paths, labels, class_names = list_videos(Path(path).expanduser(), split, num_videos, seed)
    else:
        raise DataError(f"dataset {spec!r} is unknown; give 'motion' or 'folder:/path/of/videos'")
    return VideoSet(
        spec, split, paths, labels, class_names,
        num_frames=num_frames, frame_stride=frame_stride, size=size, truth=truth, progress=progress,
    )  # fmt: skip
