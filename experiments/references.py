"""What our steps are measured against: the same thing written literally, bare, or as Hugging Face has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.attention import TrajectoryAttention
from tats_env.grid import TokenGrid
from tats_env.mae.learner import IMAGENET_MEAN, IMAGENET_STD
from tats_env.mae.model import MAESize, VideoMAE
from tats_env.precision import autocast


def literal_trajectory_attention(module: TrajectoryAttention, x: Tensor) -> Tensor:
    """The equations of Patrick et al. (NeurIPS 2021), section 3, term by term: [B, T', S, D] -> [B, T', S, D].

    All N * T' trajectory tokens are projected, to keys and to values, and the spatial weights are N x N a head.
    """
    heads, (b, t, s, d) = module.num_heads, x.shape
    scale = (d // heads) ** -0.5
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in module.qkv(x).chunk(3, -1))
    spatial = (torch.einsum("btshd,buphd->bhtsup", q, k) * scale).softmax(-1)
    trajectories = torch.einsum("bhtsup,buphd->btsuhd", spatial, v).reshape(b, t, s, t, d)
    own = trajectories.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # at the query's own time: [B, T', S, D]
    query = module.proj_q(own).unflatten(-1, (heads, -1))
    key, value = (project(trajectories).unflatten(-1, (heads, -1)) for project in (module.proj_k, module.proj_v))
    temporal = (torch.einsum("btshd,btsuhd->bhtsu", query, key) * scale).softmax(-1)
    return module.proj(torch.einsum("bhtsu,btsuhd->btshd", temporal, value).flatten(-2))


def attention_step(
    forward: Callable[[Tensor], Tensor], module: TrajectoryAttention, tokens: Tensor
) -> Callable[[], None]:
    """Forward and backward pass of an attention over tokens [B, T', S, D], in bfloat16 on a GPU."""
    x, gradient = tokens.clone().requires_grad_(), torch.randn_like(tokens)

    def step() -> None:
        with autocast(tokens.device):
            y = forward(x)
        y.backward(gradient.to(y.dtype))
        x.grad = None
        module.zero_grad(set_to_none=True)

    return step


def bare_loss(
    model: VideoMAE, grid: TokenGrid, mean: Tensor, std: Tensor, clips: Tensor, visible: Tensor
) -> Tensor:  # fmt: skip
    """A masked autoencoder's loss straight down: byte clips [B, T, H, W, 3], tokens [B, K] that are visible.

    Args:
        mean, std: [P], of the pixels of a patch, in bytes.
    """
    patches = grid.patchify(clips)
    shown = torch.zeros(patches.shape[:2], dtype=torch.int32, device=clips.device).scatter_(1, visible, 1)
    hidden = shown.argsort(dim=1, stable=True)[:, : patches.shape[1] - visible.shape[1]]
    seen, asked = (torch.take_along_dim(patches, index[..., None], 1).float() for index in (visible, hidden))
    pixels = (asked / 255).unflatten(2, (-1, 3))
    target = (pixels - pixels.mean(2, keepdim=True)) / (pixels.std(2, keepdim=True) + 1e-6)
    with autocast(clips.device):
        prediction = model((seen - mean) / std, visible, hidden)
    return (prediction.float().unflatten(2, (-1, 3)) - target).square().mean()


def pixel_statistics(repeats: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation of a byte, for that many pixels of three channels in a row: [3 * repeats] each."""
    mean, std = (torch.tensor(x, device=device).mul(255).repeat(repeats) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def bare_step(
    grid: TokenGrid, size: MAESize, batch_size: int, visible: int, device: torch.device, compile: bool
) -> Callable[[], None]:
    """A training step as one would write it in an afternoon: clips at random, masks at random, loss, AdamW."""
    model = VideoMAE(grid, size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type != "meta")
    loss_of: Any = partial(torch.compile, fullgraph=True, dynamic=False)(bare_loss) if compile else bare_loss
    pool = random_clips(grid, batch_size, device)
    mean, std = pixel_statistics(grid.patch_dim // 3, device)

    def step() -> None:
        clips = pool[torch.randint(batch_size, (batch_size,), device=device)]
        order = torch.rand(batch_size, grid.num_tokens, device=device).argsort(1)
        loss_of(model, grid, mean, std, clips, order[:, :visible].sort(1).values).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def huggingface_step(
    grid: TokenGrid, size: MAESize, batch_size: int, visible: int, device: torch.device
) -> Callable[[], None]:
    """A training step of ``transformers``' VideoMAEForPreTraining with its own defaults and torch's AdamW.

    Raises:
        ImportError: without ``transformers``.
    """
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError as error:
        raise ImportError("needs transformers: pip install 'tats-env[bench]'") from error

    config = VideoMAEConfig(
        image_size=grid.height, patch_size=grid.patch_size, num_frames=grid.num_frames, tubelet_size=grid.tubelet_size,
        hidden_size=size.embed_dim, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        intermediate_size=size.mlp_dim or 4 * size.embed_dim, decoder_hidden_size=size.decoder_embed_dim,
        decoder_num_hidden_layers=size.decoder_depth, decoder_num_attention_heads=size.decoder_num_heads,
        decoder_intermediate_size=size.decoder_mlp_dim or 4 * size.decoder_embed_dim,
    )  # fmt: skip
    model: Any = VideoMAEForPreTraining(config)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pool = random_clips(grid, batch_size, device)
    mean, std = pixel_statistics(1, device)

    def step() -> None:
        clips = pool[torch.randint(batch_size, (batch_size,), device=device)]
        pixels = ((clips.float() - mean) / std).permute(0, 1, 4, 2, 3)
        rank = torch.rand(batch_size, grid.num_tokens, device=device).argsort(1).argsort(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pixels, bool_masked_pos=rank >= visible).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_clips(grid: TokenGrid, count: int, device: torch.device) -> Tensor:
    """uint8 [count, T, H, W, 3]; noise, since a network's operations don't depend on what it sees."""
    return torch.randint(256, (count, grid.num_frames, grid.height, grid.width, 3), dtype=torch.uint8, device=device)
