"""The data sets' annotation files, the index of videos, and ``tats data check``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from experiments.data import data
from experiments.refusals import ConfigError
from tats_env.data import DataError, index, miniature
from tats_env.data.annotations import list_file, list_hmdb51, list_kinetics400, list_ssv2, list_ucf101
from tats_env.data.folder import list_folder
from tats_env.data.index import index_file, probe_all
from tats_env.data.listing import Listing
from tats_env.data.reader import UnreadableVideo, VideoInfo
from tats_env.data.workers import on_all_cores

ROOT = str(Path(index.__file__).parents[2])
SPLITS = ("train", "validation")
SETS: dict[str, tuple[Callable[..., str], Callable[[Path, str], Listing], list[str]]] = {
    "ssv2": (
        miniature.ssv2_tree, list_ssv2,
        [template.replace("[", "").replace("]", "") for template in miniature.SSV2_TEMPLATES],
    ),
    "kinetics400": (miniature.kinetics_tree, list_kinetics400, list(miniature.KINETICS_LABELS)),
    "ucf101": (miniature.ucf101_tree, list_ucf101, list(miniature.UCF101_CLASSES)),
    "hmdb51": (miniature.hmdb51_tree, list_hmdb51, list(miniature.HMDB51_CLASSES)),
    "list": (miniature.list_tree, list_file, list("0123")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An index of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TATS_CACHE", str(folder))
        yield folder


def class_by_content(path: Path) -> int:
    """Which class's clip a file holds."""
    content = path.read_bytes()
    return next(
        label for label in range(4) for take in (0, 1) if miniature.clip(path.suffix[1:], label, take) == content
    )


def process(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A fresh interpreter, which runs ``code``."""
    code = f"import sys; sys.path.insert(0, {ROOT!r})\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
    )  # fmt: skip


# What is in the sets


@pytest.mark.parametrize("kind", SETS)
def test_every_video_of_a_split_is_found_with_its_class(kind: str, tmp_path: Path) -> None:
    build, listed, names = SETS[kind]
    build(tmp_path, per_class=3, classes=4, validation=2)
    everything: list[Path] = []
    for split, per_class in zip(SPLITS, (3, 2), strict=True):
        listing = listed(tmp_path, split)
        assert listing.class_names == names and not listing.missing
        assert Counter(listing.labels) == dict.fromkeys(range(4), per_class)
        assert [class_by_content(path) for path in listing.paths] == listing.labels
        assert listing.flips == (kind != "ssv2")
        everything += listing.paths
    assert len(set(everything)) == 20, "no video is in both splits"


@pytest.mark.parametrize("kind", ["ucf101", "hmdb51"])
def test_the_three_official_splits_differ_and_keep_what_is_for_testing_out_of_training(
    kind: str, tmp_path: Path
) -> None:
    build, listed, _ = SETS[kind]
    build(tmp_path, per_class=4, classes=2, validation=2)
    tested = []
    for fold in (1, "2", 3):
        train, test = (set(listed(tmp_path, split, fold).paths) for split in SPLITS)  # type: ignore[call-arg]
        assert len(train) == 8 and len(test) == 4 and not train & test
        tested.append(test)
    assert len({path for test in tested for path in test}) == 12
    # HMDB51 marks some videos as neither: here the last of each class
    unused = set(tmp_path.rglob("*.avi")) - {path for test in tested for path in test}
    assert {path.stem[-2:] for path in unused} == ({"_6"} if kind == "hmdb51" else set())
    for fold in (0, 4, "x"):
        with pytest.raises(DataError, match=rf"no split {fold}; write {kind}:/root\?split=1, 2 or 3"):
            listed(tmp_path, "train", fold)  # type: ignore[call-arg]


def move(kind: str, root: Path) -> None:
    """Arrange a tree in another of the known ways."""
    if kind == "ssv2":
        (root / "labels").rename(root / "annotations")
        for path in (root / "annotations").iterdir():
            path.rename(path.with_name(path.name.removeprefix("something-something-v2-")))
        (root / "20bn-something-something-v2").rename(root / "videos")
        for path in (root / "videos").iterdir():  # re-encoded, with the originals of some beside them
            path.with_suffix(".mp4").write_bytes(miniature.clip("mp4", class_by_content(path)))
            path.unlink()
    elif kind == "kinetics400":
        (root / "annotations" / "train.csv").rename(root / "kinetics-400_train.csv")
        (root / "annotations" / "validate.csv").rename(root / "val.csv")
        (root / "videos").mkdir()
        for path in [*(root / "train").iterdir(), *(root / "val").iterdir()]:
            folder = root / "videos" / path.name.replace(" ", "_")
            folder.mkdir(exist_ok=True)
            for video in path.iterdir():
                video.rename(folder / video.name)
    elif kind == "kinetics400 flat":
        for split in ("train", "val"):
            for path in [*(root / split).glob("*/*")]:
                path.rename(root / split / path.name)
    elif kind == "ucf101":
        for path in [*(root / "ucfTrainTestlist").iterdir(), *(root / "UCF-101").iterdir()]:
            path.rename(root / path.name)
        (root / "HandstandPushups").rename(root / "HandStandPushups")
    elif kind == "hmdb51":
        (root / "testTrainMulti_7030_splits").rename(root / "splits")
        (root / "hmdb51_org").rename(root / "videos")


@pytest.mark.parametrize("kind", ["ssv2", "kinetics400", "kinetics400 flat", "ucf101", "hmdb51"])
def test_the_other_known_places_and_names_are_found_as_well(kind: str, tmp_path: Path) -> None:
    build, listed, names = SETS[kind.split()[0]]
    build(tmp_path, per_class=2, classes=3, validation=1)
    move(kind, tmp_path)
    for split, count in zip(SPLITS, (6, 3), strict=True):
        listing = listed(tmp_path, split)
        assert len(listing.paths) == count and not listing.missing and listing.class_names == names[:3]
        assert [class_by_content(path) for path in listing.paths] == listing.labels


def test_an_original_goes_before_its_copy_in_another_format(tmp_path: Path) -> None:
    miniature.ssv2_tree(tmp_path, per_class=1, classes=1, validation=1)
    original = next(tmp_path.rglob("*.webm"))
    miniature.place(original.with_suffix(".avi"), 2)
    miniature.place(original.with_suffix(".mp4"), 3)
    assert original in list_ssv2(tmp_path, "train").paths + list_ssv2(tmp_path, "validation").paths


def test_kinetics_videos_that_are_gone_are_named_and_the_rest_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    miniature.kinetics_tree(tmp_path, per_class=2, classes=3, validation=1, missing=3)
    listing = list_kinetics400(tmp_path, "train")
    assert len(listing.paths) == 6 and len(listing.missing) == 9
    gone = "-t1_0000004_000028_000038.mp4"
    assert tmp_path / "train" / "massaging person's head" / gone in listing.missing
    assert "kinetics400 (train): 9 of 15 videos" in caplog.text
    assert [class_by_content(path) for path in listing.paths] == listing.labels
    # Without the other split's file, its own labels are the classes
    (tmp_path / "annotations" / "train.csv").unlink()
    assert list_kinetics400(tmp_path, "validation").class_names == list(miniature.KINETICS_LABELS[:3])


def test_kinetics_classes_are_numbered_alike_where_a_split_lacks_one(tmp_path: Path) -> None:
    miniature.kinetics_tree(tmp_path, per_class=1, classes=3, validation=1)
    path = tmp_path / "annotations" / "validate.csv"
    lines = [line for line in path.open() if "abseiling" not in line]
    # As some copies have it: a byte order mark, and underscores in the labels
    path.write_text("".join([lines[0], *(line.replace(" ", "_") for line in lines[1:])]), encoding="utf-8-sig")
    listing = list_kinetics400(tmp_path, "validation")
    assert listing.class_names == list(miniature.KINETICS_LABELS[:3]) and sorted(listing.labels) == [1, 2]


# What is wrong with a tree


@pytest.mark.parametrize("kind", ["ssv2", "kinetics400", "ucf101", "hmdb51"])
def test_a_wrong_root_is_refused_with_what_it_should_hold(kind: str, tmp_path: Path) -> None:
    _, listed, _ = SETS[kind]
    first = {"ssv2": "something-something-v2-labels.json", "kinetics400": "train.csv", "ucf101": "classInd.txt"}
    with pytest.raises(DataError) as caught:
        listed(tmp_path / "none", "train")
    assert f"{tmp_path / 'none'} is not a folder" in str(caught.value)
    assert first.get(kind, "brush_hair_test_split1.txt") in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "gone", "expected", "places"),
    [
        ("ssv2", "labels/something-something-v2-labels.json", "something-something-v2-labels.json (or labels.json)",
         (".", "labels", "annotations")),
        ("ssv2", "labels/something-something-v2-train.json", "something-something-v2-train.json (or train.json)",
         (".", "labels", "annotations")),
        ("kinetics400", "annotations/train.csv", "train.csv (or kinetics-400_train.csv, kinetics400_train.csv",
         (".", "annotations")),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "classInd.txt", (".", "ucfTrainTestlist")),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "trainlist01.txt", (".", "ucfTrainTestlist")),
        ("hmdb51", "testTrainMulti_7030_splits", "brush_hair_test_split1.txt",
         (".", "splits", "testTrainMulti_7030_splits")),
        ("hmdb51", "testTrainMulti_7030_splits/catch_test_split1.txt", "catch_test_split1.txt",
         ("testTrainMulti_7030_splits",)),
        ("list", "train.csv", "train.csv (or train.txt)", (".",)),
    ],
)  # fmt: skip
def test_a_missing_annotation_file_is_named_with_the_places_for_it(
    kind: str, gone: str, expected: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    build, listed, _ = SETS[kind]
    build(tmp_path, per_class=1, validation=1)
    if (tmp_path / gone).is_dir():
        shutil.rmtree(tmp_path / gone)
    else:
        (tmp_path / gone).unlink()
    with pytest.raises(DataError) as caught:
        listed(tmp_path, "train")
    message, _, where = str(caught.value).partition(" is missing; put it into ")
    assert expected in message
    assert sorted(where.split(" or ")) == sorted(str(tmp_path / place) for place in places)


@pytest.mark.parametrize("kind", SETS)
def test_a_tree_without_a_single_video_is_refused_with_one_that_was_expected(kind: str, tmp_path: Path) -> None:
    build, listed, _ = SETS[kind]
    build(tmp_path, per_class=1, validation=1)
    everything = listed(tmp_path, "train").paths
    for path in everything:
        path.unlink()
    with pytest.raises(DataError, match=f"none of the {len(everything)} videos") as caught:
        listed(tmp_path, "train")
    assert any(str(path) in str(caught.value) for path in everything), "an example is where it was"
    assert str(tmp_path) in str(caught.value)


DAMAGES = [
    (
        "ssv2",
        "labels/something-something-v2-train.json",
        '"template": "Holding',
        '"template" "Holding',
        ":",
        "not JSON",
    ),
    ("ssv2", "labels/something-something-v2-train.json", "Holding [some", "Folding [some", "item 2", "'Folding someth"),
    ("ssv2", "labels/something-something-v2-train.json", '"template": "Hold', '"temp": "Hold', "item 2", "placeholder"),
    ("ssv2", "labels/something-something-v2-labels.json", '"2"', '"3"', "", "not numbered from 0 to 2"),
    ("ssv2", "labels/something-something-v2-labels.json", '"2"', '"two"', "", "expected {"),
    ("kinetics400", "annotations/train.csv", ",0,10,train", ",zero,10,train", ":2:", "label,youtube_id,time_start"),
    ("kinetics400", "annotations/train.csv", ",0,10,train", "", ":2:", "label,youtube_id,time_start"),
    ("kinetics400", "annotations/train.csv", "youtube_id", "id", ":1:", "no column youtube_id"),
    ("kinetics400", "annotations/train.csv", "shooting", '"shooting', ":", "not CSV"),
    ("ucf101", "ucfTrainTestlist/classInd.txt", "2 BabyCrawling", "3 BabyCrawling", ":2:", "'2 NameOfClass'"),
    ("ucf101", "ucfTrainTestlist/trainlist01.txt", "BabyCrawling/", "Baby/", ":2:", "classInd.txt"),
    ("ucf101", "ucfTrainTestlist/trainlist01.txt", "avi 2", "avi 3", ":2:", "the class's number"),
    ("ucf101", "ucfTrainTestlist/trainlist01.txt", "g02_c01.avi 2", "", ":2:", "v_Class_g01_c01.avi"),
    ("hmdb51", "testTrainMulti_7030_splits/catch_test_split1.txt", ".avi 1", ".avi 3", ":2:", "0, 1 or 2"),
    ("hmdb51", "testTrainMulti_7030_splits/catch_test_split1.txt", ".avi 1", "", ":2:", "0, 1 or 2"),
    ("list", "train.csv", "mp4 1", "mp4", ":2:", "'path label'"),
    ("list", "train.csv", "mp4 1", "mp4 one", ":2:", "not the number of a class"),
    ("list", "train.csv", "mp4 1", "mp4 -7", ":2:", "not the number of a class"),
    ("list", "train.csv", "mp4 1", "mp4 123456789", ":2:", "not the number of a class"),
    ("list", "train.csv", "mp4 1", "mp4 300 1", ":2:", "three columns"),
]


@pytest.mark.parametrize(("kind", "file", "old", "new", "place", "says"), DAMAGES)
def test_a_damaged_line_is_refused_with_its_place_and_what_would_be_right(
    kind: str, file: str, old: str, new: str, place: str, says: str, tmp_path: Path
) -> None:
    build, listed, _ = SETS[kind]
    build(tmp_path, per_class=1, validation=1)
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        listed(tmp_path, "train")
    assert str(caught.value).startswith(f"{path}{place if place.startswith(':') else ': ' + place}")
    assert says in str(caught.value)
    if place == ":":
        assert str(caught.value).removeprefix(f"{path}:").split(":")[0].isdigit()


def test_an_empty_or_binary_annotation_file_is_refused_by_name(tmp_path: Path) -> None:
    for kind, file in (
        ("ssv2", "labels/something-something-v2-train.json"),
        ("kinetics400", "annotations/train.csv"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt"),
        ("list", "train.csv"),
    ):
        build, listed, _ = SETS[kind]
        build(tmp_path / kind, per_class=1, validation=1)
        for content in (b"", bytes(range(256)) * 4):
            (tmp_path / kind / file).write_bytes(content)
            with pytest.raises(DataError) as caught:
                listed(tmp_path / kind, "train")
            assert str(tmp_path / kind / file) in str(caught.value)


# Lists


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        ("a.mp4 0\nsub/b c.mp4 2\n", [0, 2]),
        ("a.mp4   0\n\n  sub/b c.mp4 2  \n", [0, 2]),
        ("a.mp4,0\r\nsub/b c.mp4,2\r\n", [0, 2]),
        ("path,label\na.mp4,0\nsub/b c.mp4,2\n", [0, 2]),
        ("a.mp4\t0\nsub/b c.mp4\t-1", [0, -1]),
        ('"a.mp4" 0\n"sub/b c.mp4" 2\n', [0, 2]),
        ('"sub/x, y.mp4",1\na.mp4,0\n', [1, 0]),
        ("sub/x, y.mp4 1\na.mp4 0\n", [1, 0]),
        ('sub/an "inch.mp4 1\na.mp4 0\n', [1, 0]),
        ("a.mp4 jump\nsub/b c.mp4 dive\n", [1, 0]),
        ('a.mp4,"jump, high"\nsub/b c.mp4,dive\n', [1, 0]),
    ],
)
def test_lists_are_read_with_spaces_commas_or_tabs_and_quotes(lines: str, labels: list[int], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b c.mp4", "sub/x, y.mp4", 'sub/an "inch.mp4'):
        (tmp_path / name).touch()
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_bytes(lines.encode())
    listing = list_file(tmp_path, "train")
    assert listing.labels == labels and all(path.exists() for path in listing.paths)
    if "jump" in lines:
        assert listing.class_names == ["dive", "jump, high" if "high" in lines else "jump"]
    else:
        assert listing.class_names == [str(i) for i in range(max(labels) + 1)]


def test_both_files_of_a_folder_of_lists_number_the_classes_alike(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "train.csv").write_text("a.mp4 wave\nb.mp4 hop\n")
    (tmp_path / "val.csv").write_text("c.mp4 catch\n")
    assert list_file(tmp_path, "train").labels == [2, 1] and list_file(tmp_path, "validation").labels == [0]
    assert list_file(tmp_path, "train").class_names == ["catch", "hop", "wave"]


def test_one_list_is_shared_out_as_a_folder_with_the_same_files_is(tmp_path: Path) -> None:
    names = [f"{label}/{i}.mp4" for label in "abc" for i in range(7)]
    for name in names:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    path = tmp_path / "videos" / "all.txt"
    path.write_text("".join(f"{name} {name[0]}\n" for name in names))
    for split in SPLITS:
        by_list, by_folder = list_file(path, split), list_folder(tmp_path / "videos", split)
        assert by_list.paths == by_folder.paths and by_list.labels == by_folder.labels
    with pytest.raises(DataError, match="no such list, nor a folder that holds"):
        list_file(tmp_path / "none.csv", "train")


def test_videos_of_a_list_that_are_gone_are_named(tmp_path: Path) -> None:
    miniature.list_tree(tmp_path, per_class=3, classes=2)
    gone = sorted((tmp_path / "videos").glob("train_*_1.*"))
    for path in gone:
        path.unlink()
    listing = list_file(tmp_path, "train")
    assert sorted(listing.missing) == gone and len(gone) == 2 and len(listing.paths) == 4
    assert [class_by_content(path) for path in listing.paths] == listing.labels


# The index


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Six real videos in two folders."""
    return [miniature.place(tmp_path / "videos" / str(i % 2) / f"{i}.mp4", i) for i in range(6)]


def disguise(path: Path, content: bytes) -> None:
    """Change a file's content, but neither its size nor its time."""
    status = path.stat()
    path.write_bytes(content.ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def entries(paths: list[Path]) -> dict[str, list[object]]:
    return json.loads(index_file(paths).read_text())["files"]


def test_a_second_start_opens_no_video(videos: list[Path], cache: Path) -> None:
    videos[5].write_text("not a video")
    first = probe_all(videos)
    assert first[:5] == [VideoInfo(24, 48, 64, 12.0)] * 5 and isinstance(first[5], UnreadableVideo)
    assert index_file(videos).parent == cache / "index"
    for path in videos:
        disguise(path, b"x")
    again = probe_all(videos)
    assert again[:5] == first[:5]
    assert isinstance(again[5], UnreadableVideo) and (again[5].path, again[5].reason) == (videos[5], first[5].reason)
    assert index_file(videos) != index_file(videos, "torchcodec"), "what one decoder can read is no news of another"


def test_a_changed_file_is_opened_anew_and_the_others_are_not(videos: list[Path]) -> None:
    probe_all(videos)
    disguise(videos[0], b"x")
    videos[1].write_text("no longer a video")
    os.utime(videos[2], ns=(0, 1))
    miniature.place(videos[3], 3)
    videos[3].write_bytes(videos[3].read_bytes() + b"\0" * 8)
    found = probe_all(videos)
    assert isinstance(found[1], UnreadableVideo)
    assert [info for i, info in enumerate(found) if i != 1] == [VideoInfo(24, 48, 64, 12.0)] * 5
    stored = entries(videos)
    assert stored["0/2.mp4"][1] == 1 and stored["1/3.mp4"][0] == videos[3].stat().st_size
    whole = miniature.clip("mp4", 1)
    for content in (b"x" * len(whole), whole):  # mended without a change of size
        videos[1].write_bytes(content)
        os.utime(videos[1], ns=(0, len(set(content))))
        found = probe_all(videos)
    assert found == [VideoInfo(24, 48, 64, 12.0)] * 6


def test_what_may_pass_is_not_remembered(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    videos[0].unlink()
    videos[1].unlink()
    videos[1].symlink_to(videos[1])
    videos[2].unlink()
    monkeypatch.chdir(videos[2].parent)  # the name of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(videos[2].name)  # stands for any file that is there and cannot be opened
    found = probe_all(videos)
    reasons = [info.reason for info in found[:3] if isinstance(info, UnreadableVideo)]
    assert reasons == ["no such file", "Too many levels of symbolic links", "No such device or address"]
    assert sorted(entries(videos)) == ["0/4.mp4", "1/3.mp4", "1/5.mp4"]
    for i in range(3):
        videos[i].unlink(missing_ok=True)
        miniature.place(videos[i], i)
    assert probe_all(videos) == [VideoInfo(24, 48, 64, 12.0)] * 6


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"version": 1, "fi', b"\xff\xfe", b"[]", b'{"version": 1, "files": [1]}', b'{"version": 1}',
        b'{"version": 1, "files": {"0/0.mp4": [1], "1/1.mp4": null, "0/2.mp4": "x"}}',
    ],
)  # fmt: skip
def test_a_damaged_index_is_built_anew(content: bytes, videos: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    expected = probe_all(videos)
    index_file(videos).write_bytes(content)
    assert probe_all(videos) == expected
    assert ("is damaged" in caplog.text) == (b"0/0.mp4" not in content)
    for path in videos:
        disguise(path, b"x")
    assert probe_all(videos) == expected, "and is whole again"


def test_an_impossible_entry_is_not_believed(videos: list[Path]) -> None:
    expected = probe_all(videos)
    stored = json.loads(index_file(videos).read_text())
    for key, values in (("0/0.mp4", [0, 48, 64, 12.0]), ("1/1.mp4", ["24", 48, 64, 12.0]), ("0/2.mp4", [24, 48, 64])):
        stored["files"][key][2:] = values
    index_file(videos).write_text(json.dumps(stored))
    assert probe_all(videos) == expected


def test_an_index_of_another_version_is_replaced(videos: list[Path]) -> None:
    expected = probe_all(videos)
    stored = json.loads(index_file(videos).read_text())
    index_file(videos).write_text(json.dumps(stored | {"version": 0, "files": {"0/0.mp4": [1, 2, "old"]}}))
    assert probe_all(videos) == expected and len(entries(videos)) == 6


def test_a_cache_that_cannot_be_written_is_one_warning(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TATS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(index, "SAVE_EVERY", 0.0)
    assert probe_all(videos) == [VideoInfo(24, 48, 64, 12.0)] * 6
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text


def test_what_was_found_is_saved_on_the_way_and_when_a_start_is_interrupted(
    videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ended without a word when it has come to the fifth video, as by a scheduler
    code = (
        "import json, os, sys, time; from pathlib import Path\n"
        "from tats_env.data import index\n"
        "index.SAVE_EVERY, inner, paths = 0.0, index.probe, [Path(p) for p in sys.argv[1:]]\n"
        "def probe(path, decoder):\n"
        "    if path == paths[4]:\n"
        "        until = time.monotonic() + 30\n"
        "        while time.monotonic() < until:\n"
        "            try:\n"
        "                if len(json.loads(index.index_file(paths).read_bytes())['files']) == 4: os._exit(7)\n"
        "            except OSError: pass\n"
        "        os._exit(8)\n"
        "    return inner(path, decoder)\n"
        "index.probe = probe\n"
        "index.probe_all(paths)"
    )
    ended = process(code, *videos)
    assert ended.communicate()[0] == "" and ended.returncode == 7
    index_file(videos).unlink()

    def interrupted(path: Path, decoder: str) -> VideoInfo:
        if path == videos[4]:
            raise KeyboardInterrupt
        return VideoInfo(24, 48, 64, 12.0)

    monkeypatch.setattr(index, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_all(videos)
    assert sorted(entries(videos)) == ["0/0.mp4", "0/2.mp4", "1/1.mp4", "1/3.mp4"]


def test_processes_that_index_one_set_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    paths = [miniature.place(tmp_path / "videos" / str(i % 2) / f"{i:02d}.mp4", i) for i in range(42)]
    # Videos 0 and 1 lie in different folders: with them every call has the same index, which it adds one video to
    code = (
        "import sys, time; from pathlib import Path; from tats_env.data.index import probe_all\n"
        "go, paths = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.001)\n"
        "for path in paths[2:]: probe_all([*paths[:2], path])\n"
    )
    ready = [process(code, tmp_path / "go", *paths[:2], *paths[2 + w :: 2]) for w in range(2)]
    for worker in ready:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    assert [worker.communicate()[0] for worker in ready] == ["", ""]
    assert len(entries(paths)) == 42
    assert not list(index_file(paths).parent.glob(".*.part"))


def test_videos_inside_a_tar_file_are_known_by_the_tar_file(tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    tar.write_bytes(b"first")
    inside = str(tar / "000.mp4")
    before = index._stamp(inside)
    assert (
        before == (5, tar.stat().st_mtime_ns) and index._stamp(str(tmp_path / "none.tar" / "0.mp4")) == "no such file"
    )
    tar.write_bytes(b"longer than before")
    assert index._stamp(inside) != before


def test_work_on_all_cores_keeps_its_order_and_lets_real_errors_through(tmp_path: Path) -> None:
    def work(i: int) -> int:
        if i == 3:
            raise UnreadableVideo(tmp_path, "odd")
        return i * i

    results = list(on_all_cores(work, range(6), "squaring", progress=False))
    assert results[:3] == [0, 1, 4] and isinstance(results[3], UnreadableVideo) and results[4:] == [16, 25]
    with pytest.raises(ZeroDivisionError):
        list(on_all_cores(lambda i: 1 // i, range(3), "dividing", progress=False))
    assert probe_all([]) == []


# tats data check


def report(spec: str, tmp_path: Path, *options: str) -> tuple[int, dict[str, dict]]:
    code = data(["check", spec, "--json", str(tmp_path / "out" / "report.json"), *options])
    return code, json.loads((tmp_path / "out" / "report.json").read_text())["splits"]


def test_a_check_counts_what_is_there_missing_unreadable_and_undecodable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = miniature.kinetics_tree(tmp_path / "k", per_class=4, classes=3, validation=2, missing=1)
    abseiling, massaging = (
        sorted((tmp_path / "k" / "train" / name).iterdir()) for name in miniature.KINETICS_LABELS[:2]
    )
    abseiling[0].write_text("text")
    # So long that what is damaged is far from the first frame, which alone is decoded without --decode
    picture = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=12", "-frames:v", "600", "-g", "12", "-movflags", "faststart")
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", "-y", *picture, str(abseiling[1])], check=True)
    whole = abseiling[1].read_bytes()
    abseiling[1].write_bytes(whole[: 9 * len(whole) // 10].ljust(len(whole), b"\0"))
    miniature.place(massaging[0].with_suffix(".avi"), 1)
    massaging[0].unlink()
    code, splits = report(spec, tmp_path, "--decode")
    assert code == 0
    train, validation = (splits[split] for split in SPLITS)
    assert train["classes"] == {"abseiling": 2, "massaging person's head": 4, "shooting goal (soccer)": 4}
    assert train["videos"] == 10 and len(train["missing"]) == 3
    assert train["unreadable"].keys() == {str(abseiling[0])} and train["undecodable"].keys() == {str(abseiling[1])}
    assert "cannot be opened as a video" in train["unreadable"][str(abseiling[0])]
    assert train["seconds"] == {"min": 2, "median": 2, "max": 2} and train["frames"]["max"] == 24
    assert train["sizes"] == {"64x48": 10}
    kept = [*abseiling[2:], massaging[0].with_suffix(".avi"), *massaging[1:]]
    kept += (tmp_path / "k" / "train" / "shooting goal (soccer)").iterdir()
    assert train["bytes"] == sum(path.stat().st_size for path in kept)
    assert validation["videos"] == 6 and not validation["unreadable"] and validation["bytes"] > 0
    said = capsys.readouterr().out
    for expected in ("massaging person's head", "10 videos", str(abseiling[0]), str(abseiling[1]), train["index"]):
        assert expected in said
    # The index is there to be used
    found = list_kinetics400(tmp_path / "k", "train").paths
    assert Path(train["index"]) == index_file(found) and len(entries(found)) == 12
    code, splits = report(spec, tmp_path)
    assert splits["train"]["videos"] == 11 and not splits["train"]["undecodable"]


def test_a_check_of_many_classes_shows_the_largest_and_the_smallest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(25):
        for i in range(5 + (label == 7)):
            miniature.place(tmp_path / "f" / f"class[{label:02d}]" / f"{i}.mp4", label)
    miniature.place(tmp_path / "f" / "loose.mp4", 0)
    miniature.place(tmp_path / "f" / "loose too.mp4", 0)
    code, splits = report(f"folder:{tmp_path / 'f'}", tmp_path)
    assert code == 0 and len(splits["train"]["classes"]) == 26
    assert splits["train"]["classes"]["(no class)"] == splits["validation"]["classes"]["(no class)"] == 1
    said = capsys.readouterr().out
    assert "class[07]" in said and "(no class)" in said and "6 more" in said and "class[15]" not in said
    assert said.count("class[") == 19


def test_a_check_goes_on_with_the_other_split_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = miniature.ssv2_tree(tmp_path / "s", per_class=1, validation=1)
    for path in list_ssv2(tmp_path / "s", "validation").paths:
        path.unlink()
    code, splits = report(spec, tmp_path)
    assert code == 1 and list(splits) == ["train"]
    assert "none of the 3 videos" in capsys.readouterr().err
    for path in list_ssv2(tmp_path / "s", "train").paths:
        path.write_text("text")
    code, splits = report(spec, tmp_path)
    assert code == 1 and splits["train"]["videos"] == 0 and splits["train"]["seconds"] == {}
    for path in list_ssv2(tmp_path / "s", "train").paths:
        path.unlink()
    with pytest.raises(DataError, match=r"ssv2 \(train\): none of the 3 videos"):
        data(["check", spec])


@pytest.mark.parametrize("kind", SETS)
def test_every_set_can_be_checked_from_a_fresh_start(kind: str, tmp_path: Path) -> None:
    spec = SETS[kind][0](tmp_path, per_class=1, validation=1)
    checked = process("from experiments.data import data; sys.exit(data(sys.argv[1:]))", "check", spec)
    said = checked.communicate()[0]
    assert checked.returncode == 0, said
    assert said.count("3 videos") == 2 and "64x48 (3)" in said


def test_a_rendered_set_can_be_checked(tmp_path: Path) -> None:
    code, splits = report("motion", tmp_path)
    assert code == 0
    assert splits["train"]["videos"] == 60 and set(splits["validation"]["classes"].values()) == {4}


def test_what_the_command_line_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["chekc", "motion"]):
        with pytest.raises(ConfigError, match=r"tats data check SPEC \[--decode\]"):
            data(arguments)
    assert data(["--help"]) == 0
    said = capsys.readouterr().out
    assert "tats data check" in said and "tats data pack" in said
    for verb, option in (("check", "--decode"), ("pack", "--per-shard")):
        with pytest.raises(SystemExit) as ended:
            data([verb, "--help"])
        assert ended.value.code == 0 and option in capsys.readouterr().out
    with pytest.raises(DataError, match="did you mean ssv2"):
        data(["check", "ssv:/x"])
    (tmp_path / "file").touch()
    spec = miniature.list_tree(tmp_path / "l", per_class=1, validation=1)
    with pytest.raises(ConfigError, match=r"--json .* cannot be written"):
        data(["check", spec, "--json", str(tmp_path / "file" / "report.json")])
