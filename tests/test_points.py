"""Weights kept on the way, what is found in them, and how early an encoder is as good as another's in the end."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from experiments.build import load_mae
from experiments.config import parse_config
from experiments.grid import Cell
from experiments.probes import run_probes
from experiments.progress import RunProgress
from experiments.reach import reaches, said
from experiments.run import Run, run
from experiments.videos import Videos

SMALL: dict[str, Any] = {
    "name": "small", "device": "cpu", "num_videos": 30, "batch_size": 4, "steps": 8, "log_interval": 2,
    "clip": {"num_frames": 4}, "mask_ratio": 0.75, "agent": {"width": 16, "num_heads": 2},
    "probe": {"epochs": 2},
    "evaluate": {
        "num_videos": 30, "clips": 4, "tasks": ["linear", "attentive"], "points": [0.25, 0.5], "baseline": False,
        "pictures": False,
    },
}  # fmt: skip


def trained(out: Path, **changes: Any) -> Run:
    this = Run(parse_config(SMALL | {"out": str(out)} | changes, "test"), Console(file=io.StringIO()))
    this.train(this.config.agent.class_, RunProgress(this.console, this.config.steps * this.config.rounds))
    return this


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "mae.safetensors")


def test_points_are_probed_as_the_end_is_and_change_no_training(tmp_path: Path) -> None:
    config = parse_config(SMALL | {"out": str(tmp_path)}, "test")
    assert run(config) == 0
    folder = tmp_path / "small"
    rows = list(csv.DictReader((folder / "points.csv").open()))
    assert [row["clips"] for row in rows] == ["8", "16", "32"]
    figures = json.loads((folder / "summary.json").read_text())["ppo"]
    with (folder / "metrics.csv").open() as file:
        clock = {row["time/total_timesteps"]: float(row["time/time_elapsed"]) for row in csv.DictReader(file)}
    for row in rows:
        where = folder if row["clips"] == "32" else folder / "points" / row["clips"]
        assert float(row["seconds"]) == pytest.approx(clock[row["clips"]])
        mae, videos = load_mae(where / "mae.safetensors", config, "test", device="cpu"), Videos(config)
        sets = videos("motion", "train"), videos("motion", "validation")
        expected = run_probes(mae, *sets, ["linear", "attentive"], config.probe, config.seed)
        assert {name: float(row[f"{name}_top1"]) for name in expected} == {
            name: score.top1 for name, score in expected.items()
        }
        scores = json.loads((where / "downstream" / "motion" / "attentive.json").read_text())
        assert len(scores["losses"]) == 2 and scores["losses"][1] < scores["losses"][0]
    assert float(rows[-1]["linear_top1"]) == figures["linear_top1"]
    assert not list(folder.glob("points/*/downstream/**/*.npy"))
    kept = [weights(where) for where in (folder / "points" / "8", folder / "points" / "16", folder)]
    assert all(not torch.equal(a["mask_token"], b["mask_token"]) for a, b in pairwise(kept))
    without = trained(tmp_path / "without", evaluate=SMALL["evaluate"] | {"points": []}).folder
    assert all(torch.equal(x, weights(without)[name]) for name, x in kept[-1].items())


@pytest.mark.parametrize(
    ("changes", "clips"),
    [
        ({"agent": {"n_steps": 4, "width": 16, "num_heads": 2}}, ["16"]),  # the first update past both points
        ({"rounds": 4, "agent": {"credit": "clip", "gamma": 1.0, "width": 16, "num_heads": 2}}, ["16", "8"]),
        ({"agent": {"class": "random"}}, ["16", "8"]),
    ],
)
def test_points_come_at_the_first_update_past_their_share(
    changes: dict[str, Any], clips: list[str], tmp_path: Path
) -> None:
    folder = trained(tmp_path, **changes).folder
    assert sorted(path.parent.name for path in folder.glob("points/*/mae.safetensors")) == clips


def test_a_point_before_the_first_step_is_after_it_and_without_one_the_end_is_told_all_the_same(tmp_path: Path) -> None:
    changes = {"out": str(tmp_path), "evaluate": SMALL["evaluate"] | {"tasks": ["linear"], "points": [0.001]}}
    # This agent's rollouts are as long as the training
    for agent, clips in (({"class": "random"}, ["4", "32"]), ({"n_steps": 8, "width": 16, "num_heads": 2}, ["32"])):
        assert run(parse_config(SMALL | changes | {"agent": agent, "name": f"to-{clips[0]}"}, "test")) == 0
        rows = list(csv.DictReader((tmp_path / f"to-{clips[0]}" / "points.csv").open()))
        assert [row["clips"] for row in rows] == clips and all(row["linear_top1"] for row in rows)


def test_a_training_that_is_gone_on_with_keeps_the_points_that_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole").folder
    this = Run(parse_config(SMALL | {"out": str(tmp_path), "checkpoint_minutes": 0.0}, "test"), Console(quiet=True))

    class Stop(Exception):
        pass

    class Stops(RunProgress):
        """Stops after the checkpoint between the two points, and after the second one."""

        def on_update_end(self, agent: Any) -> None:
            if agent.num_timesteps == 5 * 4:
                raise Stop

    with pytest.raises(Stop):
        this.train("ppo", Stops(this.console, 8))
    (this.folder / "points" / "8" / "mae.safetensors").unlink()  # of before the checkpoint: not made anew
    this.lock.release()
    again = Run(this.config, this.console, resumed=this.folder)
    again.train("ppo", RunProgress(again.console, 8))
    assert [path.parent.name for path in this.folder.glob("points/*/mae.safetensors")] == ["16"]
    for where in (Path("points/16"), Path()):
        expected = weights(whole / where)
        assert all(torch.equal(x, expected[name]) for name, x in weights(this.folder / where).items())


def test_reach_is_where_straight_lines_between_points_cross_the_goal() -> None:
    clips, seconds = np.array([10.0, 20.0, 40.0]), np.array([1.0, 2.0, 4.0])

    def points(*accuracies: float, slower: float = 1.0) -> dict[str, np.ndarray]:
        return {"clips": clips, "seconds": slower * seconds, "linear_top1": np.array(accuracies)}

    found = {
        reach.agent: reach
        for reach in reaches(
            {
                Cell("random", "motion", 0.95, 0): points(0.1, 0.2, 0.5),
                Cell("quick", "motion", 0.95, 0): points(0.2, 0.6, 0.7, slower=2),
                Cell("never", "motion", 0.95, 0): points(0.1, 0.2, 0.3),
                Cell("at once", "motion", 0.95, 0): points(0.6, 0.2, 0.3),
                Cell("alone", "motion", 0.75, 0): points(0.6, 0.2, 0.3),
            }
        )
    }
    assert found["random"].clips == found["random"].seconds == 1 and found["random"].goal == 0.5
    assert found["quick"].clips == pytest.approx(17.5 / 40) and found["quick"].seconds == pytest.approx(3.5 / 4)
    assert np.isnan(found["never"].clips) and found["at once"].clips == pytest.approx(10 / 40)
    assert "alone" not in found, "there is nothing to reach"
    table = said(list(found.values()))
    assert "| linear_top1 | motion | 0.95 | quick | 0.500 | 0.44 | 0.88 |" in table and "| never | never |" in table
    two = reaches({Cell("random", "motion", 0.95, seed): points(0.1, 0.2, end) for seed, end in ((0, 0.4), (1, 0.6))})
    assert [reach.goal for reach in two] == [0.5, 0.5] and np.isnan(two[0].clips) and two[1].clips < 1
