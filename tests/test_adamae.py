"""AdaMAE's sampler: its loss against the literal formula, its optimiser, and that it follows the error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.adamae import AdaMAE, AdaMAESampler, sampling_loss
from agents.hooks import MAEUpdateHook
from tats_env.mae.errors import Reconstruction
from tats_env.vector_env import TATSMaskingVectorEnv


def test_loss_and_its_gradient_equal_the_literal_formula_sample_by_sample() -> None:
    torch.manual_seed(0)
    batch, n, k, c = 5, 24, 4, 1e-4
    sampler = AdaMAESampler((4, 6, 16)).double()
    observation = torch.randn(batch, 4, 6, 16, dtype=torch.float64)
    error = torch.rand(batch, n, dtype=torch.float64)
    hidden = torch.rand(batch, n).argsort(1) >= k

    def gradient(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(sampler.parameters())))

    logits = sampler.head(sampler.block(observation.flatten(1, 2) + sampler.pos_embed)).squeeze(-1)
    vectorised = sampling_loss(logits.log_softmax(1), error, hidden, c)

    literal = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        p = sampler.head(sampler.block(observation[b : b + 1].flatten(1, 2) + sampler.pos_embed))[0, :, 0].softmax(0)
        terms = [torch.log(p[i]) * error[b, i] for i in range(n) if hidden[b, i]]
        literal = literal - c * torch.stack(terms).mean() / batch
    torch.testing.assert_close(vectorised, literal, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradient(vectorised), gradient(literal), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-18)


def test_no_gradient_reaches_the_error() -> None:
    error = torch.rand(2, 8, requires_grad=True)
    log_p = torch.randn(2, 8, requires_grad=True).log_softmax(1)
    sampling_loss(log_p, error, torch.ones(2, 8, dtype=torch.bool), 1e-4).backward()
    assert error.grad is None


def make_env(num_envs: int = 8, **options: object) -> TATSMaskingVectorEnv:
    return TATSMaskingVectorEnv(num_envs, output="torch", size=16, num_videos=15, device="cpu", **options)  # type: ignore[arg-type]


def test_sampler_learns_with_the_rate_of_the_mae_and_once_a_step() -> None:
    env = make_env()
    agent = AdaMAE(env, seed=0)
    before = [p.detach().clone() for p in agent.sampler.parameters()]
    agent.learn(5 * 8, MAEUpdateHook())
    numbers = agent.metrics()
    assert numbers["train/learning_rate"] == env.mae.optimizer.param_groups[0]["lr"]
    assert numbers["train/skipped_updates"] == 0 and env.mae.num_updates == 5
    steps = {int(state["step"]) for state in agent.optimizer.state.values()}
    assert steps == {5}
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.sampler.parameters(), strict=True))
    agent.predict(env.reset(seed=0)[0])
    assert agent._policy.log_p.requires_grad is False  # asking leaves no graph behind


def test_sampler_comes_to_show_the_tokens_whose_error_is_high() -> None:
    env = make_env(32)
    agent = AdaMAE(env, seed=0)
    env.mae.train(False)  # so that only the sampler moves
    hard = torch.zeros(32, dtype=torch.bool)
    hard[::4] = True
    real = env.mae.reconstruct

    def with_hard_tokens(*args: Any) -> Reconstruction:
        found = real(*args)
        return found._replace(token_error=found.token_error * torch.where(hard, 3.0, 1.0))

    env.mae.reconstruct = with_hard_tokens  # type: ignore[method-assign]
    agent.learn(60 * 32)
    observation, _ = env.reset(seed=9)
    with torch.no_grad():
        share = agent.logits(observation).softmax(1)[:, hard].sum(1).mean()
    # A quarter at first; in proportion to the error, where the loss is lowest, it is 3 * 8 of 3 * 8 + 24
    assert 0.4 < share < 0.55, f"{share:.2f} of the probability on a quarter of the tokens"


def test_weights_and_settings_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    env = make_env()
    agent = AdaMAE(env, coefficient=1e-3, seed=2)
    agent.learn(16)
    agent.save(tmp_path / "adamae.safetensors")
    loaded = AdaMAE.load(tmp_path / "adamae.safetensors")
    assert (loaded.coefficient, loaded.seed, loaded.observation_shape) == (1e-3, 2, (8, 4, 96))
    observation, _ = env.reset(seed=0)
    assert torch.equal(agent.predict(observation, True)[0], loaded.predict(observation, True)[0])
    with pytest.raises(ValueError, match="give env= or observation_shape="):
        AdaMAE()
