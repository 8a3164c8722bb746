"""Miniature data sets in the layouts of the real ones: official annotation files, and real videos encoded here.

A class has a colour and a direction of motion. Only a few clips are encoded, once for each container; the rest are
copies.
"""

from __future__ import annotations

import csv
import functools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe

from tats_env.data.annotations import list_file

FRAMES, HEIGHT, WIDTH, FPS = 24, 48, 64, 12
_MOTIONS = ("horizontal=0.03", "vertical=0.03", "horizontal=-0.03", "vertical=-0.03")
_CODECS = {
    "mp4": ("-c:v", "libx264", "-preset", "ultrafast", "-g", "12", "-movflags", "faststart"),
    "avi": ("-c:v", "mpeg4", "-vtag", "XVID", "-q:v", "4"),
    "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "40", "-b:v", "0"),
}

SSV2_TEMPLATES = (
    "Approaching [something] with your camera",
    "Holding [something] next to [something]",
    "Pushing [something] from left to right",
    "Pushing [something] from right to left",
)
KINETICS_LABELS = ("abseiling", "massaging person's head", "shooting goal (soccer)", "zumba")
UCF101_CLASSES = ("ApplyEyeMakeup", "BabyCrawling", "HandstandPushups", "YoYo")
HMDB51_CLASSES = ("brush_hair", "cartwheel", "catch", "wave")


@functools.cache
def clip(extension: str, label: int, take: int = 0) -> bytes:
    """A video file of a class: 24 frames of 64 x 48, 12 a second. There are four classes, and two takes of each."""
    if label >= len(_MOTIONS) or take >= 2:
        return clip(extension, label % len(_MOTIONS), take % 2)
    picture = (
        f"testsrc2=s={WIDTH}x{HEIGHT}:r={FPS},hue=h={90 * label},"
        f"scroll={_MOTIONS[label]}:hpos={0.5 * take}:vpos={0.3 * take}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"clip.{extension}")
        command = [
            get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", picture, "-frames:v", str(FRAMES),
            "-pix_fmt", "yuv420p", "-threads", "1", *_CODECS[extension], str(path),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return path.read_bytes()


def place(path: Path, label: int, take: int = 0) -> Path:
    """Put a video of a class where it belongs, in the format that its name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(clip(path.suffix[1:], label, take))
    return path


def _places(classes: Sequence[str], per_class: int, validation: int) -> Iterator[tuple[str, int, str, int]]:
    """(split, label, class, number within class and split) of every video."""
    for split, count in (("train", per_class), ("validation", validation)):
        for label, name in enumerate(classes):
            for take in range(count):
                yield split, label, name, take


def ssv2_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2) -> str:
    """Something-Something v2 of up to four classes; returns its spec."""
    templates = SSV2_TEMPLATES[:classes]
    (root / "labels").mkdir(parents=True, exist_ok=True)
    labels = {template.replace("[", "").replace("]", ""): str(i) for i, template in enumerate(templates)}
    items: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    for number, (split, label, template, take) in enumerate(_places(templates, per_class, validation)):
        video = str(78687 + 13 * number)
        things = ["potato", "vicks vaporub bottle"][: template.count("[")]
        written = template
        for thing in things:
            written = written.replace("[something]", thing, 1)
        items[split].append({"id": video, "label": written, "template": template, "placeholders": things})
        place(root / "20bn-something-something-v2" / f"{video}.webm", label, take)
    for name, content in {"labels": labels, **items}.items():
        (root / "labels" / f"something-something-v2-{name}.json").write_text(json.dumps(content, indent=1))
    return f"ssv2:{root}"


def kinetics_tree(
    root: Path, per_class: int = 4, classes: int = 3, validation: int = 2, missing: int = 0, underscores: bool = False
) -> str:
    """Kinetics-400 of up to four classes; ``missing`` videos of each class and split are not there."""
    labels = KINETICS_LABELS[:classes]
    rows: dict[str, list[tuple[str, str, int, int, str]]] = {"train": [], "validate": []}
    for split, label, name, take in _places(labels, per_class + missing, validation + missing):
        part = "train" if split == "train" else "validate"
        video, start = f"-{part[0]}{label}_{take:07d}", 7 * take
        rows[part].append((name, video, start, start + 10, part))
        if take < (per_class if part == "train" else validation):
            folder = name.replace(" ", "_") if underscores else name
            where = "train" if part == "train" else "val"
            place(root / where / folder / f"{video}_{start:06d}_{start + 10:06d}.mp4", label, take)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        with (root / "annotations" / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("label", "youtube_id", "time_start", "time_end", "split"))
            writer.writerows(reversed(lines))  # in no order of classes
    return f"kinetics400:{root}"


def ucf101_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2, fold: int = 1) -> str:
    """UCF101 of up to four classes, with the lists of all three splits; ``fold`` is the one that the spec names.

    Split f tests on the groups of videos after (f - 1) * validation; the rest are for training.
    """
    names = UCF101_CLASSES[:classes]
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True, exist_ok=True)
    # Line ends as in the original archive
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(names, 1)), newline="")
    groups = per_class + validation
    videos = [[f"{name}/v_{name}_g{g + 1:02d}_c01.avi" for g in range(groups)] for name in names]
    for label, members in enumerate(videos):
        for g, video in enumerate(members):
            place(root / "UCF-101" / video, label, g)
    for f in (1, 2, 3):
        tested = {(g + (f - 1) * validation) % groups for g in range(validation)}
        train = [f"{v} {n}\r\n" for n, c in enumerate(videos, 1) for g, v in enumerate(c) if g not in tested]
        test = [f"{v}\r\n" for c in videos for g, v in enumerate(c) if g in tested]
        (lists / f"trainlist0{f}.txt").write_text("".join(train), newline="")
        (lists / f"testlist0{f}.txt").write_text("".join(test), newline="")
    return f"ucf101:{root}?split={fold}"


def hmdb51_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2, fold: int = 1) -> str:
    """HMDB51 of up to four classes, with three splits as in ``ucf101_tree``, and one video of each class unused."""
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True, exist_ok=True)
    groups = per_class + validation
    for label, name in enumerate(HMDB51_CLASSES[:classes]):
        videos = [f"#{g}_April_09_{name}_u_nm_np1_ba_goo_{g}.avi" for g in range(groups + 1)]
        for g, video in enumerate(videos):
            place(root / "hmdb51_org" / name / video, label, g)
        for f in (1, 2, 3):
            tested = {(g + (f - 1) * validation) % groups for g in range(validation)}
            marks = [0 if g == groups else 2 if g in tested else 1 for g in range(groups + 1)]
            # The original lines end in a space
            lines = "".join(f"{video} {mark} \n" for video, mark in zip(videos, marks, strict=True))
            (lists / f"{name}_test_split{f}.txt").write_text(lines)
    return f"hmdb51:{root}?split={fold}"


def list_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2, separator: str = " ") -> str:
    """A folder with ``train.csv`` and ``val.csv`` as VideoMAE takes them, of videos in all three containers."""
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    extensions = ("mp4", "avi", "webm")
    for split, label, name, take in _places([str(i) for i in range(classes)], per_class, validation):
        path = place(root / "videos" / f"{split}_{name}_{take}.{extensions[take % 3]}", label, take)
        # Half of them absolute
        lines[split].append(f"{path.absolute() if take % 2 else path.relative_to(root)}{separator}{label}\n")
    for file, split in (("train.csv", "train"), ("val.csv", "validation")):
        (root / file).write_text("".join(lines[split]))
    return f"list:{root}"


def folder_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2) -> str:
    """A folder with a subfolder a class, which is split by the files' names."""
    for label in range(classes):
        for take in range(per_class + validation):
            place(root / f"class{label}" / f"{take}.mp4", label, take)
    return f"folder:{root}"


def shards_tree(root: Path, per_class: int = 4, classes: int = 3, validation: int = 2) -> str:
    """Shards of the videos of a ``list_tree``."""
    from tats_env.data.shards import write_shards

    path = Path(list_tree(root / "videos", per_class, classes, validation).partition(":")[2])
    for split in ("train", "validation"):
        write_shards(list_file(path, split), root / "shards", split, HEIGHT)
    return f"shards:{root / 'shards'}"


MINIATURES: dict[str, Callable[[Path, int, int], str]] = {
    "folder": folder_tree,
    "list": list_tree,
    "ssv2": ssv2_tree,
    "kinetics400": kinetics_tree,
    "ucf101": ucf101_tree,
    "hmdb51": hmdb51_tree,
    "shards": shards_tree,
}
"""By kind: makes a tree under a folder with so many videos in each of so many classes, and returns its spec."""
