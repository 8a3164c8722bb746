"""Masks recorded as a sampler is trained: that training knows nothing of it, what is recorded, and where it goes."""

from __future__ import annotations

import csv
import io
import json
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from agents.ppo import PPO
from experiments import snapshots, trackers
from experiments.build import load_mae, masking_env
from experiments.config import parse_config
from experiments.evaluation import EVALUATION_SEED, evaluate_sampler
from experiments.progress import RunProgress
from experiments.refusals import ConfigError
from experiments.run import Run

SMALL: dict[str, Any] = {
    "name": "small", "device": "cpu", "num_videos": 15, "batch_size": 4, "steps": 12, "log_interval": 4,
    "clip": {"num_frames": 4}, "agent": {"width": 16, "num_heads": 2, "explore": 0.0}, "mask_ratio": 0.75,
    "evaluate": {"num_videos": 15, "clips": 4, "tasks": [], "baseline": False},
}  # fmt: skip
SUBSET = "agents.sb3.SubsetActorCriticPolicy"
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo, whose MAE waits for every third step": {
        "agent": {"credit": "clip", "n_steps": 4, "n_minibatches": 2, "width": 16, "num_heads": 2},
        "mae": {"update_every": 3},
        "micro_batch_size": 2,
    },
    "ppo in rounds": {
        "agent": {"credit": "clip", "n_steps": 3, "gamma": 1.0, "width": 16, "num_heads": 2},
        "rounds": 4,
    },
    "adamae": {"agent": {"class": "adamae"}},
    "random": {"agent": {"class": "random"}},
    "greedy": {"agent": {"class": "greedy"}, "steps": 3, "log_interval": 1},
    "sb3": {"agent": {"class": "sb3:PPO", "policy": SUBSET, "n_steps": 5, "batch_size": 10}},
}  # fmt: skip


def train(out: Path, **changes: Any) -> Run:
    """The run's first half, without what is evaluated after."""
    run = Run(parse_config(SMALL | {"out": str(out)} | changes, "test"), Console(file=io.StringIO()))
    run.train(run.config.agent.class_, RunProgress(run.console, run.config.steps * run.config.rounds))
    return run


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock said."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def weights_of(path: Path, run: Run) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return {"settings": torch.tensor([hash(path.read_text())])}
    return run.makers[run.config.agent.class_][0].load(path).model.policy.state_dict()


@pytest.mark.parametrize("agent", AGENTS)
def test_training_that_is_looked_at_is_the_same_to_the_last_bit(agent: str, tmp_path: Path) -> None:
    plain, seen = (
        train(tmp_path / str(pictures), **AGENTS[agent], evaluate=SMALL["evaluate"] | {"pictures": pictures})
        for pictures in (False, True)
    )
    assert metrics_of(seen.folder) == metrics_of(plain.folder) and metrics_of(seen.folder)
    files = [path.name for path in plain.folder.iterdir() if path.stem in ("mae", "policy")]
    assert len(files) == 2
    for name in files:
        found, expected = (weights_of(run.folder / name, run) for run in (seen, plain))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not (plain.folder / snapshots.FILE).exists()
    with np.load(seen.folder / snapshots.FILE) as file:
        assert file["steps"][0] == 0 and file["steps"][-1] == seen.config.steps
        assert ("heat" in file) == (agent not in ("random", "greedy"))


def test_ten_moments_show_the_mode_of_the_policy_that_was(tmp_path: Path) -> None:
    run = train(tmp_path, steps=30)
    with np.load(run.folder / snapshots.FILE) as file:
        clips, steps, visible, heat = (file[name] for name in ("clips", "steps", "visible", "heat"))
    assert steps.tolist() == [0, 3, 7, 10, 13, 17, 20, 23, 27, 30]
    assert clips.shape == (6, 4, 32, 32, 3) and clips.dtype == np.uint8
    assert visible.shape == heat.shape == (10, 6, 32)
    np.testing.assert_allclose(heat.sum(2), 1, rtol=1e-5)
    assert np.array_equal(visible, heat.argsort(2).argsort(2) >= 32 - 8)
    # The last is that of what was saved, asked anew
    mae = load_mae(run.folder / "mae.safetensors", run.config, "mae", device="cpu")
    env = masking_env(run.config, run.test_set, mae, 6, "tokens")
    observation, _ = env.reset(seed=EVALUATION_SEED)
    assert np.array_equal(env.task.clips.numpy(), clips)
    probability = PPO.load(run.folder / "policy.safetensors", env).logits(observation).softmax(1)
    np.testing.assert_allclose(probability.numpy(), heat[-1], rtol=1e-4)
    assert abs(heat[0] - heat[-1]).max() > 1e-3


def test_moments_come_with_the_updates_there_are(tmp_path: Path) -> None:
    run = train(tmp_path, **AGENTS["sb3"])
    with np.load(run.folder / snapshots.FILE) as file:
        assert file["steps"].tolist() == [0, 5, 10, 12]


def test_a_file_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails)
    run = train(tmp_path)
    said = " ".join(run.console.file.getvalue().split())  # type: ignore[attr-defined]
    assert f"{run.folder / snapshots.FILE} can't be written (No space left on device)" in said
    assert (run.folder / "mae.safetensors").is_file() and not list(run.folder.glob("*.partial"))


def test_a_moments_time_is_none_of_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide, clock, ahead = snapshots.decide, time.perf_counter, [0.0]

    def slowly(*args: Any, **options: Any) -> Any:
        ahead[0] += 1000
        return decide(*args, **options)

    monkeypatch.setattr(snapshots, "decide", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead[0])
    run = train(tmp_path)
    assert ahead[0] == 10_000 and run.results["ppo"]["seconds_per_step"] * 12 < 1000  # type: ignore[operator]
    for row in csv.DictReader((run.folder / "metrics.csv").open()):
        assert float(row["time/time_elapsed"]) < 1000 and float(row["time/fps"]) > 4 * 4 / 1000


class Corner:
    """Shows the first K tokens, always."""

    def predict(self, observation: torch.Tensor, deterministic: bool = False) -> tuple[torch.Tensor, None]:
        num_tokens = observation.shape[1] * observation.shape[2]
        return torch.linspace(1, -1, num_tokens).repeat(len(observation), 1), None


@pytest.mark.parametrize("rounds", [1, 4])
def test_evaluation_finds_how_often_each_token_was_visible(rounds: int, tmp_path: Path) -> None:
    config = parse_config(SMALL | {"rounds": rounds}, "test")
    run = train(tmp_path, agent={"class": "random"}, steps=1)
    mae = load_mae(run.folder / "mae.safetensors", config, "mae", device="cpu")
    env = masking_env(config, run.test_set, mae, 4, "tokens")
    found = evaluate_sampler(Corner(), env, 8, seed=1)  # type: ignore[arg-type]
    assert found.positions.tolist() == [1.0] * 8 + [0.0] * 24
    assert found.figures.keys() == {"reconstruction_error", "random_mask_error", "motion_lift"}


def test_wandb_that_is_not_there_is_refused_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", missing)
    with pytest.raises(ConfigError, match=r"tracker: wandb is not installed; pip install 'tats-env\[wandb\]'"):
        train(tmp_path, tracker="wandb")
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_gets_curves_and_pictures_and_goes_on_with_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="an extra: pip install 'tats-env[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(tmp_path, tracker="wandb")
    kept = history(run.folder)
    rows = metrics_of(run.folder)
    assert [row["mae/loss"] for row in kept if "mae/loss" in row] == [float(row["mae/loss"]) for row in rows]
    pictured = [row["_step"] for row in kept if any(key.startswith("masks/0") for key in row)]
    assert pictured == [4 * n for n in (0, 1, 3, 4, 5, 7, 8, 9, 11, 12)]
    assert len(list(run.folder.glob("wandb/offline-run-*/files/media/images/masks/1_*.png"))) == 10
    again = trackers.Tracker(run.config, run.folder, run.folder)
    assert again.tracker.tracker.config["agent"]["width"] == 16
    again.close()
    names = {path.name.rpartition("-")[2] for path in run.folder.glob("wandb/offline-run-*")}
    assert len(names) == 1 and again.tracker.tracker.id in names


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged with an offline run, row by row."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, rows = next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes(), []
    whole, at = b"", 7
    while at < len(content):  # as LevelDB logs: blocks of 32 KiB, in which a record's parts have 7 bytes before them
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            (record := Record()).ParseFromString(whole)
            whole = b""
            if items := record.history.item:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
