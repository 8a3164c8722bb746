"""Data sets from their annotation files: which videos, which classes, which split.

Something-Something v2 (``list_ssv2``), Kinetics-400 (``list_kinetics400``), UCF101 (``list_ucf101``) and HMDB51
(``list_hmdb51``) are read as their authors distribute them, and lists of ``path label`` as VideoMAE takes them
(``list_file``). None of the videos is opened. Which of them are there is found by listing folders, once each, rather
than by asking for every file. A video is known by its name without the extension, so that a set that was re-encoded
(``.webm`` to ``.mp4``, say) needs no other annotation; a class's folder may have underscores for spaces, and other
capitals than the annotation.

Each function takes ``split``, ``"train"`` or ``"validation"``, and raises DataError, which says what would be right:
for a root or an annotation file that is missing, for a damaged line (with file and line), and where not a single one
of the videos is there. Videos that are missing beside others that are there are named in ``Listing.missing``, and
counted in the log.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tats_env.data.folder import EXTENSIONS, share_out
from tats_env.data.listing import Listing
from tats_env.data.reader import DataError

FOLDS = ("1", "2", "3")
"""The official splits of UCF101 and HMDB51."""
MOST_CLASSES = 100_000
"""A label beyond it is taken for something else."""

_log = logging.getLogger("tats_env.data")


class _Entry(NamedTuple):
    """One video as an annotation names it."""

    folder: str  # of its class; empty where the set has none
    stem: str  # of its file
    label: int


def list_ssv2(root: Path, split: str) -> Listing:
    """Something-Something v2: 174 classes, in which left and right matter (``flips`` is False).

    Annotation: ``something-something-v2-labels.json`` (template to number) and ``...-train.json`` or
    ``...-validation.json``, or ``labels.json`` and so on as newer downloads have it; in ``root``, ``root/labels`` or
    ``root/annotations``. Videos: ``<id>.webm`` in ``root/20bn-something-something-v2``, ``root/videos`` or ``root``.
    """
    folders = (root, root / "labels", root / "annotations")
    labels_file, split_file = (
        _annotation("ssv2", root, folders, [f"something-something-v2-{name}.json", f"{name}.json"])
        for name in ("labels", split)
    )
    numbers = _ssv2_labels(labels_file)
    items = _json(split_file)
    if not isinstance(items, list):
        raise DataError(f"{split_file}: expected a list of {{id, label, template, placeholders}}")
    entries = []
    for i, item in enumerate(items, 1):
        if not isinstance(item, dict) or "id" not in item or not isinstance(item.get("template"), str):
            raise DataError(
                f"{split_file}: item {i}: expected {{id, label, template, placeholders}}, not {item!r:.100}"
            )
        template = item["template"].replace("[", "").replace("]", "")
        if template not in numbers:
            raise DataError(f"{split_file}: item {i} (id {item['id']}): no class {template!r} in {labels_file}")
        entries.append(_Entry("", str(item["id"]), numbers[template]))
    bases = [root / "20bn-something-something-v2", root / "videos", root]
    return _locate("ssv2", split, split_file, entries, list(numbers), bases, ".webm", flips=False)


def _ssv2_labels(path: Path) -> dict[str, int]:
    """Number of each class, in the order of the numbers."""
    found = _json(path)
    try:
        numbers = {str(name): int(number) for name, number in found.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise DataError(f'{path}: expected {{"Approaching something with your camera": "0", ...}}') from None
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise DataError(f"{path}: the {len(numbers)} classes are not numbered from 0 to {len(numbers) - 1}")
    return dict(sorted(numbers.items(), key=lambda pair: pair[1]))


_KINETICS_NAMES = {"train": ("train",), "validation": ("validate", "val", "validation")}
_KINETICS_PREFIXES = ("", "kinetics-400_", "kinetics400_", "kinetics_")
_KINETICS_FOLDERS = {"train": ("train", "train_256"), "validation": ("val", "validate", "validation", "val_256")}
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def list_kinetics400(root: Path, split: str) -> Listing:
    """Kinetics-400, of which many videos are no longer to be had: those are in ``missing``.

    Annotation: CSV with the columns ``label,youtube_id,time_start,time_end,split`` (others are passed over), named
    ``train.csv``, and ``validate.csv``, ``val.csv`` or ``validation.csv``, each with or without ``kinetics-400_``,
    ``kinetics400_`` or ``kinetics_`` in front; in ``root`` or ``root/annotations``. The classes are the labels of
    both files, in alphabetical order, or of one if there is no other.
    Videos: ``<label>/<youtube_id>_<start:06d>_<end:06d>.mp4``, or the same without the label's folder, in a folder
    of the split (``train``, ``train_256``; ``val``, ``validate``, ``validation``, ``val_256``) in ``root`` or
    ``root/videos``, or in ``root/videos`` or ``root`` itself.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    files: dict[str, Path] = {}
    for part in sorted(_KINETICS_NAMES, key=lambda part: part != split):
        names = [f"{prefix}{name}.csv" for prefix in _KINETICS_PREFIXES for name in _KINETICS_NAMES[part]]
        try:
            files[part] = _annotation("kinetics400", root, (root, root / "annotations"), names)
        except DataError:
            if part == split:
                raise
            continue
        rows[part] = list(_kinetics_rows(files[part]))
    class_names = sorted({label for part in rows.values() for label, _ in part})
    number = {name: i for i, name in enumerate(class_names)}
    entries = [_Entry(label, stem, number[label]) for label, stem in rows[split]]
    homes = (root, root / "videos")
    bases = [home / name for home in homes for name in _KINETICS_FOLDERS[split]] + [root / "videos", root]
    return _locate("kinetics400", split, files[split], entries, class_names, bases, ".mp4")


def _kinetics_rows(path: Path) -> Iterator[tuple[str, str]]:
    """(label, name of the file without extension) of each line."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if missing := [name for name in _KINETICS_COLUMNS if name not in header]:
            raise DataError(
                f"{path}:1: no column {', '.join(missing)}; expected label,youtube_id,time_start,time_end,split"
            )
        at = [header.index(name) for name in _KINETICS_COLUMNS]
        for row in reader:
            if not row:
                continue
            try:
                label, video, start, end = (row[i] for i in at)
                stem = f"{video}_{int(float(start)):06d}_{int(float(end)):06d}"
            except (IndexError, ValueError, OverflowError):
                label, video, stem = "", "", ""
            if not label or not video:
                raise DataError(f"{path}:{reader.line_num}: {','.join(row)!r:.100} is not {','.join(header)}")
            yield label.replace("_", " "), stem
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}") from None


def list_ucf101(root: Path, split: str, fold: int | str = 1) -> Listing:
    """UCF101 by one of its three official splits; ``"validation"`` is the official test list.

    Annotation: ``classInd.txt``, ``trainlist0<fold>.txt`` and ``testlist0<fold>.txt`` in ``root`` or
    ``root/ucfTrainTestlist``. Videos: ``.avi`` in class folders in ``root/UCF-101``, ``root/videos`` or ``root``.
    """
    fold = _fold("ucf101", fold)
    folders = (root, root / "ucfTrainTestlist")
    classes_file = _annotation("ucf101", root, folders, ["classInd.txt"])
    name = f"{'train' if split == 'train' else 'test'}list0{fold}.txt"
    split_file = _annotation("ucf101", root, folders, [name])
    class_names: list[str] = []
    for line, text in _lines(classes_file):
        parts = text.split()
        if len(parts) != 2 or parts[0] != str(len(class_names) + 1):
            raise DataError(f"{classes_file}:{line}: {text!r:.100} is not '{len(class_names) + 1} NameOfClass'")
        class_names.append(parts[1])
    number = {name.casefold(): i for i, name in enumerate(class_names)}
    entries = []
    for line, text in _lines(split_file):
        match = re.fullmatch(r"([^/]+)/(\S+)\.avi(?:\s+([0-9]{1,9}))?", text)
        label = number.get(match[1].casefold()) if match else None
        if not match or label is None or int(match[3] or label + 1) != label + 1:
            right = "Class/v_Class_g01_c01.avi, followed by the class's number for training"
            raise DataError(f"{split_file}:{line}: {text!r:.100} is not {right}, with a class of {classes_file}")
        entries.append(_Entry(match[1], match[2], label))
    bases = [root / "UCF-101", root / "videos", root]
    return _locate("ucf101", split, split_file, entries, class_names, bases, ".avi")


def list_hmdb51(root: Path, split: str, fold: int | str = 1) -> Listing:
    """HMDB51 by one of its three official splits; ``"validation"`` is the official test list.

    Annotation: ``<class>_test_split<fold>.txt``, a file a class, of ``name.avi 1`` (training), ``2`` (test) or ``0``
    (neither), in ``root``, ``root/splits`` or ``root/testTrainMulti_7030_splits``. The classes are in alphabetical
    order. Videos: ``.avi`` in class folders in ``root/hmdb51_org...``, ``root/videos`` or ``root``.
    """
    fold = _fold("hmdb51", fold)
    folders = (root / "testTrainMulti_7030_splits", root / "splits", root)
    example = f"brush_hair_test_split{fold}.txt"
    folder = next((folder for folder in folders if any(folder.glob("*_test_split[123].txt"))), None)
    if folder is None:
        folder = _annotation("hmdb51", root, folders, [example]).parent
    class_names = sorted({path.name[: -len("_test_split1.txt")] for path in folder.glob("*_test_split[123].txt")})
    wanted = "1" if split == "train" else "2"
    entries = []
    for label, name in enumerate(class_names):
        path = _annotation("hmdb51", root, [folder], [f"{name}_test_split{fold}.txt"])
        for line, text in _lines(path):
            match = re.fullmatch(r"(\S.*)\.avi\s+([012])", text)
            if not match:
                raise DataError(f"{path}:{line}: {text!r:.100} is not 'name.avi' with 0, 1 or 2 behind it")
            if match[2] == wanted:
                entries.append(_Entry(name, match[1], label))
    bases = [*sorted(path for path in root.glob("hmdb51_org*") if path.is_dir()), root / "videos", root]
    return _locate("hmdb51", split, folder, entries, class_names, bases, ".avi")


class _Row(NamedTuple):
    """One line of a list."""

    line: int
    path: str
    label: str


_LIST_NAMES = {"train": ("train.csv", "train.txt"), "validation": ("val.csv", "validation.csv", "val.txt")}


def list_file(path: Path, split: str) -> Listing:
    """A list of videos, ``path label`` a line: as VideoMAE takes it.

    Between the two: a space, a comma or a tab, the same in the whole file; quotes as in CSV. Paths are absolute, or
    relative to the list's folder. Labels are numbers from 0 (-1: unknown), or names, which are numbered in
    alphabetical order. A first line ``path label`` is passed over.
    Where ``path`` is a folder, its ``train.csv`` and ``val.csv`` (or ``validation.csv``; or ``.txt``) are the splits.
    Of a list alone a fifth is held out for validation, chosen by the paths (see ``tats_env.data.folder.share_out``).
    """
    if path.is_dir():
        files = {}
        for part in sorted(_LIST_NAMES, key=lambda part: part != split):
            try:
                files[part] = _annotation("list", path, [path], _LIST_NAMES[part])
            except DataError:
                if part == split:
                    raise
    elif path.is_file():
        files = {split: path}
    else:
        raise DataError(f"{path}: no such list, nor a folder that holds train.csv and val.csv")
    rows = {part: _list_rows(file) for part, file in files.items()}
    class_names, number = _list_classes([(files[part], row) for part in rows for row in rows[part]])
    mine = rows[split]
    if not mine:
        raise DataError(f"{files[split]}: lists no video; expected 'path label' a line")
    if path.is_file():
        mine = [mine[i] for i in share_out([row.path for row in mine], [row.label for row in mine])[split]]
    folder = files[split].parent
    listed = [(os.path.join(folder, row.path), number[row.label]) for row in mine]
    names: dict[str, frozenset[str]] = {}
    for parent in {os.path.dirname(name) for name, _ in listed}:
        try:
            names[parent] = frozenset(os.listdir(parent))
        except (OSError, ValueError):  # the latter of a NUL in it
            names[parent] = frozenset()
    there = [os.path.basename(name) in names[os.path.dirname(name)] for name, _ in listed]
    found = [pair for pair, is_there in zip(listed, there, strict=True) if is_there]
    missing = [Path(name) for (name, _), is_there in zip(listed, there, strict=True) if not is_there]
    if mine and not found:
        raise DataError(
            f"{files[split]} ({split}): none of the {len(mine)} videos is there; the first is {missing[0]} "
            f"(paths are absolute, or relative to {folder})"
        )
    _say_missing(str(files[split]), split, len(missing), len(mine))
    return Listing([Path(name) for name, _ in found], [label for _, label in found], class_names, missing)


def _list_rows(path: Path) -> list[_Row]:
    separator = ""
    rows: list[_Row] = []
    for line, text in _lines(path):
        # What a path that ends in a known extension ends at
        separator = separator or next((c for c in "\t, " if _is_video(_fields(text, c)[0])), "")
        separator = separator or next((c for c in "\t, " if c in text), " ")
        name, label = _fields(text, separator)
        if not rows and (name.lower(), label.lower()) in (("path", "label"), ("video", "label")):
            continue
        if not name or not label:
            raise DataError(f"{path}:{line}: {text!r:.100} is not 'path label' (separated by {separator!r} here)")
        if re.search(r"[\s,]-?\d+$", name) and not _is_video(name):
            raise DataError(
                f"{path}:{line}: {text!r:.100} has three columns, as lists of folders of frames have; "
                "expected 'path label' with the path of a video file"
            )
        rows.append(_Row(line, name, label))
    return rows


def _fields(text: str, separator: str) -> tuple[str, str]:
    """Path and label of a line; the path is empty if there is nothing to separate."""
    try:
        fields = next(csv.reader([text], delimiter=separator, strict=True), [])
    except csv.Error:  # a quotation mark that is part of a name
        fields = text.split(separator)
    return separator.join(fields[:-1]).strip(), fields[-1].strip()


def _is_video(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _list_classes(rows: list[tuple[Path, _Row]]) -> tuple[list[str], dict[str, int]]:
    """Class names, and the number of each label as it is written."""
    labels = {row.label for _, row in rows}
    numeric = {label for label in labels if re.fullmatch(r"-?[0-9]+", label)}
    if numeric and rows[0][1].label in numeric:
        number = {label: int(label) for label in numeric if len(label) < 10}  # of thousands of digits int() makes none
        for file, row in rows:
            if not -1 <= number.get(row.label, -2) < MOST_CLASSES:
                raise DataError(
                    f"{file}:{row.line}: label {row.label!r} is not the number of a class, as the first one is"
                )
        return [str(i) for i in range(max(number.values()) + 1)], number
    names = sorted(labels)
    return names, {name: i for i, name in enumerate(names)}


def _fold(kind: str, fold: int | str) -> str:
    if str(fold) not in FOLDS:
        raise DataError(f"{kind}: there is no split {fold}; write {kind}:/root?split=1, 2 or 3")
    return str(fold)


def _annotation(kind: str, root: Path, folders: Iterable[Path], names: Sequence[str]) -> Path:
    """The first of these files that is there."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; {kind}:/root names the one that holds {names[0]} and the videos")
    folders = list(folders)
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    also = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise DataError(f"{kind}: {names[0]}{also} is missing; put it into {' or '.join(map(str, folders))}")


def _text(path: Path) -> str:
    try:
        # As file names are decoded, so that a path in another encoding still finds its file
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    for number, text in enumerate(_text(path).split("\n"), 1):
        if text := text.strip():
            yield number, text


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # of a number of thousands of digits, or brackets in brackets
        raise DataError(f"{path}: is not JSON: {error}") from None


def _folder_key(name: str) -> str:
    return name.replace("_", " ").casefold()


def _videos_in(folder: str, extension: str) -> dict[str, str]:
    """Path of each video directly in a folder, by its name without extension; the official ``extension`` goes first."""
    found: dict[str, str] = {}
    with os.scandir(folder) as items:
        names = [item.name for item in items if item.name[0] != "." and _is_video(item.name)]
    for name in sorted(names, key=lambda name: not name.endswith(extension)):
        found.setdefault(os.path.splitext(name)[0], os.path.join(folder, name))
    return found


def _locate(
    kind: str,
    split: str,
    annotation: Path,
    entries: Sequence[_Entry],
    class_names: list[str],
    bases: Sequence[Path],
    extension: str,
    flips: bool = True,
) -> Listing:
    """Find the videos in class folders in, or directly in, the ``bases``; the first that has one wins."""
    bases = [base for base in bases if base.is_dir()]
    wanted = {_folder_key(entry.folder) for entry in entries}
    found: dict[tuple[str, str], str] = {}
    try:
        for base in bases:
            with os.scandir(base) as items:
                folders = {item.path: _folder_key(item.name) for item in items if item.is_dir()} | {str(base): ""}
            for folder, key in folders.items():
                if key in wanted or not key:
                    for stem, path in _videos_in(folder, extension).items():
                        found.setdefault((key, stem), path)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    paths: list[Path] = []
    labels: list[int] = []
    missing: list[Path] = []
    for entry in entries:
        place = found.get((_folder_key(entry.folder), entry.stem)) or found.get(("", entry.stem))
        if place is None:
            missing.append(bases[0] / entry.folder / f"{entry.stem}{extension}")
        else:
            paths.append(Path(place))
            labels.append(entry.label)
    if not entries:
        raise DataError(f"{annotation}: names no video for {split}")
    if not paths:
        looked = ", ".join(str(base) for base in bases)
        raise DataError(
            f"{kind} ({split}): none of the {len(entries)} videos of {annotation} is there; looked in {looked}; "
            f"expected for example {missing[0]}"
        )
    _say_missing(kind, split, len(missing), len(entries))
    return Listing(paths, labels, class_names, missing, flips)


def _say_missing(name: str, split: str, missing: int, of: int) -> None:
    if missing:
        _log.warning("%s (%s): %d of %d videos that the annotation names are missing", name, split, missing, of)
