"""Credit and PPO's objective against literal formulas, enumeration and the fixed points that theory names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.credit import (
    CREDITS,
    DUAL_CLIP,
    FORMS,
    LOG_RATIO_BOUND,
    PROPORTIONAL_BOUND,
    STANDARDISED_BOUND,
    clipped_surrogate,
    log_ratio,
    proportional,
    standardised,
    token_credit,
)
from agents.distributions import PlackettLuce
from agents.rollout import gae
from tats_env.grid import visible_mask
from tats_env.mae import Reconstruction
from tats_env.rewards import Decision


def values_and_counts(batch: int = 6, size: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Errors with a long tail, and which of them count."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, size, generator=generator).pow(4) * 10 ** torch.arange(-4.0, batch - 4)[:, None]
    return values, torch.rand(batch, size, generator=generator) < 0.8


# Advantages -------------------------------------------------------------------------------------------------


def test_the_standardised_form_is_the_z_score_over_what_counts_within_three() -> None:
    values, counts = values_and_counts()
    found = standardised(values, counts)
    for row, flags, result in zip(values.double().numpy(), counts.numpy(), found.numpy(), strict=True):
        z = np.zeros(len(row))
        z[flags] = (row[flags] - row[flags].mean()) / row[flags].std()
        np.testing.assert_allclose(result, z.clip(-STANDARDISED_BOUND, STANDARDISED_BOUND), atol=1e-4)
    assert found.max() == STANDARDISED_BOUND == 3  # reached, or the bound would be untested


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_proportional_form_is_the_power_over_its_mean_over_what_counts(power: float) -> None:
    values, counts = values_and_counts()
    found = proportional(values, counts, power)
    for row, flags, result in zip(values.double().numpy(), counts.numpy(), found.numpy(), strict=True):
        expected = np.where(flags, row**power, 0) / (row[flags] ** power).mean()
        np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_the_proportional_form_stops_at_twenty() -> None:
    values = torch.zeros(1, 100)
    values[0, :2] = torch.tensor([1.0, 0.1])
    expected = [PROPORTIONAL_BOUND, 0.1 / 0.011] + [0] * 98
    assert proportional(values, values >= 0, 1.0)[0].tolist() == pytest.approx(expected)
    assert PROPORTIONAL_BOUND == 20


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.1, 0.7, 1 / 3, 12345.678])
def test_a_clip_whose_errors_are_all_alike_earns_nothing_standardised_and_one_proportional(value: float) -> None:
    for size in (1, 7, 116, 275, 1490):
        alike, every = torch.full((2, size), value), torch.ones(2, size, dtype=torch.bool)
        every[1, size // 2 :] = False
        assert standardised(alike, every).abs().max() < 0.01, size
        expected = every.float() * (value > 0)
        torch.testing.assert_close(proportional(alike, every, 1.0), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_advantages_do_not_depend_on_the_unit_of_the_errors(scale: float, power: float) -> None:
    values, counts = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) + 0.1, torch.ones(4, 30) > 0
    torch.testing.assert_close(standardised(scale * values, counts), standardised(values, counts), rtol=1e-3, atol=1e-3)
    found, expected = proportional(scale * values, counts, power), proportional(values, counts, power)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_does_not_count_neither_earns_nor_matters() -> None:
    values, counts = values_and_counts()
    other = torch.where(counts, values, values.amax(1, keepdim=True) * torch.rand(values.shape))
    for form in (standardised, lambda v, c: proportional(v, c, 1.0)):
        assert (form(values, counts)[~counts] == 0).all()
        torch.testing.assert_close(form(other, counts), form(values, counts), rtol=1e-4, atol=1e-4)
        nothing = form(values, counts & False)
        assert (nothing == 0).all()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_under_the_proportional_form_the_policy_settles_in_proportion_to_the_power_of_the_error(power: float) -> None:
    error = torch.tensor([[0.5, 1.0, 2.0, 4.0, 8.0]])
    every = torch.ones_like(error, dtype=torch.bool)
    advantage, picks = proportional(error, every, power), torch.tensor([[0]])
    logits = torch.zeros(1, 5, requires_grad=True)
    for _ in range(150):
        new, old = PlackettLuce(logits, 1), PlackettLuce(logits.detach(), 1)
        objective = (advantage * log_ratio("token_error", new, old, picks).exp()).sum()
        (gradient,) = torch.autograd.grad(objective, logits)
        logits = (logits + 0.3 * gradient).detach().requires_grad_()
    expected = error.pow(power) / error.pow(power).sum()
    torch.testing.assert_close(logits.softmax(-1).detach(), expected, rtol=1e-3, atol=1e-4)


N, K = 10, 4


def decision_and_picks(batch: int = 5) -> tuple[Decision, Tensor]:
    """A decision on made-up errors, with picks in the order drawn and a uniform mask that shares some of them."""
    generator = torch.Generator().manual_seed(0)
    picks, uniform = (torch.rand(batch, N, generator=generator).argsort(1)[:, :K] for _ in range(2))

    def found(shown: Tensor) -> Reconstruction:
        errors = torch.rand(2, batch, N, generator=generator).masked_fill(shown, 0.0)
        return Reconstruction(errors[0], errors[1], errors[0].sum(1) / (N - K), ~shown)

    visible, shown = visible_mask(picks, N), visible_mask(uniform, N)
    decision = Decision(None, torch.empty(0), visible, found(visible), lambda: uniform)  # type: ignore[arg-type]
    decision.uniform_reconstruction = found(shown)  # type: ignore[misc]
    assert (visible & shown).any() and (visible & ~shown).any()
    return decision, picks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["token_error", "token_motion"])
def test_token_credit_goes_to_hidden_tokens_by_their_own_error(name: str, form: str) -> None:
    decision, picks = decision_and_picks()
    advantage, counts = token_credit(name, form, 2.0, decision, picks)
    assert torch.equal(counts, ~decision.visible)
    errors = decision.reconstruction.token_error if name == "token_error" else decision.reconstruction.motion_error
    for b in range(len(picks)):
        hidden = [i for i in range(N) if i not in picks[b].tolist()]
        values = errors[b, hidden].double().numpy()
        z = (values - values.mean()) / values.std()
        expected = {"standardised": z, "inverted": -z, "proportional": values**2 / (values**2).mean()}[form]
        np.testing.assert_allclose(advantage[b, hidden], expected, rtol=1e-4, atol=1e-5)
        assert (advantage[b, picks[b]] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_pick_surprise_credits_each_pick_in_the_order_drawn_by_the_error_it_would_have_had(form: str) -> None:
    decision, picks = decision_and_picks()
    advantage, counts = token_credit("pick_surprise", form, 1.0, decision, picks)
    error, shown = decision.uniform_reconstruction.token_error.double().numpy(), decision.uniform_visible
    for b, draw in enumerate(picks.tolist()):
        assert counts[b].tolist() == [not shown[b, i] for i in draw]
        values = np.array([error[b, i] for i in draw if not shown[b, i]])
        z = (values - values.mean()) / values.std()
        expected = {"standardised": z, "inverted": -z, "proportional": values / values.mean()}[form]
        np.testing.assert_allclose(advantage[b][counts[b]], expected, rtol=1e-4, atol=1e-5)
        assert (advantage[b][~counts[b]] == 0).all()


# Ratios -----------------------------------------------------------------------------------------------------


def probabilities(logits: Tensor, explore: float) -> list[float]:
    weights = [math.exp(x) for x in logits.double().tolist()]
    return [(1 - explore) * w / sum(weights) + explore / len(weights) for w in weights]


def conditional_draws(logits: Tensor, explore: float, picks: list[int]) -> list[float]:
    """The probability of each pick, given those before it."""
    p = probabilities(logits, explore)
    return [p[pick] / sum(p[i] for i in range(len(p)) if i not in picks[:j]) for j, pick in enumerate(picks)]


@pytest.mark.parametrize("explore", [0.0, 0.3])
@pytest.mark.parametrize("name", CREDITS)
def test_ratios_are_those_of_draws_written_out(name: str, explore: float) -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = 1.5 * torch.randn(2, 3, 5, generator=generator)
    picks = torch.rand(3, 5, generator=generator).argsort(1)[:, :3]
    found = log_ratio(name, PlackettLuce(new, 3, explore), PlackettLuce(old, 3, explore), picks)
    assert found.shape == (3, {"clip": 1, "pick_surprise": 3}.get(name, 5))
    for b, draw in enumerate(picks.tolist()):
        after, before = (conditional_draws(logits[b], explore, draw) for logits in (new, old))
        if name == "clip":
            expected = [math.log(math.prod(after) / math.prod(before)) / 3]
        elif name == "pick_surprise":
            expected = [math.log(a / c) for a, c in zip(after, before, strict=True)]
        else:
            pairs = zip(probabilities(new[b], explore), probabilities(old[b], explore), strict=True)
            expected = [math.log(a / c) for a, c in pairs]
        assert found[b].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("explore", [0.0, 0.5])
@pytest.mark.parametrize("name", CREDITS)
def test_ratios_of_extreme_policies_are_bounded_and_have_finite_gradients(name: str, explore: float) -> None:
    new = torch.tensor([[1e4, -1e4, 0.0, 50.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1e4, 1e4, 0.0, -50.0], [1e4, 0.0, -1e4, 5.0]])
    picks = torch.tensor([[0, 1], [2, 1]])
    found = log_ratio(name, PlackettLuce(new, 2, explore), PlackettLuce(old, 2, explore), picks)
    assert torch.isfinite(found).all() and found.abs().max() <= LOG_RATIO_BOUND == 10
    assert explore or found.abs().max() == LOG_RATIO_BOUND  # reached, or the bound would be untested
    for advantage in (1.0, -1.0):
        objective = clipped_surrogate(found, torch.full_like(found, advantage), 0.2).sum()
        (gradient,) = torch.autograd.grad(objective, new, retain_graph=True)
        assert torch.isfinite(objective) and torch.isfinite(gradient).all()


# PPO's objective --------------------------------------------------------------------------------------------


def literal_objective(ratio: float, advantage: float, clip_range: float) -> float:
    ppo = min(ratio * advantage, min(max(ratio, 1 - clip_range), 1 + clip_range) * advantage)
    return max(ppo, 3 * advantage) if advantage < 0 else ppo


@pytest.mark.parametrize("clip_range", [0.1, 0.2])
def test_the_objective_is_ppos_with_the_dual_clip(clip_range: float) -> None:
    ratios, advantages = [0.01, 0.5, 0.79, 0.85, 1.0, 1.15, 1.3, 2.9, 3.1, 50.0], [-2.0, -0.3, 0.0, 0.4, 3.0]
    pairs = [(r, a) for r in ratios for a in advantages]
    ratio, advantage = torch.tensor(pairs, dtype=torch.float64).T
    found = clipped_surrogate(ratio.log(), advantage, clip_range)
    assert found.tolist() == pytest.approx([literal_objective(r, a, clip_range) for r, a in pairs])


def slope(log: float, advantage: float) -> float:
    ratio_log = torch.tensor([log], requires_grad=True)
    return torch.autograd.grad(clipped_surrogate(ratio_log, torch.tensor([advantage]), 0.2).sum(), ratio_log)[0].item()


def test_without_the_dual_clip_a_growing_ratio_would_make_the_gradient_unbounded_and_with_it_none_is_left() -> None:
    for log in (1.5, 4.0, 9.0):
        ratio_log = torch.tensor(log, requires_grad=True)
        ratio = ratio_log.exp()
        unguarded = torch.minimum(-ratio, -ratio.clamp(0.8, 1.2))  # the published objective at advantage -1
        (gradient,) = torch.autograd.grad(unguarded, ratio_log)
        assert gradient.item() == pytest.approx(-math.exp(log))
        assert slope(log, -1.0) == 0
    steepest = max(abs(slope(log, -1.0)) for log in np.linspace(-10, 10, 401).tolist())
    assert 1.2 < steepest <= DUAL_CLIP == 3


@pytest.mark.parametrize(
    ("log", "advantage", "expected"),
    [
        (0.0, 1.0, 1.0), (0.0, -1.0, -1.0), (0.0, 0.0, 0.0),  # no step yet
        (0.5, 1.0, 0.0), (-0.5, -1.0, 0.0), (9.0, 1.0, 0.0),  # gone far enough the right way
        (-0.5, 1.0, math.exp(-0.5)), (0.5, -1.0, -math.exp(0.5)),  # gone the wrong way
    ],
)  # fmt: skip
def test_the_gradient_is_the_policys_until_a_clip_stops_it(log: float, advantage: float, expected: float) -> None:
    assert slope(log, advantage) == pytest.approx(expected)


# Advantages over time ---------------------------------------------------------------------------------------


def literal_gae(rewards: Any, values: Any, ended: Any, last: float, gamma: float, gae_lambda: float) -> list[float]:
    """The sum of discounted temporal-difference errors up to the end of the episode, for one environment."""
    length = len(rewards)
    after = [*values[1:], last]
    delta = [rewards[t] + gamma * (0 if ended[t] else after[t]) - values[t] for t in range(length)]
    advantages = []
    for t in range(length):
        end = next((u for u in range(t, length) if ended[u]), length - 1)
        advantages.append(sum((gamma * gae_lambda) ** (u - t) * delta[u] for u in range(t, end + 1)))
    return advantages


def trajectory(length: int = 7, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Episodes of three steps that end at different times in each environment."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, length, batch, generator=generator, dtype=torch.float64)
    ended = (torch.arange(length)[:, None] + torch.arange(batch)) % 3 == 2
    return rewards, values, ended, torch.randn(batch, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (1.0, 1.0), (0.9, 0.0), (0.0, 0.95)])
def test_gae_is_the_discounted_sum_of_td_errors_within_an_episode(gamma: float, gae_lambda: float) -> None:
    rewards, values, ended, last = trajectory()
    found = gae(rewards, values, ended, last, gamma, gae_lambda)
    for b in range(3):
        r, v, e = (x[:, b].tolist() for x in (rewards, values, ended))
        expected = literal_gae(r, v, e, last[b].item(), gamma, gae_lambda)
        assert found[:, b].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_with_no_discounting_of_anything_gae_is_the_return_less_the_value() -> None:
    rewards, values, ended, last = trajectory(batch=1)  # ends at steps 2 and 5, so step 6 goes on
    r, v = rewards[:, 0].tolist(), values[:, 0].tolist()
    returns = [r[0] + r[1] + r[2], r[1] + r[2], r[2], r[3] + r[4] + r[5], r[4] + r[5], r[5], r[6] + last.item()]
    found = gae(rewards, values, ended, last, 1.0, 1.0)[:, 0].tolist()
    assert found == pytest.approx([a - b for a, b in zip(returns, v, strict=True)])


def test_at_gamma_zero_an_advantage_is_reward_less_value_whatever_follows() -> None:
    rewards, values, ended, last = trajectory()
    torch.testing.assert_close(gae(rewards, values, ended, 1e9 + last, 0.0, 0.95), rewards - values)
