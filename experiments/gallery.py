"""Pictures of what a trained sampler and its MAE do with a few clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.evaluation import EVALUATION_SEED
from tats_env.rendering import animation, decision_rows, strip
from tats_env.vector_env import TATSMaskingVectorEnv

EXAMPLES = 4


def draw(agent: Any, env: TATSMaskingVectorEnv, folder: Path) -> None:
    """Write masks.png and masks.gif of what the agent does with an environment of a few clips."""
    from PIL import Image

    env.mae.train(False)
    following, _ = env.reset(seed=EVALUATION_SEED)
    complete = False
    while not complete:
        observation = following
        following, *_ = env.step(agent.predict(observation)[0])
        complete = env.task.mask_complete
    with torch.no_grad():
        heat = agent.logits(observation) if hasattr(agent, "logits") else [None] * env.num_envs
    examples = [decision_rows(env.task, i, heat[i]) for i in range(env.num_envs)]
    Image.fromarray(np.concatenate([strip(rows, env.task.grid) for rows in examples[:2]])).save(folder / "masks.png")
    frames = [Image.fromarray(frame).quantize(128) for frame in animation(examples)]
    frames[0].save(folder / "masks.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)
