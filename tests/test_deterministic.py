"""``--deterministic``: two runs give the same numbers, and torch is really told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "--deterministic", "--steps", "6", "--num-videos", "15", "--batch-size", "8", "--log-interval", "2", "--clip.size",
    "24", "--clip.augment", "multi_scale", "--loader.workers", "2", "--evaluate.tasks", "--evaluate.num-videos",
    "15", "--evaluate.clips", "16", "--evaluate.no-pictures", "--evaluate.no-baseline",
)  # fmt: skip
STREAMED = """
import sys
from experiments.cli import main
from tats_env.data import video_set

video_set.MEMORY_LIMIT = 0  # so that worker processes decode throughout
sys.exit(main(sys.argv[1:]))
"""
TOLD = """
import torch
import torch._inductor.config
import experiments.run
from experiments.schema import RunConfig

class Stop(Exception):
    pass

def join(config):
    raise Stop

experiments.run.join = join
for asked in (False, True):
    try:
        experiments.run.run(RunConfig(deterministic=asked))
    except Stop:
        padding = torch._inductor.config.shape_padding
        print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, padding)
"""


def python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(folder: Path) -> Path:
    python(STREAMED, "run", "quickstart", "--out", str(folder), *OPTIONS)
    return folder / "quickstart"


def numbers(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: x for key, x in row.items() if not key.startswith("time/")} for row in csv.DictReader(file)]


def contents(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a safetensors file says of itself, in an order that differs from one writing to the next, and the rest."""
    file = path.read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def test_two_runs_give_the_same_numbers(tmp_path: Path) -> None:
    first, second = run(tmp_path / "1"), run(tmp_path / "2")
    rows = numbers(first)
    assert rows == numbers(second) and len({row["mae/loss"] for row in rows}) == 3
    for name in ("mae.safetensors", "policy.safetensors"):
        assert contents(first / name) == contents(second / name)


def test_torch_is_told_before_anything_is_made() -> None:
    assert python(TOLD).split() == ["False", "False", "True", "True", "False", "False"]
