"""A video masked autoencoder in VideoMAE's shape, assembled from timm's transformer blocks.

Source: Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
Pre-Training", NeurIPS 2022; sizes as in its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tats_env.grid import TokenGrid


@dataclass(frozen=True)
class MAESize:
    """Width, depth and heads of encoder and decoder, and the learning rate that the size is trained with.

    Raises:
        ValueError: if the heads do not divide a width, or separable positions can't share it out.
    """

    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    learning_rate: float | None = None
    """Absolute; None where the published rule holds, 1.5e-4 for every 256 clips of the global batch."""
    separable_positions: bool = False
    """Positions by (t, h, w) rather than VideoMAE's by flat token index."""
    mlp_dim: int | None = None
    """Hidden width of the encoder's MLPs; None is 4 * embed_dim."""
    decoder_mlp_dim: int | None = None
    """Hidden width of the decoder's MLPs; None is 4 * decoder_embed_dim."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm but the decoder's last."""
    decoder_norm_eps: float = 1e-6
    """Epsilon of the decoder's last LayerNorm."""
    final_norm: bool = True
    """Whether the encoder ends in a LayerNorm."""

    def __post_init__(self) -> None:
        for prefix in ("", "decoder_"):
            dim, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if dim < 1 or heads < 1 or dim % heads:
                raise ValueError(f"{prefix}num_heads={heads} does not divide {prefix}embed_dim={dim}: give a divisor")
            if self.separable_positions and dim % 3:
                raise ValueError(f"{prefix}embed_dim={dim}: separable positions need a multiple of 3")


SIZES = {
    # For CPUs: about 0.5 M parameters, tuned at 32 clips of 128 tokens. With positions by flat index its loss stays on
    # the plateau of a constant prediction (0.99) for 600 updates; with separable ones it has left it after 300.
    "tiny": MAESize(96, 4, 3, 48, 1, 3, learning_rate=1.5e-3, separable_positions=True),
    # For small clips: about 3 M parameters.
    "mini": MAESize(192, 6, 3, 96, 2, 3, learning_rate=1e-3, separable_positions=True),
    # The decoder's last epsilon is transformers' rather than the released 1e-6: so they can be written for it exactly.
    "small": MAESize(384, 12, 6, 192, 4, 3, decoder_norm_eps=1e-5),
    "base": MAESize(768, 12, 12, 384, 4, 6, decoder_norm_eps=1e-5),
    "large": MAESize(1024, 24, 16, 512, 12, 8, decoder_norm_eps=1e-5),
}


def sinusoid(position: Tensor, dim: int, longest: float) -> Tensor:
    """Sine on even channels, cosine on odd, at rates from 1 down to 1 / longest: positions [N] -> [N, D]."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position.double()[:, None] / longest ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: TokenGrid, dim: int, separable: bool) -> Tensor:
    """Fixed positions [1, N, D]: of the flat token index (VideoMAE), or of t, h and w in a third of D each."""
    token = torch.arange(grid.num_tokens)
    if not separable:
        return sinusoid(token, dim, 10000)[None]
    return torch.cat([sinusoid(x, dim // 3, 100) for x in grid.coordinates(token)], dim=1)[None]


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, K] of x [B, N, D] (or [1, N, D], shared by the batch) -> [B, K, D]."""
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class VideoMAE(nn.Module):
    """Encoder over the K visible tokens only, shallow decoder over all N.

    Pixels come in normalised; predictions are each hidden patch's pixels, normalised by the patch itself.

    Attributes:
        checkpointing: compute the blocks' activations anew in the backward pass, rather than keep them.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor
    checkpointing: bool = False

    def __init__(self, grid: TokenGrid, size: MAESize) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=size.norm_eps)

        def blocks(depth: int, dim: int, heads: int, mlp_dim: int | None) -> nn.ModuleList:
            ratio = 4.0 if mlp_dim is None else (mlp_dim + 0.5) / dim  # timm rounds dim * ratio down
            return nn.ModuleList(
                Block(dim, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
            )

        self.size = size
        self.num_tokens = grid.num_tokens
        self.patch_embed = nn.Linear(grid.patch_dim, size.embed_dim)
        self.blocks = blocks(size.depth, size.embed_dim, size.num_heads, size.mlp_dim)
        self.norm = norm(size.embed_dim) if size.final_norm else nn.Identity()
        self.decoder_embed = nn.Linear(size.embed_dim, size.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_embed_dim))
        self.decoder_blocks = blocks(
            size.decoder_depth, size.decoder_embed_dim, size.decoder_num_heads, size.decoder_mlp_dim
        )
        self.decoder_norm = nn.LayerNorm(size.decoder_embed_dim, eps=size.decoder_norm_eps)
        self.decoder_head = nn.Linear(size.decoder_embed_dim, grid.patch_dim)
        for name, dim in (("pos_embed", size.embed_dim), ("decoder_pos_embed", size.decoder_embed_dim)):
            self.register_buffer(name, position_table(grid, dim, size.separable_positions), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier-uniform projections and a small normal mask token, as VideoMAE starts."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that timm's optimiser groups leave undecayed."""
        return {"mask_token"}

    def tokens(self, patches: Tensor) -> Tensor:
        """Embedding plus position of all tokens: patches [B, N, P] -> [B, N, D]."""
        x = self.patch_embed(patches)
        return x + self.pos_embed.to(x.dtype)

    def encode(self, visible_patches: Tensor, visible: Tensor, *, final_norm: bool = True) -> Tensor:
        """Latents of the visible tokens: patches [B, K, P] at indices [B, K] -> [B, K, D].

        A classifier that pools the latents and normalises the mean, as VideoMAE's does, asks for ``final_norm=False``.
        """
        x = _placed(self.patch_embed(visible_patches), self.pos_embed, visible)
        if visible.shape[1]:  # not every kernel takes an empty sequence
            x = self._through(self.blocks, x)
        return self.norm(x) if final_norm else x

    def decode(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predicted pixels of hidden tokens: latents [B, K, D], indices [B, K] and [B, M] -> [B, M, P]."""
        shown = _placed(self.decoder_embed(latents), self.decoder_pos_embed, visible)
        asked = _placed(self.mask_token.to(shown.dtype), self.decoder_pos_embed, hidden)
        x = self._through(self.decoder_blocks, torch.cat([shown, asked], dim=1))
        return self.decoder_head(self.decoder_norm(x[:, visible.shape[1] :]))

    def _through(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and x.requires_grad else block(x)
        return x

    def forward(self, visible_patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict hidden tokens [B, M, P], all or some of them, from the visible ones [B, K, P]; indices ascending."""
        return self.decode(self.encode(visible_patches, visible), visible, hidden)


def _placed(x: Tensor, positions: Tensor, index: Tensor) -> Tensor:
    """Tokens with their positions added, in the tokens' own precision, as VideoMAE adds them."""
    return x + gather_tokens(positions, index).to(x.dtype)
