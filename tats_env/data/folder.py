"""Folders of video files: which files, which classes, which split."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from tats_env.data.listing import Listing
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


def _digest(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def share_out(names: Sequence[str], classes: Sequence[Hashable]) -> dict[str, list[int]]:
    """Which of the videos [V] are for training and which for validation: indices, in order, by split.

    A fifth is held out: those whose name hashes highest, within each class of five or more. So the split is the same
    on every machine and in every run. A single video serves for both, with a warning.
    """
    if len(names) == 1:
        _log.warning("%s is the only video: it serves for both training and validation", names[0])
        return {"train": [0], "validation": [0]}
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for i, name in enumerate(classes):
        strata[name].append(i)
    small = [name for name, members in strata.items() if len(members) < _SMALLEST_STRATUM]
    pooled = [i for name in small for i in strata.pop(name)]
    parts: dict[str, list[int]] = {"train": [], "validation": []}
    for members in (*strata.values(), pooled):
        ordered = sorted(members, key=lambda i: _digest(names[i]))
        held_out = max(1, round(VALIDATION_SHARE * len(ordered))) if len(ordered) > 1 else 0
        parts["train"] += ordered[: len(ordered) - held_out]
        parts["validation"] += ordered[len(ordered) - held_out :]
    return {split: sorted(part) for split, part in parts.items()}


def list_folder(root: Path, split: str) -> Listing:
    """The files of one split of a folder, without opening any.

    The whole tree is searched (hidden files and folders left out). The class of a file is the first-level subfolder
    it lies under; one directly in ``root`` has none, -1. A fifth of the videos is held out for validation, chosen by
    their paths within ``root`` (see ``share_out``). The class names are all of the folder's, sorted, in both splits.

    Raises:
        DataError: if the folder is missing or holds no video.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    videos = _find(root)
    if not videos:
        raise DataError(f"no video under {root}; looked for {' '.join(EXTENSIONS)}")
    classes = [path.parts[0] if len(path.parts) > 1 else "" for path in videos]
    class_names = sorted(set(classes) - {""})
    number = {name: i for i, name in enumerate(class_names)} | {"": -1}
    chosen = share_out([path.as_posix() for path in videos], classes)[split]
    return Listing([root / videos[i] for i in chosen], [number[classes[i]] for i in chosen], class_names)
