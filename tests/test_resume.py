"""Runs that are killed, stopped, damaged or moved to more processes, and what becomes of them with --resume."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.adamae import AdaMAE
from agents.base import Resumable, is_resumable
from agents.heuristics import RandomMask
from agents.ppo import PPO
from agents.sb3_agent import peer
from experiments import cli
from experiments.checkpoints import (
    FOLDER,
    KEPT,
    TERMINATED,
    DamagedCheckpoint,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from tats_env.data import DataError, open_dataset
from tats_env.data.reader import UnreadableVideo

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small", "device": "cpu", "num_videos": 15, "batch_size": 4, "steps": 12, "log_interval": 2,
    "checkpoint_minutes": 0.0, "reward": "told:reward", "mae": {"warmup_steps": 3},
    "agent": {"width": 16, "num_heads": 2},
    "evaluate": {"num_videos": 15, "clips": 4, "pictures": False, "tasks": [], "baseline": False},
}  # fmt: skip
CLIP = {"credit": "clip", "n_steps": 2, "n_minibatches": 2, "gamma": 0.9, "width": 16, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "a token's credit": {"agent": {**SMALL["agent"], "update_every": 3}},
    "a clip's credit, several clips an episode": {"agent": CLIP, "horizon": 3},
    "in rounds, of which updates and lines know nothing": {"agent": {"class": "told:Told"}, "rounds": 4},
    "a frozen MAE": {"mae": {"frozen": True}},
    "adamae": {"agent": {"class": "adamae", "coefficient": 1.0}},
    "motion": {"agent": {"class": "motion"}, "mae": {"update_every": 3}},
    "an agent without a state": {"agent": {"class": "told:Learner"}},
}
TOLD = """
import os, signal
from agents.heuristics import RandomMask
from agents.ppo import PPO

steps = 0

def reward(decision):
    "The reconstruction error; and SIGTERM for one process, in the course of the step that TOLD_AT says."
    global steps
    steps += 1
    tell(steps)
    return decision.reconstruction.reconstruction_error

def tell(step):
    if step == int(os.environ.get("TOLD_AT", "-1")) and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)

class Told(PPO):
    "For a task that has a reward of its own."
    def __init__(self, env, *, seed):
        super().__init__(env, credit="clip", n_steps=3, gamma=1.0, policy_kwargs={"width": 16}, seed=seed)

    def _collect(self, observation, hooks):
        found = super()._collect(observation, hooks)
        tell(self.num_timesteps // self.env.num_envs - 2)
        return found

    @classmethod
    def load(cls, path, env=None):
        return PPO.load(path, env)

class Learner(RandomMask):
    "Learns, and says nothing of it in a state."
    def after_step(self, observation):
        pass
"""
NURSERY = """
import json, os, sys
import torch
torch.set_num_threads(1)
import experiments.run
from experiments.cli import main

for line in sys.stdin:
    log, *args = json.loads(line)
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        try:
            code = main(args)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts ``tats`` as processes of their own, one at a time, that have imported everything already."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, log: Path, *args: str | Path) -> int:
        """Start one; returns its process id."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(log), *map(str, args)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Its exit code; a signal's number, negative, if that killed it."""
        assert self.process.stdout
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.process.kill()
    nursery.process.wait()


@pytest.fixture(autouse=True, scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module ``told``, for this process and those that it starts."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "told.py").write_text(TOLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def run_here(config: Path, out: Path, *options: str, told_at: int = -1) -> int:
    """``tats run`` in this process, which gets SIGTERM in the course of that step; returns the exit code."""
    import told

    told.steps = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOLD_AT", str(told_at))
        try:
            return cli.main(["run", str(config), "--out", str(out), *options])
        except SystemExit as error:
            return int(error.code or 0)


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Where no file can be larger than so many bytes, which is as good as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without what a clock said."""
    clocks = ("time/fps", "time/time_elapsed", "time/data_wait")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows]


def assert_same(run: Path, unbroken: Path, *samplers: str) -> None:
    """Metrics, weights, masks on the way and results of two runs are equal to the last bit."""
    for folder, other in ((run / name, unbroken / name) for name in (".", *samplers)):
        assert metrics_of(folder) == metrics_of(other)
        weights = list(other.glob("*.safetensors"))
        assert weights
        for path in weights:
            found, expected = load_file(folder / path.name), load_file(path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), path
        for path in other.glob("*.npz"):
            seen, foreseen = np.load(folder / path.name), np.load(path)
            assert seen.files == foreseen.files and len(seen["steps"]) == 10
            assert all(np.array_equal(seen[name], foreseen[name]) for name in seen.files), path
        assert not list(folder.glob("**/*.pt")) and not list(folder.glob("**/*.partial"))
    results = [json.loads((folder / "summary.json").read_text()) for folder in (run, unbroken)]
    for found in results:
        for of_machine in ("wall_seconds", "device", "versions"):
            del found[of_machine]
        for figures in found.values():
            del figures["seconds_per_step"]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Configuration of a run with its baseline; the folder of one that writes no checkpoint; how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = configure(folder, evaluate=SMALL["evaluate"] | {"baseline": True, "pictures": True})
    nursery.start(folder / "log", "run", config, "--out", folder, "--checkpoint-minutes", "5")
    start = time.monotonic()
    assert nursery.wait() == 0, (folder / "log").read_text()
    return config, folder / "small", time.monotonic() - start


def survive(kills: int, nursery: Nursery, unbroken: tuple[Path, Path, float], folder: Path) -> None:
    """Kill runs at random moments, resume each until it is finished, and compare; as often as it takes."""
    config, expected, seconds = unbroken
    moments = random.Random(0)
    survived, number = 0, 0
    while survived < kills:
        out, number = folder / str(number), number + 1
        out.mkdir()
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            process = nursery.start(out / "log", "run", config, "--out", out, "--resume")
            if survived < kills:
                time.sleep(moments.uniform(0, 0.5 * seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code = nursery.wait()
            survived += code == -signal.SIGKILL
        assert code == 0, (out / "log").read_text()
        # Killed before it had a folder with a configuration, it began another
        assert_same(max(out.glob("small*")), expected, "random")
    print(f"survived {survived} kills in {number} runs")


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(
    nursery: Nursery, unbroken: tuple[Path, Path, float], tmp_path: Path
) -> None:
    survive(3, nursery, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_are_survived(nursery: Nursery, unbroken: tuple[Path, Path, float], tmp_path: Path) -> None:
    survive(20, nursery, unbroken, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_by_sigterm_goes_on_as_though_nothing_had_been(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, **VARIANTS[variant])
    assert run_here(config, tmp_path / "unbroken", "--checkpoint-minutes", "5") == 0
    # Checkpoints of their own time do not come before that of SIGTERM here
    assert run_here(config, tmp_path, "--checkpoint-minutes", "5", told_at=4) == TERMINATED
    stateless = "state" in variant
    line = 9 if "rounds" in variant else 4
    kept = [path.name for path in tmp_path.glob(f"small/{FOLDER}/*.pt")]
    steps = line * 4 * SMALL["batch_size"] if "rounds" in variant else line * SMALL["batch_size"]
    assert kept == [f"step-{steps:09}.pt"] * (not stateless)
    capsys.readouterr()
    assert run_here(config, tmp_path, "--resume") == 0
    said = capsys.readouterr().out
    assert ("goes on from step" in said) != stateless and ("begins anew" in said) == stateless
    assert_same(tmp_path / "small", tmp_path / "unbroken" / "small")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, unbroken: tuple[Path, Path, float]) -> Path:
    """A run like ``unbroken``'s that was stopped by SIGTERM as it trained its baseline."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run_here(unbroken[0], folder, told_at=SMALL["steps"] + 5) == TERMINATED
    return folder / "small"


def test_curves_go_on_where_they_stopped_and_what_is_trained_is_not_trained_again(
    stopped: Path, unbroken: tuple[Path, Path, float], tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "small")
    # As though it had been killed in the middle of a line, before its last checkpoint: lines after that come anew
    for path in (run / "random" / FOLDER).glob("step-000000024.*"):
        path.unlink()
    with (run / "random" / "metrics.csv").open("a") as file:
        file.write("1.0,")
    (run / "policy.safetensors").touch()
    before = (run / "policy.safetensors").stat().st_mtime_ns
    assert run_here(unbroken[0], tmp_path, "--resume") == 0
    assert (run / "policy.safetensors").stat().st_mtime_ns == before
    assert_same(run, unbroken[1], "random")
    curves = []
    for folder in (run, unbroken[1]):
        events = EventAccumulator(str(folder / "random")).Reload()
        curves.append([(event.step, event.value) for event in events.Scalars("mae/loss")])
    assert curves[0] == curves[1] and len(curves[0]) == SMALL["steps"] / SMALL["log_interval"]


class Hostile:
    """Whose pickle leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["a flipped bit", "a file that was cut", "no checksum", "a pickle with code in it"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_counts(
    kind: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(stopped / "random" / FOLDER, tmp_path / "checkpoints")
    older, newest = sorted(folder.glob("*.pt"))
    content = bytearray(newest.read_bytes())
    if kind == "a flipped bit":
        content[len(content) // 2] ^= 4
    elif kind == "a file that was cut":
        del content[len(content) // 2 :]
    elif kind == "no checksum":
        newest.with_suffix(".sha256").unlink()
    else:
        pickled = io.BytesIO()
        torch.save({"format": "tats-env checkpoint 2", "step": 1, "mae": Hostile(tmp_path / "ran")}, pickled)
        content = bytearray(pickled.getvalue())
        newest.with_suffix(".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {newest.name}\n")
    newest.write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(newest)
    console = Console(file=io.StringIO())
    found = newest_checkpoint(folder, console)
    assert found and f"step-{found['step']:09}.pt" == older.name
    assert newest.name in console.file.getvalue()  # type: ignore[attr-defined]
    assert not (tmp_path / "ran").exists()
    if kind == "a pickle with code in it":
        torch.load(newest, weights_only=False)  # what was kept from happening
        assert (tmp_path / "ran").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    stopped: Path, unbroken: tuple[Path, Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "small")
    newest = max((run / "random" / FOLDER).glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run_here(unbroken[0], tmp_path, "--resume", str(run)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged: its checksum is not the one" in said and "goes on from step 4" in said
    assert_same(run, unbroken[1], "random")


def test_checkpoints_are_whole_or_not_there_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    for step in (8, 16, 24):
        write_checkpoint(folder, step, {"x": torch.full((1000,), float(step))})
    (folder / "step-000000032.pt.partial").touch()  # killed as it wrote this one
    steps = [path.name for path in sorted(folder.glob("*.pt"))]
    assert steps == ["step-000000016.pt", "step-000000024.pt"] and len(steps) == KEPT
    checked = subprocess.run(["sha256sum", "-c", "step-000000024.sha256"], cwd=folder, capture_output=True)
    assert checked.returncode == 0
    before = {path.name: path.read_bytes() for path in folder.glob("step-*[!l]")}
    with small_files(2_000), pytest.raises(OSError):
        write_checkpoint(folder, 40, {"x": torch.zeros(1000)})
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")}.items() <= before.items()
    assert newest_checkpoint(folder, Console(quiet=True))["step"] == 24  # type: ignore[index]
    write_checkpoint(folder, 48, {})
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-{step:09}.{kind}" for step in (24, 48) for kind in ("pt", "sha256")
    ]


def test_a_checkpoint_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    folder, moments, step = tmp_path / FOLDER, random.Random(0), 0
    for _ in range(10):
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                while True:
                    step += 1
                    write_checkpoint(folder, step, {"x": torch.full((200_000,), float(step))})
            os._exit(1)
        time.sleep(moments.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        console = Console(file=io.StringIO())
        found = newest_checkpoint(folder, console)
        assert not console.file.getvalue()  # type: ignore[attr-defined]
        if found:
            assert found["step"] >= step and (found["x"] == found["step"]).all()
            step = found["step"]
    assert step > 10


def test_a_full_disk_costs_checkpoints_and_is_named_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path)
    assert run_here(config, tmp_path / "unbroken") == 0
    with small_files(100_000):
        assert run_here(config, tmp_path) == 2
    said = capsys.readouterr()
    assert said.out.count("No checkpoint could be written") == SMALL["steps"] / SMALL["log_interval"]
    assert "weights can't be written" in said.err and "--resume" in said.err and "Traceback" not in said.err
    assert run_here(config, tmp_path, "--resume") == 0
    assert_same(tmp_path / "small", tmp_path / "unbroken" / "small")
    with small_files(1_000):
        assert run_here(config, tmp_path) == 2
    assert "config.yaml: can't be written: File too large" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--steps", "24"], "--resume: steps is 24 here, but the run in"),
        (["--agent.width", "32"], "--resume: agent.width is 32 here"),
        (["--agent.class", "tube"], "--resume: agent."),
        (["--evaluate.no-baseline"], "--resume: evaluate.baseline is False here"),
        (["--dry-run"], "--resume: --dry-run goes on with nothing"),
        (["--name", "other", "--resume", "{run}"], "--resume: name is 'other' here"),
        (["--resume", "{run}/random"], "is not the folder of a run"),
    ],
)
def test_what_would_change_the_run_is_refused(
    options: list[str], refusal: str, stopped: Path, unbroken: tuple[Path, Path, float],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [option.format(run=stopped) for option in options]
    assert run_here(unbroken[0], stopped.parent, *filled, *["--resume"] * ("--resume" not in filled)) == 2
    said = capsys.readouterr().err
    assert refusal in said and "Traceback" not in said


def test_a_finished_run_says_so_and_one_that_never_was_is_begun(
    unbroken: tuple[Path, Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, _ = unbroken
    assert run_here(config, folder.parent, "--resume") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert run_here(config, tmp_path, "--resume", "--steps", "2", "--evaluate.no-baseline") == 0
    assert (tmp_path / "small" / "summary.json").is_file()


def test_the_newest_run_of_a_name_is_gone_on_with_on_another_device_or_with_other_workers(
    stopped: Path, unbroken: tuple[Path, Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "small-2", "small-10"):
        shutil.copytree(stopped, tmp_path / name)
    (tmp_path / "small-probe").mkdir()
    assert run_here(unbroken[0], tmp_path, "--resume", "--loader.workers", "0", "--log-interval", "4") == 0
    assert [(tmp_path / name / "summary.json").exists() for name in ("small", "small-2", "small-10")] == [
        False,
        False,
        True,
    ]
    assert yaml.safe_load((tmp_path / "small-10" / "config.yaml").read_text())["log_interval"] == 4
    assert [row["time/iterations"] for row in metrics_of(tmp_path / "small-10" / "random")] == ["2", "4", "6", "10"]


def test_two_runs_cannot_write_into_one_folder(
    stopped: Path, unbroken: tuple[Path, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(stopped / ".lock"):
        assert run_here(unbroken[0], stopped.parent, "--resume") == 2
    assert "another tats is at work in this folder" in capsys.readouterr().err


def test_agents_that_learn_and_keep_no_state_are_known() -> None:
    import told

    class Remembers(told.Learner):
        def state(self) -> dict[str, Any]:
            return super().state() | {"more": 1}

    agents = [RandomMask(), AdaMAE(observation_shape=(2, 4, 8)), Remembers(), told.Learner(), peer("PPO")(None)]
    assert [is_resumable(agent) for agent in agents] == [True, True, True, False, False]
    assert issubclass(PPO, Resumable)


def test_videos_that_failed_stay_replaced_and_a_set_that_lost_some_is_refused() -> None:
    first, again = (open_dataset("motion", num_frames=4, size=(32, 32), num_videos=15) for _ in range(2))
    first._replace(3, UnreadableVideo(first.paths[3], "cut"))
    again.restore(json.loads(json.dumps(first.state())))
    assert (again._plays == first._plays).all() and (again.labels == first.labels).all()
    assert again.bad_videos == first.bad_videos and len(first.bad_videos) == 1
    smaller = open_dataset("motion", num_frames=4, size=(32, 32), num_videos=10)
    with pytest.raises(DataError, match=r"has 10 videos .* but had 15"):
        smaller.restore(first.state())


def test_another_number_of_processes_goes_on_and_sigterm_for_one_of_them_stops_all(
    unbroken: tuple[Path, Path, float], stopped: Path, tmp_path: Path
) -> None:
    config, expected, _ = unbroken
    run = shutil.copytree(stopped, tmp_path / "small")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "experiments", "run", str(config), "--out", str(tmp_path), "--resume"]
    environment = {**os.environ, "TOLD_AT": "3"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode and done.stderr.count("exitcode  : 143") == 2, done.stderr
    assert "random goes on from step 6" in done.stdout
    steps = [int(path.stem[5:]) // SMALL["batch_size"] for path in sorted((run / "random" / FOLDER).glob("*.pt"))]
    assert steps == [8, 10]
    assert run_here(config, tmp_path, "--resume") == 0
    rows = metrics_of(run / "random"), metrics_of(expected / "random")
    for row, other in zip(*rows, strict=True):
        for key, value in other.items():
            assert float(row[key]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), key
    found, wanted = (load_file(folder / "random" / "mae.safetensors") for folder in (run, expected))
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-4)
