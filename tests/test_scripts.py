"""The two training loops to start from run and learn, and their probabilities are right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import cleanrl_ppo

# N = 32, K = 3, and few enough videos that the MAE knows them soon
SMALL: dict[str, Any] = {"size": 16, "num_videos": 15, "num_envs": 16, "total_timesteps": 2048, "device": "cpu"}


def sequential_log_prob(logits: torch.Tensor, picks: torch.Tensor) -> float:
    """Of one ordered draw, pick by pick in float64: each takes its share of the tokens still there."""
    weight, result = logits.double().exp(), 0.0
    for pick in picks:
        result += float((weight[pick] / weight.sum()).log())
        weight[pick] = 0
    return result


def random_draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [6, 32], picks [6, 5], and the log-probability of each row."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 32)
    picks = torch.stack([torch.randperm(32)[:5] for _ in range(6)])
    expected = torch.tensor([sequential_log_prob(*row) for row in zip(logits.clone(), picks, strict=True)])
    return logits, picks, expected


def assert_learned(result: dict[str, float]) -> None:
    margin = result["trained"] - result["random"]
    assert margin > 5 * result["standard_error"], result
    assert abs(result["random"] - 1) < 0.1, result  # surprise at chance


def test_the_single_file_ppo_learns_to_show_what_surprises_the_mae(tmp_path: Path) -> None:
    assert_learned(cleanrl_ppo.main(cleanrl_ppo.Args(**SMALL, log_dir=tmp_path)))
    assert list(tmp_path.glob("events*"))


def test_the_single_file_ppo_weighs_a_draw_by_its_exact_probability() -> None:
    logits, picks, expected = random_draws()
    log_prob, entropy = cleanrl_ppo.log_prob_and_entropy(logits, picks)
    torch.testing.assert_close(log_prob, expected.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_the_single_file_ppo_draws_as_often_as_it_says() -> None:
    logits, num_draws = torch.tensor([2.0, 0.0, 1.0, -1.0]), 20_000
    torch.manual_seed(0)
    drawn = cleanrl_ppo.perturb(logits.expand(num_draws, 4)).topk(2).indices
    for pick in [torch.tensor([i, j]) for i in range(4) for j in range(4) if i != j]:
        share = float((drawn == pick).all(1).float().mean())
        expected = float(cleanrl_ppo.log_prob_and_entropy(logits[None], pick[None])[0].exp())
        assert abs(share - expected) < 5 * (expected * (1 - expected) / num_draws) ** 0.5, (pick, share, expected)


def test_the_torchrl_ppo_learns_to_show_what_surprises_the_mae(tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    from experiments import torchrl_ppo

    assert_learned(torchrl_ppo.main(torchrl_ppo.Args(**SMALL, log_dir=tmp_path)))
    assert list(tmp_path.glob("events*"))


def test_the_torchrl_ppos_distribution_keeps_its_promises() -> None:
    pytest.importorskip("torchrl")
    from experiments.torchrl_ppo import PlackettLuce

    logits, picks, expected = random_draws()
    distribution = PlackettLuce(logits, 5)
    scores = torch.full_like(logits, -1.0).scatter(1, picks, torch.linspace(1, 0, 5).expand(6, 5))
    torch.testing.assert_close(distribution.log_prob(scores), expected.float(), rtol=1e-5, atol=1e-4)
    draws = PlackettLuce(torch.tensor([2.0, 0.0, 1.0, -1.0]), 2).sample((20_000,))
    assert draws.shape == (20_000, 4) and draws.min() == -1 and draws.max() == 1
    first = torch.bincount(draws.argmax(1), minlength=4) / 20_000
    torch.testing.assert_close(first, torch.tensor([2.0, 0.0, 1.0, -1.0]).softmax(0), rtol=0, atol=0.02)
    assert torch.equal(distribution.mode.topk(5).indices, logits.topk(5).indices)


def test_a_missing_torchrl_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl.collectors", None)
    monkeypatch.delitem(sys.modules, "experiments.torchrl_ppo", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'tats-env\[torchrl\]'"):
        import experiments.torchrl_ppo  # noqa: F401


@pytest.mark.parametrize("name", ["cleanrl_ppo", "torchrl_ppo"])
def test_help_names_the_options(name: str) -> None:
    if name == "torchrl_ppo":
        pytest.importorskip("torchrl")
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "--total-timesteps" in result.stdout and "--learning-rate" in result.stdout
