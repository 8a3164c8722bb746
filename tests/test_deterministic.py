"""``--deterministic``: two runs give the same numbers, and torch is really told."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "--deterministic", "--steps", "6", "--num-videos", "15", "--batch-size", "8", "--log-interval", "2", "--clip.size",
    "24", "--clip.augment", "multi_scale", "--loader.workers", "2", "--evaluate.tasks", "--evaluate.num-videos",
    "15", "--evaluate.clips", "16", "--evaluate.no-pictures", "--evaluate.no-baseline",
)  # fmt: skip


def run(folder: Path, *options: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "run", "quickstart", "--out", str(folder), *OPTIONS, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "quickstart"


def numbers(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: x for key, x in row.items() if not key.startswith("time/")} for row in csv.DictReader(file)]


def test_two_runs_give_the_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    first, second = run(tmp_path / "1"), run(tmp_path / "2")
    other = run(tmp_path / "3", "--seed", "1")
    assert len(numbers(first)) == 3 and numbers(first) == numbers(second) != numbers(other)
    for name in ("mae.safetensors", "policy.safetensors"):
        one, two, three = (load_file(folder / name) for folder in (first, second, other))
        assert all(torch.equal(x, two[key]) for key, x in one.items())
        assert any(not torch.equal(x, three[key]) for key, x in one.items())


@pytest.mark.parametrize("asked", [True, False])
def test_torch_is_told_before_anything_is_made(asked: bool) -> None:
    code = f"""
import torch
import experiments.run
from experiments.schema import RunConfig

class Stop(Exception):
    pass

def join(config):
    raise Stop

experiments.run.join = join
try:
    experiments.run.run(RunConfig(deterministic={asked}))
except Stop:
    print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(asked)] * 2, done.stderr
