"""Folders of video files: which files, which classes, which split."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from tats_env.data.reader import DataError

EXTENSIONS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv",
)  # fmt: skip
VALIDATION_SHARE = 0.2
_SMALLEST_STRATUM = 5  # a class with fewer videos is split together with the other small ones

_log = logging.getLogger("tats_env.data")


def _find(root: Path) -> list[Path]:
    """Paths, relative to ``root`` and sorted, of all video files below it, through links to folders as well."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                found.append(Path(folder, name).relative_to(root))
    return sorted(found)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()


def _class_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def _split(videos: list[Path]) -> dict[str, list[Path]]:
    """Share out relative paths by the hash of their names: the same on every machine and in every run."""
    strata: dict[str, list[Path]] = defaultdict(list)
    for path in videos:
        strata[_class_of(path)].append(path)
    small = [name for name, members in strata.items() if len(members) < _SMALLEST_STRATUM]
    pooled = [path for name in small for path in strata.pop(name)]
    parts: dict[str, list[Path]] = {"train": [], "validation": []}
    for members in (*strata.values(), pooled):
        ordered = sorted(members, key=_digest)
        held_out = max(1, round(VALIDATION_SHARE * len(ordered))) if len(ordered) > 1 else 0
        parts["train"] += ordered[: len(ordered) - held_out]
        parts["validation"] += ordered[len(ordered) - held_out :]
    return {name: sorted(part) for name, part in parts.items()}


def list_videos(
    root: Path, split: str, num_videos: int | None = None, seed: int = 0
) -> tuple[list[Path], list[int], list[str]]:
    """The files of one split of a folder, without opening any.

    The whole tree is searched (hidden files and folders left out). The class of a file is the first-level subfolder
    it lies under; one directly in ``root`` has none, -1. A fifth of the videos is held out for validation: those
    whose relative path hashes highest, within each class of five or more.

    Returns:
        paths [V], labels [V], and the class names: all of the folder's, sorted, in both splits.

    Raises:
        DataError: if the folder is missing or holds no video.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    videos = _find(root)
    if not videos:
        raise DataError(f"no video under {root}; looked for {' '.join(EXTENSIONS)}")
    class_names = sorted({_class_of(path) for path in videos} - {""})
    if len(videos) == 1:
        _log.warning("%s holds one video: it serves for both training and validation", root)
        chosen = videos
    else:
        chosen = _split(videos)[split]
    if num_videos is not None and num_videos < len(chosen):
        picks = np.random.default_rng(seed).choice(len(chosen), num_videos, replace=False)
        chosen = [chosen[i] for i in sorted(picks)]
    number = {name: i for i, name in enumerate(class_names)}
    return [root / path for path in chosen], [number.get(_class_of(path), -1) for path in chosen], class_names
