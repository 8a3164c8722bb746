"""The co-trained MAE: network, optimiser, schedule and precision, with one forward for reward and gradient."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from tats_env.grid import TokenGrid, hidden_tokens
from tats_env.guard import GuardedOptimizer
from tats_env.mae.model import SIZES, MAESize, VideoMAE, gather_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Reconstruction(NamedTuple):
    """What one masked forward pass found, detached; errors are 0 where a token was visible."""

    token_error: Tensor
    """[B, N] mean squared error over a hidden token's pixels, normalised by the patch's own mean and deviation."""
    motion_error: Tensor
    """[B, N] error of the change within the tubelet, in squared units of pixels in [0, 1]."""
    reconstruction_error: Tensor
    """[B] mean of ``token_error`` over the hidden tokens."""
    prediction: Tensor = torch.empty(0)
    """[B, N - K, P] predicted pixels of the hidden tokens, ascending, normalised as for ``token_error``."""


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else is torch's own name for a device.

    Raises:
        ValueError: for a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices; give auto or cpu"
        )
    return resolved


def patch_targets(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise each patch per channel by its own mean and unbiased standard deviation (VideoMAE's reference form).

    Args:
        patches: [..., tubelet * p * p, C] pixels in [0, 1].

    Returns:
        Targets of the same shape, and the per-channel variance [..., 1, C].
    """
    variance = patches.var(dim=-2, unbiased=True, keepdim=True)
    return (patches - patches.mean(dim=-2, keepdim=True)) / (variance.sqrt() + 1e-6), variance


def motion_errors(prediction: Tensor, target: Tensor, variance: Tensor, tubelet_size: int) -> Tensor:
    """Reconstruction error of the *change* between the frames of a tubelet, in pixels rather than deviations.

    ``var * ((pred_2 - pred_1) - (target_2 - target_1))^2 / 2`` averaged over pixels (and over frame pairs where a
    tubelet has more than two frames); 0 for tubelets of one frame, which hold no motion.

    Args:
        prediction, target: [B, M, tubelet * p * p, C], normalised by patch.
        variance: [B, M, 1, C], each patch's pixel variance, which undoes the normalisation.

    Returns:
        [B, M].
    """
    if tubelet_size == 1:
        return prediction.new_zeros(prediction.shape[:2])
    change = (prediction - target).unflatten(2, (tubelet_size, -1)).diff(dim=2)
    return (change.square() * variance.unsqueeze(2)).mean(dim=(2, 3, 4)) / 2


class MAELearner:
    """A masked autoencoder that is trained while an environment uses it.

    ``reconstruct`` scores clips and, in training mode, keeps the graph of that newest forward pass, whatever
    gradient mode the caller runs under; ``update`` uses it up for one optimiser step. Copying a learner (as
    ``gym.make`` does with its arguments) gives the same learner, so several environments can share one.

    Args:
        grid: token geometry of the clips.
        size: a name of ``SIZES``, or a size of your own.
        batch_size: clips in one update, over all processes; a base learning rate is scaled by it.
        learning_rate: absolute learning rate.
        base_learning_rate: learning rate for 256 clips. With neither, the size's own rule holds.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: updates of linear warm-up.
        total_steps: updates until the cosine reaches 1 % of the learning rate; None keeps it constant.
        device: ``auto`` or torch's name for one.
        seed: of the initial weights, which are the same on every device.
        compile: run the network through ``torch.compile``.

    Raises:
        ValueError: on an unknown size or two learning rates.
    """

    def __init__(
        self,
        grid: TokenGrid,
        size: str | MAESize = "tiny",
        *,
        batch_size: int = 1,
        learning_rate: float | None = None,
        base_learning_rate: float | None = None,
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"mae size {size!r} is unknown; give one of {', '.join(SIZES)}, or a checkpoint's path")
        if learning_rate is not None and base_learning_rate is not None:
            raise ValueError("give learning_rate (absolute) or base_learning_rate (for 256 clips), not both")
        self.grid, self.size, self.device = grid, size, resolve_device(device)
        shape = SIZES[size] if isinstance(size, str) else size
        if learning_rate is None and base_learning_rate is None:
            learning_rate = shape.learning_rate
        if learning_rate is None:
            learning_rate = (1.5e-4 if base_learning_rate is None else base_learning_rate) * batch_size / 256
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
            self.model = VideoMAE(grid, shape).to(self.device)
        self.network: Any = torch.compile(self.model) if compile else self.model
        groups = param_groups_weight_decay(self.model, weight_decay, no_weight_decay_list=self.model.no_weight_decay())
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(2, (total_steps or 0) - warmup_steps),
            lr_min=0.01 * learning_rate,
            warmup_t=warmup_steps,
            warmup_lr_init=0.01 * learning_rate,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.total_steps = total_steps
        self.num_updates = 0
        self.training = True
        self._loss: Tensor | None = None
        self._guard = GuardedOptimizer(self.optimizer, self.model.parameters())
        self._loss_sum, self._loss_count = torch.zeros(2, device=self.device).unbind()
        # Pixel statistics repeated over a patch, for bytes as they come from the decoder.
        pixels = grid.patch_dim // 3
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).mul(255).repeat(pixels)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).mul(255).repeat(pixels)

    def __deepcopy__(self, memo: dict[int, Any]) -> MAELearner:
        return self

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return self.model.size.embed_dim

    def train(self, mode: bool = True) -> MAELearner:
        """In training mode ``reconstruct`` keeps its graph for ``update``; leaving it drops the graph that waited."""
        self.training = mode
        if not mode:
            self._loss = None
        return self

    def normalize(self, patches: Tensor) -> Tensor:
        """Byte patches [B, N, P] -> float32, normalised by ImageNet's mean and deviation."""
        return (patches.float() - self._mean) / self._std

    def _autocast(self) -> torch.autocast:
        # Without the cache, for a caller's own autocast would keep it, and with it weights from before an update.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        """What a policy sees: byte clips [B, T, H, W, 3] -> embedding plus position [B, T', S, D], float32."""
        with self._autocast():
            tokens = self.model.tokens(self.normalize(self.grid.patchify(clips)))
        return tokens.float().unflatten(1, (self.grid.num_steps, self.grid.num_positions))

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """The encoder's output with nothing hidden: byte clips [B, T, H, W, 3] -> [B, T', S, D], float32."""
        every = torch.arange(self.grid.num_tokens, device=self.device).expand(len(clips), -1)
        with self._autocast():
            latents = self.model.encode(self.normalize(self.grid.patchify(clips)), every)
        return latents.float().unflatten(1, (self.grid.num_steps, self.grid.num_positions))

    def _forward(self, clips: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions, targets [B, N - K, tubelet * p * p, 3], variance [B, N - K, 1, 3], hidden [B, N - K]."""
        patches = self.grid.patchify(clips)
        hidden = hidden_tokens(visible, self.grid.num_tokens)
        pixels = gather_tokens(patches, hidden).float().div(255).unflatten(2, (-1, 3))
        target, variance = patch_targets(pixels)
        with self._autocast():
            prediction = self.network(self.normalize(gather_tokens(patches, visible)), visible, hidden)
        return prediction.float().unflatten(2, (-1, 3)), target, variance, hidden

    def _reconstruct(self, clips: Tensor, visible: Tensor) -> tuple[Tensor, Reconstruction]:
        prediction, target, variance, hidden = self._forward(clips, visible)
        hidden_error = (prediction - target).square().mean(dim=(2, 3))

        def spread(errors: Tensor) -> Tensor:
            return errors.new_zeros(len(visible), self.grid.num_tokens).scatter_(1, hidden, errors)

        with torch.no_grad():
            motion = motion_errors(prediction, target, variance, self.grid.tubelet_size)
            result = Reconstruction(
                spread(hidden_error.detach()), spread(motion), hidden_error.detach().mean(1),
                prediction.detach().flatten(2),
            )  # fmt: skip
        return hidden_error.mean(), result

    def reconstruct(self, clips: Tensor, visible: Tensor) -> Reconstruction:
        """Score clips under a mask and, in training mode, keep the graph for ``update`` (the newest one only).

        Args:
            clips: uint8 [B, T, H, W, 3].
            visible: [B, K] token indices, ascending.
        """
        if not self.training:
            return self.errors(clips, visible)
        with ExitStack() as modes:
            # Whoever rolls out under no_grad or inference_mode still gets a graph to learn from. Indices made
            # under inference_mode can't be saved for backward, hence the copies.
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            if visible.is_inference():
                visible = visible.clone()
            if clips.is_inference():
                clips = clips.clone()
            self._loss, result = self._reconstruct(clips, visible)
        return result

    @torch.no_grad()
    def errors(self, clips: Tensor, visible: Tensor) -> Reconstruction:
        """``reconstruct`` without a graph, leaving the one that waits for ``update`` alone."""
        return self._reconstruct(clips, visible)[1]

    @torch.no_grad()
    def predict_pixels(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Byte clips [B, T, H, W, 3] with the hidden tokens as the MAE sees them, for looking at.

        A patch's own mean and deviation, which the MAE is not asked for, are taken from the truth.
        """
        prediction, _, variance, hidden = self._forward(clips, visible)
        patches = self.grid.patchify(clips)
        mean = gather_tokens(patches, hidden).float().div(255).unflatten(2, (-1, 3)).mean(2, keepdim=True)
        pixels = (prediction * (variance.sqrt() + 1e-6) + mean).clamp(0, 1).mul(255).round().byte().flatten(2)
        index = hidden[..., None].expand(-1, -1, patches.shape[-1])
        return self.grid.unpatchify(patches.scatter(1, index, pixels))

    def update(self) -> None:
        """One optimiser step on the graph of the newest ``reconstruct``, which is used up.

        A loss or gradient that is not finite skips the step and is counted, without waiting for the device.

        Raises:
            RuntimeError: if no ``reconstruct`` in training mode came since the last update.
        """
        if self._loss is None:
            raise RuntimeError(
                "update() has no forward pass to learn from: each needs a reconstruct() (an environment step) of its "
                "own before it, in training mode (train(True))"
            )
        loss, self._loss = self._loss, None
        with torch.inference_mode(False), torch.enable_grad():
            broken = self._guard.step(loss)
        self.num_updates += 1
        if self.total_steps is not None or self.num_updates <= self.schedule.warmup_t:
            self.schedule.step_update(self.num_updates)
        with torch.no_grad():
            self._loss_sum += torch.where(broken, 0.0, loss.detach())
            self._loss_count += ~broken

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call, for a log line; waits for the device.

        Raises:
            FloatingPointError: if the last 20 updates or more were all skipped.
        """
        norm, skipped = self._guard.report(
            "MAE",
            "try a lower mae.learning_rate or a longer mae.warmup_steps, and look for broken clips in the data",
        )
        loss_sum, count = torch.stack([self._loss_sum, self._loss_count]).tolist()
        with torch.no_grad():
            self._loss_sum.zero_()
            self._loss_count.zero_()
        return {
            "mae/loss": loss_sum / count if count else float("nan"),
            "mae/grad_norm": norm,
            "mae/learning_rate": self.optimizer.param_groups[0]["lr"],
            "mae/skipped_updates": skipped,
            "mae/n_updates": float(self.num_updates),
        }
