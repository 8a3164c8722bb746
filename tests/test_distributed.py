"""Runs of two processes that torchrun starts, beside the same runs of one."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed

from agents.base import first_seed
from experiments import cli
from experiments.config import load_config, parse_config
from experiments.distributed import check_shares, first_then_others, join, part
from experiments.progress import RunProgress
from experiments.refusals import ConfigError
from experiments.run import Run
from tats_env.data import DataError, motion, open_dataset, video_set
from tats_env.mae import load_learner
from tats_env.vector_env import TATSMaskingVectorEnv

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "device": "cpu", "num_videos": 20, "batch_size": 8, "steps": 4, "log_interval": 2,
    "mae": {"warmup_steps": 2}, "agent": {"width": 16, "num_heads": 2},
    "evaluate": {"num_videos": 20, "clips": 8, "pictures": False, "tasks": [], "baseline": False},
}  # fmt: skip
CLIP = {"credit": "clip", "n_steps": 2, "gamma": 0.9, "ent_coef": 0.01, "width": 16, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "motion": {},
    # Where the KL of all stops an update that the KL of one would not, or the other way round
    "kl": {"agent": {"n_epochs": 6, "target_kl": 2.68e-5, "width": 16, "num_heads": 2}},
    # Where more picks count in one process than in the other
    "picks": {"agent": {"credit": "pick_surprise", "width": 16, "num_heads": 2}},
    "clip": {"agent": CLIP, "reward": "surprise", "horizon": 2},
    "rounds": {"agent": CLIP, "rounds": 2},
    "parts": {
        "micro_batch_size": 2, "loader": {"repeats": 2}, "mae": {"decode_ratio": 0.5},
        "agent": {"entropy_floor": 100.0, "width": 16, "num_heads": 2},
    },
    "random": {"agent": {"class": "random"}},
    "adamae": {"agent": {"class": "adamae", "coefficient": 1.0}},
}  # fmt: skip
TOLERANCE = 2e-5
"""Of a weight, where learning rates are 4e-4 and 2e-3 and the updates four. A few may differ by more: Adam divides by
the gradient's size, and of some biases the gradient is 0 but for the order in which float32 is summed up."""
STREAM = """
if __name__ == "__main__":
    import sys
    from tats_env.data import video_set
    from experiments.cli import main

    video_set.MEMORY_LIMIT = 0
    sys.exit(main())
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(paths: Sequence[str | Path]) -> list[str]:
    """Train what the configurations say, in however many processes, without evaluation; what was said by the way."""
    configs, said = [load_config(str(path)) for path in paths], []
    device, console = join(configs[0]), Console(quiet=True)
    for config in configs:
        try:
            this = first_then_others(partial(Run, config, console, device), lambda made: made.folder)
        except DataError as error:
            said.append(f"refused: {error}")
        except SystemExit as error:
            said.append(f"ends with {error.code}")
        else:
            for name in this.makers:
                this.train(name, RunProgress(console, 1))
    part(None)
    return said


def torchrun(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)]


def in_two(*args: str | Path) -> str:
    """What is printed."""
    done = subprocess.run(
        torchrun(*args), env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Of SMALL with changes, whose run's folder is to be made in ``folder``."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(SMALL | {"name": name, "out": str(folder)} | changes))
    return path


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        assert all(row.pop(f"time/{clock}") > 0 for clock in ("fps", "time_elapsed", "data_wait"))
    return rows


def assert_same_training(one: Path, two: Path) -> None:
    kinds = [sorted(path.name.split(".")[0] for path in folder.iterdir()) for folder in (one, two)]
    assert kinds[0] == kinds[1], "each file is written once"
    assert (one / "mae.safetensors").exists()
    for path in one.glob("*.safetensors"):
        expected, found = load_file(path), load_file(two / path.name)
        differences = torch.cat([(found[name] - weight).abs().flatten() for name, weight in expected.items()])
        assert (differences > TOLERANCE).float().mean() < 2e-3 and differences.max() < 5e-3, path.name
    rows = metrics(one), metrics(two)
    assert [row["mae/n_updates"] for row in rows[0]] == [2, 4]
    for row, other in zip(*rows, strict=True):
        assert other == pytest.approx(row, rel=2e-3, abs=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Every variant trained by one process and by two, and a run that is refused among them."""
    folder = tmp_path_factory.mktemp("trained")
    files = []
    for out in ("one", "two"):
        files.append([write_config(folder / out, name, **changes) for name, changes in VARIANTS.items()])
        files[-1].insert(1, write_config(folder / out, "refused", data=f"folder:{folder / 'none'}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", None)  # an attempt to import it would fail
        alone = train(files[0])
    return folder, alone, in_two(__file__, *files[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_what_one_does_with_the_same_batch(name: str, trained: tuple[Path, list[str], str]) -> None:
    assert_same_training(trained[0] / "one" / name, trained[0] / "two" / name)


def test_what_is_refused_after_they_met_is_said_by_process_0_and_ends_the_others(
    trained: tuple[Path, list[str], str],
) -> None:
    folder, alone, said = trained
    assert len(alone) == 1 and alone[0].startswith("refused: ") and "is not a folder" in alone[0]
    assert sorted(re.findall("^(?:refused|ends).*", said, re.MULTILINE)) == ["ends with 2", alone[0]]
    assert not (folder / "two" / "refused").exists()


def test_one_process_starts_nothing(trained: tuple[Path, list[str], str]) -> None:
    assert (trained[0] / "one" / "motion").is_dir(), "though accelerate could not be imported"
    assert not distributed.is_initialized()


@pytest.fixture(scope="module")
def with_a_broken_video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of videos, and that of them whose last part can't be decoded, as one finds out when it is due.

    Of a batch of four it is drawn by the third or fourth environment, which are process 1's, and by no other.
    """
    folder = tmp_path_factory.mktemp("broken")
    for i, path in enumerate(motion.render(0, "train", 30)):
        target = folder / "videos" / str(i % 2) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    videos = open_dataset(f"folder:{folder / 'videos'}", num_videos=SMALL["num_videos"], num_frames=14, frame_stride=3)
    env = TATSMaskingVectorEnv(4, dataset=videos, num_frames=14, frame_stride=3, output="torch")
    env.reset(seed=first_seed(0))
    drawn = [env.task._choose(episode, 0)[0] for episode in range(SMALL["steps"] + 1)]
    ours, theirs = ({int(v) for batch in drawn for v in batch[rows]} for rows in (slice(2), slice(2, 4)))
    path = videos.paths[min(theirs - ours)]
    whole = path.read_bytes()
    end = whole.find(b"moov") - 4
    path.write_bytes(whole[: end - 3000] + bytes(3000) + whole[end:])
    return folder, path


def test_a_run_of_two_processes_leaves_what_one_leaves_with_a_video_that_breaks_in_one_of_them(
    with_a_broken_video: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, broken = with_a_broken_video
    (folder / "stream.py").write_text(STREAM)
    options = {
        "batch_size": 4, "data": f"folder:{folder / 'videos'}", "clip": {"num_frames": 14, "frame_stride": 3},
        "loader": {"workers": 0},
        "evaluate": SMALL["evaluate"] | {"baseline": True, "tasks": ["knn"], "pictures": True},
    }  # fmt: skip
    said = in_two(folder / "stream.py", "run", write_config(folder, "two", **options))
    monkeypatch.setattr(video_set, "MEMORY_LIMIT", 0)
    caplog.clear()
    assert cli.main(["run", str(write_config(folder, "one", **options))]) == 0
    assert "plays in its place" in caplog.text, "it broke on the way, not when it was opened"

    for sampler in (".", "random"):
        assert_same_training(folder / "one" / sampler, folder / "two" / sampler)
    for run in ("one", "two"):
        bad = (folder / run / "bad_videos.txt").read_text()
        assert bad.count("\n") == 1 and bad.startswith(f"{broken}\t")
    summaries = [json.loads((folder / run / "summary.json").read_text()) for run in ("one", "two")]
    for sampler in ("ppo", "random"):
        expected, found = ({**summary[sampler], "seconds_per_step": 0} for summary in summaries)
        assert expected.pop("motion_lift") is found.pop("motion_lift") is None
        assert found == pytest.approx(expected, rel=1e-3) and "knn_top1" in found
    assert not list(folder.glob("two-*")) and said.count("Run folder: ") == 1
    assert said.count("Written to ") == 1 and len(re.findall("ppo: step 2 of 8", said)) == 1


@pytest.mark.parametrize("event", ["a process dies", "Ctrl-C"])
def test_when_one_dies_or_at_ctrl_c_all_end_and_nothing_is_left_behind(event: str, tmp_path: Path) -> None:
    script = tmp_path / "stream.py"
    script.write_text(STREAM)
    config = write_config(tmp_path, "long", steps=1_000_000, loader={"workers": 1})
    with (tmp_path / "said.txt").open("w") as said:
        launcher = psutil.Popen(
            torchrun(script, "run", config), env={**os.environ, **ENVIRONMENT}, stdout=said, stderr=said,
            # Whoever runs the tests in the background of a shell has them ignore the signal
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    log, deadline = tmp_path / "long" / "metrics.csv", time.monotonic() + 120
    try:
        while not (log.is_file() and log.read_text().count("\n") >= 3):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "said.txt").read_text()
            time.sleep(0.1)
        everyone = launcher.children(recursive=True)
        processes = [child for child in launcher.children() if child.environ().get("RANK")]
        memory = {x.path for child in processes for x in child.memory_maps() if x.path.startswith("/dev/shm/tats-")}
        assert len(processes) == 2 and len(memory) == 2
        if event == "Ctrl-C":
            launcher.send_signal(signal.SIGINT)
        else:
            next(child for child in processes if child.environ()["RANK"] == "1").kill()
        assert launcher.wait(60) != 0
        assert not psutil.wait_procs(everyone, timeout=20)[1]
        assert not [path for path in memory if Path(path).exists()]
    finally:
        for process in [*launcher.children(recursive=True), launcher] if launcher.is_running() else []:
            process.kill()
    if event == "Ctrl-C":
        assert json.loads((tmp_path / "long" / "summary.json").read_text())["interrupted"] is True
        assert load_learner(tmp_path / "long" / "mae.safetensors").size == "tiny"
        assert (tmp_path / "said.txt").read_text().count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize(
    ("count", "changes", "says"),
    [
        (4, {"batch_size": 10}, "batch_size: 10 does not divide among 4 processes; give 8 or 12"),
        (4, {"batch_size": 2}, "batch_size: 2 does not divide among 4 processes; give 4"),
        (3, {"batch_size": 8, "loader": {"repeats": 2}}, "give 6 or 12"),
        (2, {"batch_size": 12, "loader": {"repeats": 4}}, "batch_size / 2 processes = 6: loader.repeats: 4 does not"),
        (2, {"batch_size": 8, "micro_batch_size": 8}, "micro_batch_size: 8 does not divide batch_size = 4; give 4"),
        (4, {"batch_size": 8, "agent": {"n_steps": 2, "n_minibatches": 8}}, "agent.n_minibatches: 8 does not divide"),
        (2, {"device": "cuda:1"}, "device: cuda:1 is one GPU for 2 processes; give cuda"),
        (2, {"agent": {"class": "sb3:PPO"}}, "agent.class: sb3:PPO learns in one process only"),
    ],
)
def test_what_processes_can_t_share_is_refused_with_what_they_can(
    count: int, changes: dict[str, Any], says: str
) -> None:
    config = parse_config(changes, "test")
    check_shares(config, 1)
    with pytest.raises(ConfigError) as caught:
        check_shares(config, count)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "quickstart", "--batch-size", "9"], "batch_size: 9 does not divide among 2 processes; give 8 or 10"),
        (["run", "quickstart", "--mask-ratio", "2"], "mask_ratio: 2.0 is not below 1"),
        (["run", "quickstart", "--dry-run"], "start it without torchrun"),
        (["compare", "compare_quick"], "start it without torchrun"),
        (["run", "quickstart", "--batch-sice", "8"], "--batch-size"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_by_process_0_alone(
    args: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        try:
            code: Any = cli.main(args)
        except SystemExit as error:
            code = error.code
        printed = "".join(capsys.readouterr())
        assert code == 2 and (says in printed if rank == "0" else printed == "")


def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        join(parse_config({"device": "cuda"}, "test"))


if __name__ == "__main__":
    print(*(f"{line}\n" for line in train(sys.argv[1:])), sep="", end="", flush=True)
