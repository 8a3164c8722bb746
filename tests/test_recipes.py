"""Every data set from annotation files to a fine-tuned classifier, and the recipes at full size and in miniature."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import cli
from experiments.config import load_config, parse_config
from experiments.dry_run import miniature
from experiments.estimate import estimate
from tats_env.data import open_dataset
from tats_env.data.miniature import MINIATURES

ROOT = Path(__file__).parents[1]
RECIPES = ("ssv2", "kinetics400", "ucf101", "hmdb51")
SMALL = """
batch_size: 4
steps: 2
log_interval: 1
agent: {class: tube}
probe: {epochs: 2}
finetune: {epochs: 1, warmup_epochs: 0, batch_size: 4}
evaluate: {clips: 8, tasks: [], baseline: false, pictures: false}
"""


@pytest.mark.parametrize("kind", sorted(MINIATURES))
def test_every_data_set_goes_through_check_training_probes_and_fine_tuning(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = MINIATURES[kind](tmp_path / "data", 4, 3)
    assert cli.main(["data", "check", spec]) == 0
    train, validation = (15, 3) if kind == "folder" else (12, 6)  # a folder holds a fifth out itself
    assert f"{train} videos" in capsys.readouterr().out
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [str(tmp_path / "small.yaml"), "--data", spec, "--out", str(tmp_path / "runs")]
    assert cli.main(["run", *command]) == 0
    folder = tmp_path / "runs" / "run"
    for verb in ("probe", "finetune"):
        assert cli.main([verb, str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in ("linear", "attentive", "knn", "finetune"))
    (home,) = (folder / "downstream").iterdir()
    for name in ("linear", "attentive", "knn", "finetune/confusion"):
        scores = json.loads((home / f"{name}.json").read_text())
        assert scores["num_videos"] == validation and len(scores["per_class"]) == len(scores["class_names"]) == 3
        assert (home / f"{name}.png").stat().st_size > 5000
    # A class has a colour of its own
    assert json.loads((home / "linear.json").read_text())["top1"] == 1


def test_a_packed_set_gives_the_classes_and_the_pictures_of_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = MINIATURES["ucf101"](tmp_path / "data", 4, 3)
    (tmp_path / "data" / "UCF-101" / "YoYo").mkdir()
    broken = next((tmp_path / "data" / "UCF-101" / "ApplyEyeMakeup").iterdir())
    broken.write_text("text")
    command = ["data", "pack", spec, str(tmp_path / "shards"), "--size", "48", "--per-shard", "5"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "in " + str(tmp_path / "shards" / "train") in said and str(broken) in said
    original, packed = (open_dataset(name, size=(48, 48)) for name in (spec, f"shards:{tmp_path / 'shards'}"))
    assert packed.class_names == original.class_names and np.array_equal(packed.labels, original.labels)
    index, start = np.arange(len(original)), np.zeros(len(original), int)
    assert torch.equal(*(videos.clips(index, start, torch.device("cpu")) for videos in (original, packed)))
    assert cli.main([*command[:-1], "0"]) == 2
    assert cli.main(["data", "unpack"]) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_takes_and_makes_two_steps_in_miniature(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "run", name, "--dry-run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (
        "86.2 M parameters",
        "1568, 78",
        "GiB",
        "its time on one H100",
        "ppo: step 2 of 2",
        "fine-tuned",
        "k-NN",
    ):
        assert said in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize("options", [["--rounds", "13"], ["--agent.entropy-floor", "200"], ["--mask-ratio", "0.995"]])
def test_what_is_possible_at_full_size_is_possible_in_miniature(options: list[str], tmp_path: Path) -> None:
    small = miniature(load_config("ssv2", options), tmp_path)
    assert small.clip.num_tokens == 128 and small.rounds <= 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_its_source_and_trains_for_the_epochs_it_says(name: str) -> None:
    text = (ROOT / "experiments" / f"{name}.yaml").read_text()
    assert f"\n#   tats data check '{name}:/" in text or f"\n#   tats data check {name}:/" in text
    assert "Source:" in text and "VideoMAE" in text
    config = load_config(name)
    found = re.search(r"steps: \d+  # (\d+) epochs of ([\d,]+) videos", text)
    assert found
    epochs, videos = int(found[1]), int(found[2].replace(",", ""))
    assert config.steps == epochs * videos // config.batch_size
    assert config.data.startswith(f"{name}:") and config.mae.size == "base" and config.clip.size == 224
    assert (config.clip.flip, config.finetune.flip) == (name != "ssv2",) * 2


@pytest.mark.parametrize(
    ("batch_size", "agent", "clips_a_second", "gib"),
    [
        (64, {"class": "random"}, 1525, 9.2),
        (256, {"class": "random"}, 1825, 31.5),
        (64, {"class": "ppo", "width": 128, "num_heads": 4, "n_epochs": 1}, 1317, 10.7),
        (64, {"class": "ppo", "width": 384, "num_heads": 6, "n_epochs": 1}, 1117, 13.6),
        (256, {"class": "ppo", "width": 128, "num_heads": 4, "n_epochs": 1}, 1512, 37.8),
    ],
)
def test_estimates_are_near_what_was_measured_on_an_h100(
    batch_size: int, agent: dict[str, object], clips_a_second: float, gib: float
) -> None:
    values = {"clip": {"size": 224, "patch_size": 16}, "mae": {"size": "base"}, "mask_ratio": 0.95, "steps": 1000}
    config = parse_config({**values, "batch_size": batch_size, "agent": agent}, "test")
    found = estimate(config)
    assert found.num_tokens == 1568 and found.num_visible == 78
    assert found.memory_bytes / 2**30 == pytest.approx(gib, rel=0.1)
    assert 1000 * batch_size / found.seconds == pytest.approx(clips_a_second, rel=0.1)
