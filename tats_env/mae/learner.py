"""The co-trained MAE: network, optimiser, schedule and precision, with one forward for reward and gradient."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.guard import GuardedOptimizer, fused_adamw
from tats_env.mae.errors import Reconstruction, motion_errors, patch_targets
from tats_env.mae.model import SIZES, MAESize, VideoMAE, gather_tokens
from tats_env.precision import autocast

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        device: ``auto`` or torch's name for one. On ``meta``, where there are no values, what a step takes can be
            counted.
        seed: of the initial weights, which are the same on every device.
        compile: run tokens and masked passes, errors included, through ``torch.compile``: one graph each, without a
            break, for each shape.
        micro_batch_size: clips in one forward and backward pass; gradients add up over a ``reconstruct``. None takes
            all at once.
        decode_ratio: share of the hidden tokens that an environment has decoded, and learned from, in training; drawn
            at random (VideoMAE v2's dual masking has a fixed pattern).
        checkpointing: keep no activations within blocks, and compute them anew in the backward pass.

    Raises:
        ValueError: on an unknown size, two learning rates, or a share that is none.
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
        micro_batch_size: int | None = None,
        decode_ratio: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"mae size {size!r} is unknown; give one of {', '.join(SIZES)}, or a checkpoint's path")
        if learning_rate is not None and base_learning_rate is not None:
            raise ValueError("give learning_rate (absolute) or base_learning_rate (for 256 clips), not both")
        if not 0 < decode_ratio <= 1:
            raise ValueError(f"decode_ratio={decode_ratio} is not a share: give a value above 0, at most 1")
        self.grid, self.size, self.device = grid, size, resolve_device(device)
        self.micro_batch_size, self.decode_ratio = micro_batch_size, decode_ratio
        shape = SIZES[size] if isinstance(size, str) else size
        if learning_rate is None and base_learning_rate is None:
            learning_rate = shape.learning_rate
        if learning_rate is None:
            learning_rate = (1.5e-4 if base_learning_rate is None else base_learning_rate) * batch_size / 256
        # Drawn on the CPU, and the same on every device; where there are no values, nothing is drawn
        home = self.device if self.device.type == "meta" else torch.device("cpu")
        with torch.random.fork_rng(devices=[]), home:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
            self.model = VideoMAE(grid, shape).to(self.device)
        self.model.checkpointing = checkpointing
        compiled: Any = partial(torch.compile, fullgraph=True, dynamic=False) if compile else lambda function: function
        self._pass, self._tokens = compiled(self._masked_pass), compiled(self._embedded)
        groups = param_groups_weight_decay(self.model, weight_decay, no_weight_decay_list=self.model.no_weight_decay())
        self.optimizer = fused_adamw(groups, self.device, lr=learning_rate, betas=(0.9, 0.95))
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
        self._can_update = False
        self._loss: Tensor | None = None  # with the graph that waits for an update
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
            self._forget()
        return self

    def _forget(self) -> None:
        self._loss, self._can_update = None, False
        self._guard.discard()

    def normalize(self, patches: Tensor) -> Tensor:
        """Byte patches [B, N, P] -> float32, normalised by ImageNet's mean and deviation."""
        return (patches.float() - self._mean) / self._std

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        """What a policy sees: byte clips [B, T, H, W, 3] -> embedding plus position [B, T', S, D], float32."""
        return self._tokens(clips)

    def _embedded(self, clips: Tensor) -> Tensor:
        with autocast(self.device):
            tokens = self.model.tokens(self.normalize(self.grid.patchify(clips)))
        return tokens.float().unflatten(1, (self.grid.num_steps, self.grid.num_positions))

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """The encoder's output with nothing hidden: byte clips [B, T, H, W, 3] -> [B, T', S, D], float32."""
        every = torch.arange(self.grid.num_tokens, device=self.device).expand(len(clips), -1)
        with autocast(self.device):
            latents = self.model.encode(self.normalize(self.grid.patchify(clips)), every)
        return latents.float().unflatten(1, (self.grid.num_steps, self.grid.num_positions))

    def _predict(self, clips: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions and targets [B, M, tubelet * p * p, 3], and variance [B, M, 1, 3], of hidden tokens [B, M]."""
        patches = self.grid.patchify(clips)
        pixels = gather_tokens(patches, hidden).float().div(255).unflatten(2, (-1, 3))
        target, variance = patch_targets(pixels)
        with autocast(self.device):
            prediction = self.model(self.normalize(gather_tokens(patches, visible)), visible, hidden)
        return prediction.float().unflatten(2, (-1, 3)), target, variance

    def _masked_pass(
        self, clips: Tensor, visible: Tensor, hidden: Tensor | None, keep_prediction: bool
    ) -> tuple[Tensor, Reconstruction]:
        """Loss and errors; of all the pixels in it, only what is asked for leaves the compiled graph."""
        if hidden is None:
            hidden = hidden_tokens(visible, self.grid.num_tokens)
        prediction, target, variance = self._predict(clips, visible, hidden)
        error = (prediction - target).square().mean(dim=(2, 3))
        motion = motion_errors(prediction.detach(), target, variance, self.grid.tubelet_size)

        def spread(errors: Tensor) -> Tensor:
            return errors.new_zeros(len(visible), self.grid.num_tokens).scatter_(1, hidden, errors)

        found = error.detach()
        result = Reconstruction(
            spread(found), spread(motion), found.mean(1), visible_mask(hidden, self.grid.num_tokens),
            prediction.detach().flatten(2) if keep_prediction else prediction.new_empty(0),
        )  # fmt: skip
        return error.mean(), result

    def reconstruct(
        self, clips: Tensor, visible: Tensor, hidden: Tensor | None = None, keep_prediction: bool = False
    ) -> Reconstruction:
        """Score clips under a mask and, in training mode, keep the graph for ``update`` (the newest one only).

        With a ``micro_batch_size`` below B its gradient is kept instead, since several graphs would not fit.

        Args:
            clips: uint8 [B, T, H, W, 3].
            visible: [B, K] token indices, ascending.
            hidden: [B, M] token indices, ascending, of those to decode; None for all that are not visible.
            keep_prediction: whether the predicted pixels are wanted.

        Raises:
            ValueError: if ``micro_batch_size`` does not divide B.
        """
        if not self.training:
            return self.errors(clips, visible, hidden, keep_prediction)
        if len(clips) % (size := self.micro_batch_size or len(clips)):
            raise ValueError(f"micro_batch_size={size} does not divide a batch of {len(clips)} clips")
        with ExitStack() as modes:
            # Whoever rolls out under no_grad or inference_mode still gets a graph to learn from. Tensors made
            # under inference_mode can't be saved for backward, hence the copies.
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            clips, visible = (x.clone() if x.is_inference() else x for x in (clips, visible))
            hidden = hidden.clone() if hidden is not None and hidden.is_inference() else hidden
            self._forget()
            self._can_update = True
            if size == len(clips):
                self._loss, result = self._pass(clips, visible, hidden, keep_prediction)
                return result
            results = []
            for i in range(0, len(clips), size):
                rows = slice(i, i + size)
                part = clips[rows], visible[rows], None if hidden is None else hidden[rows]
                loss, result = self._pass(*part, keep_prediction)
                self._guard.accumulate(loss, size / len(clips))
                results.append(result)
        return Reconstruction._make(map(torch.cat, zip(*results, strict=True)))

    @torch.no_grad()
    def errors(
        self, clips: Tensor, visible: Tensor, hidden: Tensor | None = None, keep_prediction: bool = False
    ) -> Reconstruction:
        """``reconstruct`` without a graph, leaving the one that waits for ``update`` alone."""
        return self._pass(clips, visible, hidden, keep_prediction)[1]

    @torch.no_grad()
    def predict_pixels(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Byte clips [B, T, H, W, 3] with the hidden tokens as the MAE sees them, for looking at.

        A patch's own mean and deviation, which the MAE is not asked for, are taken from the truth.
        """
        hidden = hidden_tokens(visible, self.grid.num_tokens)
        prediction, _, variance = self._predict(clips, visible, hidden)
        patches = self.grid.patchify(clips)
        mean = gather_tokens(patches, hidden).float().div(255).unflatten(2, (-1, 3)).mean(2, keepdim=True)
        pixels = (prediction * (variance.sqrt() + 1e-6) + mean).clamp(0, 1).mul(255).round().byte().flatten(2)
        index = hidden[..., None].expand(-1, -1, patches.shape[-1])
        return self.grid.unpatchify(patches.scatter(1, index, pixels))

    def update(self) -> None:
        """One optimiser step on the newest ``reconstruct``, which is used up; the same one on all processes.

        A loss or gradient that is not finite skips the step and is counted, without waiting for the device.

        Raises:
            RuntimeError: if no ``reconstruct`` in training mode came since the last update.
        """
        if not self._can_update:
            raise RuntimeError(
                "update() has no forward pass to learn from: each needs a reconstruct() (an environment step) of its "
                "own before it, in training mode (train(True))"
            )
        with torch.inference_mode(False), torch.enable_grad():
            if self._loss is not None:
                self._guard.accumulate(self._loss)
            loss, broken = self._guard.step()
        self._loss, self._can_update = None, False
        self.num_updates += 1
        if self.total_steps is not None or self.num_updates <= self.schedule.warmup_t:
            self.schedule.step_update(self.num_updates)
        with torch.no_grad():
            self._loss_sum += torch.where(broken, 0.0, loss)
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

    def state(self) -> dict[str, Any]:
        """All that training goes on from after an update: weights, optimiser and counts, which ``restore`` takes."""
        return {
            "weights": self.model.state_dict(),
            "guard": self._guard.state(),
            "losses": torch.stack([self._loss_sum, self._loss_count]),
            "num_updates": self.num_updates,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was asked for; a learner made with the same settings then goes on alike."""
        self._forget()
        self.model.load_state_dict(state["weights"])
        self._guard.restore(state["guard"])
        self._loss_sum.copy_(state["losses"][0])
        self._loss_count.copy_(state["losses"][1])
        self.num_updates = state["num_updates"]
