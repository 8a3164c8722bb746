"""That training which goes wrong is told of, with what helps, and that training which does not is left in peace."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

from agents.adamae import AdaMAE
from agents.guards import Guards, Thresholds
from agents.heuristics import RandomMask
from agents.hooks import LogHook, MAEUpdateHook
from agents.ppo import PPO
from experiments.config import load_config
from experiments.run import run
from experiments.schema import GuardsConfig
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner
from tats_env.rewards import Decision, surprise
from tats_env.vector_env import TATSMaskingVectorEnv

SMALL = {"width": 16, "num_heads": 2}
NARROW: dict[str, Any] = {"credit": "pick_surprise", "learning_rate": 2e-2, "ent_coef": 0.0, "explore": 0.0}


class Lines(KVWriter):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.lines.append(dict(key_values))

    def close(self) -> None:
        pass


def trained(
    steps: int,
    make: Any = PPO,
    mae_rate: float | None = None,
    reward: str = "surprise",
    thresholds: Thresholds | None = None,
    path: Path | None = None,
    every: int = 5,
    **settings: Any,
) -> tuple[Guards, list[dict[str, Any]]]:
    """What the guards said in a real training of that many steps, and the lines of metrics."""
    mae = MAELearner(TokenGrid(16, 16, 16, 2, 8), "tiny", learning_rate=mae_rate, batch_size=16, device="cpu")
    env = TATSMaskingVectorEnv(
        16, output="torch", size=16, mask_ratio=0.75, num_videos=15, mae=mae, reward=reward, device="cpu"
    )
    if make is PPO:
        settings = {"policy_kwargs": SMALL} | settings
    writer, guards = Lines(), Guards(thresholds, path)
    hooks = [MAEUpdateHook(), LogHook(Logger(None, [writer]), every, guards)]
    make(env, **settings).learn(16 * steps, hooks)
    return guards, writer.lines


def names(guards: Guards) -> set[str]:
    return {guard for _, guard, _ in guards.warnings}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (PPO, {}),
        (PPO, {"credit": "clip", "explore": 0.0, "ent_coef": 0.01}),
        (AdaMAE, {}),
        (RandomMask, {}),
    ],
)
def test_healthy_training_is_left_in_peace(make: Any, settings: dict[str, Any]) -> None:
    guards, lines = trained(30, make, **settings)
    assert not guards.warnings
    columns = [{key for key in line if key.startswith("guard/")} for line in lines]
    assert columns[0] and all(found == columns[0] for found in columns)
    assert not any(line[key] for line, found in zip(lines, columns, strict=True) for key in found)


def test_losses_that_are_not_finite_are_told_of_and_a_lower_rate_ends_them(tmp_path: Path) -> None:
    guards, lines = trained(10, RandomMask, mae_rate=1e30, path=tmp_path / "warnings.txt")
    assert names(guards) == {"skipped"} and lines[-1]["guard/skipped"] == 1
    assert lines[-1]["mae/skipped_updates"] > 0
    ((step, _, words),) = guards.warnings
    assert "lower mae.learning_rate" in words and "MAE" in words
    assert (tmp_path / "warnings.txt").read_text() == f"{step}\tskipped\t{words}\n"
    assert not trained(10, RandomMask, mae_rate=1e-3)[0].warnings


def test_a_policy_that_jumps_is_told_of_and_target_kl_ends_it() -> None:
    wild: dict[str, Any] = {"learning_rate": 0.03, "n_epochs": 16, "ent_coef": 0.0, "explore": 0.0}
    guards, lines = trained(15, target_kl=None, **wild)
    assert "approx_kl" in names(guards) and max(line["train/approx_kl"] for line in lines) > 1
    words = next(words for _, guard, words in guards.warnings if guard == "approx_kl")
    assert "agent.target_kl" in words and "agent.learning_rate" in words
    assert "approx_kl" not in names(trained(15, target_kl=0.05, **wild)[0])
    assert "approx_kl" not in names(trained(15, target_kl=None, **wild | {"learning_rate": 2e-3})[0])


def test_a_policy_that_narrows_is_told_of_and_an_entropy_floor_ends_it() -> None:
    guards, lines = trained(60, **NARROW)
    assert "effective_tokens" in names(guards) and min(line["mask/effective_tokens"] for line in lines) < 8
    assert any(line["guard/effective_tokens"] for line in lines)
    words = next(words for _, guard, words in guards.warnings if guard == "effective_tokens")
    assert "agent.entropy_floor" in words and "agent.ent_coef" in words
    assert "effective_tokens" not in names(trained(60, **NARROW, entropy_floor=16.0)[0])
    unwatched, lines = trained(20, **NARROW, thresholds=Thresholds(effective_tokens=None))
    assert "effective_tokens" not in names(unwatched) and "guard/effective_tokens" not in lines[-1]


def test_a_value_function_that_learns_nothing_is_told_of_and_learning_it_ends_that() -> None:
    dead, lines = trained(44, credit="clip", vf_coef=0.0, every=2)
    assert names(dead) == {"explained_variance"} and "agent.vf_coef" in dead.warnings[0][2]
    assert lines[-1]["guard/explained_variance"] == 1
    assert "explained_variance" not in names(trained(44, credit="clip", learning_rate=5e-3, every=2)[0])


def test_a_value_function_that_nothing_is_learnt_from_is_not_watched() -> None:
    _, lines = trained(5, credit="token_motion", vf_coef=0.0)
    assert not {"guard/explained_variance", "guard/reward_scale", "train/reward_scale"} & set(lines[-1])


_calls = 0


def growing_reward(decision: Decision) -> torch.Tensor:
    """A thousand times as large after twenty calls."""
    global _calls
    _calls += 1
    return surprise(decision) * (1000 if _calls > 20 else 1)


def test_a_reward_that_outgrows_what_normalises_it_is_told_of_and_credit_by_token_does_not_mind() -> None:
    global _calls
    reward = f"{__name__}:growing_reward"
    guards, lines = trained(40, credit="clip", reward=reward)
    assert "reward_scale" in names(guards)
    first = next(i for i, line in enumerate(lines) if line["guard/reward_scale"])
    assert first == 4 and lines[3]["train/reward_scale"] < 3 < lines[4]["train/reward_scale"]
    assert "credit by token" in next(words for _, guard, words in guards.warnings if guard == "reward_scale")
    _calls = 0
    assert not trained(40, credit="token_motion", reward=reward)[0].warnings


def test_trouble_is_told_of_once_and_again_when_it_comes_back() -> None:
    guards = Guards()
    for step, kl in enumerate([0.01, 0.5, 0.5, 0.01, 0.5]):
        columns = guards.look(object(), {"train/approx_kl": kl}, step)
        assert columns == {"guard/approx_kl": float(kl > 0.2)}
    assert [step for step, _, _ in guards.warnings] == [1, 4]
    assert Guards().look(object(), {"train/approx_kl": float("nan")}, 0) == {"guard/approx_kl": 1.0}


def test_guards_go_on_from_a_checkpoint_as_though_nothing_had_been(tmp_path: Path) -> None:
    path = tmp_path / "warnings.txt"
    whole, before, after = Guards(path=tmp_path / "whole.txt"), Guards(path=path), Guards(path=path)
    values = [
        {"mae/skipped_updates": float(i // 2), "mae/n_updates": 10.0 * i, "train/approx_kl": [0.5, 0.0][i % 2]}
        for i in range(1, 9)
    ]
    expected = [whole.look(object(), line, i) for i, line in enumerate(values)]
    seen = [before.look(object(), line, i) for i, line in enumerate(values[:4])]
    path.unlink()
    after.restore(before.state())
    seen += [after.look(object(), line, 4 + i) for i, line in enumerate(values[4:])]
    assert seen == expected and after.warnings == whole.warnings
    assert path.read_text() == (tmp_path / "whole.txt").read_text() != ""
    Guards(path=path)
    assert not path.exists(), "a run that begins anew has no warnings yet"


def test_a_run_says_writes_and_logs_what_its_guards_see(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--agent.class", "random", "--mae.learning-rate", "1e30", "--out", str(tmp_path), "--steps", "6"]
    options += ["--log-interval", "2", "--batch-size", "8", "--num-videos", "15", "--evaluate.num-videos", "15"]
    options += ["--evaluate.clips", "16", "--evaluate.tasks", "--evaluate.no-pictures"]
    assert run(load_config("quickstart", options)) == 0
    folder = tmp_path / "quickstart"
    ((step, guard, words),) = (line.split("\t") for line in (folder / "warnings.txt").read_text().splitlines())
    assert guard == "skipped" and "lower mae.learning_rate" in words and f"after {step} clips: {words}" in caplog.text
    with (folder / "metrics.csv").open() as file:
        seen = {int(row["time/total_timesteps"]): float(row["guard/skipped"]) for row in csv.DictReader(file)}
    assert list(seen) == [16, 32, 48] and min(at for at in seen if seen[at]) == int(step)


def test_the_configuration_has_every_threshold_at_its_default() -> None:
    assert GuardsConfig().model_dump() == vars(Thresholds())
    config = load_config("quickstart", ["--guards.approx-kl", "0.3", "--guards.effective-tokens", "None"])
    assert (config.guards.approx_kl, config.guards.effective_tokens) == (0.3, None)
