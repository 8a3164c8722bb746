"""What a run will take at full size, counted without allocating any of it: parameters, operations, memory, time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.distributions import PlackettLuce
from agents.hooks import MAEUpdateHook
from experiments.build import agent_maker, masking_env, new_learner
from experiments.classifier import VideoClassifier, choose_tokens, tokens_kept
from experiments.operations import H100_BYTES, H100_FLOPS, Counts, Part, count, count_parts, predict
from experiments.schema import AgentConfig, RunConfig
from tats_env.data import VideoSet
from tats_env.grid import token_budget
from tats_env.mae import MAELearner

ATTAINED = 0.57
"""Share of a roofline's speed that compiled bfloat16 steps have reached on an H100. Those measured, ViT-B on 16 x 224 x
224 with and without a sampler at 64 and 256 clips, lie from 0.54 to 0.62; trajectory attention on its own at 0.51."""
HELD = 1.1
"""Memory that those steps held at most, over what was counted."""
MAE_PARTS = ("MAE forward", "MAE backward", "optimiser")


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
    """Work out a run's size; the networks are on the meta device, which allocates nothing.

    Raises:
        ConfigError: if ``mae.init`` cannot be loaded, which is asked for its sizes.
    """
    step = Step(config)
    parts = step.parts()
    mae, grid = step.mae.model, step.mae.grid
    encoder = _parameters(mae.patch_embed, mae.blocks, mae.norm)
    clips = config.batch_size * step.batches
    return Estimate(
        num_tokens=grid.num_tokens,
        num_visible=token_budget(grid.num_tokens, config.mask_ratio),
        encoder_parameters=encoder,
        decoder_parameters=_parameters(mae) - encoder,
        sampler_parameters=0 if step.policy is None else _parameters(step.policy),
        flops_per_clip=sum(part.flops for part in parts.values()) / clips,
        memory_bytes=HELD * max(part.peak_bytes for part in parts.values()),
        seconds=config.steps / step.batches * seconds(*parts.values()),
        finetune_clips_a_second=config.finetune.batch_size / seconds(_finetuning(config, step.mae)),
    )


def seconds(*counts: Counts) -> float:
    """What an H100 is expected to take, one after the other."""
    return sum(predict(each, H100_FLOPS, H100_BYTES) for each in counts) / ATTAINED


class Step:
    """One step of a run on ``meta``: the joint step of our PPO and the MAE or, under any other agent, the MAE's alone.

    Both learn from each batch of clips, even where ``mae.update_every`` or ``agent.update_every`` would have them skip
    some.

    Attributes:
        mae: the learner.
        policy: PPO's network; None for other agents.
        batches: of clips that it takes, more than 1 if PPO's rollout does.
    """

    policy: nn.Module | None = None
    batches: float = 1

    def __init__(self, config: RunConfig) -> None:
        self.config = config = config.model_copy(update={"device": "meta", "compile": False})
        self.mae = new_learner(config)
        _fill(self.mae.optimizer)
        if not isinstance(config.agent, AgentConfig):
            return
        make, settings = agent_maker(config.agent, config)
        clip = config.clip
        videos = _Blank((clip.num_frames, clip.size, clip.size))
        self.env = masking_env(config, videos, self.mae, config.batch_size, "tokens")
        self.agent = make(self.env, **settings)
        self.policy = self.agent.policy
        _fill(self.agent.optimizer)
        # As many rollouts as it takes until the MAE is updated, which happens once in all rounds
        self.rollouts = -(-config.rounds // self.agent.n_steps)
        self.batches = self.rollouts * self.agent.n_steps / config.rounds

    def parts(self) -> dict[str, Counts]:
        """What the step's parts take, in the order in which they come."""
        mae, guard = self.mae, self.mae._guard
        parts = [
            Part("tokenise", mae, "_tokens", "tokens"),
            Part("MAE forward", mae, "_pass", "mae"),
            Part("MAE backward", guard, "accumulate", "mae"),
            Part("optimiser", guard, "step", "optimiser"),
        ]
        if self.policy is None:
            return count_parts(self._mae_step, parts, "rest")
        agent, observation = self.agent, self.env.reset(seed=0)[0]
        parts += [
            Part("policy forward", agent, "_forward", "policy"),
            Part("sampling", agent.draws, "uniform"),
            Part("sampling", PlackettLuce, "__init__"),
            Part("sampling", PlackettLuce, "sample"),
            Part("sampling", self.env.task, "_pick"),
            Part("PPO", agent, "_train"),
            Part("PPO", agent, "_objective", "policy"),
            Part("PPO", agent._guard, "accumulate", "policy"),
            Part("PPO", agent._guard, "step", "optimiser"),
        ]
        return count_parts(lambda: self._joint_step(observation), parts, "rest")

    def _joint_step(self, observation: Tensor) -> None:
        hooks = [] if self.config.mae.frozen else [MAEUpdateHook(self.config.rounds)]
        for _ in range(self.rollouts):
            rollout, observation = self.agent._collect(observation, hooks)
            self.agent._train(rollout)

    def _mae_step(self) -> None:
        clip, grid = self.config.clip, self.mae.grid
        clips = torch.empty(
            self.config.batch_size, clip.num_frames, clip.size, clip.size, 3, dtype=torch.uint8, device="meta"
        )
        order = torch.empty(len(clips), grid.num_tokens, dtype=torch.int64, device="meta")
        num_visible = token_budget(grid.num_tokens, self.config.mask_ratio)
        num_hidden = max(1, round(self.mae.decode_ratio * (grid.num_tokens - num_visible)))
        self.mae.reconstruct(clips, order[:, :num_visible], order[:, num_visible:][:, :num_hidden])
        if not self.config.mae.frozen:
            self.mae.update()


class _Blank(VideoSet):
    """One video without pixels."""

    def __init__(self, clip_shape: tuple[int, int, int]) -> None:
        self.clip_shape, self.labels, self.name = clip_shape, np.zeros(1, np.int64), "blank"
        self.augment, self.augments, self.has_foreground = "none", False, False

    def __len__(self) -> int:
        return 1

    def starts(self, video_index: np.ndarray, bits: np.ndarray, num_clips: int = 1, nth: int = 0) -> np.ndarray:
        return np.zeros(len(video_index), np.int64)

    def clips(
        self, video_index: np.ndarray, start_frame: np.ndarray, device: torch.device, *_: Any, **__: Any
    ) -> Tensor:
        return torch.empty(len(video_index), *self.clip_shape, 3, dtype=torch.uint8, device=device)

    def prefetch(self, *_: Any, **__: Any) -> None:
        pass


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser its state, which it makes in its first step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _finetuning(config: RunConfig, mae: MAELearner) -> Counts:
    """Of a training step of the classifier, the optimiser apart."""
    grid, section = mae.grid, config.finetune
    model = VideoClassifier(mae.model, num_classes=1, drop_path=section.drop_path)
    patches = torch.empty(section.batch_size, grid.num_tokens, grid.patch_dim, device="meta")
    order = torch.empty(section.batch_size, grid.num_tokens, dtype=torch.int64, device="meta")
    visible = choose_tokens(tokens_kept(grid.num_tokens, section.keep_ratio), order)
    return count(lambda: model(patches, visible).sum().backward(), fused=False)


def _parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
