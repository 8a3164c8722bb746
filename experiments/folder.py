"""The folder of a run: made, and held against other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.refusals import ConfigError

LOCK = ".lock"
"""Held in a run's folder for as long as its process lives."""


def stored(path: Path) -> dict[str, Any]:
    """What a JSON file of ours holds; nothing if it is not there, or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def hold(folder: Path) -> FileLock:
    """Make a folder this process's own until it ends, or releases the lock.

    Raises:
        ConfigError: if another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"{folder}: another tats is at work in this folder; wait for it, or end it") from None
    return lock


def new_folder(out: Path, name: str) -> Path:
    """Make ``out/name``, or ``out/name-2`` and so on where there is a run already."""
    for number in range(1, 10_000):
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{out} holds thousands of runs called {name}; give --out another folder")
