"""``tats compare``: that a grid is carried out, gone on with, and summed up truthfully."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from PIL import Image

from experiments import cli
from experiments.compare import interval, markdown, summarise
from experiments.grid import Cell, load_grid
from experiments.plots import plot_comparison
from experiments.refusals import ConfigError
from experiments.yaml_files import packaged_configs

ROOT = Path(__file__).parents[1]
GRID = {
    "name": "grid",
    "processes": 2,
    "seeds": [0, 1],
    "mask_ratios": [0.9],
    "run": {
        "num_videos": 15,
        "batch_size": 4,
        "steps": 6,
        "log_interval": 2,
        "clip": {"size": 16},
        "evaluate": {"num_videos": 15, "clips": 16, "pictures": False, "points": [0.5]},
    },
    "agents": {
        "random": {"class": "random"},
        "mine": {"class": "my_agent:Corner", "slot": 2},
        "rounds": {"class": "random", "run": {"rounds": 3}},
    },
}
MY_AGENT = """
import torch
from agents.base import Stepwise

class Corner(Stepwise):
    def __init__(self, env=None, *, slot=0, seed=0):
        super().__init__(env, seed=seed)
        self.slot = slot

    def scores(self, observation, deterministic):
        first = torch.zeros(observation.shape[:3])
        first[:, self.slot] = 1
        return first.flatten(1) - 0.5
"""


def compare(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options), cwd=folder, env=environment(), capture_output=True, text=True, timeout=280
    )  # fmt: skip


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "experiments", "compare", "grid.yaml", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (tmp_path / "my_agent.py").write_text(MY_AGENT)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (folder / "my_agent.py").write_text(MY_AGENT)
    done = compare(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_grid_leaves_tables_and_plots_with_every_seed(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    out = folder / "runs" / "grid"
    cells = list(csv.DictReader((out / "cells.csv").open()))
    assert {(row["agent"], row["seed"]) for row in cells} == set(itertools.product(GRID["agents"], "01"))  # type: ignore[call-overload]
    assert {row["mae_updates"] for row in cells} == {"6"}  # in rounds as well
    table = (out / "table.md").read_text()
    assert table.count("\n") == 2 + 3 and "| mine | 0.9 |" in table and "±" in table
    assert "grid" in printed and "[6/6]" in printed and "too narrow" in printed
    drawn = "linear.png", "motion_lift.png", "linear_by_clips.png", "linear_by_seconds.png", "motion_lift_by_clips.png"
    for name in ("error.png", *drawn):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5
    curve = list(csv.DictReader((out / "cells" / "rounds-0.9-0" / "metrics.csv").open()))
    assert [row["time/total_timesteps"] for row in curve] == ["24", "48", "72"]
    followed = [row for row in csv.DictReader((out / "curves.csv").open()) if row["agent"] == "rounds"]
    # A clip counts once, however many the rounds
    assert [float(row["clips"]) for row in followed] == [8, 16, 24] * 2
    assert all(float(row["motion_lift"]) > 0 for row in followed)
    points = list(csv.DictReader((out / "points.csv").open()))
    assert [float(row["clips"]) for row in points] == [12, 24] * 6
    last = {(row["agent"], row["seed"]): float(row["linear_top1"]) for row in points}
    assert last == {(row["agent"], row["seed"]): float(row["linear_top1"]) for row in cells}
    assert "| linear_top1 | motion | 0.9 | mine |" in (out / "reach.md").read_text()


def test_agent_of_ones_own_in_the_current_folder_got_its_settings_and_acted(finished: tuple[Path, str]) -> None:
    cell = finished[0] / "runs" / "grid" / "cells" / "mine-0.9-0"
    assert json.loads((cell / "policy").with_suffix(".json").read_text()) == {"agent": "Corner", "seed": 0, "slot": 2}
    assert "my_agent:Corner" in json.loads((cell / "summary.json").read_text())


def test_finished_runs_are_not_done_again_and_one_that_was_stopped_is(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    cells = folder / "runs" / "grid" / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/summary.json")}
    (cells / "mine-0.9-1" / "summary.json").unlink()
    done = compare(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("] mine on motion, mask ratio 0.9, seed 1: ") == 1 and "[5/6]" not in done.stdout
    changed = {path.parent.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"mine-0.9-1"}


def test_a_folder_with_runs_of_another_configuration_is_refused(finished: tuple[Path, str]) -> None:
    done = compare(finished[0], "--run.steps", "7")
    assert done.returncode == 2 and "holds runs of another configuration" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_comparison_that_was_killed_goes_on_where_it_stopped(folder: Path) -> None:
    options = ("--seeds", "[0]", "--processes", "1")
    process = subprocess.Popen(
        command(*options), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    cells = folder / "runs" / "grid" / "cells"
    deadline = time.monotonic() + 120

    def finished_runs() -> dict[Path, bytes]:
        found = {path: path.read_bytes() for path in cells.glob("*/summary.json")}
        return {path: content for path, content in found.items() if b"interrupted" not in content}

    while not finished_runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # the runs with it
    process.wait()
    survivors = finished_runs()
    assert 1 <= len(survivors) < 3
    done = compare(folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(cells.glob("*/summary.json"))) == 3
    assert all(path.read_bytes() == content for path, content in survivors.items())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(folder: Path, end: signal.Signals) -> None:
    options = ("--seeds", "[0]", "--processes", "1", "--run.steps", "4000", "--run.checkpoint_minutes", "0")
    process = subprocess.Popen(
        command(*options), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    cells = folder / "runs" / "grid" / "cells"
    deadline = time.monotonic() + 120
    while not list(cells.glob("random-*/checkpoints/step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    if end == signal.SIGTERM:  # the comparison stops its runs
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    else:
        os.killpg(process.pid, end)
        process.wait()
    (stopped,) = cells.glob("random-*/checkpoints")
    log = stopped.parent.with_suffix(f"{stopped.parent.suffix}.log")
    process = subprocess.Popen(
        command(*options), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    while "random goes on from step" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "random goes on from step" in log.read_text()


def test_a_slice_that_is_over_leaves_the_rest_for_the_next(folder: Path) -> None:
    done = compare(folder, "--minutes", "0", "--processes", "1")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 runs are left: the same command goes on with them" in done.stdout


def test_a_run_that_fails_is_named_with_its_last_words_and_stops_no_other(folder: Path) -> None:
    (folder / "my_agent.py").write_text(
        MY_AGENT + "\n    def after_step(self, observation):\n        raise OSError('x1')"
    )
    done = compare(folder, "--seeds", "[0]", "--agents.rounds.run.rounds", "1")
    assert done.returncode == 1
    assert (
        "mine on motion, mask ratio 0.9, seed 0: failed: OSError: x1 (" in done.stdout
        and "1 runs failed" in done.stdout
    )
    assert len(list((folder / "runs" / "grid" / "cells").glob("*/summary.json"))) >= 2


def test_two_comparisons_cannot_work_in_one_folder(folder: Path) -> None:
    first = subprocess.Popen(command("--processes", "1"), cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list((folder / "runs").glob("grid/cells/*.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
        second = compare(folder)
    finally:
        first.terminate()
        first.wait()
    assert second.returncode == 2 and "another tats is at work in this folder" in second.stderr


def test_statistics_are_those_of_the_seeds() -> None:
    values = {"random": [1.0, 1.2, 0.8], "ppo": [0.9, 1.3, 0.5]}
    results = {
        Cell(agent, "motion", 0.9, seed): {"random_mask_error": value, "motion_lift": None}
        for agent, row in values.items() for seed, value in enumerate(row)
    }  # fmt: skip
    found = {s.agent: s for s in summarise(results)}
    assert len(found) == len(summarise(results)) == 2  # nothing is said of what nobody knows
    ppo = found["ppo"]
    assert ppo.mean == pytest.approx(0.9) and ppo.std == pytest.approx(np.std(values["ppo"], ddof=1))
    assert ppo.gain == pytest.approx(-0.1) and np.isnan(found["random"].gain)
    gains = np.subtract(values["ppo"], values["random"])
    means = [np.mean(draw) for draw in itertools.product(gains, repeat=3)]  # all 27 resamples, equally likely
    assert (ppo.gain_low, ppo.gain_high) == pytest.approx(np.quantile(means, [0.025, 0.975], method="inverted_cdf"))
    assert "| ppo | 0.9 | 0.900 ± 0.400 | -0.100 [" in markdown(list(found.values()))
    assert all(np.isnan(interval([1.0])))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"agents": {"ppo": {"clip_rnage": 1}}}, "agents.ppo: agent.clip_rnage: unknown key; did you mean agent.clip"),
        ({"agents": {"a": {"class": "tub"}}}, "agents.a: agent.class: 'tub' is unknown; give one of ppo, adamae"),
        ({"run": {"steps": 0}}, "agents.random: steps: 0 is not above 0"),
        ({"run": {"seed": 3}}, "agents.random: run.seed: the grid itself says this; leave it out"),
        ({"agents": {"a": {"class": "tube", "run": 5}}}, "agents.a: run: 5 is not a mapping of a run's keys to values"),
        ({"sed": [1]}, "sed: unknown key; did you mean seeds?"),
        ({"seeds": []}, "seeds: "),
        ({"data": ["moton"]}, "data: 'moton' is unknown; give motion, scenes or folder:/path"),
        ({"data": ["motion"], "run": {"data": "motion"}}, "agents.random: run.data: the grid itself says this"),
        ({"mask_ratios": [1.5]}, "agents.random: mask_ratio: 1.5 is not below 1"),
        ({"agents": {"a/b": {"class": "tube"}}}, "agents: 'a/b' is unknown; give a folder's name"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_with_the_agent_and_the_key(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "agents": {"random": {"class": "random"}}, **change}))
    with pytest.raises(ConfigError) as error:
        load_grid(str(path))
    assert f"{path}: {said}" in str(error.value)


def test_options_reach_every_depth_of_a_grid(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    options = ["--seeds", "[3]", "--run.clip.size=32", "--agents.mine.slot", "1", "--mask-ratios", "[0.95]"]
    grid, minutes = load_grid(str(tmp_path / "grid.yaml"), [*options, "--minutes", "2.5"])
    assert minutes == 2.5
    run = grid.runs("grid.yaml")[Cell("mine", "motion", 0.95, 3)]
    assert (run.clip.size, run.mask_ratio, run.agent.model_extra) == (32, 0.95, {"slot": 1})
    several, _ = load_grid(
        str(tmp_path / "grid.yaml"), ["--seeds", "0", "4", "--data", "motion", "scenes", "--minutes", "1"]
    )
    assert (several.seeds, several.data) == ([0, 4], ["motion", "scenes"])
    with pytest.raises(ConfigError, match=r"seeds: 3 is a whole number; expected a list, such as .* \(write \[3\]\)"):
        load_grid(str(tmp_path / "grid.yaml"), ["--seeds", "3"])
    for wrong in (["--minutes", "x"], ["steps"], ["--seeds"], ["--seeds", "--data", "motion"]):
        with pytest.raises(ConfigError, match="command line: "):
            load_grid(str(tmp_path / "grid.yaml"), wrong)


@pytest.mark.parametrize("name", packaged_configs("compare"))
def test_a_packaged_grid_holds_and_begins_with_its_command(name: str) -> None:
    text = (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
    grid, _ = load_grid(name)
    assert grid.name == name and len(grid.seeds) >= 3 and "random" in grid.agents
    assert f"\n#   tats compare {name}\n" in text
    comment = text.split("\n\n")[0].replace(" \\\n#    ", "")
    overrides = re.findall(rf"^#   tats compare {name} (--.+)$", comment, re.MULTILINE)
    assert overrides and all(load_grid(name, shlex.split(each))[0] != grid for each in overrides)


def test_compare_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--minutes", "--mask-ratios", "--agents", "compare_quick"))
    assert cli.main(["compare"]) == 2
    assert "a grid comes first" in capsys.readouterr().err


def test_an_agent_without_points_is_drawn_as_a_line_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[float] = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **style: lines.append(y))
    results: dict[Cell, dict[str, float | None]] = {
        Cell("random", "motion", 0.9, 0): {"linear_top1": 0.2},
        Cell("untrained", "motion", 0.9, 0): {"linear_top1": 0.1},
        Cell("untrained", "motion", 0.9, 1): {"linear_top1": 0.12},
    }
    columns = {"clips": np.array([10.0, 20.0]), "seconds": np.array([1.0, 2.0]), "linear_top1": np.array([0.15, 0.2])}
    plot_comparison(tmp_path, summarise(results), {}, {Cell("random", "motion", 0.9, 0): columns})
    assert lines == [pytest.approx(0.11)] * 2 and (tmp_path / "linear_by_seconds.png").is_file()
