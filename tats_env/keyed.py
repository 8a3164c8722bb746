"""Randomness without state: bits, permutations and uniform numbers that depend on nothing but their key."""

from __future__ import annotations

import torch
from torch import Tensor


def keyed_bits(key: Tensor, *salt: int | Tensor) -> Tensor:
    """Random bits that depend on nothing but their key: int64, of ``key``'s shape broadcast with the salts'.

    SplitMix64's finaliser (Steele et al., OOPSLA 2014), applied once for each part. A counter in place of a state
    makes a draw the same on every device and for every way of sharing out the environments.
    """

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # torch's >> keeps the sign

    x = key
    for part in (0, *salt):
        x = (x ^ part) + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        x = x ^ shifted(x, 31)
    return x


def keyed_order(key: Tensor, num_tokens: int) -> Tensor:
    """A uniform random permutation of the tokens for each key: int64 [B] -> [B, N]."""
    return keyed_bits(key[:, None], torch.arange(num_tokens, device=key.device)).argsort(dim=1)


def keyed_uniform(key: Tensor, *salt: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, of ``keyed_bits``' shape."""
    return ((keyed_bits(key, *salt) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
