"""Videos in tar files, in the webdataset convention: read at random out of them, and written with their frames decoded.

A sample is the members of one key: ``000123.npy`` (frames, uint8 [L, h, w, 3]) or an encoded ``000123.mp4``, and its
label in ``000123.cls`` (a number) or ``000123.json`` (``{"label": 7}``, and ``"fps"`` if known). The tar files lie in
``train`` and ``validation`` (or ``val``), and beside those ``classes.txt``, a name a line, or ``classes.json``, a list
of names, or ``{"class_names": [...], "flips": false}`` for a set in which left or right is the label.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from tats_env.data.folder import EXTENSIONS
from tats_env.data.index import probe_all
from tats_env.data.listing import Listing
from tats_env.data.reader import (
    DECODERS,
    DataError,
    NpyReader,
    UnreadableVideo,
    VideoInfo,
    VideoReader,
    cover,
    num_cores,
    read_frames,
)
from tats_env.data.workers import on_all_cores, seconds_for

FOLDERS = {"train": ("train",), "validation": ("validation", "val")}
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DECODED = ".decoded-"
_LARGEST_NOTE = 1 << 20  # bytes; a .cls or .json is a few dozen

_log = logging.getLogger("tats_env.data")


class _Video(NamedTuple):
    """Where one lies in its tar file, and what is said of it there."""

    offset: int
    length: int
    label: int
    fps: float


class _Classes(NamedTuple):
    names: list[str]
    flips: bool = True


def _scan(shard: Path) -> dict[str, _Video]:
    """The videos of a tar file by their members' names, in its order. Only headers, labels and notes are read."""
    status = shard.stat()
    return _scanned(shard, status.st_mtime_ns, status.st_size)


@cache
def _scanned(shard: Path, modified: int, size: int) -> dict[str, _Video]:
    places: dict[str, tuple[str, int, int]] = {}  # of each key: its video
    notes: dict[str, Mapping[str, int | float]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            name = PurePosixPath(member.name)  # without the ./ that some write
            if not member.isfile() or name.name.startswith("."):
                continue
            key, kind = str(name.with_name(name.name.split(".")[0])), name.suffix.lower()
            if kind == ".npy" or kind in EXTENSIONS:
                places.setdefault(key, (str(name), member.offset_data, member.size))
            elif kind in (".cls", ".json") and member.size <= _LARGEST_NOTE:
                stream = tar.extractfile(member)
                assert stream is not None, "a member that is a file has contents"
                notes[key] = {**notes.get(key, {}), **_note(str(name), stream.read())}
    found = {}
    for key, (member_name, offset, length) in places.items():
        note = notes.get(key, {})
        found[member_name] = _Video(offset, length, int(note.get("label", -1)), float(note.get("fps", 0.0)))
    return found


def _note(name: str, text: bytes) -> Mapping[str, int | float]:
    """What a .cls or .json member says: ``label`` and ``fps``, each if it is there."""
    try:
        if name.lower().endswith(".cls"):
            return {"label": int(text)}
        note = json.loads(text)
        return {what: kind(note[what]) for what, kind in (("label", int), ("fps", float)) if what in note}
    except (ValueError, TypeError):
        right = "a whole number" if name.lower().endswith(".cls") else '{"label": a whole number}'
        raise ValueError(f"{name} holds {text[:40]!r}; {right} would be right") from None


def open_member(shard: Path, name: str, decoder: str, size: tuple[int, int] | None) -> VideoReader:
    """A video in a tar file, by its member's name; frames that lie there decoded are read in place.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is empty or cut off. Others for a file that is no tar, or as the decoder does.
    """
    videos = _scan(shard)
    if name not in videos:
        raise FileNotFoundError(f"{shard}/{name}")
    video = videos[name]
    if name.lower().endswith(".npy"):
        return NpyReader(shard, size, offset=video.offset, length=video.length, fps=video.fps)
    with shard.open("rb") as stream:
        stream.seek(video.offset)
        encoded = stream.read(video.length)
    if not encoded:
        raise ValueError("the file is empty")
    return DECODERS[decoder](encoded, size)


def list_shards(root: Path, split: str) -> Listing:
    """The videos in the tar files of one split, shard by shard in the order of their names.

    Without ``classes.txt`` or ``classes.json`` the classes are named by their numbers, up to the highest there is.

    Raises:
        DataError: if there are none, or one is compressed, cut off or labelled with something else than a class.
    """
    shards = _shards(root, split)
    classes = _class_names(root)
    every = shards if classes else [shard for name in FOLDERS for shard in _shards(root, name, needed=False)]
    with ThreadPoolExecutor(num_cores()) as pool:  # each header is a read of its own, and disks may be far away
        videos = dict(zip(every, pool.map(_scan_or_refuse, every), strict=True))
    found = [(shard / name, video.label) for shard in shards for name, video in videos[shard].items()]
    if not found:
        raise DataError(f"no video in the tar files of {shards[0].parent}; looked for .npy {' '.join(EXTENSIONS)}")
    if classes is None:
        highest = max(video.label for members in videos.values() for video in members.values())
        classes = _Classes([str(i) for i in range(highest + 1)])
    for path, label in found:
        if not -1 <= label < len(classes.names):
            raise DataError(f"{path}: its class is {label}, and there are {len(classes.names)}, numbered from 0")
    return Listing([path for path, _ in found], [label for _, label in found], classes.names, flips=classes.flips)


def _shards(root: Path, split: str, needed: bool = True) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    for folder in (root / name for name in FOLDERS[split]):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in files:
            if path.name.lower().endswith(COMPRESSED):
                raise DataError(
                    f"{path} is compressed: a video in it cannot be reached without unpacking all before it; "
                    "unpack it to a plain .tar (the videos in it are compressed already)"
                )
        if shards := [path for path in files if path.suffix == ".tar" and not path.name.startswith(".")]:
            return shards
    if needed:
        raise DataError(f"no shards: expected {' or '.join(f'{root / name}/*.tar' for name in FOLDERS[split])}")
    return []


def _scan_or_refuse(shard: Path) -> dict[str, _Video]:
    try:
        return _scan(shard)
    except (tarfile.TarError, ValueError, OSError) as error:
        what = f"not a whole, uncompressed tar file ({error})" if isinstance(error, tarfile.TarError) else error
        raise DataError(f"{shard}: {what}") from error


def _class_names(root: Path) -> _Classes | None:
    """What is said of the set's classes; None if nothing is."""
    if (path := root / "classes.json").is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            said = said if isinstance(said, dict) else {"class_names": said}
            classes = _Classes(said["class_names"], said.get("flips", True))
            if not isinstance(classes.names, list) or not all(isinstance(name, str) for name in classes.names):
                raise ValueError("the names are not a list of texts")
        except (ValueError, KeyError) as error:
            raise DataError(
                f'{path}: {error}; a list of names, or {{"class_names": [...], "flips": true}}, would be right'
            ) from None
        return classes
    if (path := root / "classes.txt").is_file():
        return _Classes(path.read_text(encoding="utf-8").splitlines())
    return None


def write_shards(
    listing: Listing,
    folder: Path,
    split: str,
    size: tuple[int, int] | int,
    *,
    per_shard: int = 100,
    decoder: str = "decord",
    workers: int = 0,
    progress: bool = False,
) -> list[UnreadableVideo]:
    """Write a listing's videos, decoded, into ``folder/split/shard-000000.tar`` and on, all cores at once.

    ``size`` (H, W) covers and crops at the centre; a number is the shorter side, of which a video that is smaller
    keeps its own size. Each shard is renamed when whole: after a kill, the same call writes those that lack.
    ``workers`` are processes, so that a decoder which crashes or hangs costs one video; 0 means threads.

    Returns:
        The videos left out because they cannot be decoded, of the shards written now.

    Raises:
        DataError: if the folder holds shards of other videos or of another size.
    """
    from filelock import FileLock

    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    rows = list(zip(range(len(listing.paths)), listing.paths, listing.labels, strict=True))
    plan = {
        target / f"shard-{i:06d}.tar": rows[start : start + per_shard]
        for i, start in enumerate(range(0, len(rows), per_shard))
    }
    with FileLock(folder / ".lock"):  # the other split's too may be being written
        _write_classes(listing, folder)
    with FileLock(target / ".lock"):
        for shard in target.glob("*.tar"):
            if shard not in plan or not _holds(shard, plan[shard], size):
                raise DataError(f"{shard} holds other videos, or at another size, than asked for; take an empty folder")
        for left in target.glob(f"{_DECODED}*"):  # by a packing that was killed
            shutil.rmtree(left)
        missing = [shard for shard in plan if not shard.exists()]
        infos = probe_all([path for shard in missing for _, path, _ in plan[shard]], decoder, progress, workers)
        orders = list(zip((row for shard in missing for row in plan[shard]), infos, strict=True))
        with tempfile.TemporaryDirectory(prefix=_DECODED, dir=target) as place:
            work = partial(_decode, folder=Path(place), size=size, decoder=decoder)
            decoded = on_all_cores(work, orders, "packing videos", progress, workers, _about)
            bad = [error for shard in missing for error in _write_shard(shard, plan[shard], decoded, size)]
    for error in bad:
        _log.warning("left out: %s", error)
    return bad


_Row = tuple[int, Path, int]  # number in the listing, video, label


def _write_classes(listing: Listing, folder: Path) -> None:
    """Name the classes once for all splits."""
    classes = _Classes(list(listing.class_names), listing.flips)
    if (there := _class_names(folder)) is None:
        text = json.dumps({"class_names": classes.names, "flips": classes.flips}, ensure_ascii=False, indent=1)
        (temporary := folder / ".classes.json.new").write_text(text, encoding="utf-8")
        temporary.rename(folder / "classes.json")
    elif there != classes:
        raise DataError(f"{folder} holds shards of other classes than asked for; take an empty folder")


def _source(path: Path) -> str:
    return "/".join(path.parts[-2:])  # enough to tell videos apart, and nothing of the machine it was packed on


def _holds(shard: Path, rows: list[_Row], size: tuple[int, int] | int) -> bool:
    """Whether a shard is the one that these videos make (those of them that can be decoded)."""
    made = {(_source(path), label, json.dumps(size)) for _, path, label in rows}
    with tarfile.open(shard, "r:") as tar:
        notes = [json.loads(stream.read()) for member in tar if member.name.endswith(".json")
                 and (stream := tar.extractfile(member))]  # fmt: skip
    return {(note.get("source"), note.get("label"), json.dumps(note.get("size"))) for note in notes} <= made


_Order = tuple[_Row, VideoInfo | UnreadableVideo]


def _about(order: _Order) -> tuple[Path, float]:
    (_, path, _), info = order
    return path, seconds_for(info.num_frames if isinstance(info, VideoInfo) else 0)


def _decode(order: _Order, *, folder: Path, size: tuple[int, int] | int, decoder: str) -> tuple[Path, float]:
    """Decode a video into a file; returns that and the frame rate."""
    (number, path, _), info = order
    if isinstance(info, UnreadableVideo):
        raise info
    frames = read_frames(path, _packed(info.height, info.width, size), info=info, decoder=decoder)
    decoded = folder / f"{number:06d}.npy"
    np.save(decoded, frames)
    return decoded, info.fps


def _write_shard(
    shard: Path,
    rows: list[_Row],
    decoded: Iterator[tuple[Path, float] | UnreadableVideo],
    size: tuple[int, int] | int,
) -> list[UnreadableVideo]:
    """Put the next videos into a tar file."""
    bad: list[UnreadableVideo] = []
    temporary = shard.with_name(f".{shard.name}.new")
    with tarfile.open(temporary, "w:") as tar:
        for (number, path, label), result in zip(rows, decoded, strict=False):
            if isinstance(result, UnreadableVideo):
                bad.append(result)
                continue
            frames, fps = result
            note = {"label": label, "fps": fps, "source": _source(path), "size": size}
            with frames.open("rb") as stream:
                _add(tar, f"{number:06d}.npy", stream, frames.stat().st_size)
            frames.unlink()
            text = json.dumps(note).encode()
            _add(tar, f"{number:06d}.json", io.BytesIO(text), len(text))
    temporary.rename(shard)
    return bad


def _add(tar: tarfile.TarFile, name: str, contents: BinaryIO, length: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = length
    tar.addfile(member, contents)


def _packed(height: int, width: int, size: tuple[int, int] | int) -> tuple[int, int]:
    if not isinstance(size, int):
        return size
    shorter = min(size, height, width)
    return cover(height, width, (shorter, shorter))[:2]
