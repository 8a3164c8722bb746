"""Trajectory attention: attend within each frame, then along time, so that a token follows its object."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class TrajectoryAttention(nn.Module):
    """Multi-head trajectory attention over a clip's tokens: [B, T', S, D] -> [B, T', S, D].

    Patrick et al., "Keeping Your Eye on the Ball: Trajectory Attention in Video Transformers" (NeurIPS 2021),
    section 3. Each of the N = T' * S queries pools the S values of every frame on its own, which gives T'
    trajectory tokens; a second attention, whose query is the trajectory token at the query's own time, pools
    those over time::

        y~[s,t,t'] = sum_s' v[s',t'] softmax_s'(<q[s,t], k[s',t']> / sqrt(D/heads))
        y[s,t]     = sum_t' W_v y~[s,t,t'] softmax_t'(<W_q y~[s,t,t], W_k y~[s,t,t']> / sqrt(D/heads))

    and an output projection follows. Differences to the released Motionformer code: W_v is applied, which
    that code leaves out, and W_k has no bias, since it would shift all T' logits of a query alike and never
    learn.

    The same function is computed without projecting the N * T' trajectory tokens: <W_q a, W_k b> equals
    <W_k^T W_q a, b>, so W_k is folded into the N queries, and W_v with its bias commutes with the temporal
    sum, whose weights sum to 1. No tensor is larger than the N * T' * D trajectory tokens of a clip or its
    N * heads * D folded queries (or the 3 * N * D queries, keys and values); nothing is N x N.

    Args:
        dim: D, the width of a token.
        num_heads: attention heads; must divide ``dim``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``, or the input is not [B, T', S, dim].
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} cannot be shared out over num_heads={num_heads}: give positive numbers of which "
                "num_heads divides dim"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim, bias=False)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T', S, D] -> tokens [B, T', S, D] that have looked along their trajectories."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"tokens have shape {tuple(x.shape)}; expected [B, T', S, {self.dim}]")
        batch, steps = x.shape[:2]
        trajectories = self._attend_frames(x)
        by_time = rearrange(trajectories, "(t s b) u d -> s b d t u", t=steps, b=batch)
        own = rearrange(by_time.diagonal(dim1=-2, dim2=-1), "s b d t -> (t s b) d")
        tokens = self.proj(self._attend_time(own, trajectories))
        return rearrange(tokens, "(t s b) d -> b t s d", t=steps, b=batch)

    def _attend_frames(self, x: Tensor) -> Tensor:
        """Tokens [B, T', S, D] -> trajectory tokens y~ [N * B, T', D], a view of the attention's output."""
        batch, steps = x.shape[:2]
        qkv = rearrange(self.qkv(x), "b t s (three h d) -> three t s (b h) d", three=3, h=self.num_heads)
        q, k, v = qkv.unbind(0)
        # A real copy of the queries for each key frame: broadcasting them with a zero stride saves memory but
        # makes cuDNN attention fail in PyTorch releases without pull request 175764.
        q = q.flatten(0, 1).expand(steps, -1, -1, -1).contiguous()
        # The kernels lay their output out like the queries, so the next reshape copies nothing.
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return rearrange(y, "u (b h) n d -> (n b) u (h d)", b=batch)

    def _attend_time(self, own: Tensor, trajectories: Tensor) -> Tensor:
        """Pool trajectory tokens y~ [N * B, T', D] by the queries' own ones [N * B, D] -> [N * B, D]."""
        query = self.proj_q(own).unflatten(-1, (self.num_heads, -1)) * (self.dim // self.num_heads) ** -0.5
        w_k, w_v = (x.weight.unflatten(0, (self.num_heads, -1)) for x in (self.proj_k, self.proj_v))
        folded = torch.einsum("nhe,hed->nhd", query, w_k)
        weights = torch.einsum("nhd,nud->nhu", folded, trajectories).softmax(-1)
        summed = torch.einsum("nhu,nud->nhd", weights, trajectories)
        return torch.einsum("nhd,hed->nhe", summed, w_v).flatten(1) + self.proj_v.bias


def _init_weights(module: nn.Module) -> None:
    """timm's vision-transformer initialisation: truncated normal of std 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
