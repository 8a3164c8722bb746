"""What frozen features are worth to a classifier: linear, attentive and nearest-neighbour probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from timm.layers import AttentionPoolLatent
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from experiments.features import Features, extract, in_batches, labelled
from experiments.schema import ProbeConfig
from experiments.scores import Scores
from tats_env.data import VideoSet
from tats_env.keyed import keyed_bits, keyed_order
from tats_env.mae import MAELearner
from tats_env.precision import autocast

LINEAR_WEIGHT_DECAY = 1e-3
LINEAR_ITERATIONS = 200
WARMUP = 0.1
"""Share of the attentive probe's steps over which its learning rate rises to its peak."""
KNN_BATCH = 1024


class Judged(NamedTuple):
    """What a trained probe makes of the test videos."""

    scores: Tensor
    """[V, C]: the higher, the likelier."""
    losses: Sequence[float] = ()
    """Mean training loss of each epoch or, of an optimiser without epochs, the last one: whether it has converged."""
    starts: Sequence[Tensor] = ()
    """What each of several restarts makes of them, ``scores`` among them: what is owed to luck."""


Probe = Callable[[Features, Features, int, ProbeConfig, int, bool], Judged]
"""(train, test, num_classes, config, seed, progress) -> what it makes of the test videos."""


def linear(
    train: Features, test: Features, num_classes: int, config: ProbeConfig, seed: int = 0, progress: bool = False
) -> Judged:
    """Logits of a linear classifier on standardised pooled features, trained to convergence by L-BFGS."""
    mean, deviation = train.pooled.mean(0), train.pooled.std(0) + 1e-6
    x, x_test = (train.pooled - mean) / deviation, (test.pooled - mean) / deviation
    weight = torch.zeros(x.shape[1], num_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=LINEAR_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, train.labels) + LINEAR_WEIGHT_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return Judged((x_test @ weight + bias).detach(), [float(closure().detach())])


def knn(
    train: Features, test: Features, num_classes: int, config: ProbeConfig, seed: int = 0, progress: bool = False
) -> Judged:
    """Shares of the votes of the k nearest training videos, each exp(cosine similarity of features / temperature).

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021.
    """
    known, asked = F.normalize(train.pooled, dim=1), F.normalize(test.pooled, dim=1)
    scores = []
    for batch in asked.split(KNN_BATCH):
        similarity, nearest = (batch @ known.T).topk(min(config.k, len(known)), dim=1)
        # Softmax: the votes up to a factor, without the overflow of a low temperature
        votes = (similarity / config.temperature).softmax(1)
        scores.append(votes.new_zeros(len(batch), num_classes).scatter_add_(1, train.labels[nearest], votes))
    return Judged(torch.cat(scores))


class AttentiveProbe(nn.Module):
    """V-JEPA's probe: one learned query attends to the tokens; an MLP with a residual and a linear layer follow.

    Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video", 2024.

    Args:
        dim: D, the width of the tokens.
        num_heads: of the attention; where it does not divide D, the largest number below it that does is taken.
        num_classes: C.
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        heads = max(n for n in range(1, min(num_heads, dim) + 1) if dim % n == 0)
        self.input_norm = nn.LayerNorm(dim)
        self.pool = AttentionPoolLatent(dim, num_heads=heads, norm_layer=nn.LayerNorm)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T', S, D] -> logits [B, C]."""
        pool, dim = self.pool, tokens.shape[-1]
        # As timm's, in another order: with a single query, keys and values are projected once for all tokens rather
        # than each token's, and no gradient goes through the tokens
        x = F.layer_norm(tokens.flatten(1, 2), (dim,))
        key, value = pool.kv.weight.unflatten(0, (2, pool.num_heads, -1))
        query = pool.q(pool.latent[0, 0]).unflatten(0, (pool.num_heads, -1))
        asked = torch.einsum("hk,hkd->hd", query, key) * self.input_norm.weight * pool.scale
        share = (x @ asked.T).softmax(1)
        seen = (share.mT @ x) * self.input_norm.weight + self.input_norm.bias
        y = pool.proj(torch.einsum("bhd,hkd->bhk", seen, value).flatten(1) + pool.kv.bias[dim:])
        return self.head(self.norm(y + pool.mlp(pool.norm(y))))


def attentive(
    train: Features, test: Features, num_classes: int, config: ProbeConfig, seed: int = 0, progress: bool = False
) -> Judged:
    """Logits of the attentive probe, of ``config.restarts`` the one with the lowest loss in its last epoch."""
    device = train.labels.device
    tokens = next(iter(train.tokens([np.arange(1)])))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keyed_bits(torch.tensor(seed))))
        probes = [AttentiveProbe(tokens.shape[-1], config.num_heads, num_classes) for _ in range(config.restarts)]
    groups = []
    for probe in probes:
        groups += param_groups_weight_decay(probe.to(device), config.weight_decay, no_weight_decay_list={"pool.latent"})
    optimizer = create_optimizer_v2(groups, "adamw", lr=config.learning_rate)  # disjoint, so one serves all restarts
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    warmup = int(WARMUP * config.epochs * steps_per_epoch)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(2, config.epochs * steps_per_epoch - warmup),
        warmup_t=warmup,
        warmup_lr_init=0.01 * config.learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    epochs = range(config.epochs)
    step, history = 0, []
    for epoch in track(epochs, "attentive probe") if progress else epochs:
        order = keyed_order(keyed_bits(torch.tensor([seed]), epoch), len(train)).numpy()[0]
        batches = in_batches(order, config.batch_size)
        losses = torch.zeros(len(probes), device=device)
        for batch, tokens in zip(batches, train.tokens(batches), strict=True):
            labels = train.labels[torch.from_numpy(batch).to(device, non_blocking=True)]
            with autocast(device):
                logits = torch.stack([probe(tokens.float()) for probe in probes])
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.repeat(len(probes)), reduction="none")
            loss = loss.view(len(probes), -1)
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
            losses += loss.detach().sum(1)
        history.append(losses / len(train))
    found = torch.stack(history)
    chosen = int(found[-1].nan_to_num(math.inf).argmin())
    batches = in_batches(np.arange(len(test)), config.batch_size)
    with torch.inference_mode(), autocast(device):
        asked = [torch.stack([probe.eval()(x.float()).float() for probe in probes]) for x in test.tokens(batches)]
    scores = torch.cat(asked, 1)
    return Judged(scores[chosen], found[:, chosen].tolist(), list(scores) if len(probes) > 1 else [])


PROBES: dict[str, Probe] = {"linear": linear, "attentive": attentive, "knn": knn}


def has_classes(train: VideoSet, test: VideoSet) -> bool:
    """Whether there are two classes to tell apart, and labelled videos to test it on."""
    return len(np.unique(train.labels[labelled(train)])) > 1 and len(labelled(test)) > 0


def run_probes(
    mae: MAELearner,
    train: VideoSet,
    test: VideoSet,
    kinds: Sequence[str],
    config: ProbeConfig,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Scores]:
    """Train each kind of probe (of ``PROBES``) on the training set's features, and test it on the test set's.

    Args:
        mae: the frozen encoder.
        folder: where features are cached; None keeps none.
        progress: show progress bars.

    Returns:
        Scores by kind; nothing where there are not two classes to tell apart.

    Raises:
        ValueError: if the two sets don't have the same classes.
    """
    if not has_classes(train, test):
        return {}
    if train.class_names != test.class_names:
        raise ValueError(
            f"{train.name} ({train.split}) and {test.name} ({test.split}) have different classes; "
            "a probe is tested on the classes that it was trained on"
        )
    tokens = "attentive" in kinds
    x, x_test = (extract(mae, s, config.batch_size, folder, tokens=tokens, progress=progress) for s in (train, test))
    names = train.class_names
    labels, found = x_test.labels, {}
    for kind in kinds:
        scores, losses, starts = PROBES[kind](x, x_test, len(names), config, seed, progress)
        top1 = [float((start.argmax(1) == labels)[labels >= 0].double().mean()) for start in starts]
        found[kind] = Scores(scores, labels, names, losses, top1)
    return found
