from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from tats_env.data import shards as shards_module
from tats_env.data.cache import FrameCache
from tats_env.data.listing import Listing
from tats_env.data.reader import DataError, UnreadableVideo, probe, read_frames
from tats_env.data.shards import list_shards, write_shards


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five real videos of 10 frames, 96 x 64, all different and each of a kind of its own."""
    folder = tmp_path_factory.mktemp("videos") / "some class"
    folder.mkdir()
    for i, (kind, codec) in enumerate(
        (("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mkv", "libx264"), ("mp4", "libx264"))
    ):
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", f"testsrc2=s=96x64:r=24,hue=h={60 * i}",
                   "-frames:v", "10", "-c:v", codec, "-b:v", "2M", "-pix_fmt", "yuv420p",
                   folder / f"{i}.{kind}"]  # fmt: skip
        subprocess.run(command, check=True)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def listing(videos: list[Path]) -> Listing:
    return Listing(videos, [0, 1, 2, 1, -1], ["left", "élan", "other"], flips=False)


def frames_of(length: int = 4, height: int = 8, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (length, height, width, 3)).astype(np.uint8)


def npy(frames: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), frames)
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:") as file:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            file.addfile(info, io.BytesIO(contents))
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reading


def test_samples_are_members_of_one_key_with_their_label(tmp_path: Path, videos: list[Path]) -> None:
    tar(tmp_path / "train" / "b.tar", {"7.npy": npy(frames_of()), "7.cls": b"2\n"})
    tar(tmp_path / "train" / "a.tar", {
        "x/0001.json": b'{"label": 1, "fps": 12.5, "caption": "words"}', "x/0001.npy": npy(frames_of()),
        "./0002.mp4": videos[0].read_bytes(), "./0002.txt": b"words", "0003.NPY": npy(frames_of()), "0004.cls": b"1",
        "._0005.npy": b"junk", "0005.cls": b"0", "0005.WebM": videos[1].read_bytes(),
    })  # fmt: skip
    tar(tmp_path / "val" / "0.tar", {"1.npy": npy(frames_of()), "1.cls": b"3"})
    train, validation = (list_shards(tmp_path, split) for split in ("train", "validation"))
    a, b = tmp_path / "train" / "a.tar", tmp_path / "train" / "b.tar"
    assert train.paths == [a / "x" / "0001.npy", a / "0002.mp4", a / "0003.NPY", a / "0005.WebM", b / "7.npy"]
    assert train.labels == [1, -1, -1, 0, 2] and train.flips and not train.missing
    assert validation.paths == [tmp_path / "val" / "0.tar" / "1.npy"] and validation.labels == [3]
    assert train.class_names == validation.class_names == ["0", "1", "2", "3"], "as many in both splits"
    assert [probe(path)[:3] for path in train.paths] == [(4, 8, 10), (10, 64, 96), (4, 8, 10), (10, 64, 96), (4, 8, 10)]
    assert [probe(path).fps for path in train.paths] == [12.5, 24.0, 0.0, pytest.approx(24, rel=0.01), 0.0]


def test_encoded_members_are_read_as_the_files_they_were(tmp_path: Path, videos: list[Path]) -> None:
    shard = tar(tmp_path / "train" / "0.tar", {f"{i}{path.suffix}": path.read_bytes() for i, path in enumerate(videos)})
    wanted = np.array([9, 0, 4, 4])
    for member, path in zip(list_shards(tmp_path, "train").paths, videos, strict=True):
        assert member == shard / f"{videos.index(path)}{path.suffix}"
        assert probe(member) == probe(path)
        for size, position in (((64, 96), 0.5), ((32, 32), 0.0)):
            found = read_frames(member, size, wanted, position=position)
            assert np.array_equal(found, read_frames(path, size, wanted, position=position))


def test_decoded_members_are_read_in_place_and_scaled_if_need_be(tmp_path: Path) -> None:
    frames = [frames_of(seed=i) for i in range(3)]
    shard = tar(tmp_path / "s.tar", {f"{i}.npy": npy(f) for i, f in enumerate(frames)})
    for i in (2, 0, 1):
        wanted = np.array([3, 0, 1, 1])
        assert np.array_equal(read_frames(shard / f"{i}.npy", (8, 10), wanted), frames[i][wanted])
        assert np.array_equal(read_frames(shard / f"{i}.npy", (8, 6), wanted, position=1.0), frames[i][wanted, :, 4:])
    flat = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, None, :, None], (1, 60, 100, 3))
    tar(shard, {"0.npy": npy(flat)})
    half = read_frames(shard / "0.npy", (30, 50))
    assert half.shape == (1, 30, 50, 3) and np.abs(half[0, 0, :, 0] - np.arange(1, 200, 4)).max() <= 1


def test_only_the_frames_asked_for_are_read(tmp_path: Path) -> None:
    frames = frames_of(200, 64, 64)
    shard = tar(tmp_path / "s.tar", {"0.npy": npy(frames), "1.npy": npy(frames)})
    read_frames(shard / "1.npy", (64, 64), np.array([0]))
    before = psutil.Process().io_counters().read_chars
    found = read_frames(shard / "1.npy", (64, 64), np.array([150, 3]))
    assert np.array_equal(found, frames[[150, 3]])
    assert psutil.Process().io_counters().read_chars - before < 4 * frames[0].nbytes


def test_a_tar_file_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tar(tmp_path / "train" / "0.tar", {f"{i}.npy": npy(frames_of(seed=i)) for i in range(3)})
    paths = list_shards(tmp_path, "train").paths
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.tarfile, "open", None)  # any use of it fails
        for i, path in enumerate(paths):
            assert np.array_equal(read_frames(path, (8, 10)), frames_of(seed=i))
    os.utime(tar(shard, {"1.npy": npy(frames_of(seed=7))}), (1, 1))
    assert np.array_equal(read_frames(paths[1], (8, 10)), frames_of(seed=7)), "and again when it has changed"
    with pytest.raises(UnreadableVideo, match="no such file"):
        read_frames(paths[0], (8, 10))


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("0.npy", npy(frames_of())[:-1], "end before the last"),
        ("0.npy", npy(np.zeros((4, 8, 8))), "frames are uint8"),
        ("0.npy", b"junk", "magic"),
        ("0.mp4", b"", "empty"),
        ("0.mp4", b"not a video" * 99, "cannot be opened as a video"),
    ],
)
def test_a_broken_member_is_an_unreadable_video(name: str, contents: bytes, says: str, tmp_path: Path) -> None:
    shard = tar(tmp_path / "s.tar", {name: contents, "1.npy": npy(frames_of())})
    with pytest.raises(UnreadableVideo, match=says) as caught:
        probe(shard / name)
    assert caught.value.path == shard / name and "\n" not in caught.value.reason
    assert probe(shard / "1.npy")[:3] == (4, 8, 10)
    shard.unlink()
    with pytest.raises(UnreadableVideo, match="no such file"):
        read_frames(shard / "1.npy", (8, 10))


def test_class_names_may_be_a_text_file_or_json(tmp_path: Path) -> None:
    tar(tmp_path / "train" / "0.tar", {"0.npy": npy(frames_of()), "0.cls": b"1"})
    (tmp_path / "classes.txt").write_text("zero\nein zweiter\n", encoding="utf-8")
    assert list_shards(tmp_path, "train").class_names == ["zero", "ein zweiter"]
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    assert list_shards(tmp_path, "train").class_names == ["a", "b", "c"] and list_shards(tmp_path, "train").flips
    (tmp_path / "classes.json").write_text('{"class_names": ["push left", "push right"], "flips": false}')
    found = list_shards(tmp_path, "train")
    assert found.class_names == ["push left", "push right"] and not found.flips


def test_what_cannot_be_listed_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    good = {"0.npy": npy(frames_of()), "0.cls": b"0"}
    cut = tar(tmp_path / "cut" / "train" / "0.tar", good)
    cut.write_bytes(cut.read_bytes()[:900])
    packed = tmp_path / "packed" / "train" / "0.tar"
    packed.parent.mkdir(parents=True)
    with tarfile.open(packed, "w:gz"):
        pass
    (tmp_path / "gz" / "train").mkdir(parents=True)
    (tmp_path / "gz" / "train" / "0.tar.gz").touch()
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for name, members in {
        "word": {**good, "0.cls": b"cat"}, "list": {**good, "0.json": b'{"label": [0]}'}, "none": {"0.txt": b"words"},
        "high": {**good, "0.cls": b"5"}, "names": good,
    }.items():  # fmt: skip
        tar(tmp_path / name / "train" / "0.tar", members)
    (tmp_path / "high" / "classes.txt").write_text("one\ntwo")
    (tmp_path / "names" / "classes.json").write_text('{"0": "one"}')
    for name, says in {
        "nowhere": "is not a folder",
        "empty": f"expected {tmp_path}/empty/train/*.tar",
        "gz": "0.tar.gz is compressed",
        "packed": "not a whole, uncompressed tar file",
        "cut": "not a whole, uncompressed tar file (unexpected end of data)",
        "word": "0.cls holds b'cat'; a whole number",
        "list": '{"label": a whole number}',
        "none": "looked for .npy",
        "high": "its class is 5, and there are 2",
        "names": "a list of names",
    }.items():
        with pytest.raises(DataError) as caught:
            list_shards(tmp_path / name, "train")
        assert says in str(caught.value) and str(tmp_path / name) in str(caught.value)
    with pytest.raises(DataError, match=r"validation/\*\.tar or .*val/\*\.tar"):
        list_shards(tmp_path / "names", "validation")


# Writing


def test_what_is_written_is_read_back(tmp_path: Path, listing: Listing) -> None:
    assert write_shards(listing, tmp_path, "train", (32, 48), per_shard=2) == []
    assert sorted(p.name for p in (tmp_path / "train").glob("*.tar")) == [f"shard-00000{i}.tar" for i in range(3)]
    found = list_shards(tmp_path, "train")
    assert (found.labels, found.class_names, found.flips) == (listing.labels, listing.class_names, listing.flips)
    for member, path in zip(found.paths, listing.paths, strict=True):
        assert probe(member) == (10, 32, 48, probe(path).fps)
        assert np.array_equal(read_frames(member, (32, 48)), read_frames(path, (32, 48)))


def test_a_shorter_side_keeps_each_video_s_shape_and_enlarges_none(tmp_path: Path, listing: Listing) -> None:
    for side, shape in ((32, (32, 48)), (500, (64, 96))):
        write_shards(listing, tmp_path / str(side), "validation", side)
        (path, *_) = list_shards(tmp_path / str(side), "validation").paths
        assert probe(path)[1:3] == shape
        assert np.array_equal(read_frames(path, shape), read_frames(listing.paths[0], shape))


def test_webdataset_reads_the_same_samples(tmp_path: Path, listing: Listing) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(listing, tmp_path, "train", (32, 48), per_shard=2)
    urls = sorted(map(str, (tmp_path / "train").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(5)]
    assert [sample["json"]["label"] for sample in samples] == listing.labels
    for sample, path in zip(samples, listing.paths, strict=True):
        assert np.array_equal(sample["npy"], read_frames(path, (32, 48)))
        assert sample["json"]["source"] == f"some class/{path.name}"


def test_shards_that_webdataset_writes_are_read(tmp_path: Path, videos: list[Path]) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "train").mkdir()
    with webdataset.TarWriter(str(tmp_path / "train" / "0.tar")) as writer:
        writer.write({"__key__": "a", "npy": frames_of(), "cls": 3})
        writer.write({"__key__": "b", "mp4": videos[0].read_bytes(), "json": {"label": 1}})
    found = list_shards(tmp_path, "train")
    assert [path.name for path in found.paths] == ["a.npy", "b.mp4"] and found.labels == [3, 1]
    assert np.array_equal(read_frames(found.paths[0], (8, 10)), frames_of())
    assert np.array_equal(read_frames(found.paths[1], (32, 48)), read_frames(videos[0], (32, 48)))


def test_unreadable_videos_are_left_out_and_returned(
    tmp_path: Path, videos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.mp4").write_text("text")
    paths = [videos[0], tmp_path / "broken.mp4", videos[1]]
    bad = write_shards(Listing(paths, [0, 1, 1], ["a", "b"]), tmp_path / "out", "train", (16, 16))
    assert [error.path for error in bad] == [tmp_path / "broken.mp4"] and str(tmp_path / "broken.mp4") in caplog.text
    found = list_shards(tmp_path / "out", "train")
    assert found.labels == [0, 1] and [path.name for path in found.paths] == ["000000.npy", "000002.npy"]
    assert np.array_equal(read_frames(found.paths[1], (16, 16)), read_frames(videos[1], (16, 16)))


def test_a_killed_packing_leaves_whole_shards_and_is_taken_up_again(tmp_path: Path, listing: Listing) -> None:
    reference = tmp_path / "reference"
    write_shards(listing, reference, "train", (32, 48), per_shard=2)
    code = f"""
import os, signal, time
from pathlib import Path
from tats_env.data import shards
from tats_env.data.listing import Listing
real, first = shards.read_frames, Path({str(tmp_path / "out" / "train" / "shard-000000.tar")!r})
def read(path, *arguments, **options):
    if path == Path({str(listing.paths[3])!r}):  # the second of the second shard
        while not first.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *arguments, **options)
shards.read_frames = read
paths = [Path(p) for p in {list(map(str, listing.paths))}]
listing = Listing(paths, {listing.labels}, {listing.class_names}, flips=False)
shards.write_shards(listing, Path({str(tmp_path / "out")!r}), "train", (32, 48), per_shard=2)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL and not process.stderr
    first = tmp_path / "out" / "train" / "shard-000000.tar"
    assert list_shards(tmp_path / "out", "train").paths == [first / "000000.npy", first / "000001.npy"]
    before = first.stat().st_mtime_ns
    write_shards(listing, tmp_path / "out", "train", (32, 48), per_shard=2)
    assert first.stat().st_mtime_ns == before
    assert everything(tmp_path / "out") == everything(reference)


def test_shards_of_another_kind_are_not_mixed(tmp_path: Path, listing: Listing) -> None:
    write_shards(listing, tmp_path, "train", (16, 16), per_shard=2)
    other_order = Listing(listing.paths[::-1], listing.labels[::-1], listing.class_names, flips=False)
    fewer = Listing(listing.paths[:2], listing.labels[:2], listing.class_names, flips=False)
    others = Listing(listing.paths, listing.labels, ["x", "y", "z"], flips=False)
    before = everything(tmp_path)
    for what, size, says in (
        (listing, (16, 24), "other videos, or at another size"), (listing, 16, "other videos, or at another size"),
        (other_order, (16, 16), "other videos"), (fewer, (16, 16), "other videos"), (others, (16, 16), "other classes"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            write_shards(what, tmp_path, "train", size, per_shard=2)
    assert everything(tmp_path) == before
    write_shards(listing, tmp_path, "validation", (16, 24))  # the other split may


def test_the_notes_say_nothing_of_the_machine(tmp_path: Path, listing: Listing) -> None:
    write_shards(listing, tmp_path, "train", 16)
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as file:
        members = file.getmembers()
        notes = [json.loads(file.extractfile(m).read()) for m in members if m.name.endswith(".json")]  # type: ignore
    assert all((m.uid, m.gid, m.uname, m.mtime) == (0, 0, "", 0) for m in members)
    assert str(listing.paths[0].parent.parent) not in json.dumps(notes)


def test_the_frame_cache_stores_encoded_members_and_passes_over_decoded_ones(
    tmp_path: Path, videos: list[Path]
) -> None:
    shard = tar(tmp_path / "0.tar", {"0.mp4": videos[0].read_bytes(), "1.npy": npy(frames_of(10, 64, 96))})
    cache, wanted = FrameCache(tmp_path / "cache", 1 << 30), np.array([3, 1])
    for name in ("0.mp4", "1.npy"):
        path = shard / name
        for _ in range(2):
            found = cache.frames(path, probe(path), (32, 32), 0.5, "decord", wanted)
            assert np.array_equal(found, read_frames(path, (32, 32), wanted))
    assert len(list(cache.folder.glob("??/*.npy"))) == 1


def test_memory_and_open_files_stay_flat_over_many_reads(tmp_path: Path, videos: list[Path]) -> None:
    shard = tar(tmp_path / "0.tar", {"0.mp4": videos[0].read_bytes(), "1.npy": npy(frames_of(10, 64, 96))})
    infos = {name: probe(shard / name) for name in ("0.mp4", "1.npy")}
    rng, process = np.random.default_rng(0), psutil.Process()

    def read(times: int) -> tuple[int, int]:
        for _ in range(times):
            for name, info in infos.items():
                read_frames(shard / name, (32, 32), rng.integers(10, size=4), info)
        return process.memory_info().rss, process.num_fds()

    before, after = read(40), read(300)
    assert after[0] - before[0] < 16 << 20 and after[1] == before[1]
