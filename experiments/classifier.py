"""The MAE's encoder as a classifier of clips, and the choice of the tokens that enter it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from agents.base import Agent
from tats_env.grid import TokenGrid
from tats_env.mae import SIZES, MAELearner, MAESize, VideoMAE
from tats_env.mae.checkpoint import read_checkpoint
from tats_env.mae.model import gather_tokens
from tats_env.precision import autocast
from tats_env.task import top_tokens

FORMAT = "tats-env classifier 1"
HEAD_SCALE = 1e-3
"""Factor on the head's initial weights, so that training starts from level logits (VideoMAE's ``init_scale``)."""


class VideoClassifier(nn.Module):
    """A copy of an MAE's encoder, the mean of its tokens, LayerNorm and a linear head, as VideoMAE is fine-tuned.

    The encoder's last LayerNorm is left out: ``fc_norm``, after the mean, takes its place. Only ``fc_norm`` and
    ``head`` are drawn anew. For timm's optimiser factory, with ``layer_decay``, the patch embedding is the first
    layer, each block one, and ``fc_norm`` and ``head`` are the last.

    Args:
        mae: whose encoder is copied; it keeps its own.
        num_classes: C.
        drop_path: probability of leaving out a residual branch of the last block; the others' rise to it linearly.
    """

    pos_embed: Tensor

    def __init__(self, mae: VideoMAE, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch_embed, self.blocks = deepcopy(mae.patch_embed), deepcopy(mae.blocks)
        self.register_buffer("pos_embed", mae.pos_embed.clone(), persistent=False)
        width = self.pos_embed.shape[-1]
        self.fc_norm = nn.LayerNorm(width, eps=1e-5)  # as transformers' classifier has it
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(HEAD_SCALE)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(self.blocks):
            block.drop_path1 = block.drop_path2 = DropPath(drop_path * i / max(1, len(self.blocks) - 1))
        self.to(self.pos_embed.device)

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that timm's optimiser groups leave undecayed: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for timm, by parameter name; ``fc_norm`` and ``head`` match nothing, which makes them the last."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def forward(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits [B, C] of clips as normalised patches [B, N, P]; with ``visible`` [B, K], of those tokens alone."""
        if visible is None:
            x = self.patch_embed(patches) + self.pos_embed
        else:
            x = self.patch_embed(gather_tokens(patches, visible)) + gather_tokens(self.pos_embed, visible)
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc_norm(x.mean(1)))


class LoadedClassifier(NamedTuple):
    """What a fine-tuning's finetune.safetensors holds."""

    model: VideoClassifier
    """For use, on the CPU."""
    class_names: list[str]
    """By label."""
    grid: TokenGrid
    """Of the clips."""
    size: str | MAESize
    """Of the MAE whose encoder it was."""


def load_classifier(path: str | Path) -> LoadedClassifier:
    """Bring back what fine-tuning wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file.
    """
    metadata, tensors = read_checkpoint(path, FORMAT)
    weights = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    try:
        settings = json.loads(metadata["settings"])
        size, class_names, grid = settings["mae"], settings["class_names"], TokenGrid(**settings["grid"])
        if not isinstance(size, str):
            size = MAESize(**size)
        with torch.random.fork_rng(devices=[]):  # for initial weights, which are not kept
            mae = VideoMAE(grid, SIZES[size] if isinstance(size, str) else size)
            model = VideoClassifier(mae, len(class_names))
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from error
    return LoadedClassifier(model.eval(), class_names, grid, size)


def tokens_kept(num_tokens: int, keep_ratio: float) -> int:
    """K = floor(N * keep_ratio + 1e-9), but one token at least."""
    return max(1, int(num_tokens * keep_ratio + 1e-9))


def choose_tokens(num_kept: int, order: Tensor, scores: Tensor | None = None) -> Tensor | None:
    """Which tokens enter the encoder: indices [B, K], ascending; None where all do.

    Args:
        num_kept: K.
        order: [B, N] random permutations, which choose by chance, or between equal scores.
        scores: [B, N] of a sampler, of which the highest are kept; None leaves it to chance.
    """
    if num_kept == order.shape[1]:
        return None
    if scores is None:
        return order[:, :num_kept].sort(dim=1).values
    return top_tokens(scores, num_kept, order)


class PolicySampler:
    """A trained agent as a judge of which tokens of a clip matter.

    What it observes comes of the MAE that it was trained with, not of the encoder that is being fine-tuned.

    Args:
        agent: one of the one-shot task, made or loaded with an environment, and so on the MAE's device.
        mae: the pre-trained MAE; it is left as it is.

    Raises:
        ValueError: for an agent that must be shown the true foreground.
    """

    def __init__(self, agent: Agent, mae: MAELearner) -> None:
        self.agent, self.mae = agent, mae
        self.observation = getattr(agent, "observation", "tokens")
        if self.observation == "foreground":
            raise ValueError(
                f"sampler: policy: {type(agent).__name__} must be shown the {self.observation} of a clip, "
                "which a classifier's input does not tell; give an agent that observes tokens or pixels"
            )

    @torch.no_grad()
    def __call__(self, patches: Tensor) -> Tensor:
        """Scores [B, N] of the tokens of clips, given as normalised patches [B, N, P]."""
        grid, device = self.mae.grid, self.mae.device
        if self.observation == "tokens":
            with autocast(device):
                patches = self.mae.model.tokens(patches)
        observation = patches.float().unflatten(1, (grid.num_steps, grid.num_positions))
        # Logits where there are any: a draw would be as good, but not the same every time.
        ask: Any = getattr(self.agent, "logits", None) or self._predict
        return torch.as_tensor(ask(observation), dtype=torch.float32, device=device)

    def _predict(self, observation: Tensor) -> Any:
        return self.agent.predict(observation, deterministic=True)[0]
