"""Whatever comes in, what comes out is right or a refusal in our own words: never a hang, a crash or something else.

Each property has a short form and a slow one with many more examples; both try the same ones every time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from deadly import decode
from gymnasium.error import InvalidAction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from imageio_ffmpeg import get_ffmpeg_exe

import agents
from agents.adamae import AdaMAE
from agents.base import resolve_agent
from agents.ppo import PPO
from experiments.checkpoints import DamagedCheckpoint, read_checkpoint, write_checkpoint
from experiments.config import dump_config, load_config, override_config, parse_config, to_values
from experiments.features import extract
from experiments.refusals import ConfigError, items
from experiments.resume import is_finished
from experiments.schema import RunConfig
from tats_env.data import DataError, list_videos, motion, open_dataset
from tats_env.data.cache import FrameCache
from tats_env.data.index import index_file, probe_all
from tats_env.data.miniature import FRAMES, MINIATURES, place
from tats_env.data.reader import UnreadableVideo, VideoInfo, probe, read_frames
from tats_env.data.workers import on_all_cores
from tats_env.mae import load_learner, save_learner
from tats_env.rewards import resolve_reward

CPU = torch.device("cpu")
SECONDS = 20  # for one example: more is a hang
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def examples(short: int, long: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.slow)])


@contextmanager
def no_hang() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check: Callable[..., None], *strategies: st.SearchStrategy[Any], examples: int) -> None:
    """``check`` on so many examples, the same ones every time."""

    def guarded(example: tuple[Any, ...]) -> None:
        with no_hang():
            check(*example)

    settings(max_examples=examples, **SETTINGS)(given(st.tuples(*strategies))(guarded))()  # type: ignore[arg-type]


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """That, cut off, with bytes changed or put in, with a JSON value changed, or something else altogether."""
    values = [match.span() for match in re.finditer(rb'-?\d[\d.e-]*|"[^"\\]*"|true|false|null', whole[:4000])]
    place, byte = st.integers(0, max(0, len(whole) - 1)), st.integers(0, 255)
    head = st.integers(0, max(0, min(1500, len(whole)) - 1))

    def change(changes: list[tuple[int, int]]) -> bytes:
        content = bytearray(whole)
        for i, value in changes:
            content[i] = value
        return bytes(content)

    def replace(span: tuple[int, int], value: bytes) -> bytes:
        return whole[: span[0]] + value + whole[span[1] :]

    odd = [
        b"",
        b"null",
        b"-1",
        b'"x"',
        b"[]",
        b"{}",
        b"1e999",
        b"NaN",
        b"9" * 30,
        b"9" * 5000,
        b"[" * 9000,
        b"\0",
        b"\xff",
    ]
    ways = [
        st.builds(lambda end: whole[:end], place),
        st.builds(change, st.lists(st.tuples(st.one_of(place, head), byte), min_size=1, max_size=4)),
        st.builds(lambda i, more: whole[:i] + more + whole[i:], place, st.binary(min_size=1, max_size=9)),
        st.one_of(st.binary(max_size=64), st.sampled_from(odd)),
    ]
    if values:
        ways.append(st.builds(replace, st.sampled_from(values), st.sampled_from(odd)))
    return st.one_of(ways)


# Configurations

KEYS = [key for key, value in items(to_values(RunConfig())) if not isinstance(value, dict)]
_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=4), st.dates(),
    st.sampled_from([10**9 + 7, 10**12 + 39, 10**400, 2**63, 1e300, 5e-324, "ppo", "random", "folder:/x", "a.b:C"]),
)  # fmt: skip
_NAMES = st.one_of(st.text(max_size=6), st.integers(), st.sampled_from([key.rpartition(".")[2] for key in KEYS]))
VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(_NAMES, v, max_size=3), max_leaves=5
)
_MARKS = "{}[]:,&*!-|>?'\"#%@` \n\tab1.e~<0é"


def accepted(read: Callable[[], RunConfig], folder: Path) -> ConfigError | None:
    """The refusal; what is accepted loads back equal."""
    try:
        config = read()
    except ConfigError as error:
        return error
    (folder / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(folder / "dumped.yaml")) == config
    return None


@examples(40, 4_000)
def test_any_value_under_any_key_is_understood_or_refused_by_the_key(examples: int, tmp_path: Path) -> None:
    def check(key: str, value: Any) -> None:
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        error = accepted(lambda: parse_config(nested, "x.yaml"), tmp_path)
        # A value can also disagree with another key, which is named then
        assert error is None or any(name.rpartition(".")[2] in str(error) for name in KEYS), error

    fuzz(check, st.sampled_from(KEYS), VALUES, examples=examples)
    for key in KEYS:
        for value in (10**9 + 7, 10**400):
            with no_hang():
                check(key, value)


@examples(40, 4_000)
def test_any_text_is_a_configuration_or_refused_with_its_place(examples: int, tmp_path: Path) -> None:
    shipped = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))]
    file = tmp_path / "fuzzed.yaml"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        error = accepted(lambda: load_config(str(file)), tmp_path)
        assert error is None or str(error).startswith(str(file))

    texts = st.one_of(st.text(max_size=40), st.text(_MARKS, max_size=40)).map(
        lambda text: text.encode("utf-8", "replace")
    )
    fuzz(check, st.one_of(texts, st.sampled_from(shipped).flatmap(damaged)), examples=examples)
    for text in (
        "d: 2001-99-99",
        "steps: !!timestamp x",
        "steps: !!int x",
        "[" * 9000,
        "? {a: b}\n: c",
        "1.5: 3",
        "&a {b: *a}",
    ):
        check(text.encode())
    for tag in ("object/apply:os.system [ls]", "name:os.system", "module:os", "object:subprocess.Popen {}"):
        file.write_text(f"name: !!python/{tag}\n")
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            load_config(str(file))


@examples(15, 400)
def test_any_options_of_the_command_line_are_understood_or_refused(examples: int, tmp_path: Path) -> None:
    words = st.one_of(
        st.text(max_size=8), VALUES.filter(lambda v: v != 10**400).map(lambda v: yaml.safe_dump(v)[:40]),
        st.sampled_from(["", "true", "null", "1e400", "[", "{a: 1}", "1" * 5000, "--", "random", "!!set x", "a.b:C"]),
    )  # fmt: skip
    keys = st.sampled_from([*KEYS, "agent.class", "agent.x", "agent.x.y", "nothing", "2001-99-99"])

    def check(options: list[tuple[str, str, bool]]) -> None:
        args: list[str] = []
        for key, word, joined in options:
            flag = f"--{key.replace('_', '-')}"
            args += [f"{flag}={word}"] if joined else [flag, word]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                accepted(lambda: override_config(RunConfig(), args, "tats run x"), tmp_path)
            except SystemExit as ended:  # tyro has told the user
                assert ended.code in (0, 2)

    fuzz(check, st.lists(st.tuples(keys, words, st.booleans()), min_size=1, max_size=3), examples=examples)


def test_a_configuration_imports_only_what_its_user_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("written_by_me", "not_written"):
        (tmp_path / f"{name}.py").write_text("def reward(decision):\n    return decision\n")
    config = parse_config({"agent": {"class": "written_by_me:Agent"}, "reward": "written_by_me:reward"}, "x.yaml")
    assert "written_by_me" not in sys.modules, "to look at a configuration runs nothing"
    before = set(sys.modules)
    assert resolve_reward(config.reward)(3) == 3  # type: ignore[arg-type,comparison-overlap]
    with pytest.raises(ValueError, match="written_by_me"):
        resolve_agent(config.agent.class_)
    assert set(sys.modules) - before == {"written_by_me"}
    del sys.modules["written_by_me"]
    for wrong in (
        "not_written",
        "not_written:reward:x",
        "__import__('not_written')",
        "./not_written:x",
        "not_written.py",
    ):
        with pytest.raises(ConfigError):
            parse_config({"reward": wrong}, "x.yaml")
    assert "not_written" not in sys.modules


# Scores

_LARGEST = float(np.finfo(np.float32).max)
_ELEMENTS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1e-45, 1.0, -1.0, _LARGEST, -_LARGEST])
)


def scores(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Arrays of that shape and others, of floats and whatever else, in every order in memory; and no arrays at all."""
    others = st.sampled_from(
        [np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64, "U3", object, "M8[s]"]
    )
    array = st.one_of(
        arrays.arrays(np.float32, shape, elements=_ELEMENTS),
        arrays.arrays(np.float32, shape, elements=_ELEMENTS.filter(np.isfinite)),
        arrays.arrays(others, shape),
        arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=9), elements=_ELEMENTS),
    )

    def read_only(x: np.ndarray) -> np.ndarray:
        x.setflags(write=False)
        return x

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x.copy()) if x.dtype.kind in "biufc" else x

    forms = [array, array.map(np.asfortranarray), array.map(lambda x: x[..., ::-1]), array.map(read_only)]
    odd = st.one_of(
        st.none(), st.text(max_size=3), st.integers(), st.complex_numbers(), st.just({}), st.just([[1], [1, 2]])
    )
    return st.one_of(*forms, array.map(lambda x: x.tolist()), array.map(tensor), odd)


@pytest.mark.parametrize("face", ["single", "numpy", "torch"])
@examples(25, 2_000)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_any_scores_keep_the_k_highest_visible_or_are_an_invalid_action(face: str, examples: int) -> None:
    options: dict[str, Any] = {"num_videos": 4, "num_frames": 4, "size": 16, "mask_ratio": 0.5}
    if face == "single":
        env: Any = gym.make("TATSMasking-v0", disable_env_checker=True, **options).unwrapped
    else:
        env = gym.make_vec("TATSMasking-v0", 2, vectorization_mode="vector_entry_point", output=face, **options)
    env.reset(seed=0)
    n, k = env.task.grid.num_tokens, env.task.num_visible
    outcomes: Counter[str] = Counter()

    def check(action: Any) -> None:
        try:
            info = env.step(action)[-1]
            if face == "torch":
                env.check()
        except InvalidAction:
            outcomes["invalid"] += 1
            return
        finally:
            if face == "single":
                env.reset()
        outcomes["masked"] += 1
        given = np.asarray(action, dtype=np.float32)
        assert given.shape == env.action_space.shape and not np.isnan(given).any()
        for row, visible in zip(given.reshape(-1, n), np.asarray(info["visible"]).reshape(-1, n), strict=True):
            assert visible.sum() == k and row[visible].min() >= row[~visible].max()

    fuzz(check, scores((n,) if face == "single" else (2, n)), examples=examples)
    assert min(outcomes["invalid"], outcomes["masked"]) > examples // 10


# Annotation files

KINDS = ("list", "ssv2", "kinetics400", "ucf101", "hmdb51")
_BITS = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([
        b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"../../", b"/etc/", b"/../", b"\n", b"\r", b",", b'"', b" ", b"9" * 5000,
        b"-1", b"1e308", b"Infinity", b"nan", b"[" * 9000, b"{", b"}", b"\xe2\x80\xa8", b"\x85", b"\xd9\xa3", b"100000",
    ]),
)  # fmt: skip


@st.composite
def annotation(draw: st.DrawFn, whole: bytes) -> bytes:
    """That file with bytes put in or taken out, lines or columns moved, or in another encoding."""
    content = whole
    for _ in range(draw(st.integers(1, 3))):
        lines = content.splitlines(True) or [b""]
        i = draw(st.integers(0, len(lines) - 1))
        way = draw(st.integers(0, 6))
        if way == 0:
            j = draw(st.integers(0, len(content)))
            content = content[:j] + draw(_BITS) + content[j + draw(st.integers(0, 8)) :]
        elif way == 1:
            content = b"".join([*lines[: i + 1], *lines[i:]])
        elif way == 2:
            content = b"".join(lines[:i] + lines[i + 1 :])
        elif way == 3:
            content = b"".join(lines[i:] + lines[:i])
        elif way == 4:
            content = content[: draw(st.integers(0, len(content)))]
        elif way == 5:
            encoding = draw(st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"]))
            content = content.decode("utf-8", "surrogateescape").encode(encoding, "replace")
        else:
            separator, column = draw(st.sampled_from([b",", b" ", b"\t"])), draw(st.integers(0, 3))
            cut = (line.split(separator) for line in lines)
            content = b"".join(separator.join(x for n, x in enumerate(line) if n != column) for line in cut)
    return content


def says(kind: str, root: Path, split: str, path: Path, name: str) -> bool:
    """Whether the annotation, read in the plainest way, says that this video is of the class of that name."""

    def read(pattern: str) -> str:
        (file,) = root.rglob(pattern)
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")

    official = {"train": "train", "validation": "test"}[split]
    if kind == "list":
        lines = read("train.csv" if split == "train" else "val.csv").split("\n")
        return any(path.name in line and line.strip().strip('"').endswith(name) for line in lines)
    if kind == "ssv2":
        entries, numbers = (json.loads(read(f"*-{what}.json")) for what in (split, "labels"))
        templates = {str(x["template"]).replace("[", "").replace("]", "") for x in entries if str(x["id"]) == path.stem}
        return name in templates and name in numbers
    if kind == "kinetics400":
        rows = csv.reader(read("train.csv" if split == "train" else "validate.csv").splitlines())
        return any(
            name in (x.replace("_", " ") for x in row) and any(x and x in path.stem for x in row) for row in rows
        )
    if kind == "ucf101":
        place, names = f"{path.parent.name}/{path.stem}.avi".casefold(), read("classInd.txt").split()
        return (
            place in read(f"{official}list01.txt").casefold()
            and name.casefold() == place.split("/")[0]
            and name in names
        )
    mark = {"train": "1", "validation": "2"}[split]
    lines = read(f"{name}_test_split1.txt").split("\n")
    return any(line.strip().startswith(f"{path.stem}.avi") and line.strip().endswith(mark) for line in lines)


@pytest.mark.parametrize("kind", KINDS)
@examples(12, 1_000)
def test_a_damaged_annotation_is_refused_or_gives_what_it_says(kind: str, examples: int, tmp_path: Path) -> None:
    spec, root = MINIATURES[kind](tmp_path / kind, 3, 3), tmp_path / kind
    files = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix in (".csv", ".txt", ".json")}
    cases = st.sampled_from(sorted(files)).flatmap(lambda path: st.tuples(st.just(path), annotation(files[path])))
    outcomes: Counter[str] = Counter()

    def check(case: tuple[Path, bytes]) -> None:
        file, content = case
        file.write_bytes(content)
        try:
            for split in ("train", "validation"):
                try:
                    found = list_videos(spec, split)
                except DataError as error:
                    outcomes["refused"] += 1
                    assert str(root) in str(error)
                    continue
                outcomes["listed"] += 1
                assert len(found.paths) == len(found.labels) > 0
                for path, label in zip(found.paths, found.labels, strict=True):
                    assert path.is_file() and path.resolve().is_relative_to(root.resolve())
                    name = found.class_names[label] if label >= 0 else "-1"
                    assert says(kind, root, split, path, name), (path, name)
        finally:
            file.write_bytes(files[file])

    logging.disable(logging.WARNING)
    try:
        fuzz(check, cases, examples=examples)
        if kind in ("list", "ssv2"):
            for path, whole in files.items():
                for content in (
                    b"[" * 9000,
                    b"a\0b/c.mp4 1\n" + whole,
                    whole.replace(b"0", b"9" * 5000),
                    b'{"a": Infinity}',
                ):
                    check((path, content))
    finally:
        logging.disable(logging.NOTSET)
    assert outcomes["refused"] and outcomes["listed"]


# Video files

_CODECS = {
    "mp4": ("-c:v", "libx264", "-bf", "2"),
    "front.mp4": ("-c:v", "libx264", "-bf", "0", "-movflags", "faststart"),
    "mkv": ("-c:v", "libx264", "-bf", "0"),
    "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "avi": ("-c:v", "mpeg4", "-bf", "0"),
}
GROUP = 8  # frames from one key frame to the next
SHAPE = (48, 64)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real videos of 24 frames that all differ."""
    folder = tmp_path_factory.mktemp("wholes")
    for name, codec in _CODECS.items():
        command = [
            get_ffmpeg_exe(),
            "-loglevel",
            "error",
            "-f",
            "lavfi",
            "-i",
            "testsrc2=s=64x48:r=12",
            "-frames:v",
            "24",
        ]
        command += ["-pix_fmt", "yuv420p", "-threads", "1", "-g", str(GROUP), *codec, str(folder / f"whole.{name}")]
        subprocess.run(command, check=True)
    return {name: folder / f"whole.{name}" for name in _CODECS}


def decoded(paths: list[Path]) -> list[tuple[VideoInfo, np.ndarray] | UnreadableVideo]:
    """Each that comes has as many frames as announced, of the right shape."""
    found = list(
        on_all_cores(partial(decode, size=SHAPE), [(path, 10.0) for path in paths], "", False, 2, lambda item: item)
    )
    for result in found:
        if not isinstance(result, UnreadableVideo):
            assert result[1].shape == (result[0].num_frames, *SHAPE, 3) and len(result[1]) > 0
        else:
            assert "too long" not in result.reason and "\n" not in result.reason
    return found


@examples(12, 99)
def test_a_video_cut_off_anywhere_is_refused_or_gives_its_first_frames(
    examples: int, wholes: dict[str, Path], tmp_path: Path
) -> None:
    paths = []
    for name, whole in wholes.items():
        content = whole.read_bytes()
        for i in range(1, examples + 1):
            paths.append(tmp_path / f"{i:02d}.{name}")
            paths[-1].write_bytes(content[: len(content) * i // (examples + 1)])
    shortened = 0
    for path, result in zip(paths, decoded(paths), strict=True):
        if isinstance(result, UnreadableVideo):
            continue
        frames = result[1]
        assert path.suffix != ".mp4" or len(frames) == 24, "unless only the last box, of comments, is cut"
        expected = read_frames(wholes[path.name.partition(".")[2]], SHAPE)[: len(frames)]
        # Of an avi the frame in which it is cut comes too, as far as it goes; a player shows it likewise
        sure = len(frames) - (path.suffix == ".avi")
        assert np.array_equal(frames[:sure], expected[:sure])
        shortened += 1
    assert shortened > examples, "what is there of an mkv, webm or avi file is used"


@examples(20, 1_500)
def test_a_flipped_bit_damages_its_group_of_frames_alone_or_the_video_is_refused(
    examples: int, wholes: dict[str, Path], tmp_path: Path
) -> None:
    """A flip in the picture itself. Decord conceals it, as a player does, and nobody can tell."""
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for name, whole in wholes.items():
        content, expected, paths, inside = whole.read_bytes(), read_frames(whole, SHAPE), [], []
        start, end = _payload(content) if "mp4" in name else (0, 0)
        for i in range(examples):
            at = int(rng.integers(len(content)))
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(rng.integers(8))
            paths.append(tmp_path / f"{i:04d}.{name}")
            paths[-1].write_bytes(flipped)
            inside.append(start <= at < end)
        for path, result, is_picture in zip(paths, decoded(paths), inside, strict=True):
            path.unlink()
            if isinstance(result, UnreadableVideo):
                outcomes["refused"] += 1
                continue
            frames = result[1]
            wrong = {t // GROUP for t in range(24) if len(frames) != 24 or not np.array_equal(frames[t], expected[t])}
            outcomes["one group" if len(wrong) == 1 else "whole" if not wrong else "beyond it"] += 1
            assert len(wrong) <= 1 or not is_picture
    # The rest are flips in a container's tables, which hold no checksums: of where frames are, and how many
    assert outcomes["beyond it"] < 0.02 * outcomes.total() and outcomes["refused"] and outcomes["one group"]


def _payload(mp4: bytes) -> tuple[int, int]:
    """Where the coded frames of an mp4 file are, after x264's own words about itself."""
    at = mp4.index(b"mdat")
    (length,) = struct.unpack(">I", mp4[at - 4 : at])
    return at + 4, at - 4 + length


def test_files_that_are_not_what_they_seem_are_refused_or_read_as_what_they_are(
    wholes: dict[str, Path], tmp_path: Path
) -> None:
    mp4, webm, avi = (wholes[name].read_bytes() for name in ("mp4", "webm", "avi"))

    def box(name: bytes, length: int) -> bytes:
        at = mp4.index(name) - 4
        return mp4[:at] + struct.pack(">I", length) + mp4[at + 4 :]

    def long_box(name: bytes, length: int) -> bytes:
        at = mp4.index(name) - 4
        return mp4[:at] + struct.pack(">I4sQ", 1, name, length) + mp4[at + 8 :]

    def entries(name: bytes, count: int) -> bytes:
        at = mp4.index(name) + 8 + 4 * (name == b"stsz")
        return mp4[:at] + struct.pack(">I", count) + mp4[at + 4 :]

    def flipped(at: int) -> bytes:
        return mp4[:at] + bytes([mp4[at] ^ 0x80]) + mp4[at + 1 :]

    times = mp4.index(b"stts")
    segment = webm.index(b"\x18\x53\x80\x67") + 4
    refused = {
        "text.mp4": b"not a video\n" * 100, "text.avi": b"RIFF is a word\n" * 9, "empty.mp4": b"", "empty.webm": b"",
        "zeros.mp4": bytes(5000), "picture.mp4": b"\x89PNG\r\n\x1a\n" + bytes(500), "moov.mp4": b"\0\0\0\x08moov",
        "huge-ftyp.mp4": box(b"ftyp", 0xFFFFFFF0),
        "huge-ftyp-64.mp4": long_box(b"ftyp", 1 << 62),
        "many-sizes.mp4": entries(b"stsz", 0xFFFFFFF0), "many-chunks.mp4": entries(b"stco", 0x7FFFFFFF),
        # How many frames there are: std::bad_alloc ends the process (decord 0.6)
        "many-times.mp4": flipped(times + 12),
        # How long a frame is shown: decord would give copies of others for most of the frames
        "negative-time.mp4": flipped(times + 16),
        "huge-header.webm": webm[:4] + b"\x01\x3f\xff\xff\xff\xff\xff\xf0" + webm[5:],
    }  # fmt: skip
    read = {
        "huge-moov.mp4": box(b"moov", 0xFFFFFFF0), "huge-trak.mp4": box(b"trak", 0x7FFFFFFF),
        "mp4-as.avi": mp4, "webm-as.mp4": webm, "avi-as.webm": avi, "more.mp4": mp4 + bytes(3000),
        "huge-segment.webm": webm[:segment] + b"\x01\x3f\xff\xff\xff\xff\xff\xf0" + webm[segment + 8 :],
    }  # fmt: skip
    for name, content in (refused | read).items():
        (tmp_path / name).write_bytes(content)
    ffmpeg = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi"]
    for name, source in (("sound.mp4", ["-i", "sine=d=1"]), ("none.mp4", ["-i", "testsrc2=s=64x48", "-t", "0"])):
        subprocess.run([*ffmpeg, *source, str(tmp_path / name)], check=name == "sound.mp4")
        refused[name] = b""
    results = dict(
        zip(sorted(refused | read), decoded([tmp_path / name for name in sorted(refused | read)]), strict=True)
    )
    assert [name for name, result in results.items() if isinstance(result, UnreadableVideo)] == sorted(refused)
    for name, content in read.items():
        result = results[name]
        assert not isinstance(result, UnreadableVideo)
        source = {mp4[:4]: "mp4", webm[:4]: "webm", avi[:4]: "avi"}[content[:4]]
        assert np.array_equal(result[1], read_frames(wholes[source], SHAPE))


# Files of our own


@pytest.fixture(scope="module")
def env(video_cache: None) -> Any:
    return gym.make_vec(
        "TATSMasking-v0", 2, vectorization_mode="vector_entry_point", output="torch",
        num_videos=4, num_frames=4, size=16, mask_ratio=0.5,
    )  # fmt: skip


def huggingface(folder: Path) -> dict[str, Path]:
    """A tiny VideoMAE as ``save_pretrained`` writes it, whole and with its weights pickled."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    network = transformers.VideoMAEForPreTraining(config)
    network.save_pretrained(folder / "safe")
    shutil.copytree(folder / "safe", folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pickled" / "pytorch_model.bin")
    return {
        "config.json": folder / "safe" / "config.json",
        "model.safetensors": folder / "safe" / "model.safetensors",
        "pytorch_model.bin": folder / "pickled" / "pytorch_model.bin",
    }


class Hostile:
    """What a hostile pickle does: here it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def signed(path: Path) -> Path:
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return path


@examples(8, 300)
def test_damaged_checkpoints_and_policies_are_refused_by_name(examples: int, env: Any, tmp_path: Path) -> None:
    save_learner(env.mae, tmp_path / "mae.safetensors")
    PPO(env, policy_kwargs={"width": 8, "num_heads": 1}).save(tmp_path / "ppo.safetensors")
    AdaMAE(env).save(tmp_path / "adamae.safetensors")
    random: Any = resolve_agent("random")
    random(env).save(tmp_path / "random.json")
    write_checkpoint(tmp_path / "checkpoints", 3, {"weights": torch.ones(3), "names": [1, "x"]})
    folders = huggingface(tmp_path / "hf")
    files: list[tuple[Path, Callable[[Path], Any]]] = [
        (tmp_path / "mae.safetensors", load_learner),
        (tmp_path / "ppo.safetensors", PPO.load), (tmp_path / "ppo.safetensors", agents.load),
        (tmp_path / "adamae.safetensors", AdaMAE.load), (tmp_path / "adamae.safetensors", agents.load),
        (tmp_path / "random.json", random.load), (tmp_path / "random.json", agents.load),
        (tmp_path / "checkpoints" / "step-000000003.pt", lambda path: read_checkpoint(signed(path))),
        *((path, lambda path: load_learner(path.parent)) for path in folders.values()),
    ]  # fmt: skip
    for path, load in files:
        load(path)
        whole, outcomes = path.read_bytes(), Counter[str]()

        def check(content: bytes, path: Path = path, load: Any = load, outcomes: Any = outcomes) -> None:
            path.write_bytes(content)
            try:
                load(path)
                outcomes["loaded"] += 1
            except ValueError as error:  # DamagedCheckpoint is one
                outcomes["refused"] += 1
                assert str(path.parent) in str(error)

        fuzz(check, damaged(whole), examples=examples)
        path.write_bytes(whole)
        assert outcomes["refused"]


@pytest.mark.parametrize("file", ["checkpoint", "pytorch_model.bin", "features", "frames", "policy.zip"])
def test_a_hostile_pickle_is_refused(file: str, env: Any, tmp_path: Path) -> None:
    """stable-baselines3's own zip, which its own loader unpickles, is the one exception: ``agents.load`` opens none."""
    mark, hostile = tmp_path / "mark", tmp_path / "hostile"
    torch.save({"weights": Hostile(mark)}, hostile)
    if file == "checkpoint":
        path = signed(hostile.rename(tmp_path / "step-000000001.pt"))
        with pytest.raises(DamagedCheckpoint, match="more than tensors"):
            read_checkpoint(path)
        signed(path).write_bytes(pickle.dumps(Hostile(mark)))
        with pytest.raises(DamagedCheckpoint, match="more than tensors"):
            read_checkpoint(signed(path))
    elif file == "pytorch_model.bin":
        path = huggingface(tmp_path)[file]
        for content in (hostile.read_bytes(), pickle.dumps(Hostile(mark))):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="more than tensors"):
                load_learner(path.parent)
    elif file == "policy.zip":
        path = hostile.rename(tmp_path / file)
        with pytest.raises(ValueError, match="any code"):
            agents.load(path)
    else:
        array = np.empty(1, object)
        array[0] = Hostile(mark)
        with hostile.open("wb") as stream:
            np.save(stream, array, allow_pickle=True)
        if file == "frames":
            _replace_and_check_frames(hostile.read_bytes(), tmp_path)
        else:
            videos = open_dataset("motion", num_videos=4, num_frames=4, size=(16, 16))
            expected = extract(env.mae, videos, 4, tmp_path / "features", tokens=True).pooled
            for path in (tmp_path / "features").glob("*.npy"):
                path.write_bytes(hostile.read_bytes())
                found = extract(env.mae, videos, 4, tmp_path / "features", tokens=True).pooled
                assert torch.equal(found, expected)
    assert not mark.exists()


def _replace_and_check_frames(content: bytes, folder: Path) -> None:
    """Frames of a cache whose file holds something else are decoded anew."""
    (path,) = motion.render(0, "train", 1)
    info, cache = probe(path), FrameCache(folder / "frames", 1 << 30)
    read = (path, info, (16, 16), 0.5, "decord", np.arange(4))
    expected = cache.frames(*read)
    (file,) = cache.folder.glob("??/*.npy")
    file.write_bytes(content)
    assert np.array_equal(FrameCache(folder / "frames", 1 << 30).frames(*read), expected)


@examples(25, 1_500)
def test_damaged_caches_are_built_anew(
    examples: int, env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = motion.render(0, "train", 1)
    cache = FrameCache(tmp_path / "frames", 1 << 30)
    info = probe(path)
    expected = cache.frames(path, info, (16, 16), 0.5, "decord", np.arange(4))
    (file,) = cache.folder.glob("??/*.npy")
    header = file.read_bytes()[:128]
    rest = file.read_bytes()[128:]
    logging.disable(logging.WARNING)
    try:

        def check_frames(content: bytes) -> None:
            file.write_bytes(content + rest)
            found = cache.frames(path, info, (16, 16), 0.5, "decord", np.arange(4))
            assert found.shape == expected.shape

        fuzz(check_frames, damaged(header), examples=examples)
        videos = [place(tmp_path / "videos" / f"{i}.mp4", i) for i in range(2)]
        monkeypatch.setenv("TATS_CACHE", str(tmp_path / "index"))
        right = probe_all(videos)
        assert right == [VideoInfo(FRAMES, 48, 64, 12.0)] * 2
        index = index_file(videos)

        def check_index(content: bytes) -> None:
            index.write_bytes(content)
            for info in probe_all(videos):  # a digit that is another one is not noticed
                assert isinstance(info, UnreadableVideo) or (min(info[:3]) > 0 and max(info[:3]) < 1 << 31)

        fuzz(check_index, damaged(index.read_bytes()), examples=examples)

        def check_summary(content: bytes) -> None:
            (tmp_path / "summary.json").write_bytes(content)
            is_finished(tmp_path)

        fuzz(check_summary, damaged(b'{"ppo": {"motion_lift": 1.5}, "wall_seconds": 3.0}'), examples=examples)
    finally:
        logging.disable(logging.NOTSET)


@examples(6, 500)
def test_damaged_features_are_encoded_anew(examples: int, env: Any, tmp_path: Path) -> None:
    videos = open_dataset("motion", num_videos=4, num_frames=4, size=(16, 16))
    right = extract(env.mae, videos, 4, tmp_path, tokens=True)
    for path in sorted(tmp_path.glob("*.npy")) + sorted(tmp_path.glob("*.json")):
        whole = path.read_bytes()
        size = 128 if path.suffix == ".npy" else len(whole)

        def check(content: bytes, path: Path = path, rest: bytes = whole[size:]) -> None:
            path.write_bytes(content + rest)
            found = extract(env.mae, videos, 4, tmp_path, tokens=True)
            assert found.pooled.shape == right.pooled.shape

        fuzz(check, damaged(whole[:size]), examples=examples)
