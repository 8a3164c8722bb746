"""Ordered draws without replacement of K of N tokens, and the scores that carry a draw to the environment."""

from __future__ import annotations

import torch
from torch import Tensor

# Log-weight of a token that can no longer be drawn: its exponential is 0, and 0 * _NEVER is 0 too, which
# 0 * -inf is not.
_NEVER = -1e30
_TINY = torch.finfo(torch.float64).tiny


class PlackettLuce:
    """The Plackett-Luce distribution over ordered draws without replacement of K of N tokens.

    Each draw takes token i with probability p_i over the sum of p of the tokens not yet drawn, where
    p = (1 - explore) softmax(logits) + explore / N. Leading dimensions, written ..., are independent.

    Tokens that are not ``available`` count as drawn before: p stays that of all N tokens, and every draw is among the
    available ones, in proportion to their p. A draw in several rounds with the same logits is thus, exactly, one draw.

    The arithmetic is float64 inside, whatever the logits are, and results are float32 (float64 for float64
    logits): in float32 the running sums over K draws are off by up to 1e-5 a pick, for logits within +-20 and
    N = K = 1568. As it is, results are within 2e-7 * max(1, |result|) of exact, float32's own rounding, for
    logits up to +-1e6, and values and gradients are finite up to +-1e20. Memory is O(N): nothing is K x N.

    Args:
        logits: [..., N], any floating dtype, finite.
        k: K, the number of tokens drawn.
        explore: weight in [0, 1] of the uniform distribution mixed in, for drawing and log-probability alike.
        available: bool [..., N], which tokens can be drawn, K of them or more (not checked: that would stop the
            device); None for all. Picks must be among them.

    Attributes:
        log_p: [..., N], normalised log-probability of each token in the first draw, after mixing; about -1e30, for a
            probability of 0, where a token is not available.
        k: K.

    Raises:
        ValueError: if K is not in 1..N, ``explore`` not in [0, 1], or picks do not have the shape [..., K].
    """

    def __init__(self, logits: Tensor, k: int, explore: float = 0.0, available: Tensor | None = None) -> None:
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k={k} tokens cannot be drawn of N={logits.shape[-1]}: give k between 1 and N")
        if not 0 <= explore <= 1:
            raise ValueError(f"explore={explore} is not a share: give a value between 0 and 1")
        self.k = k
        self._logits = logits
        self._log_p = logits.double().log_softmax(-1)
        if explore:
            self._log_p = ((1 - explore) * self._log_p.exp() + explore / logits.shape[-1]).log()
        if available is not None:
            self._logits = logits.masked_fill(~available, -torch.inf)
            self._log_p = self._log_p.masked_fill(~available, _NEVER).log_softmax(-1)
        self.log_p = self._rounded(self._log_p)

    def sample(self, generator: torch.Generator | None = None, *, uniform: Tensor | None = None) -> Tensor:
        """Draw K tokens: int64 [..., K] in the order drawn, by Gumbel-top-k (Kool et al., ICML 2019).

        Args:
            generator: on the logits' device; without one torch's global generator is used.
            uniform: float64 [..., N] in [0, 1), numbers that decide in the generator's place.
        """
        log_p = self._log_p.detach()
        if uniform is None:
            uniform = torch.rand(log_p.shape, dtype=log_p.dtype, device=log_p.device, generator=generator)
        # -log of an Exponential(1) variable is a Gumbel(0, 1) one; an exact 0 would make it infinite.
        noise = -torch.log1p(-uniform)
        return (log_p - noise.clamp_min(_TINY).log()).topk(self.k).indices

    def mode(self) -> Tensor:
        """The most probable draw, int64 [..., K]: the K highest logits, highest first."""
        # Mixing keeps the order of the logits but rounds small differences away.
        return self._logits.topk(self.k).indices

    def pick_log_prob(self, picks: Tensor) -> Tensor:
        """Log-probability of each pick given those before it: picks [..., K] -> [..., K]."""
        drawn, _, left = self._scan(picks)
        return self._rounded(drawn - left[..., :-1])

    def log_prob(self, picks: Tensor) -> Tensor:
        """Exact log-probability of the ordered draw: picks [..., K] -> [...]."""
        drawn, _, left = self._scan(picks)
        return self._rounded((drawn - left[..., :-1]).sum(-1))

    def pick_entropy(self, picks: Tensor) -> Tensor:
        """Entropy, in nats, of each draw's choice among the tokens still left: picks [..., K] -> [..., K]."""
        return self._rounded(self._conditional_entropy(picks))

    def entropy(self, picks: Tensor) -> Tensor:
        """Sum of the K conditional entropies along the draw, in nats: picks [..., K] -> [...].

        By the chain rule its mean over draws is the exact entropy of the distribution. It is differentiable
        in the logits at fixed picks, which leaves out how the logits change the picks drawn.
        """
        return self._rounded(self._conditional_entropy(picks).sum(-1))

    def effective_tokens(self) -> Tensor:
        """exp(entropy) of the first draw, [...]: N (or all available) if uniform, towards 1 as one token takes all."""
        return self._rounded(-(self._log_p.exp() * self._log_p).sum(-1)).exp()

    def _scan(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, in float64, of what was drawn and of what was left.

        Returns:
            drawn [..., K] of each pick, never_drawn [..., N] with the picks at _NEVER, and left [..., K + 1]:
            the total of all tokens not drawn before pick j, and last that of the tokens never drawn.
        """
        expected = (*self._log_p.shape[:-1], self.k)
        if picks.shape != expected:
            raise ValueError(f"picks have shape {tuple(picks.shape)}; expected {expected}, K={self.k} a draw")
        drawn = self._log_p.gather(-1, picks)
        never_drawn = self._log_p.scatter(-1, picks, _NEVER)
        total = never_drawn.logsumexp(-1, keepdim=True)
        return drawn, never_drawn, _reversed_logcumsumexp(torch.cat([drawn, total], -1))

    def _conditional_entropy(self, picks: Tensor) -> Tensor:
        """Entropy in float64 of each draw's choice among the tokens left: picks [..., K] -> [..., K].

        Splitting off pick j, of conditional probability q_j, gives H_j = h(q_j) + (1 - q_j) H_{j+1} with the
        binary entropy h. With R_j the total left, 1 - q_j = R_{j+1} / R_j, so R_j H_j is a reversed running
        sum of R_j h(q_j), all terms of which are positive: nothing cancels, however unequal the logits.
        """
        drawn, never_drawn, left = self._scan(picks)
        split = _negated_p_log_p(drawn - left[..., :-1]) + _negated_p_log_p(left[..., 1:] - left[..., :-1])
        rest = _negated_p_log_p(never_drawn - left[..., -1:]).sum(-1, keepdim=True)
        terms = torch.cat([split, rest], -1).clamp_min(_TINY).log() + left
        return (_reversed_logcumsumexp(terms) - left)[..., :-1].exp()

    def _rounded(self, result: Tensor) -> Tensor:
        return result.to(torch.promote_types(self._logits.dtype, torch.float32))


def picks_to_scores(picks: Tensor, n: int) -> Tensor:
    """Scores whose K highest are the picks, in their order: int64 [..., K] -> float32 [..., N] in [-1, 1].

    Picks descend evenly from 1 and stay above 0; all other tokens get -1.

    Raises:
        ValueError: if there are more picks than the ``n`` tokens.
    """
    k = picks.shape[-1]
    if k > n:
        raise ValueError(f"{k} picks do not fit n={n} tokens: n must be at least {k}")
    values = torch.linspace(1, 0, k + 1, device=picks.device)[:-1]
    scores = torch.full((*picks.shape[:-1], n), -1.0, device=picks.device)
    return scores.scatter_(-1, picks, values.expand_as(picks))


def _reversed_logcumsumexp(x: Tensor) -> Tensor:
    """log of the sum of exp(x) from each entry to the last, [..., M] -> [..., M]."""
    return x.flip(-1).logcumsumexp(-1).flip(-1)


def _negated_p_log_p(log_p: Tensor) -> Tensor:
    """-p log p, elementwise; 0 with gradient 0 where p underflows."""
    return -log_p.exp() * log_p
