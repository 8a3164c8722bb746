"""What a trained MAE and its sampler are worth: errors under masks, motion lift, and a linear probe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import Agent
from agents.meter import motion_lift
from tats_env.data import VideoSet
from tats_env.mae import MAELearner
from tats_env.vector_env import TATSMaskingVectorEnv

PROBE_WEIGHT_DECAY = 1e-3
PROBE_ITERATIONS = 200


def evaluate_sampler(agent: Agent, env: TATSMaskingVectorEnv, num_clips: int, seed: int) -> dict[str, float | None]:
    """Errors of the environment's MAE under the agent's masks and under uniform ones, on the same clips.

    Args:
        agent: asked for draws, as in training.
        env: with ``output="torch"``, of the split to evaluate on; its MAE is left as it is.
        num_clips: rounded up to whole batches.
        seed: of the clips.

    Returns:
        ``reconstruction_error``, ``random_mask_error`` (both in units of the patch's variance), and
        ``motion_lift`` (None where the truth is unknown).
    """
    was_training = env.mae.training
    env.mae.train(False)
    own: list[Tensor] = []
    uniform, shown, moving = [], [], []
    observation, _ = env.reset(seed=seed)
    while len(own) * env.num_envs < num_clips:
        scores, _ = agent.predict(observation)
        observation, *_ = env.step(scores)
        decision = env.task.decision
        assert decision is not None
        if not env.task.mask_complete:
            continue
        own.append(decision.reconstruction.reconstruction_error)
        uniform.append(decision.uniform_reconstruction.reconstruction_error)
        if decision.foreground is not None:
            shown.append(decision.visible)
            moving.append(decision.foreground)
    env.mae.train(was_training)
    return {
        "reconstruction_error": float(torch.cat(own).mean()),
        "random_mask_error": float(torch.cat(uniform).mean()),
        "motion_lift": float(motion_lift(torch.cat(shown), torch.cat(moving))) if shown else None,
    }


def clip_features(mae: MAELearner, videos: VideoSet, batch_size: int = 64) -> Tensor:
    """The frozen encoder's features of each video's middle clip, averaged over space, frame pair by frame pair.

    Returns:
        float32 [V, T' * D].
    """
    features = []
    for first in range(0, len(videos), batch_size):
        index = torch.arange(first, min(first + batch_size, len(videos))).numpy()
        start = (videos.lengths[index] - videos.clip_span).clip(0) // 2
        features.append(mae.features(videos.clips(index, start, mae.device)).mean(2).flatten(1))
    return torch.cat(features)


def linear_probe(mae: MAELearner, train: VideoSet, test: VideoSet) -> float | None:
    """Top-1 accuracy of a linear classifier on frozen features (``clip_features``), trained to convergence by L-BFGS.

    Returns:
        A share in [0, 1]; None if there are not two classes to tell apart.
    """
    if len(set(train.labels[train.labels >= 0].tolist())) < 2 or not (test.labels >= 0).any():
        return None

    def labelled(videos: VideoSet) -> tuple[Tensor, Tensor]:
        x, y = clip_features(mae, videos), torch.as_tensor(videos.labels, device=mae.device)
        return x[y >= 0], y[y >= 0]

    (x, y), (x_test, y_test) = labelled(train), labelled(test)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    weight = torch.zeros(x.shape[1], len(train.class_names), device=x.device, requires_grad=True)
    bias = torch.zeros(len(train.class_names), device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + PROBE_WEIGHT_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(((x_test @ weight + bias).argmax(1) == y_test).float().mean())


def table_row(metrics: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """One sampler's metrics as text, a dash where there is none."""
    return ["-" if metrics.get(name) is None else format(metrics[name], spec) for name, spec in columns.items()]
