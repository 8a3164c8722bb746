"""The test of a classifier from several views of each video, and with fewer and fewer of their tokens."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from experiments.classifier import PolicySampler, VideoClassifier, choose_tokens, tokens_kept
from experiments.progress import RunProgress
from experiments.schema import FinetuneConfig
from tats_env.data import VideoSet
from tats_env.keyed import keyed_bits, keyed_order
from tats_env.mae import MAELearner
from tats_env.precision import autocast


@torch.no_grad()
def class_scores(
    model: VideoClassifier,
    mae: MAELearner,
    videos: VideoSet,
    index: np.ndarray,
    config: FinetuneConfig,
    sampler: PolicySampler | None,
    seed: int,
    console: Console,
) -> dict[tuple[str, float], Tensor]:
    """Probabilities of each video's classes, averaged over ``test_clips`` x ``test_crops`` views of it.

    Args:
        model: the classifier, which is left in evaluation mode.
        mae: for the token grid and normalisation.
        videos: the test set.
        index: which of them to test on [V].
        config: of the test.
        sampler: also keep the tokens that it scores highest; None keeps random ones only.
        seed: of the random tokens; of one view, fewer are always some of the more.
        console: where to show progress.

    Returns:
        By ("random" or "policy", keep ratio): [V, C] on the device.
    """
    model.eval()
    num_tokens, num_views = mae.grid.num_tokens, config.test_clips * config.test_crops
    ratios = config.tested
    names = ["random"] if sampler is None else ["random", "policy"]
    found = {
        (name, ratio): torch.zeros(len(index), len(videos.class_names), device=mae.device)
        for name in names
        for ratio in ratios
    }
    rows = np.split(np.arange(len(index)), range(config.batch_size, len(index), config.batch_size))
    views = [(batch, view) for batch in rows for view in range(num_views)]
    progress = RunProgress(console, len(views))
    progress.start("testing")

    def asked(i: int) -> tuple[np.ndarray, int, int, torch.device, int | None]:
        """What a set is asked for the i-th batch of views."""
        batch, view = views[i]
        nth, crop = divmod(view, config.test_crops)
        return index[batch], nth, config.test_clips, mae.device, crop if config.test_crops > 1 else None

    try:
        for i, (batch, view) in enumerate(views):
            clips = videos.test_clips(*asked(i))
            if i + 1 < len(views):
                videos.prefetch_test(*asked(i + 1))
            patches = mae.normalize(mae.grid.patchify(clips))
            key = keyed_bits(torch.from_numpy(index[batch]), seed, view).to(mae.device, non_blocking=True)
            order = keyed_order(key, num_tokens)
            scores = sampler(patches) if sampler is not None and ratios[0] < 1 else None
            shares: dict[float, Tensor] = {}  # with all tokens in, whoever chose them
            for (name, ratio), total in found.items():
                visible = choose_tokens(tokens_kept(num_tokens, ratio), order, scores if name == "policy" else None)
                if visible is not None or ratio not in shares:
                    with autocast(mae.device):
                        logits = model(patches, visible)
                    shares[ratio] = logits.float().softmax(dim=1)
                total[torch.from_numpy(batch).to(mae.device)] += shares[ratio] / num_views
            progress.on_step(None)
        progress.write({}, {})
    finally:
        progress.close()
    return found


def plot_tokens_kept(kept: dict[str, list[dict[str, float]]], num_tokens: int) -> Figure:
    """Top-1 accuracy against tokens that enter the encoder, a line for each sampler."""
    figure = Figure((5, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("policy", "o-"), ("random", "s:k")):
        if name in kept:
            rows = sorted(kept[name], key=lambda row: row["tokens"])
            axes.plot([row["tokens"] for row in rows], [row["top1"] for row in rows], style, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({int(row["tokens"]) for rows in kept.values() for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"tokens that enter the encoder, of {num_tokens}", ylabel="top-1 accuracy")
    axes.legend(frameon=False)
    return figure
