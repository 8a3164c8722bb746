"""What a run will take at full size, worked out without allocating any of it: parameters, operations, memory, time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from agents.policies import TrajectoryPolicy
from experiments.classifier import tokens_kept
from experiments.run import new_learner, token_grid
from experiments.schema import AgentConfig, RunConfig
from tats_env.grid import token_budget
from tats_env.mae import SIZES, VideoMAE

BYTES_PER_PARAMETER = 16
"""float32 weights, gradients and AdamW's two moments."""
BYTES_PER_ACTIVATION = 40
"""Of a block, for each token and channel, in bf16 without checkpointing; as measured with ViT-B on an H100: 9.2 GiB at
64 clips a step and 31.5 GiB at 256 (16 x 224 x 224, 95 % hidden)."""
BYTES_PER_SAMPLER_ACTIVATION = 125
"""Likewise of a block of trajectory attention, which has T' = 8 trajectory tokens a token: 10.7 GiB with a sampler 128
wide and 13.6 GiB with one 384 wide, at 64 clips."""
ATTAINED = 0.32 * 752e12
"""Operations a second of a compiled bf16 step of ViT-B on an H100 (1525 clips/s), 32 % of a matrix product's."""


class Estimate(NamedTuple):
    """A run at full size."""

    num_tokens: int
    num_visible: int
    encoder_parameters: int
    decoder_parameters: int
    sampler_parameters: int
    flops_per_clip: float
    """Of the MAE's training step and, for our PPO, of its rollout and epochs; multiplications and additions."""
    memory_bytes: float
    """On the device, in training."""
    seconds: float
    """Of the whole pre-training on one H100, data not counted."""
    finetune_clips_a_second: float
    """Of fine-tuning on one H100, likewise."""


def estimate(config: RunConfig) -> Estimate:
    """Work out a run's size; the networks are built on the meta device, which allocates nothing.

    Raises:
        ConfigError: if ``mae.init`` cannot be loaded, which is asked for its sizes.
    """
    grid = token_grid(config)
    n, k = grid.num_tokens, token_budget(grid.num_tokens, config.mask_ratio)
    size = SIZES[config.mae.size] if config.mae.init is None else new_learner(config).model.size
    with torch.device("meta"):
        mae = VideoMAE(grid, size)
    encoder = _count(mae.patch_embed, mae.blocks, mae.norm)

    def encode(tokens: int) -> float:
        return _blocks(tokens, size.embed_dim, size.depth) + 2 * tokens * grid.patch_dim * size.embed_dim

    decoder_flops = _blocks(n, size.decoder_embed_dim, size.decoder_depth)
    decoder_flops += 2 * (n - k) * size.decoder_embed_dim * grid.patch_dim
    flops = 3 * (encode(k) + decoder_flops)  # the backward pass is two forward ones
    activations = k * size.embed_dim * size.depth + n * size.decoder_embed_dim * size.decoder_depth
    bytes_per_clip = BYTES_PER_ACTIVATION * activations
    sampler = 0
    if isinstance(config.agent, AgentConfig):
        agent = config.agent
        with torch.device("meta"):
            shape = grid.num_steps, grid.num_positions, size.embed_dim
            policy = TrajectoryPolicy(shape, agent.width, agent.num_heads, agent.depth)
        sampler = _count(policy)
        once = 2 * n * size.embed_dim * agent.width + _blocks(n, agent.width, agent.depth)
        flops += 2 * n * grid.patch_dim * size.embed_dim + (1 + 3 * agent.n_epochs) * once
        bytes_per_clip += BYTES_PER_SAMPLER_ACTIVATION * n * agent.width * agent.depth
    parameters = sum(p.numel() for p in mae.parameters()) + sampler
    memory = BYTES_PER_PARAMETER * parameters + bytes_per_clip * config.batch_size
    seconds = config.steps * config.batch_size * flops / ATTAINED
    finetune = ATTAINED / (3 * encode(tokens_kept(n, config.finetune.keep_ratio)))
    return Estimate(n, k, encoder, _count(mae) - encoder, sampler, flops, memory, seconds, finetune)


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _blocks(tokens: int, width: int, depth: int) -> float:
    """Operations of a forward pass through transformer blocks: projections and MLP, then attention."""
    return depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)
