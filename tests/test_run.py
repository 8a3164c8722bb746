"""The main job as a user starts it, what it leaves behind, and the README's examples."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.ppo import PPO
from experiments.config import load_config
from experiments.run import Run
from tats_env.data import motion
from tats_env.mae import load_learner

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "12", "--log-interval", "4", "--batch-size", "8", "--num-videos", "30"]
SHORT += ["--evaluate.num-videos", "30", "--evaluate.clips", "64"]
QUICK = [*SHORT, "--agent.width", "16"]


def tats(*args: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *args, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs")
    done = tats("run", "quickstart", *QUICK, out=out)
    assert done.returncode == 0, done.stderr
    return out / "quickstart", done.stdout


def test_run_leaves_everything_that_is_promised(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    config = load_config(str(folder / "config.yaml"))
    assert (config.steps, config.batch_size, config.agent.width) == (12, 8, 16)
    for sampler_folder in (folder, folder / "random"):
        rows = list(csv.DictReader((sampler_folder / "metrics.csv").open()))
        assert [row["time/iterations"] for row in rows] == ["4", "8", "12"]
        assert all(np.isfinite(float(row["mae/loss"])) for row in rows)
        assert list(sampler_folder.glob("events.out.tfevents.*"))
        with Image.open(sampler_folder / "masks.gif") as gif:
            assert gif.n_frames == 16
        assert np.asarray(Image.open(sampler_folder / "masks.png")).std() > 10
        assert {path.name for path in (sampler_folder / "gallery").iterdir()} == {f"{i}.webp" for i in range(6)}
        for path in (sampler_folder / "gallery").iterdir():
            with Image.open(path) as example:
                assert example.n_frames == 16 and path.stat().st_size < 100_000
        with np.load(sampler_folder / "snapshots.npz") as snapshots:
            assert snapshots["steps"].tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12]
        positions = json.loads((sampler_folder / "positions.json").read_text())
        assert positions["grid"] == [8, 4, 4] and sum(positions["share"]) == pytest.approx(12)
        curves = EventAccumulator(str(sampler_folder), {"images": 0}).Reload()
        assert len(curves.Scalars("mae/loss")) == 3
        assert set(curves.Tags()["images"]) == {f"masks/{i}" for i in range(2)} | {f"gallery/{i}" for i in range(6)}
        steps = [event.step for event in curves.Images("masks/0")]
        assert steps == [8 * batches for batches in (0, 1, 3, 4, 5, 7, 8, 9, 11, 12)]
    assert load_learner(folder / "mae.safetensors").size == "tiny"
    assert PPO.load(folder / "policy.safetensors").credit == "token_motion"


def test_run_ends_with_a_report_and_names_it(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "report.html" in printed.splitlines()[-1]
    assert (folder / "report.html").read_text().count("data:image/webp") >= 6


def test_report_that_fails_is_told_of_and_loses_nothing(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    console = Console(file=io.StringIO())
    this = object.__new__(Run)
    this.folder, this.console, this.config = folder, console, load_config(str(folder / "config.yaml"))
    monkeypatch.setattr("experiments.report.write_report", lambda folders: Path("/no/such").write_text(""))
    assert this.report() is False
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "report.html could not be written (FileNotFoundError" in said and f"tats report {folder}" in said


def test_summary_holds_the_table(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    columns = {
        "reconstruction_error",
        "random_mask_error",
        "motion_lift",
        "linear_top1",
        "seconds_per_step",
        "mae_updates",
    }
    for sampler in ("ppo", "random"):
        assert summary[sampler].keys() == columns
        assert f"{summary[sampler]['motion_lift']:.2f}" in printed
    assert 0.6 < summary["random"]["motion_lift"] < 1.5
    # Uniform masks are the yardstick itself
    assert summary["random"]["reconstruction_error"] == pytest.approx(summary["random"]["random_mask_error"], rel=0.05)
    assert "threads" in summary["device"]
    assert summary["wall_seconds"] > 0 and {"torch", "gymnasium", "python"} <= summary["versions"].keys()


def test_run_tells_its_numbers_where_there_is_no_terminal(finished: tuple[Path, str]) -> None:
    _, printed = finished
    assert re.search(r"ppo: step \d+ of 24, .* s left: reward .* MAE loss .* random-mask .* lift .* clips/s", printed)
    assert "probe can't show a gain" in " ".join(printed.split())


def test_second_run_of_a_name_gets_a_folder_of_its_own(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    done = tats("run", "quickstart", *QUICK, "--steps", "4", "--evaluate.no-baseline", out=folder.parent)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder.parent / "quickstart-2" / "summary.json").read_text())
    assert "ppo" in summary and "random" not in summary
    assert (folder / "summary.json").read_bytes() == before


def test_run_starts_from_a_checkpoint_and_leaves_a_frozen_mae_as_it_is(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    given = finished[0] / "mae.safetensors"
    more = ["--agent.class", "tube", "--evaluate.no-baseline", "--steps", "4", "--mae.init", str(given)]
    for frozen in (True, False):
        done = tats("run", "quickstart", *SHORT, *more, *["--mae.frozen"] * frozen, out=tmp_path)
        assert done.returncode == 0, done.stderr
    weights = [load_learner(path).model.state_dict() for path in (given, *sorted(tmp_path.glob("*/mae.safetensors")))]
    changed = [any(not torch.equal(found[name], weights[0][name]) for name in found) for found in weights[1:]]
    assert changed == [False, True]
    done = tats("run", "quickstart", "--mae.init", str(tmp_path / "no.safetensors"), out=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("mae.init: checkpoint ")


def test_run_on_a_folder_of_ones_own_videos_skips_the_broken_ones(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for index, source in enumerate(motion.render(0, "train", 12)):
        target = videos / ("left" if index % 2 else "right") / f"{index}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (videos / "left" / "text.mp4").write_text("not a video")
    (videos / "right" / "cut.mp4").write_bytes((videos / "right" / "0.mp4").read_bytes()[:600])
    done = tats("run", "quickstart", *QUICK, "--data", f"folder:{videos}", "--evaluate.no-baseline", out=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "quickstart"
    bad = (folder / "bad_videos.txt").read_text()
    assert "text.mp4" in bad and "cut.mp4" in bad
    assert bad.count("text.mp4\t") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ppo"]["motion_lift"] is None  # nobody knows what moves there
    assert 0 <= summary["ppo"]["linear_top1"] <= 1


def test_folder_without_videos_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = tats("run", "quickstart", "--data", f"folder:{tmp_path / 'empty'}", out=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "empty" in done.stderr
    assert not (tmp_path / "quickstart").exists()


def test_reward_or_device_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for option, value in (("reward", "no_such_module:reward"), ("device", "cuda:63")):
        done = tats("run", "quickstart", f"--{option}", value, out=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(f"{option}: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_a_usable_run_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "run", "quickstart", *QUICK, "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Whoever runs the tests in the background of a shell has them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "quickstart" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output and "Interrupted" in output and "report.html shows them" in output
    folder = tmp_path / "quickstart"
    assert json.loads((folder / "summary.json").read_text())["interrupted"] is True
    assert load_learner(folder / "mae.safetensors").size == "tiny"
    PPO.load(folder / "policy.safetensors")
    assert len(list(csv.DictReader(metrics.open()))) >= 2
    assert "data:image/webp" in (folder / "report.html").read_text()  # the masks so far


def readme_block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md lost its {name}"
    return found.group(1)


@pytest.mark.parametrize("name", ["sb3 example", "sb3 policy example", "own policy example"])
def test_readme_example_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", readme_block(name)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "surprise" in done.stdout


def test_wheel_holds_packages_and_configurations_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    names = zipfile.ZipFile(wheel).namelist()
    assert "experiments/quickstart.yaml" in names and "tats_env/data/motion.py" in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tats_env", "agents", "experiments"}
    assert not [name for name in names if "figures" in name or name.endswith((".pyc", ".mp4"))]
