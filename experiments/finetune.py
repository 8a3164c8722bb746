"""Full fine-tuning of an MAE's encoder into a classifier, and its test from several views of each video.

As VideoMAE is fine-tuned (Tong et al., NeurIPS 2022, appendix; ``run_class_finetuning.py``): AdamW with layer decay and
drop path, a cosine with warm-up, RandAugment, random erasing, mixup or CutMix, label smoothing, and repeated
augmentation. One thing differs: here ``batch_size`` counts all clips, where VideoMAE's counts each repeated one once.

All randomness is keyed by the seed, the epoch and the clip's place in it, so an epoch is the same whether training went
straight to it or was taken up there again.
"""

from __future__ import annotations

import csv
import json
import reprlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from agents.base import Agent
from experiments.checkpoints import whole
from experiments.classifier import FORMAT, PolicySampler, VideoClassifier, choose_tokens, tokens_kept
from experiments.features import labelled
from experiments.multi_view import class_scores, plot_tokens_kept
from experiments.progress import RunProgress
from experiments.schema import FinetuneConfig
from experiments.scores import Scores
from tats_env.data import VideoSet
from tats_env.data.augment import rand_augment, random_erase
from tats_env.data.sampling import epoch_order, rank_share
from tats_env.guard import GuardedOptimizer
from tats_env.keyed import keyed_bits, keyed_order
from tats_env.mae import MAELearner
from tats_env.mae.checkpoint import read_checkpoint, save_tensors
from tats_env.mae.learner import IMAGENET_MEAN, IMAGENET_STD
from tats_env.precision import autocast

CHECKPOINT = "finetune.safetensors"
LOWEST_RATE = 1e-3
"""Where the learning rate starts and ends, as a share of its peak."""
_NETWORK, _DROP_PATH, _START, _AUGMENT, _MIX, _TOKENS, _PLACE = range(7)  # what a random number is for


def finetune(
    mae: MAELearner,
    train: VideoSet,
    test: VideoSet,
    config: FinetuneConfig,
    folder: Path,
    *,
    agent: Agent | None = None,
    seed: int = 0,
    console: Console,
) -> dict[str, Any]:
    """Train a classifier that starts from the MAE's encoder, and test it; the MAE is left as it is.

    A checkpoint is written after each epoch, and a folder that holds one is gone on from.

    Args:
        mae: the pre-trained MAE.
        train, test: labelled videos of the same classes; those of label -1 are left out.
        config: what to do.
        folder: for finetune.safetensors, metrics.csv, finetune.json, confusion.json and .png, and, where several
            ``test_keep_ratios`` are asked for, tokens_kept.png.
        agent: who chooses tokens under ``sampler: policy``, made or loaded with an environment around ``mae``.
        seed: of the head's weights, the order and augmentation of clips, and the tokens left to chance.
        console: where to show progress.

    Returns:
        What finetune.json holds: ``top1``, ``top5`` and ``mean_class`` with the share of tokens that counts;
        ``tokens_kept`` with those of each sampler and test_keep_ratio; views, epochs, the last one's mean
        ``train_loss``, and seconds.

    Raises:
        ValueError: if the classes do not fit, settings contradict one another, or the folder's checkpoint is of
            another fine-tuning.
        FloatingPointError: if 20 updates in a row were not finite.
    """
    if train.class_names != test.class_names:
        raise ValueError(
            f"the classes of {train.name} ({len(train.class_names)}) and of {test.name} ({len(test.class_names)}) "
            "differ: a classifier is tested on those that it was trained on"
        )
    for videos, least in ((train, 2), (test, 1)):
        if len(set(videos.labels[videos.labels >= 0].tolist())) < least:
            raise ValueError(f"{videos.name} ({videos.split}): too few labelled videos to fine-tune and test on")
    if config.sampler == "policy" and agent is None:
        raise ValueError("sampler: policy needs the agent of a run; give random, or a run that trained one")
    sampler = PolicySampler(agent, mae) if config.sampler == "policy" and agent is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(mae, train, config, folder, sampler, seed)
    training.run(console)

    start = time.perf_counter()
    index = labelled(test)
    labels = test.labels[index]
    found = class_scores(training.model, mae, test, index, config, sampler, seed, console)
    read = np.isin(index, labelled(test))  # another plays in place of one that turned out unreadable
    scores = {
        key: Scores(value[torch.from_numpy(read)], labels[read], test.class_names) for key, value in found.items()
    }
    num_tokens = mae.grid.num_tokens
    kept = {
        name: [
            {"keep_ratio": ratio, "tokens": tokens_kept(num_tokens, ratio), **score.row()}
            for (who, ratio), score in scores.items()
            if who == name
        ]
        for name in dict.fromkeys(who for who, _ in scores)
    }
    best = scores[config.sampler, config.judged]
    best.write(folder, "confusion")
    if len(config.tested) > 1:
        plot_tokens_kept(kept, num_tokens).savefig(folder / "tokens_kept.png", dpi=110)
    result = {
        **best.row(),
        "num_videos": best.num_videos,
        "views": {"clips": config.test_clips, "crops": config.test_crops},
        "sampler": config.sampler,
        "keep_ratio": config.keep_ratio,
        "test_keep_ratio": config.judged,
        "tokens_kept": kept,
        "epochs": config.epochs,
        "train_loss": float(training.rows[-1]["loss"]),
        "train_seconds": sum(float(row["seconds"]) for row in training.rows),
        "test_seconds": time.perf_counter() - start,
    }
    with whole(folder / "finetune.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")
    return result


class _Training:
    """The classifier, its optimiser, and what of its training is on the disk."""

    def __init__(
        self,
        mae: MAELearner,
        videos: VideoSet,
        config: FinetuneConfig,
        folder: Path,
        sampler: PolicySampler | None,
        seed: int,
    ) -> None:
        self.mae, self.videos, self.config, self.folder = mae, videos, config, folder
        self.sampler, self.seed, self.device = sampler, seed, mae.device
        self.labelled = np.flatnonzero(videos.labels >= 0)
        self.num_classes = len(videos.class_names)
        self.steps = len(self._order(0))
        self.mixup: Mixup | None = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=self.num_classes
            )
        self.kept = tokens_kept(mae.grid.num_tokens, config.keep_ratio)
        with self._seeded(_NETWORK, 0):
            self.model = VideoClassifier(mae.model, self.num_classes, config.drop_path)
        rate = config.learning_rate * config.batch_size / 256
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=rate, weight_decay=config.weight_decay, layer_decay=config.layer_decay, fused=True
        )
        self.guard = GuardedOptimizer(self.optimizer, self.model.parameters(), config.max_grad_norm)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(2, (config.epochs - config.warmup_epochs) * self.steps),
            lr_min=LOWEST_RATE * rate,
            warmup_t=config.warmup_epochs * self.steps,
            warmup_lr_init=LOWEST_RATE * rate,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.criterion = SoftTargetCrossEntropy()
        self._mean, self._std = (255 * torch.tensor(x, device=self.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        # What changes the weights. The test's settings don't.
        self.settings = {
            **{k: v for k, v in config.model_dump().items() if not k.startswith("test_")},
            "sampler": config.sampler if self.kept < mae.grid.num_tokens else None,
            "seed": seed,
            "data": videos.name,
            "num_videos": len(self.labelled),
            "class_names": videos.class_names,
            "mae": mae.size if isinstance(mae.size, str) else asdict(mae.size),
            "grid": asdict(mae.grid),
            "clip_span": videos.clip_span,
        }
        self.rows: list[dict[str, str]] = []
        """Lines of metrics.csv, one an epoch."""
        self.epoch = self._resume()

    def run(self, console: Console) -> None:
        """Train through the epochs that are left."""
        progress = RunProgress(console, (self.config.epochs - self.epoch) * self.steps)
        progress.start("fine-tuning")
        try:
            while self.epoch < self.config.epochs:
                row = self._train_epoch(progress)
                self.epoch += 1
                self.rows.append({name: f"{value:.6g}" for name, value in row.items()})
                self._write_metrics()
                self._save()
                progress.write({f"finetune/{name}": value for name, value in row.items()}, {})
        finally:
            progress.close()

    def _train_epoch(self, progress: RunProgress) -> dict[str, float]:
        start = time.perf_counter()
        self.model.train()
        loss_sum, count = torch.zeros(2, device=self.device).unbind()
        first, order = self.epoch * self.steps, self._order(self.epoch)
        with self._seeded(_DROP_PATH, self.epoch):
            for step in range(self.steps):
                self.schedule.step_update(first + step)
                patches, targets, visible = self._batch(order, step)
                with autocast(self.device):
                    logits = self.model(patches, visible)
                self.guard.accumulate(self.criterion(logits.float(), targets))
                loss, broken = self.guard.step()
                with torch.no_grad():
                    loss_sum += torch.where(broken, 0.0, loss)
                    count += ~broken
                progress.on_step(None)
        _, skipped = self.guard.report("classifier", "try a lower finetune.learning_rate, or finetune.max_grad_norm: 1")
        return {
            "epoch": self.epoch + 1,
            "loss": float(loss_sum / count),
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "skipped_updates": skipped,
            "seconds": time.perf_counter() - start,
        }

    def _order(self, epoch: int) -> np.ndarray:
        """The videos of each step of an epoch: int64 [steps, batch_size / repeats]."""
        order = self.labelled[epoch_order(len(self.labelled), self.seed, epoch)]
        return rank_share(order, 0, 1, self.config.batch_size // self.config.repeats)

    def _choose(self, order: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(videos, first frames, places along the longer side) of a step's clips [B]; repeated ones share all."""
        repeats, batch_size = self.config.repeats, self.config.batch_size
        first = torch.arange(step * batch_size, (step + 1) * batch_size, repeats)
        bits, more = (self._bits(first, self.epoch, use).numpy() & ((1 << 62) - 1) for use in (_START, _PLACE))
        start, place = self.videos.starts(order[step], bits), self.videos.positions(more)
        return order[step].repeat(repeats), start.repeat(repeats), place.repeat(repeats)

    def _batch(self, order: np.ndarray, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A step's clips, ready to be learnt from: normalised patches [B, N, P], targets [B, C], tokens [B, K]."""
        config, grid = self.config, self.mae.grid
        video, start, place = self._choose(order, step)
        keys = self._bits(step * config.batch_size + torch.arange(config.batch_size), self.epoch, _AUGMENT)
        clips = self.videos.clips(video, start, self.device, keys, place)
        if step + 1 < self.steps:
            video_next, start_next, place_next = self._choose(order, step + 1)
            self.videos.prefetch(video_next, start_next, self.device, place_next)
        if config.randaugment_ops:
            clips = rand_augment(clips, keys, config.randaugment_ops, config.randaugment_magnitude)
        pixels = (clips.float() - self._mean) / self._std
        if config.erasing:
            pixels = random_erase(pixels, keys, config.erasing)
        # Only now, for the set may have put another video in place of one that proved unreadable
        labels = torch.from_numpy(self.videos.labels[video]).to(self.device, non_blocking=True)
        if self.mixup is None:
            targets = mixup_target(labels, self.num_classes, smoothing=config.smoothing)
        else:
            pixels, targets = mix(self.mixup, pixels, labels, self._seed(step, self.epoch, _MIX))
        patches = grid.patchify(pixels)
        if self.kept == grid.num_tokens:
            return patches, targets, None
        scores = None if self.sampler is None else self.sampler(patches)
        chance = keyed_order(keyed_bits(keys, _TOKENS).to(self.device, non_blocking=True), grid.num_tokens)
        return patches, targets, choose_tokens(self.kept, chance, scores)

    def _bits(self, key: Tensor, epoch: int, purpose: int) -> Tensor:
        return keyed_bits(key, self.seed, epoch, purpose)

    def _seed(self, step: int, epoch: int, purpose: int) -> int:
        """32 bits for a generator that others keep."""
        return int(self._bits(torch.tensor(step), epoch, purpose)) & 0xFFFFFFFF

    @contextmanager
    def _seeded(self, purpose: int, epoch: int) -> Iterator[None]:
        """torch's own generators as the key says, and as they were afterwards."""
        seed = self._seed(0, epoch, purpose)
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU
            if on_gpu:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(seed)
            yield

    def _write_metrics(self) -> None:
        with whole(self.folder / "metrics.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def _save(self) -> None:
        """Write the checkpoint: weights and, until the last epoch, what AdamW has gathered."""
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        if self.epoch < self.config.epochs:
            for name, parameter in self.model.named_parameters():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value
        metadata = {"format": FORMAT, "epoch": str(self.epoch), "settings": json.dumps(self.settings)}
        with whole(self.folder / CHECKPOINT) as partial:
            save_tensors(tensors, partial, metadata)

    def _resume(self) -> int:
        """Take up the folder's checkpoint, if there is one; returns the epochs done.

        Raises:
            ValueError: if it is of another fine-tuning.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        metadata, tensors = read_checkpoint(path, FORMAT)
        theirs = json.loads(metadata["settings"])
        differing = [
            f"{name} ({reprlib.repr(theirs.get(name))} there, {reprlib.repr(value)} here)"
            for name, value in self.settings.items()
            if theirs.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{path} is of another fine-tuning: {'; '.join(differing)}; delete that file to fine-tune anew"
            )
        epoch = int(metadata["epoch"])
        tensors = {name: x.to(self.device) for name, x in tensors.items()}
        self.model.load_state_dict({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})
        if epoch < self.config.epochs:
            for name, parameter in self.model.named_parameters():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][key] = tensors[f"optimizer.{key}.{name}"]
        if (self.folder / "metrics.csv").exists():
            with (self.folder / "metrics.csv").open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epoch]
        return epoch


def mix(mixup: Mixup, pixels: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mix each clip with one from the other end of the batch, by timm's mixup or CutMix, alike in all frames.

    Args:
        mixup: knows the number of classes C.
        pixels: float [B, T, H, W, 3], B even.
        labels: int64 [B].
        seed: of the draw, for timm draws from numpy's global generator, which is as it was afterwards.

    Returns:
        Clips [B, T, H, W, 3] and soft targets [B, C].
    """
    # timm cuts its box out of the last two of four axes: frames become channels
    images = pixels.movedim(4, 2).flatten(1, 2)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        images, targets = mixup(images, labels)
    finally:
        np.random.set_state(state)
    return images.unflatten(1, (-1, 3)).movedim(2, 4), targets
