"""Plackett-Luce draws against brute-force enumeration and term-by-term float64 arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.distributions import PlackettLuce, picks_to_scores

SMALL = [(n, k) for n in range(1, 6) for k in range(1, n + 1)]


def some_logits(n: int, scale: float = 1.5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def mixed(logits: Tensor, explore: float) -> Tensor:
    return (1 - explore) * logits.double().softmax(-1) + explore / logits.shape[-1]


def draw_probabilities(p: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """Every ordered draw of k and the literal product of its conditional probabilities."""
    table = {}
    for draw in permutations(range(len(p)), k):
        left, product = list(range(len(p))), 1.0
        for token in draw:
            product *= (p[token] / p[left].sum()).item()
            left.remove(token)
        table[draw] = product
    return table


def literal(logits: Tensor, picks: Tensor, explore: float = 0.0) -> tuple[Tensor, Tensor]:
    """Conditional log-probabilities and entropies [K] of one draw, each from a softmax of what is left."""
    logits = logits.double()
    scores = mixed(logits, explore).log() if explore else logits
    left = torch.ones(len(scores), dtype=torch.bool)
    log_probs, entropies = [], []
    for pick in picks.tolist():
        log_p = scores[left].log_softmax(0)
        log_probs.append(log_p[left[:pick].sum()])
        entropies.append(-(log_p.exp() * log_p).sum())
        left = left.clone()
        left[pick] = False
    return torch.stack(log_probs), torch.stack(entropies)


def assert_exact(dist: PlackettLuce, logits: Tensor, picks: Tensor, explore: float = 0.0) -> None:
    """Values agree with the literal ones within 2e-7 * max(1, |value|)."""
    log_prob, entropy = literal(logits, picks, explore)
    for ours, exact in (
        (dist.pick_log_prob(picks), log_prob),
        (dist.pick_entropy(picks), entropy),
        (dist.log_prob(picks), log_prob.sum()),
        (dist.entropy(picks), entropy.sum()),
    ):
        error = ((ours.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
        assert error <= 2e-7


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest tensor that any operation returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("explore", [0.0, 0.3])
@pytest.mark.parametrize(("n", "k"), SMALL)
def test_log_prob_is_the_literal_product_and_sums_to_one(n: int, k: int, explore: float) -> None:
    logits = some_logits(n)
    table = draw_probabilities(mixed(logits, explore), k)
    dist = PlackettLuce(logits.expand(len(table), n), k, explore)
    picks = torch.tensor(list(table))
    ours, exact = dist.log_prob(picks).exp(), torch.tensor(list(table.values()), dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    assert ours.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(dist.pick_log_prob(picks).sum(-1), dist.log_prob(picks))


@pytest.mark.parametrize("explore", [0.0, 0.3])
@pytest.mark.parametrize(("n", "k"), SMALL)
def test_mean_entropy_over_draws_is_the_exact_joint_entropy(n: int, k: int, explore: float) -> None:
    logits = some_logits(n, seed=1)
    table = draw_probabilities(mixed(logits, explore), k)
    p = torch.tensor(list(table.values()), dtype=torch.float64)
    dist = PlackettLuce(logits.expand(len(table), n), k, explore)
    picks = torch.tensor(list(table))
    exact = -(p * p.log()).sum().item()
    assert (p * dist.entropy(picks)).sum().item() == pytest.approx(exact, abs=1e-12)
    torch.testing.assert_close(dist.pick_entropy(picks).sum(-1), dist.entropy(picks))


@pytest.mark.parametrize(("n", "k", "explore"), [(4, 2, 0), (4, 3, 0.5), (4, 4, 0), (5, 2, 1), (3, 1, 0.2)])
def test_gumbel_top_k_frequencies_match_plackett_luce(n: int, k: int, explore: float) -> None:
    logits, draws = some_logits(n, seed=2, dtype=torch.float32), 60_000
    table = draw_probabilities(mixed(logits, explore), k)
    dist = PlackettLuce(logits.expand(draws, n), k, explore)
    picks = dist.sample(torch.Generator().manual_seed(0))
    assert picks.shape == (draws, k) and picks.dtype == torch.int64
    place = n ** torch.arange(k)
    counts = torch.bincount((picks * place).sum(1), minlength=n**k)
    observed = [counts[(torch.tensor(draw) * place).sum()].item() for draw in table]
    assert sum(observed) == draws, "a draw repeats a token"
    assert chisquare(observed, np.array(list(table.values())) * draws).pvalue > 1e-3

    sets: dict[frozenset[int], float] = defaultdict(float)
    drawn: dict[frozenset[int], float] = defaultdict(float)
    for (draw, probability), count in zip(table.items(), observed, strict=True):
        sets[frozenset(draw)] += probability
        drawn[frozenset(draw)] += count
    if len(sets) > 1:
        assert chisquare(list(drawn.values()), np.array(list(sets.values())) * draws).pvalue > 1e-3


def test_the_same_generator_state_draws_the_same_picks() -> None:
    dist = PlackettLuce(some_logits(60).expand(3, 60), 10)
    first, again, other = (dist.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_exponential_noise_of_exactly_zero_does_no_harm() -> None:
    dist = PlackettLuce(some_logits(50), 5)
    assert torch.equal(dist.sample(uniform=torch.zeros(50, dtype=torch.float64)), dist.mode())


@pytest.mark.parametrize("explore", [0.0, 0.4])
def test_mode_is_the_most_probable_draw(explore: float) -> None:
    logits = some_logits(5, seed=3)
    table = draw_probabilities(mixed(logits, explore), 3)
    assert tuple(PlackettLuce(logits, 3, explore).mode().tolist()) == max(table, key=lambda draw: table[draw])


def test_mode_keeps_the_order_of_logits_that_mixing_rounds_away() -> None:
    logits = torch.tensor([-60.0, 0.0, -50.0, -40.0])
    assert PlackettLuce(logits, 4, explore=0.5).mode().tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("explore", [0.0, 0.25])
@pytest.mark.parametrize(("n", "k"), [(7, 3), (7, 6), (7, 7), (1, 1)])
def test_gradients_match_autograd_through_the_literal_form(n: int, k: int, explore: float) -> None:
    logits = some_logits(n, seed=4).requires_grad_()
    dist = PlackettLuce(logits, k, explore)
    picks = dist.sample(torch.Generator().manual_seed(5))
    weight = some_logits(k, seed=6)
    log_prob, entropy = literal(logits, picks, explore)
    for ours, exact in (
        (dist.pick_log_prob(picks), log_prob),
        (dist.pick_entropy(picks), entropy),
        (dist.log_prob(picks), log_prob.sum()),
        (dist.entropy(picks), entropy.sum()),
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        along = weight if ours.ndim else torch.ones((), dtype=torch.float64)
        grads = [torch.autograd.grad(y, logits, along, retain_graph=True)[0] for y in (ours, exact)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("worst_first", [False, True])
@pytest.mark.parametrize(("n", "k", "scale"), [(1568, 78, 20), (400, 399, 20), (400, 400, 20), (400, 400, 0)])
def test_float32_logits_lose_only_the_last_rounding(n: int, k: int, scale: int, worst_first: bool) -> None:
    logits = (torch.rand(n, generator=torch.Generator().manual_seed(7)) * 2 - 1) * scale
    dist = PlackettLuce(logits, k)
    sampled = dist.sample(torch.Generator().manual_seed(8))
    picks = logits.topk(k, largest=False).indices if worst_first else sampled
    assert dist.log_prob(picks).dtype == torch.float32
    assert_exact(dist, logits, picks)


@pytest.mark.parametrize("spike", [40.0, 1000.0, -1000.0, 1e6])
@pytest.mark.parametrize("k", [1, 19, 20])
@pytest.mark.parametrize("spike_last", [False, True])
def test_one_extreme_logit_stays_exact_with_finite_gradients(spike: float, k: int, spike_last: bool) -> None:
    logits = torch.zeros(20)
    logits[0] = spike
    picks = torch.arange(20).roll(-1 if spike_last else 0)[:k]
    logits.requires_grad_()
    dist = PlackettLuce(logits, k)
    assert_exact(dist, logits.detach(), picks)
    for value in (dist.log_prob(picks), dist.entropy(picks), dist.effective_tokens()):
        assert value.isfinite()
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert grad.isfinite().all()


@pytest.mark.parametrize("spread", [5e3, 1e6, 1e20])
@pytest.mark.parametrize("explore", [0.0, 0.5])
@pytest.mark.parametrize("worst_first", [False, True])
def test_logits_all_far_apart_keep_gradients_finite(spread: float, explore: float, worst_first: bool) -> None:
    logits = torch.linspace(-spread, spread, 30).requires_grad_()
    picks = torch.arange(30) if worst_first else torch.arange(30).flip(0)
    dist = PlackettLuce(logits, 30, explore)
    if spread <= 1e6:
        assert_exact(dist, logits.detach(), picks, explore)
    for value in (dist.log_prob(picks), dist.entropy(picks), dist.effective_tokens()):
        assert value.isfinite()
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert grad.isfinite().all()


def test_bfloat16_logits_are_computed_as_if_they_were_float32() -> None:
    rough = some_logits(40, scale=5).bfloat16().requires_grad_()
    fine = rough.detach().float().requires_grad_()
    picks = PlackettLuce(fine, 12).sample(torch.Generator().manual_seed(0))
    a, b = PlackettLuce(rough, 12, explore=0.1), PlackettLuce(fine, 12, explore=0.1)
    readings: list[Callable[[PlackettLuce], Tensor]] = [
        lambda d: d.log_p,
        lambda d: d.pick_log_prob(picks),
        lambda d: d.log_prob(picks),
        lambda d: d.pick_entropy(picks),
        lambda d: d.entropy(picks),
        lambda d: d.effective_tokens(),
    ]
    for read in readings:
        assert read(a).dtype == torch.float32
        assert torch.equal(read(a), read(b))
    a.log_prob(picks).backward()
    b.log_prob(picks).backward()
    assert rough.grad is not None and fine.grad is not None
    assert torch.equal(rough.grad, fine.grad.bfloat16())


@pytest.mark.parametrize("explore", [0.0, 0.6, 1.0])
def test_log_p_mixes_the_categorical_with_the_uniform_one(explore: float) -> None:
    logits = some_logits(9)
    log_p = PlackettLuce(logits, 2, explore).log_p
    torch.testing.assert_close(log_p.exp(), mixed(logits, explore))
    assert log_p.logsumexp(-1).item() == pytest.approx(0, abs=1e-12)


def test_effective_tokens_is_n_if_uniform_and_one_if_certain() -> None:
    certain, two = torch.eye(50)[3] * 1e4, torch.eye(50)[:2].sum(0) * 1e4
    logits = torch.stack([torch.zeros(50), certain, two])
    torch.testing.assert_close(PlackettLuce(logits, 1).effective_tokens(), torch.tensor([50.0, 1.0, 2.0]))
    assert PlackettLuce(logits[1], 1, explore=1.0).effective_tokens().item() == pytest.approx(50)


def test_every_leading_dimension_is_its_own_distribution() -> None:
    logits = some_logits(2 * 3 * 11).reshape(2, 3, 11)
    dist = PlackettLuce(logits, 4)
    picks = dist.sample(torch.Generator().manual_seed(0))
    assert picks.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            log_prob, entropy = literal(logits[i, j], picks[i, j])
            torch.testing.assert_close(dist.pick_log_prob(picks)[i, j], log_prob)
            torch.testing.assert_close(dist.pick_entropy(picks)[i, j], entropy)


def test_no_tensor_grows_with_k_times_n() -> None:
    batch, n, k = 4, 200, 100
    logits = torch.randn(batch, n, requires_grad=True)
    with LargestTensor() as seen:
        dist = PlackettLuce(logits, k, explore=0.1)
        picks = dist.sample()
        (dist.log_prob(picks) + dist.entropy(picks) + dist.effective_tokens()).sum().backward()
    assert batch * n <= seen.numel < 2 * batch * n


AVAILABLE = torch.tensor([True, False, True, True, False, True])


def available_draws(logits: Tensor, k: int, explore: float) -> dict[tuple[int, ...], float]:
    """Every ordered draw of k of the ``AVAILABLE`` tokens and its probability, by their share of p over all tokens."""
    index = AVAILABLE.nonzero()[:, 0]
    table = draw_probabilities(mixed(logits, explore)[index], k)
    return {tuple(index[list(draw)].tolist()): probability for draw, probability in table.items()}


@pytest.mark.parametrize("explore", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_only_available_tokens_are_drawn_and_their_probabilities_are_the_literal_ones(k: int, explore: float) -> None:
    logits = some_logits(6, seed=9).requires_grad_()
    table = available_draws(logits.detach(), k, explore)
    picks, exact = torch.tensor(list(table)), torch.tensor(list(table.values()), dtype=torch.float64)
    dist = PlackettLuce(logits.expand(len(table), 6), k, explore, AVAILABLE)
    torch.testing.assert_close(dist.log_prob(picks).exp(), exact, rtol=1e-12, atol=0)
    assert (exact * dist.entropy(picks)).sum().item() == pytest.approx(-(exact * exact.log()).sum().item(), abs=1e-12)
    first = (mixed(logits, explore) * AVAILABLE).detach()
    torch.testing.assert_close(dist.log_p[0].exp(), first / first.sum())
    assert tuple(dist.mode()[0].tolist()) == max(table, key=lambda draw: table[draw]) or explore == 1
    assert AVAILABLE[dist.mode()].all()

    draws = PlackettLuce(logits.expand(30_000, 6), k, explore, AVAILABLE).sample(torch.Generator().manual_seed(0))
    place = 6 ** torch.arange(k)
    counts = torch.bincount((draws * place).sum(1), minlength=6**k)[(picks * place).sum(1)]
    assert counts.sum() == 30_000, "a draw holds a token that was not available, or one twice"
    assert chisquare(counts.numpy(), exact.numpy() * 30_000).pvalue > 1e-3


@pytest.mark.parametrize("explore", [0.0, 0.3])
def test_gradients_with_tokens_left_out_match_autograd_through_the_literal_form(explore: float) -> None:
    logits = some_logits(6, seed=10).requires_grad_()
    picks = torch.tensor([3, 0, 5, 2])
    dist = PlackettLuce(logits, 4, explore, AVAILABLE)
    p = mixed(logits, explore) * AVAILABLE
    left = [p.sum() - p[picks[:j]].sum() for j in range(4)]
    exact = torch.stack([p[pick].log() - total.log() for pick, total in zip(picks, left, strict=True)])
    first = (p / p.sum())[AVAILABLE]
    for ours, literally in (
        (dist.log_prob(picks), exact.sum()),
        (dist.effective_tokens().log(), -(first * first.log()).sum()),
    ):
        torch.testing.assert_close(ours, literally, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (ours, literally)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("explore", [0.0, 0.5])
def test_a_draw_in_rounds_with_the_same_logits_is_one_draw(explore: float) -> None:
    logits = some_logits(40, seed=11)
    whole = PlackettLuce(logits, 12, explore)
    picks = whole.sample(torch.Generator().manual_seed(1))
    available, log_probs, entropies = torch.ones(40, dtype=torch.bool), [], []
    for part in picks.split(4):
        dist = PlackettLuce(logits, 4, explore, available)
        log_probs.append(dist.pick_log_prob(part))
        entropies.append(dist.pick_entropy(part))
        available = available.index_fill(0, part, False)
    torch.testing.assert_close(torch.cat(log_probs), whole.pick_log_prob(picks), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(entropies), whole.pick_entropy(picks), rtol=1e-12, atol=1e-12)


def test_an_order_of_all_tokens_holds_a_draw_among_the_available_ones() -> None:
    # Luce's axiom, by which agents that know of no rounds may send the environment an order of all tokens
    logits, draws = some_logits(6, seed=12), 30_000
    table = available_draws(logits, 2, 0.3)
    order = PlackettLuce(logits.expand(draws, 6), 6, 0.3).sample(torch.Generator().manual_seed(0))
    first = order[AVAILABLE[order]].view(draws, 4)[:, :2]
    counts = torch.bincount((first * torch.tensor([1, 6])).sum(1), minlength=36)
    observed = [counts[a + 6 * b].item() for a, b in table]
    assert chisquare(observed, np.array(list(table.values())) * draws).pvalue > 1e-3


@pytest.mark.parametrize("spread", [20.0, 1e6, 1e20])
@pytest.mark.parametrize("explore", [0.0, 0.5])
@pytest.mark.parametrize("best_left_out", [False, True])
def test_tokens_left_out_keep_far_apart_logits_exact_and_finite(
    spread: float, explore: float, best_left_out: bool
) -> None:
    logits = torch.linspace(-spread, spread, 30).requires_grad_()
    available = torch.arange(30) < 20 if best_left_out else torch.arange(30) >= 10
    picks = available.nonzero()[:, 0]
    dist = PlackettLuce(logits, 20, explore, available)
    assert available[dist.sample(torch.Generator().manual_seed(0))].all()
    if not explore and spread <= 1e6:  # without mixing, what is left out might as well not be there
        log_prob, entropy = literal(logits.detach()[available], torch.arange(20))
        for ours, exact in ((dist.pick_log_prob(picks), log_prob), (dist.pick_entropy(picks), entropy)):
            assert ((ours - exact).abs() / exact.abs().clamp_min(1)).max() <= 2e-7
    for value in (dist.log_prob(picks), dist.entropy(picks), dist.effective_tokens()):
        assert value.isfinite()
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert grad.isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 5), (1568, 78), (1568, 1568)])
def test_the_top_k_of_picks_to_scores_are_the_picks_in_order(n: int, k: int) -> None:
    picks = PlackettLuce(some_logits(n).expand(3, n), k).sample(torch.Generator().manual_seed(0))
    scores = picks_to_scores(picks, n)
    assert scores.shape == (3, n) and scores.dtype == torch.float32
    assert scores.min() >= -1 and scores.max() == 1
    top = scores.topk(k)
    assert torch.equal(top.indices, picks)
    assert (top.values > 0).all() and (top.values.diff(dim=-1) < 0).all()
    assert ((scores > 0).sum(-1) == k).all()


@pytest.mark.parametrize("k", [0, 6])
def test_a_k_outside_one_to_n_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} tokens cannot be drawn of N=5"):
        PlackettLuce(torch.zeros(5), k)


@pytest.mark.parametrize("explore", [-0.1, 1.1, math.nan])
def test_an_explore_that_is_no_share_is_refused(explore: float) -> None:
    with pytest.raises(ValueError, match=f"explore={explore} is not a share"):
        PlackettLuce(torch.zeros(5), 2, explore)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (1, 2), (4, 2)])
def test_picks_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
        PlackettLuce(torch.zeros(3, 5), 2).log_prob(torch.zeros(shape, dtype=torch.int64))


def test_more_picks_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 picks do not fit n=2"):
        picks_to_scores(torch.arange(3), 2)
