"""What an encoder is asked after training: at a run's end, by ``tats probe`` and ``tats finetune``, and in a grid."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import cli
from experiments.config import load_config
from experiments.downstream import slug
from tats_env.data import motion

ROOT = Path(__file__).parents[1]
SHORT = {
    "num_videos": 30,
    "batch_size": 4,
    "steps": 4,
    "log_interval": 2,
    "agent": {"width": 16, "num_heads": 2},
    "probe": {"epochs": 2},
    "finetune": {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "repeats": 2, "test_clips": 1, "test_crops": 1},
    "evaluate": {
        "num_videos": 30, "clips": 8, "pictures": False, "data": ["motion", "scenes"],
        "tasks": ["linear", "attentive", "knn", "finetune"],
    },
}  # fmt: skip
TASKS = ("linear", "attentive", "knn", "finetune")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under our sampler and under random masks, asked everything on two data sets."""
    folder = tmp_path_factory.mktemp("downstream")
    (folder / "short.yaml").write_text(yaml.safe_dump(SHORT))
    assert cli.main(["run", str(folder / "short.yaml"), "--out", str(folder)]) == 0
    return folder / "run"


def test_a_run_ends_with_every_task_on_every_data_set(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for sampler, home in (("ppo", finished), ("random", finished / "random")):
        asked = {f"{task}_top1@{data}" for task in TASKS for data in ("motion", "scenes")}
        assert asked <= summary[sampler].keys()
        for data in ("motion", "scenes"):
            scores = json.loads((home / "downstream" / data / "attentive.json").read_text())
            assert scores["top1"] == summary[sampler][f"attentive_top1@{data}"] and scores["num_videos"] == 30
            assert (home / "downstream" / data / "knn.png").exists()
            tuned = json.loads((home / "downstream" / data / "finetune" / "finetune.json").read_text())
            assert tuned["top1"] == summary[sampler][f"finetune_top1@{data}"]


def test_a_finished_run_is_probed_again_with_other_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((finished / "random" / "downstream" / "motion" / "knn.json").read_text())
    assert cli.main(["probe", str(finished / "random"), "--evaluate.data", "motion", "--probe.k", "1"]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in TASKS[:3]) and "mean class" in said
    after = json.loads((finished / "random" / "downstream" / "motion" / "knn.json").read_text())
    assert after["confusion"] != before["confusion"] and after["num_videos"] == 30
    assert load_config(str(finished / "config.yaml")).probe.k == 10, "the run's own configuration stays"


def test_a_classifier_that_only_guesses_is_told_of(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["probe", str(finished / "random"), "--evaluate.data", "motion"]
    for epochs, rate, guesses in (("1", "1e-7", True), ("60", "1e-2", False)):
        assert cli.main([*ask, "--probe.epochs", epochs, "--probe.learning-rate", rate]) == 0
        said = capsys.readouterr().out
        assert ("motion, attentive: still on the plateau of guessing" in said) is guesses
        assert ("and 2.71 for 15 classes alike" in said) is guesses
        assert "linear:" not in said and "knn:" not in said
    tune = ["finetune", str(finished / "random"), "--evaluate.data", "motion", "--finetune.learning-rate", "1e-7"]
    shutil.rmtree(finished / "random" / "downstream" / "motion" / "finetune")
    assert cli.main(tune) == 0
    assert "motion, finetune: still on the plateau of guessing" in capsys.readouterr().out


def test_a_run_is_fine_tuned_with_the_tokens_that_its_sampler_keeps(finished: Path) -> None:
    options = ["--evaluate.data", "motion", "--finetune.sampler", "policy", "--finetune.keep-ratio", "0.5"]
    ratios = ["--finetune.test-keep-ratios", "1.0", "0.5", "0.25"]
    home = finished / "downstream" / "motion" / "finetune"
    with pytest.raises(ValueError, match="of another fine-tuning: sampler"):  # the folder holds another fine-tuning
        from experiments.trained import evaluate_trained

        evaluate_trained("finetune", [str(finished), *options, *ratios])
    for path in home.iterdir():
        path.unlink()
    assert cli.main(["finetune", str(finished), *options, *ratios]) == 0
    found = json.loads((home / "finetune.json").read_text())
    assert found["keep_ratio"] == 0.5 and found["sampler"] == "policy"
    for sampler in ("policy", "random"):
        assert [row["tokens"] for row in found["tokens_kept"][sampler]] == [32, 64, 128]
    assert (home / "tokens_kept.png").stat().st_size > 5000
    assert cli.main(["finetune", str(finished / "random"), *options, "--agent.class", "ppo"]) == 2


def test_everything_may_start_from_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=16, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
        decoder_intermediate_size=48,
    )  # fmt: skip
    transformers.VideoMAEForPreTraining(config).save_pretrained(tmp_path / "videomae")
    short = SHORT | {"mae": {"init": f"hf:{tmp_path / 'videomae'}"}, "out": str(tmp_path)}
    short["evaluate"] = {"num_videos": 30, "clips": 8, "pictures": False, "baseline": False, "tasks": []}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    for verb, written in (
        ("run", "run/mae.safetensors"),
        ("probe", "run-probe/downstream/motion/linear.json"),
        ("finetune", "run-finetune/downstream/motion/finetune/finetune.json"),
    ):
        assert cli.main([verb, str(tmp_path / "short.yaml")]) == 0
        assert (tmp_path / written).is_file()
    assert cli.main(["probe", str(tmp_path / "run")]) == 0  # of such sizes, from our own file
    capsys.readouterr()
    assert cli.main(["run", str(tmp_path / "short.yaml"), "--clip.size", "64"]) == 2
    assert capsys.readouterr().err.startswith("mae.init: ")


def test_trained_verbs_refuse_what_is_no_run_and_a_set_without_classes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["probe"]) == 2 and "RUN is a run's folder" in capsys.readouterr().err
    assert cli.main(["probe", str(tmp_path)]) == 2 and "no such file" in capsys.readouterr().err
    (source,) = motion.render(0, "train", 1)
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes(source.read_bytes())
    for verb in ("probe", "finetune"):
        assert cli.main([verb, str(finished), "--evaluate.data", f"folder:{tmp_path}"]) == 2
        assert "there are not two classes to tell apart" in capsys.readouterr().err
    assert cli.main(["probe", str(finished), "--clip.size", "64"]) == 2
    assert "was made for" in capsys.readouterr().err
    assert cli.main(["probe", str(finished), "--mae.init", "x"]) == 2
    short = str(finished.parent / "short.yaml")
    assert cli.main(["run", short, "--evaluate.data", f"folder:{tmp_path / 'none'}", "--out", str(tmp_path)]) == 2
    assert "none is not a folder" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_fine_tuning_of_a_model_from_elsewhere_goes_on_in_its_folder(finished: Path, tmp_path: Path) -> None:
    short = SHORT | {"mae": {"init": str(finished / "mae.safetensors")}, "out": str(tmp_path)}
    short["evaluate"] = {"num_videos": 30, "clips": 8}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    assert cli.main(["finetune", str(tmp_path / "short.yaml")]) == 0
    weights = tmp_path / "run-finetune" / "downstream" / "motion" / "finetune" / "finetune.safetensors"
    before = weights.stat().st_mtime_ns
    assert cli.main(["finetune", str(tmp_path / "run-finetune")]) == 0
    assert weights.stat().st_mtime_ns == before, "it was finished"
    with pytest.raises(ValueError, match="of another fine-tuning: clip_span"):
        from experiments.trained import evaluate_trained

        evaluate_trained("finetune", [str(tmp_path / "run-finetune"), "--clip.frame-stride", "2"])


def test_two_folders_of_one_name_are_told_apart() -> None:
    names = {slug(f"folder:/data/{part}/videos") for part in ("a", "b")}
    assert len(names) == 2 and all(name.startswith("folder-videos-") for name in names)
    assert slug("motion") == "motion" and "/" not in slug("ucf101:/x/y z?split=2")


def test_a_grid_of_data_sets_compares_transfer(tmp_path: Path) -> None:
    run = {key: value for key, value in SHORT.items() if key not in ("agent",)}
    run["evaluate"] = {**SHORT["evaluate"], "tasks": ["knn"]}  # type: ignore[dict-item]
    grid = {
        "name": "transfer", "processes": 2, "seeds": [0], "mask_ratios": [0.9], "data": ["motion", "scenes"],
        "run": run, "agents": {"random": {"class": "random"}, "tube": {"class": "tube"}},
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "compare", "grid.yaml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "transfer"
    cells = list(csv.DictReader((folder / "cells.csv").open()))
    assert [(cell["agent"], cell["data"]) for cell in cells] == [
        ("random", "motion"), ("tube", "motion"), ("random", "scenes"), ("tube", "scenes"),
    ]  # fmt: skip
    assert all(0 <= float(cell[f"knn_top1@{data}"]) <= 1 for cell in cells for data in ("motion", "scenes"))
    table = (folder / "table.md").read_text()
    assert "| agent | pre-trained on | mask ratio |" in table and "| tube | scenes | 0.9 |" in table
    assert "| pre-trained on | evaluated on | mask ratio | agent | k-NN | over random's [95 %] |" in table
    assert "| motion | scenes | 0.9 | tube |" in table and "k-NN" in done.stdout
    for name in ("error", "knn_motion", "knn_scenes", "motion_lift"):
        assert (folder / f"{name}.png").stat().st_size > 5000
