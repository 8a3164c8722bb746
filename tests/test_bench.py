"""``tats bench``: that rows are measured, counted and gone on with, that goals are judged truthfully, and that
references are what they are called. Nothing here asserts a speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from agents.attention import TrajectoryAttention
from experiments import cli, stopwatch
from experiments.bench import Bench, operations
from experiments.bench_report import GOALS, growth, judge
from experiments.bench_rows import MATRIX, PARTS, Setting, curves, table
from experiments.bench_schema import BenchConfig, load_bench
from experiments.config import load_config
from experiments.references import bare_loss, literal_trajectory_attention, pixel_statistics
from experiments.refusals import ConfigError
from experiments.schema import RunConfig
from experiments.stopwatch import Step, Stopwatch
from experiments.videos import Videos
from experiments.yaml_files import packaged_configs
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "name": "tiny",
    "batches": [4],
    "warmup": 1,
    "repeats": 2,
    "matrix": 16,
    "copy_mib": 1,
    "attention": {"width": 8, "num_heads": 2, "clips": 2},
    "growth": {"batch_size": 2, "batches": [2], "clips": [], "models": []},
    "run": {"device": "cpu", "num_videos": 15, "clip": {"size": 16}, "agent": {"width": 16, "num_heads": 2}},
}
CURVED = {"mask_ratios": [0.75, 0.9], "growth": {**TINY["growth"], "batches": [2, 4]}}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return str(path)


def rows_of(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((folder / "runs" / "tiny" / "bench.json").read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A bench in a world without transformers."""
    folder = tmp_path_factory.mktemp("bench")
    path = write(folder, **CURVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "transformers", None)
        return folder, cli.main(["bench", path])


@pytest.fixture(scope="module")
def finished(failed: tuple[Path, int]) -> tuple[Path, int, dict[str, Any]]:
    """The same command with it; and the rows before."""
    folder, _ = failed
    before = rows_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, cli.main(["bench", "tiny.yaml"]), before


def test_a_row_that_fails_is_recorded_with_its_error_and_the_rest_goes_on(failed: tuple[Path, int]) -> None:
    folder, code = failed
    rows = rows_of(folder)
    assert code == 1 and [name for name, row in rows.items() if "error" in row] == ["Hugging Face, batch 4"]
    assert "transformers" in rows["Hugging Face, batch 4"]["error"]
    assert "failed: ImportError: needs transformers" in (folder / "runs" / "tiny" / "bench.md").read_text()


def test_the_same_command_measures_what_is_missing_and_nothing_else(
    finished: tuple[Path, int, dict[str, Any]],
) -> None:
    folder, code, before = finished
    rows = rows_of(folder)
    assert code == 0 and not any("error" in row for row in rows.values())
    assert {name for name, row in rows.items() if row.get("seconds") != before[name].get("seconds")} == {
        "Hugging Face, batch 4"
    }


def test_every_row_has_its_time_its_memory_and_its_operations(finished: tuple[Path, int, dict[str, Any]]) -> None:
    rows = rows_of(finished[0])
    steps = [f"{kind}, batch {batch}" for kind in ("MAE step", "joint step") for batch in (2, 4)]
    others = ["copy", "bare MAE step, batch 4", "environment, batch 4", "joint step, batch 4, 50 % decoded"]
    attention = ["trajectory attention", "trajectory attention, literal"]
    ratios = [f"{kind}, batch 4, 75 % hidden" for kind in ("MAE step", "joint step")]
    parts = [f"{part}, batch 4" for part in PARTS]
    assert set(rows) == {MATRIX, *others, *attention, *steps, *ratios, *parts, "Hugging Face, batch 4"}
    for name, row in rows.items():
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"], name
        assert row["seconds"]["repeats"] == 2 and row["peak_bytes"] > 0, name
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops[MATRIX] == 2 * 16**3
    assert flops["MAE step, batch 4"] == flops["bare MAE step, batch 4"] == 2 * flops["MAE step, batch 2"]
    assert flops["MAE step, batch 4"] == flops["MAE forward, batch 4"] + flops["MAE backward, batch 4"]
    assert flops["joint step, batch 4"] == sum(flops[f"{part}, batch 4"] for part in PARTS)
    assert flops["joint step, batch 4, 50 % decoded"] < flops["joint step, batch 4"]
    assert flops["trajectory attention"] < flops["trajectory attention, literal"]
    joint, mae = rows["joint step, batch 4"], rows["MAE step, batch 4"]
    assert joint["ratios"]["MAE step, batch 4"] == pytest.approx(mae["seconds"]["median"] / joint["seconds"]["median"])
    assert joint["clips_per_second"] == pytest.approx(4 / joint["seconds"]["median"])
    assert 0 < rows["data, batch 4"]["share_of_step"] < 1
    assert rows["data, batch 4"]["peak_bytes"] < mae["peak_bytes"] < joint["peak_bytes"]


def test_a_bench_leaves_tables_and_plots(finished: tuple[Path, int, dict[str, Any]]) -> None:
    out = finished[0] / "runs" / "tiny"
    table = (out / "bench.md").read_text()
    assert "| joint step, batch 4 |" in table and "needs an H100" in table and "its parts together" in table
    for name in ("throughput.png", "memory.png", "growth.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5
    found = json.loads((out / "bench.json").read_text())
    assert {goal["goal"] for goal in found["goals"]} == {goal.what for goal in GOALS}
    (curve,) = [
        c for c in found["growth"] if c["axis"] == "batch_size" and c["figure"] == "seconds" and c["step"] == "MAE step"
    ]
    assert curve["x"] == [2, 4] and np.isfinite(curve["exponent"])


def test_a_profile_is_a_trace_of_the_joint_step(
    finished: tuple[Path, int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    assert cli.main(["bench", "tiny.yaml", "--profile"]) == 0
    events = json.loads((finished[0] / "runs" / "tiny" / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"aten::_fused_adamw_", "aten::addmm"} <= names
    assert "aten::addmm" in capfd.readouterr().out


def test_a_bench_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path), tmp_path / "runs" / "tiny" / "bench.json"
    # With as many threads as here, for a time holds for these only
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "bench", path],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not out.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survivors = rows_of(tmp_path)
    assert survivors
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", path]) == 0
    rows = rows_of(tmp_path)
    assert len(rows) > len(survivors)
    assert {name: rows[name]["seconds"] for name in survivors} == {n: row["seconds"] for n, row in survivors.items()}


def test_rows_that_do_not_fit_are_named_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", write(tmp_path), "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    assert "tats bench" in said and "--minutes 0 goes on with matrix product; copy; environment, batch 4" in said
    assert rows_of(tmp_path) == {}


def test_what_was_measured_otherwise_does_not_count(tmp_path: Path) -> None:
    def keys(*options: str) -> dict[str, str]:
        bench = Bench(*load_bench(write(tmp_path), ["--out", str(tmp_path), *options]), None)  # type: ignore[arg-type]
        bench.lock.release()
        return bench.keys

    first = keys()
    assert len(set(first.values())) == len(first)
    assert keys("--name", "other", "--minutes", "1") == first
    for change in (("--repeats", "3"), ("--run.agent.width", "8"), ("--run.steps", "7")):
        assert not set(keys(*change).values()) & set(first.values())


def test_operations_counted_for_a_gpu_are_those_counted_here(tmp_path: Path) -> None:
    config, run = load_bench(write(tmp_path))
    videos = Videos(run)(run.data, "train")
    counted = []
    for group in table(config, run):
        here, there = Setting(group.run, videos), Setting(group.run, videos)
        there.device = torch.device("cuda")  # which is asked of it alone: nothing is put there
        for row in group.rows:
            if group.run.batch_size == 4 and (not row.part_of or row.name.startswith("MAE backward")):
                found = operations(row, here, row.make(here)).flops
                assert operations(row, there, Step(lambda _: None)).flops == found, row.name
                counted.append(row.name)
    assert len(counted) == 11


def test_what_is_prepared_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([7.0, 100.0, 1.0, 100.0, 2.0, 100.0, 3.0, 100.0, 50.0])

    def spend(x: int | None = None) -> int:
        nonlocal now
        now += next(durations) if x is None else next(durations) * x
        return 1

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    watch = Stopwatch(Step(spend, spend), torch.device("cpu"))
    next(durations)
    for _ in range(3):
        watch.once()
    assert watch.timing() == (2.0, 1.5, 2.5, 3)


def measured(seconds: float, **more: Any) -> dict[str, Any]:
    timing = {"median": seconds, "low": seconds, "high": seconds, "repeats": 1}
    return {"seconds": timing, "clips": 0, "flops": 0, "peak_bytes": 1, "against": [], "part_of": "", **more}


def at_the_goals(worse: float = 1.0) -> dict[str, Any]:
    """Rows that just reach every goal of an H100; ``worse`` makes them slower, larger and costlier."""
    return {
        "joint step, batch 64": measured(worse * 64 / 1500, clips=64, peak_bytes=worse * 10 * 2**30),
        "joint step, batch 256": measured(worse * 256 / 1800, clips=256, flops=0.4 * 1e12 * 256 / 1800),
        "joint step, batch 256, 50 % decoded": measured(worse * 256 / 2200, clips=256),
        "MAE step, batch 64": measured(64 / 1500 / 1.1499),
        "MAE step, batch 256": measured(256 / 1800 / 1.1499),
        "trajectory attention": measured(worse * 0.008, clips=16),
        "environment, batch 64": measured(worse * 64 / 4000, clips=64),
        "matrix product": measured(1.0, flops=1e12 * (1 - 1e-9)),
    }


def test_goals_are_met_at_their_bound_and_not_met_beyond_it() -> None:
    run = load_bench("bench")[1]
    for worse, met in ((1.0, True), (1.001, False)):
        judged = judge(at_the_goals(worse), run, "H100")
        gpu = [goal for goal in judged if goal.get("why") != "needs a CPU"]
        assert len(gpu) == len(GOALS) - 1 and all(goal["met"] is met for goal in gpu), judged
    cpu = load_bench("bench_cpu")[1]
    for ratio, met in ((1.3, True), (1.31, False)):
        rows = {"MAE step, batch 32": measured(ratio), "bare MAE step, batch 32": measured(1.0)}
        (goal,) = [goal for goal in judge(rows, cpu, "CPU") if "why" not in goal]
        assert goal["met"] is met and goal["measured"] == ratio


def test_a_goal_that_cannot_be_judged_says_why() -> None:
    run = load_bench("bench")[1]
    rows = at_the_goals()
    del rows["joint step, batch 64"]
    rows["trajectory attention"] = {"error": "out of memory"}
    why = {goal["goal"]: goal.get("why") for goal in judge(rows, run, "H100")}
    missing = {"joint step, batch 64", "cost of the sampler, batch 64", "peak memory, batch 64"}
    assert {what for what, reason in why.items() if reason == "not measured"} == {
        *missing, "trajectory attention, 16 clips"
    }  # fmt: skip
    assert {goal.get("why") for goal in judge(rows, run, "CPU")[:-1]} == {"needs an H100"}
    assert {goal["why"] for goal in judge(rows, run, "NVIDIA H200")} == {"needs an H100", "needs a CPU"}
    other = RunConfig(mask_ratio=0.9)
    assert judge(rows, other, "H100")[0]["why"] == "needs base, 16x224x224 in patches of 16, 95 % hidden"


def test_the_fitted_exponent_is_that_of_a_power_law() -> None:
    config, run = load_bench("bench")
    results = {
        row.name: measured(3 * group.run.batch_size**1.25, batch_size=group.run.batch_size)
        for group in curves(config, run)["batch_size"] for row in group.rows
    }  # fmt: skip
    found = {
        (curve["step"], curve["figure"]): curve["exponent"]
        for curve in growth(results, config.model_copy(update={"mask_ratios": [], "growth": only_batches(config)}), run)
    }
    assert found[("MAE step", "seconds")] == pytest.approx(1.25) == found[("joint step", "seconds")]
    assert found[("MAE step", "peak_bytes")] == pytest.approx(0)


def only_batches(config: BenchConfig) -> Any:
    return config.growth.model_copy(update={"clips": [], "models": []})


@pytest.mark.parametrize("shape", [(2, 3, 4, 8, 2), (1, 1, 5, 6, 3), (2, 4, 1, 8, 2)])
def test_literal_trajectory_attention_is_the_same_function_as_ours(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *size, dim, heads = shape
    module = TrajectoryAttention(dim, heads).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=dim**-0.5)
    x = torch.randn(*size, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*size, dim, dtype=torch.float64)
    ours, literal = module(x), literal_trajectory_attention(module, x)
    torch.testing.assert_close(literal, ours, rtol=0, atol=1e-10)
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, literal)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)


def test_the_bare_loss_is_the_learners() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 16, 16, 2, 8)
    learner = MAELearner(grid, "tiny", device="cpu")
    clips = torch.randint(256, (3, 4, 16, 16, 3), dtype=torch.uint8)
    visible = torch.stack([torch.randperm(grid.num_tokens)[:2].sort().values for _ in range(3)])
    bare = bare_loss(learner.model, grid, *pixel_statistics(grid.patch_dim // 3, clips.device), clips, visible)
    ours = learner.reconstruct(clips, visible).reconstruction_error.mean()
    torch.testing.assert_close(bare.detach(), ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": {"batch_size": 8}}, "run.batch_size: the bench itself says this; leave it out"),
        ({"run": {"agent": {"class": "tube"}}}, "run.agent.class: 'tube' is given; the parts timed are those of ppo"),
        ({"run": {"rounds": 3}}, "run.rounds: 3 is given; the parts of a step can be told apart at 1"),
        ({"run": {"mae": {"frozen": True}}}, "run.mae.frozen: True is given"),
        ({"run": {"clip": {"sise": 16}}}, "run: clip.sise: unknown key; did you mean clip.size?"),
        ({"growth": {"clips": [{"size": 30}]}}, "growth.clips: 8 does not divide size = 30; give 6 or 10"),
        ({"repeets": 3}, "repeets: unknown key; did you mean repeats?"),
        ({"batches": []}, "batches: "),
    ],
)
def test_a_bench_that_cannot_be_run_is_refused_with_the_key(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **change)
    with pytest.raises(ConfigError) as error:
        load_bench(path)
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("name", packaged_configs("bench"))
def test_a_packaged_bench_holds_and_begins_with_its_command(name: str) -> None:
    config, _ = load_bench(name)
    assert config.name == name
    assert f"\n#   tats bench {name}\n" in (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "recipe", "place"), [("bench", "ssv2", "H100"), ("bench_cpu", "quickstart", "CPU")])
def test_packaged_benches_measure_what_is_shipped_and_all_that_goals_need(name: str, recipe: str, place: str) -> None:
    config, run = load_bench(name)
    shipped = load_config(recipe)
    agent = shipped.agent.model_copy(update={"update_every": 1})  # what a step costs that the sampler learns from
    assert (run.agent, run.mae, run.mask_ratio, run.steps) == (agent, shipped.mae, shipped.mask_ratio, shipped.steps)
    assert run.clip.model_copy(update={"augment": shipped.clip.augment}) == shipped.clip
    assert (run.compile, run.reward) == (shipped.compile, shipped.reward)
    assert shipped.batch_size in config.batches
    rows = {row.name: measured(1.0, clips=1, flops=1) for group in table(config, run) for row in group.rows}
    judged = [goal for goal in judge(rows, run, place) if not goal.get("why", "").startswith("needs a")]
    assert len(judged) == (len(GOALS) - 1 if place == "H100" else 1)
    assert all(goal["measured"] is not None for goal in judged), judged
    groups = [group.goals for group in table(config, run)]
    assert groups == sorted(groups, reverse=True), "what goals need comes first"


def test_bench_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--minutes", "--profile", "--growth", "bench_cpu"))
    assert cli.main(["bench"]) == 2
    assert "a bench comes first" in capsys.readouterr().err


def test_files_feed_the_step_and_its_waiting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = Bench(*load_bench(write(tmp_path, feed={"repeats": 2, "key_frame_every": 250, "seconds": 0.2})), Console())
    bench.groups = [group for group in bench.groups if group.feed is not None]
    bench.carry_out(time.monotonic() + 60, "")
    loader, repeated, fed = bench.results.values()
    assert all(row["seconds"]["median"] > 0 and row["clips"] == 4 for row in (loader, repeated, fed))
    assert 0 <= fed["data_wait"] < 1.01
    assert "waits for clips" in bench.tables()[0][2][2][-1]
    with pytest.raises(ConfigError, match=r"feed\.repeats: 3 does not divide the first of batches = 4; give 2 or 4"):
        load_bench(write(tmp_path, feed={"repeats": 3}))


def test_a_time_holds_where_operations_cannot_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise AttributeError("torch has changed inside")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.bench.operations", fails)
    bench = Bench(*load_bench(write(tmp_path)), Console())
    bench.groups = bench.groups[:1]
    bench.carry_out(time.monotonic() + 60, "")
    assert set(bench.results) == {MATRIX, "copy"}
    for row in bench.results.values():
        assert row["seconds"]["median"] > 0 and "torch has changed inside" in row["not_counted"]
    assert "operations not counted" in bench.tables()[0][2][0][-1]


def test_videos_that_cannot_be_opened_fail_their_rows_and_the_tables_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", write(tmp_path, run={**TINY["run"], "data": "folder:/none"})]) == 1
    rows = rows_of(tmp_path)
    assert rows and all("/none" in row["error"] for row in rows.values())
    assert "goals" in capsys.readouterr().out
