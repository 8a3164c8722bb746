"""Pictures of what a sampler and its MAE do with a few clips, the same ones for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.evaluation import EVALUATION_SEED
from tats_env.rendering import animation, decision_rows, strip
from tats_env.vector_env import TATSMaskingVectorEnv

EXAMPLES = 6
IN_ONE = 4
"""Examples side by side in masks.gif."""
FRAME_MILLISECONDS = 125


def decide(agent: Any, env: TATSMaskingVectorEnv, deterministic: bool = False) -> Tensor | None:
    """Have an agent mask an environment's few clips, which ``env.task.decision`` then tells of.

    Returns:
        The logits [B, N] that it did it by, for an agent that has any.
    """
    following, _ = env.reset(seed=EVALUATION_SEED)
    complete = False
    while not complete:
        observation = following
        following, *_ = env.step(agent.predict(observation, deterministic=deterministic)[0])
        complete = env.task.mask_complete
    with torch.no_grad():
        return agent.logits(observation) if hasattr(agent, "logits") else None


def examples(env: TATSMaskingVectorEnv, logits: Tensor | None, count: int) -> list[dict[str, np.ndarray]]:
    """What there is to see of ``decide``'s first clips: named rows of frames [T, H, W, 3]."""
    return [decision_rows(env.task, i, None if logits is None else logits[i]) for i in range(count)]


def draw(agent: Any, env: TATSMaskingVectorEnv, folder: Path) -> list[np.ndarray]:
    """Write masks.png, masks.gif and gallery/0.webp, ... of what the agent does with an environment of a few clips.

    Returns:
        A strip of frames [height, width, 3] for each clip.
    """
    from PIL import Image

    env.mae.train(False)
    rows = examples(env, decide(agent, env), env.num_envs)
    strips = [strip(each, env.task.grid) for each in rows]
    Image.fromarray(np.concatenate(strips[:2])).save(folder / "masks.png")
    moving: dict[str, Any] = {"save_all": True, "duration": FRAME_MILLISECONDS, "loop": 0}
    first, *others = (Image.fromarray(frame).quantize(128) for frame in animation(rows[:IN_ONE]))
    first.save(folder / "masks.gif", append_images=others, **moving)
    (folder / "gallery").mkdir(exist_ok=True)
    for i, each in enumerate(rows):
        first, *others = map(Image.fromarray, animation([each]))
        first.save(folder / "gallery" / f"{i}.webp", append_images=others, quality=80, **moving)
    return strips
