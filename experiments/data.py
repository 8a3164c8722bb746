"""``tats data check`` and ``tats data pack``: what is there of a data set; the same, decoded, as tar shards."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.refusals import ConfigError
from tats_env.data import SPLITS, DataError, list_videos
from tats_env.data.index import index_file, probe_all
from tats_env.data.listing import Listing
from tats_env.data.reader import UnreadableVideo, VideoInfo, num_cores, read_frames, shard_of
from tats_env.data.shards import write_shards
from tats_env.data.workers import on_all_cores, seconds_for

ALL_CLASSES = 20
"""Classes up to which the table has all of them; of more it has the largest and the smallest ones."""
LISTED = 10
"""Files of one kind that are named on the screen."""
_UNLABELLED = "(no class)"


@dataclass
class Check:
    """Check a data set: what is there by class and split, what is missing or unreadable, durations and sizes.

    Leaves an index of the videos behind, from which later runs start at once. Ends with 0 if both splits can be used,
    with 1 if one of them can't, with 2 if neither can.
    """

    spec: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SPEC")]
    """Such as ssv2:/root, kinetics400:/root, ucf101:/root?split=1, hmdb51:/root?split=1, list:/file.csv, folder:/root,
    shards:/folder, motion."""
    decode: tyro.conf.FlagCreatePairsOff[bool] = False
    """Decode every frame of each video, rather than the first."""
    json: Path | None = None
    """Write all that was found to this file."""


@dataclass
class Pack:
    """Write a data set's videos, decoded and scaled, as tar shards that data: shards:FOLDER and webdataset read."""

    spec: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SPEC")]
    """As for tats data check."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Where to; a call that was stopped goes on where it was."""
    size: int = 256
    """Shorter side in pixels; smaller videos keep their own."""
    per_shard: int = 100
    """Videos in a tar file."""


def data(args: Sequence[str]) -> int:
    """What ``tats data`` does with its arguments; returns the exit code.

    Raises:
        ConfigError: for anything but ``check`` and ``pack`` and what they take.
        DataError: if neither split can be used.
        SystemExit: by tyro, after ``--help`` or an option that is unknown or can't be read.
    """
    usage = (
        "tats data check SPEC [--decode] [--json FILE]\n"
        "tats data pack SPEC FOLDER [--size 256] [--per-shard 100]\n"
        "(tats data check --help says more)"
    )
    if args and args[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not args or args[0] not in ("check", "pack"):
        given = f"{args[0]}: unknown" if args else "what about it?"
        raise ConfigError(f"tats data: {given}; there are\n{usage}")
    if args[0] == "pack":
        return pack(tyro.cli(Pack, args=args[1:], prog="tats data pack"))
    return check(tyro.cli(Check, args=args[1:], prog="tats data check"))


def pack(options: Pack) -> int:
    """Write both splits' shards, and name the videos left out; arguments, errors and the exit code as for ``data``."""
    for name, value in (("size", options.size), ("per-shard", options.per_shard)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    for split in SPLITS:
        listing = list_videos(options.spec, split, progress=True)
        bad = write_shards(
            listing, options.folder, split, options.size,
            per_shard=options.per_shard, workers=num_cores(), progress=True,
        )  # fmt: skip
        print(f"{split}: {len(listing.paths) - len(bad)} videos in {options.folder / split}")
        _print_files(f"left out ({split})", {str(error.path): error.reason for error in bad})
    return 0


def check(options: Check) -> int:
    """Print what there is of a data set; arguments, errors and the exit code as for ``data``."""
    reports: dict[str, dict[str, Any]] = {}
    errors: dict[str, DataError] = {}
    for split in SPLITS:
        try:
            listing = list_videos(options.spec, split, progress=True)
            reports[split] = _report(listing, split, options.decode)
        except DataError as error:
            errors[split] = error
    if not reports:
        raise errors[SPLITS[0]]
    console = Console()
    print(options.spec)
    _print_classes(console, reports)
    _print_totals(console, reports, options.decode)
    for split, report in reports.items():
        for what in ("missing", "unreadable", "undecodable"):
            _print_files(f"{what} ({split})", report[what])
    for problem in errors.values():
        print(problem, file=sys.stderr)
    for place in sorted({report["index"] for report in reports.values()}):
        print(f"index: {place}")
    if options.json:
        written = {"spec": options.spec, "splits": reports, "errors": {name: str(e) for name, e in errors.items()}}
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="ascii")
        except OSError as error:
            raise ConfigError(f"--json {options.json}: cannot be written: {error.strerror}") from None
        print(f"report: {options.json}")
    return 0 if not errors and all(report["videos"] for report in reports.values()) else 1


def _report(listing: Listing, split: str, decode: bool) -> dict[str, Any]:
    """All that is to be said of one split, as JSON has it."""
    infos = probe_all(listing.paths, progress=True, workers=num_cores())
    pairs = [(path, info) for path, info in zip(listing.paths, infos, strict=True) if isinstance(info, VideoInfo)]

    decoded: list[Any] = []
    if decode:
        say = f"decoding videos ({split})"
        decoded = list(on_all_cores(_decode_all, pairs, say, True, num_cores(), _about))
    undecodable = {str(bad.path): bad.reason for bad in decoded if isinstance(bad, UnreadableVideo)}
    good = [i for i, p in enumerate(listing.paths) if isinstance(infos[i], VideoInfo) and str(p) not in undecodable]
    readable = [info for info in (infos[i] for i in good) if isinstance(info, VideoInfo)]
    counts = Counter(listing.labels[i] for i in good)
    classes = {name: counts[label] for label, name in enumerate(listing.class_names)}
    return {
        "videos": len(good),
        "classes": classes | ({_UNLABELLED: counts[-1]} if counts[-1] else {}),
        "missing": [str(path) for path in listing.missing],
        "unreadable": {str(info.path): info.reason for info in infos if isinstance(info, UnreadableVideo)},
        "undecodable": undecodable,
        "frames": _spread([info.num_frames for info in readable]),
        "seconds": _spread([info.num_frames / info.fps for info in readable if info.fps > 0]),
        "sizes": dict(Counter(f"{info.width}x{info.height}" for info in readable).most_common()),
        "bytes": _bytes(listing.paths[i] for i in good),
        "index": str(index_file(listing.paths)),
    }


def _decode_all(pair: tuple[Path, VideoInfo]) -> None:
    read_frames(pair[0], (32, 32), info=pair[1])  # small, so that an hour of video fits in memory as well


def _about(pair: tuple[Path, VideoInfo]) -> tuple[Path, float]:
    return pair[0], seconds_for(pair[1].num_frames)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _bytes(paths: Iterable[Path]) -> int:
    """Of the files together; a tar file counts once, as a whole."""
    return sum(path.stat().st_size for path in {shard_of(path) or path for path in paths})


def _print_classes(console: Console, reports: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for report in reports.values() for name in report["classes"]))
    counts = {name: [report["classes"].get(name, 0) for report in reports.values()] for name in names}
    shown: list[str | None] = list(names)
    if len(names) > ALL_CLASSES:
        ranked = sorted(names, key=lambda name: -sum(counts[name]))
        shown = [*ranked[: ALL_CLASSES // 2], None, *ranked[-ALL_CLASSES // 2 :]]
    table = Table("class")
    for split in reports:
        table.add_column(split, justify="right")
    for name in shown:
        if name is None:
            table.add_row(f"... {len(names) - ALL_CLASSES} more ...", *("" for _ in reports))
        else:
            table.add_row(Text(name), *map(str, counts[name]))
    table.add_section()
    totals = [sum(report["classes"].values()) for report in reports.values()]
    table.add_row(f"{len(names)} classes", *(f"{total} videos" for total in totals))
    console.print(table)


def _print_totals(console: Console, reports: dict[str, dict[str, Any]], decode: bool) -> None:
    def spread(values: dict[str, float], digits: int) -> str:
        return ", ".join(f"{values[name]:.{digits}f}" for name in ("min", "median", "max")) if values else "unknown"

    def sizes(report: dict[str, Any]) -> str:
        few = [f"{size} ({count})" for size, count in list(report["sizes"].items())[:3]]
        return ", ".join(few + (["..."] if len(report["sizes"]) > 3 else []))

    table = Table("", *reports)
    rows = {
        "usable videos": lambda report: str(report["videos"]),
        "missing": lambda report: str(len(report["missing"])),
        "unreadable": lambda report: str(len(report["unreadable"])),
        "undecodable": lambda report: str(len(report["undecodable"])) if decode else "not checked (--decode)",
        "seconds (min, median, max)": lambda report: spread(report["seconds"], 1),
        "frames (min, median, max)": lambda report: spread(report["frames"], 0),
        "sizes, width x height": sizes,
        "gigabytes": lambda report: f"{report['bytes'] / 1e9:.3g}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(report) for report in reports.values()))
    console.print(table)


def _print_files(title: str, files: Sequence[str] | dict[str, str]) -> None:
    if not files:
        return
    print(f"{title}:")
    for name in list(files)[:LISTED]:
        print(f"  {name}: {files[name]}" if isinstance(files, dict) else f"  {name}")
    if len(files) > LISTED:
        print(f"  and {len(files) - LISTED} more (--json FILE has all of them)")
