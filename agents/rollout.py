"""What PPO collects and learns from."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """What one rollout stored, M = n_steps * B decisions, on the device."""

    observation: Tensor
    """[M, T', S, D]"""
    picks: Tensor
    """[M, K], in the order drawn"""
    logits: Tensor
    """[M, N] float32, of the policy that drew"""
    value: Tensor
    """[M]"""
    returns: Tensor
    """[M], in units of the reward's running deviation"""
    advantage: Tensor
    """[M, X], X as the credit has it"""
    counts: Tensor
    """bool [M, X], which advantages count"""
    available: Tensor | None = None
    """bool [M, N], which tokens could be drawn; None where all could"""


class Statistics(NamedTuple):
    """Scalars of one loss, for the log."""

    loss: Tensor
    policy_gradient_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    entropy: Tensor
    effective_tokens: Tensor


def gae(rewards: Tensor, values: Tensor, ended: Tensor, last_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al., 2016): [L, B] from rewards, values and ends [L, B].

    Args:
        rewards, values: at each step.
        ended: bool, whether the episode ended with the step.
        last_value: [B], of the observation after the last step.
        gamma, gae_lambda: discount and trace decay.
    """
    advantages, carried = torch.zeros_like(rewards), torch.zeros_like(last_value)
    following = last_value
    for t in reversed(range(len(rewards))):
        goes_on = (~ended[t]).float()
        delta = rewards[t] + gamma * following * goes_on - values[t]
        carried = delta + gamma * gae_lambda * goes_on * carried
        advantages[t], following = carried, values[t]
    return advantages


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """Some of the decisions of a rollout, by index [m]."""
    return Rollout._make(None if x is None else x[rows] for x in rollout)
