"""Actor and critic on trajectory attention."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from agents.attention import TrajectoryAttention
from tats_env.precision import autocast


class TrajectoryBlock(nn.Module):
    """LayerNorm, trajectory attention, LayerNorm, MLP, with residuals: [B, T', S, D] -> [B, T', S, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = TrajectoryAttention(dim, num_heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens along trajectories, then each token's channels."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TrajectoryPolicy(nn.Module):
    """Tokens -> one logit a token (actor) and one value a clip (critic), on a shared trunk.

    Args:
        observation_shape: (T', S, D).
        width: channels inside.
        num_heads: of the attention.
        depth: trajectory blocks.
        logit_cap: c of ``c * tanh((l - mean) / c)``; bounds how far apart two logits can be (2c), so that no ratio
            of probabilities can run away.

    Raises:
        ValueError: if ``num_heads`` does not divide ``width``.
    """

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        width: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        logit_cap: float = 8.0,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "observation_shape": list(observation_shape),
            "width": width,
            "num_heads": num_heads,
            "depth": depth,
            "logit_cap": logit_cap,
        }
        self.logit_cap = logit_cap
        channels = observation_shape[-1]
        # The projection can do all that a scale and a shift of the norm's own could, which would need the gradient of
        # something as large as the observation
        norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.embed = nn.Sequential(norm, nn.Linear(channels, width))
        self.blocks = nn.Sequential(*(TrajectoryBlock(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.actor = nn.Linear(width, 1, bias=False)  # which would move all logits alike, and the mean is taken off
        self.critic = nn.Linear(width, 1)
        # Start near uniform masks and near a value of nothing.
        for head in (self.actor, self.critic):
            nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(self.critic.bias)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Observation [B, T', S, D] -> logits [B, N] and values [B], float32."""
        x = self.norm(self.blocks(self.embed(observation)))
        with autocast(x.device, enabled=False):  # in bfloat16 logits would collide
            x = x.float()
            raw = self.actor(x).flatten(1)
            logits = self.logit_cap * torch.tanh((raw - raw.mean(1, keepdim=True)) / self.logit_cap)
            return logits, self.critic(x.mean(dim=(1, 2))).squeeze(-1)
