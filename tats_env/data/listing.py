"""What a set of videos is before any file is opened: its name as a user writes it, and its files with their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from tats_env.data.reader import DataError

RENDERED = ("motion", "scenes")
"""Sets that are rendered on first use and have no root."""
KINDS = (*RENDERED, "folder", "list", "ssv2", "kinetics400", "ucf101", "hmdb51", "shards")
OPTIONS = {"ucf101": ("split",), "hmdb51": ("split",)}
"""What may follow a root's ``?``, by kind."""


@dataclass(frozen=True)
class Spec:
    """A data set's name taken apart: ``kind``, ``kind:root`` or ``kind:root?option=value``."""

    kind: str
    root: Path
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The files of one split of a data set, none of them opened."""

    paths: list[Path]
    """[V] files that are there (``folder/shard.tar/000123.mp4`` for one inside a tar file)."""
    labels: list[int]
    """[V] index of each one's class; -1 where unknown."""
    class_names: list[str]
    missing: list[Path] = field(default_factory=list)
    """Files that the annotation names and that are not there."""
    flips: bool = True
    """Whether a mirrored video has the same class: not so where left or right is the label."""


def parse_spec(text: str) -> Spec:
    """Take a data set's name apart.

    Raises:
        DataError: for a kind or an option that is unknown, or a root that is missing.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; did you mean folder:{text}?" if "/" in text else ""
        forms = ", ".join(name if name in RENDERED else f"{name}:/path" for name in KINDS)
        raise DataError(f"dataset {text!r} is unknown; give one of {forms}{hint}")
    root, _, query = rest.partition("?") if kind in OPTIONS else (rest, "", "")
    if bool(root) == (kind in RENDERED):
        raise DataError(f"dataset {text!r}: write {kind if kind in RENDERED else f'{kind}:/path/to/it'}")
    options = dict(part.partition("=")[::2] for part in query.split("&") if part)
    for name in options:
        if name not in OPTIONS.get(kind, ()):
            known = ", ".join(OPTIONS[kind])
            raise DataError(f"dataset {text!r}: {kind} has no option {name!r}; it has {known}")
    return Spec(kind, Path(root).expanduser(), options)
