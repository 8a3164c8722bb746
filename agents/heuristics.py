"""Masks that need no learning: geometry, motion in the pixels, and oracles that look at the truth."""

from __future__ import annotations

from abc import abstractmethod
from math import isqrt
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from agents.base import Stepwise, from_batch
from agents.distributions import PlackettLuce, picks_to_scores
from tats_env.grid import hidden_tokens


class RandomMask(Stepwise):
    """Uniform random masks: the baseline of every comparison. They don't look, and so don't pay for an observation."""

    observation: ClassVar[str] = "nothing"

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """Uniform draws; there is no other mode."""
        return 2 * self.draws.uniform(*observation.shape[:3]).flatten(1) - 1

    def _groups(self, group: Tensor, count: int, observation: Tensor) -> Tensor:
        """Scores [B, N] that keep whole groups of tokens, in random order, and of the last one random tokens.

        Args:
            group: int64 [T', S], which group each token belongs to, from 0 to count - 1.
            count: how many there are.
            observation: [B, T', S, D].
        """
        rank = self.draws.uniform(len(observation), count).argsort(dim=1)[:, group.flatten()]  # [B, N]
        return 2 * (rank + self.draws.uniform(*rank.shape)) / count - 1


def _steps_and_positions(observation: Tensor) -> tuple[Tensor, Tensor]:
    """int64 (t, s), [T', 1] and [1, S], that broadcast over an observation's tokens."""
    steps, positions = observation.shape[1:3]
    device = observation.device
    return torch.arange(steps, device=device)[:, None], torch.arange(positions, device=device)[None]


class TubeMask(RandomMask):
    """One random spatial mask for all of time (VideoMAE's tubes); what is left of K / T' goes to one more column."""

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """Whole columns of tokens, and random slots of one more."""
        t, s = _steps_and_positions(observation)
        return self._groups(s + 0 * t, s.numel(), observation)


class FrameMask(RandomMask):
    """Whole time slots while K lasts, the last one in random positions."""

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """Whole slots of time, and random positions of one more."""
        t, s = _steps_and_positions(observation)
        return self._groups(t + 0 * s, t.numel(), observation)


class BlockMask(RandomMask):
    """Space-time cubes of tokens, on a fixed partition of a square grid.

    Args:
        steps: tokens of a cube along time.
        side: tokens of a cube down and across.
        **options: of ``Stepwise``.

    Raises:
        ValueError: if a cube is empty.
    """

    def __init__(self, env: Any = None, *, steps: int = 2, side: int = 2, seed: int = 0) -> None:
        if min(steps, side) < 1:
            raise ValueError(f"steps={steps}, side={side}: a cube has at least one token each way")
        super().__init__(env, seed=seed)
        self.steps, self.side = steps, side

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """Whole cubes, and random tokens of one more."""
        t, s = _steps_and_positions(observation)
        columns = _square_side(observation)
        blocks, layers = -(-columns // self.side), -(-t.numel() // self.steps)
        cube = (t // self.steps * blocks + s // columns // self.side) * blocks + s % columns // self.side
        return self._groups(cube, layers * blocks**2, observation)


def _square_side(observation: Tensor) -> int:
    """H' = W' of an observation [B, T', S, D].

    Raises:
        ValueError: if S is not a square.
    """
    positions = observation.shape[2]
    if isqrt(positions) ** 2 != positions:
        raise ValueError(f"{positions} positions are not a square grid")
    return isqrt(positions)


class _Prior(RandomMask):
    """Draws without replacement from p = (1 - explore) softmax(logits) + explore / N, for logits that a subclass has.

    Raises:
        ValueError: if ``explore`` is not a share.
    """

    def __init__(self, env: Any = None, *, explore: float = 0.5, seed: int = 0) -> None:
        if not 0 <= explore <= 1:
            raise ValueError(f"explore={explore} is not a share: give a value between 0 and 1")
        super().__init__(env, seed=seed)
        self.explore = explore

    @abstractmethod
    def logits(self, observation: Tensor) -> Tensor:
        """[B, N] for an observation [B, T', S, D]."""

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """The ranks of a draw, or of the highest logits."""
        logits = self.logits(observation)
        policy = PlackettLuce(logits, logits.shape[1], self.explore)
        picks = policy.mode() if deterministic else policy.sample(uniform=self.draws.uniform(*logits.shape))
        return picks_to_scores(picks, logits.shape[1])


class MotionMask(_Prior):
    """Frame-difference energy e as a prior: p in proportion to e^(1 / temperature), mixed with uniform draws.

    The energy of a token is the mean squared difference of its frames, one to the next; the first frame of a tubelet
    is compared with the last of the tubelet before, so that tubelets of one frame work as well.

    Args:
        temperature: 1 draws in proportion to the energy; lower is sharper, higher is closer to uniform.
        explore: share of uniform draws.
        camera: take the global camera motion out first: frames are compared after the whole-pixel shift between them
            that phase correlation finds (Kuglin and Hines, 1975), over what both show.
        tubelet_size, patch_size: frames and pixels of a token; with an environment, its own.
        **options: of ``Stepwise``.

    Raises:
        ValueError: if the temperature is not positive.
    """

    observation: ClassVar[str] = "pixels"

    def __init__(
        self,
        env: Any = None,
        *,
        temperature: float = 1.0,
        explore: float = 0.5,
        camera: bool = False,
        tubelet_size: int = 2,
        patch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: give a positive number")
        super().__init__(env, explore=explore, seed=seed)
        self.temperature, self.camera = temperature, camera
        self.tubelet_size, self.patch_size = tubelet_size, patch_size
        if self.env is not None:
            grid = self.env.unwrapped.task.grid
            self.tubelet_size, self.patch_size = grid.tubelet_size, grid.patch_size

    def logits(self, observation: Tensor) -> Tensor:
        """log of the energy over the temperature: pixels, the first P channels of [B, T', S, D] -> [B, N]."""
        pixels = observation[..., : self.tubelet_size * self.patch_size**2 * 3]
        return motion_energy(pixels, self.tubelet_size, self.camera).clamp_min(1e-12).log() / self.temperature


def motion_energy(observation: Tensor, tubelet_size: int, camera: bool) -> Tensor:
    """Mean squared difference of a token's frames from the ones before: pixels [B, T', S, P] -> [B, N].

    Args:
        observation: normalised patches, P in the order (frame, row, column, channel).
        tubelet_size: frames in a token.
        camera: compare after the global shift between two frames has been taken out.
    """
    side = _square_side(observation)
    patch = isqrt(observation.shape[-1] // (3 * tubelet_size))
    axes = {"h": side, "u": tubelet_size, "p": patch, "c": 3}
    frames = rearrange(observation, "b t (h w) (u p q c) -> b (t u) c (h p) (w q)", **axes)
    before, after = frames[:, :-1], frames[:, 1:]
    inside = torch.ones_like(after[:, :, 0], dtype=torch.bool)
    if camera:
        before, inside = _shifted(before, global_shift(before.mean(2), after.mean(2)))
    change = (after - before).square().mean(2) * inside

    def total(x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x], 1)  # the first frame has none before it: take its change to the next
        return rearrange(x, "b (t u) (h p) (w q) -> b (t h w) (u p q)", p=patch, q=patch, u=tubelet_size).sum(-1)

    return total(change) / total(inside.float()).clamp_min(1)


def global_shift(before: Tensor, after: Tensor) -> Tensor:
    """How far the picture as a whole moved, by phase correlation: grey frames [..., H, W] twice -> int64 [..., 2].

    A shift that does not lower the mean absolute difference of what both frames show is none: on small pictures the
    peak of the correlation can belong to an object.

    Returns:
        (down, right) in pixels, each within half of the picture's side.
    """
    sides = before.shape[-2:]
    cross = torch.fft.rfft2(after) * torch.fft.rfft2(before).conj()
    peak = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-12), s=sides).flatten(-2).argmax(-1)
    shift = torch.stack([peak // sides[1], peak % sides[1]], -1)
    side = torch.tensor(sides).to(before.device, non_blocking=True)  # made there, it would wait for the device
    shift = (shift + side // 2) % side - side // 2
    moved, inside = _shifted(before[..., None, :, :], shift)
    residual = ((after - moved.squeeze(-3)).abs() * inside).sum((-2, -1)) / inside.sum((-2, -1))
    return shift * (residual < (after - before).abs().mean((-2, -1)))[..., None]


def _shifted(frames: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [..., C, H, W] moved by (down, right) [..., 2], and where the picture came from inside: [..., H, W]."""
    height, width = frames.shape[-2:]
    row = torch.arange(height, device=frames.device) - shift[..., :1]  # [..., H]
    column = torch.arange(width, device=frames.device) - shift[..., 1:]
    inside = ((row >= 0) & (row < height))[..., :, None] & ((column >= 0) & (column < width))[..., None, :]
    index = (row % height)[..., :, None] * width + (column % width)[..., None, :]
    moved = frames.flatten(-2).gather(-1, index.flatten(-2)[..., None, :].expand(frames.flatten(-2).shape))
    return moved.view(frames.shape), inside


class OracleMask(_Prior):
    """The true moving foreground of a rendered set as a prior: p in proportion to a token's share of it. A reference.

    Args:
        explore: share of uniform draws.
        **options: of ``Stepwise``.
    """

    observation: ClassVar[str] = "foreground"

    def logits(self, observation: Tensor) -> Tensor:
        """log of the share of moving foreground, the first channel: [B, T', S, D] -> [B, N]."""
        return observation[..., 0].flatten(1).clamp_min(1e-6).log()


class GreedyOracle(RandomMask):
    """Looks at the true error: shows those tokens of which each alone would lower the reconstruction error most.

    A reference for evaluation, and for small grids: ``predict`` makes one forward pass of the MAE for every token that
    could be shown. While the MAE trains, in ``learn``, masks are uniformly random. On ``TATSMaskingSequential-v0`` it
    is the greedy choice of each round; with one token a round, exactly so.
    """

    @torch.no_grad()
    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, None]:
        """Ranks [B, N], highest where the summed error is lowest with that token shown besides those that are.

        Raises:
            ValueError: if the agent has no environment, or the observation is not of its present clips.
        """
        if self.env is None or len(observation) != self.env.num_envs:
            raise ValueError("the greedy oracle looks into its environment: give env=, and that one's observation")
        task = self.env.unwrapped.task
        candidates = hidden_tokens(task.shown, task.grid.num_tokens)
        errors = [
            task.mae.errors(task.clips, torch.cat([task.shown, one], 1).sort(dim=1).values).token_error.sum(1)
            for one in candidates.split(1, dim=1)
        ]
        order = candidates.gather(1, torch.stack(errors, 1).argsort(dim=1))
        scores = picks_to_scores(order, task.grid.num_tokens)
        return from_batch(scores, False, isinstance(observation, np.ndarray)), None
