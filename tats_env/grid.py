"""Clip <-> token geometry: no state, no learning, nothing of ours imported."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

import torch
from einops import rearrange
from torch import Tensor


def token_budget(num_tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens, K = floor(N * (1 - mask_ratio) + 1e-9).

    Raises:
        ValueError: if that leaves nothing visible or nothing hidden.
    """
    k = int(num_tokens * (1 - mask_ratio) + 1e-9)
    if not 1 <= k < num_tokens:
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps {k} of {num_tokens} tokens visible; between 1 and {num_tokens - 1} "
            f"must stay: give a mask_ratio from {ceil(1e4 / num_tokens) / 1e4} to {floor(1e4 - 1e4 / num_tokens) / 1e4}"
        )
    return k


@dataclass(frozen=True)
class TokenGrid:
    """How a clip of T x H x W pixels is cut into N = T' * S tokens, time-major ``(t h w)`` as in VideoMAE.

    A token is a tubelet of ``tubelet_size`` frames x ``patch_size`` x ``patch_size`` pixels x 3 channels, flattened
    in that order into P values.

    Raises:
        ValueError: if tubelet or patch do not divide the clip.
    """

    num_frames: int = 16
    height: int = 224
    width: int = 224
    tubelet_size: int = 2
    patch_size: int = 16

    def __post_init__(self) -> None:
        for name, whole, part in (
            ("num_frames", self.num_frames, self.tubelet_size),
            ("height", self.height, self.patch_size),
            ("width", self.width, self.patch_size),
        ):
            if whole < 1 or part < 1 or whole % part:
                unit = "tubelet_size" if name == "num_frames" else "patch_size"
                raise ValueError(f"{unit}={part} does not divide {name}={whole}: give a divisor of {whole}")

    @property
    def num_steps(self) -> int:
        """T', the number of tubelets along time."""
        return self.num_frames // self.tubelet_size

    @property
    def rows(self) -> int:
        """H', the number of patches down a frame."""
        return self.height // self.patch_size

    @property
    def columns(self) -> int:
        """W', the number of patches across a frame."""
        return self.width // self.patch_size

    @property
    def num_positions(self) -> int:
        """S = H' * W', the spatial positions of one tubelet."""
        return self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """N = T' * S."""
        return self.num_steps * self.num_positions

    @property
    def patch_dim(self) -> int:
        """P, the values in one token."""
        return self.tubelet_size * self.patch_size**2 * 3

    def _rearrange(self, x: Tensor, pattern: str) -> Tensor:
        axes = {"t": self.num_steps, "h": self.rows, "w": self.columns, "u": self.tubelet_size}
        return rearrange(x, pattern, p=self.patch_size, q=self.patch_size, **axes)

    def patchify(self, clips: Tensor) -> Tensor:
        """Cut clips [B, T, H, W, C] of any dtype into patches [B, N, tubelet * p * p * C]."""
        return self._rearrange(clips, "b (t u) (h p) (w q) c -> b (t h w) (u p q c)")

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches [B, N, tubelet * p * p * C] back together into clips [B, T, H, W, C]."""
        return self._rearrange(patches, "b (t h w) (u p q c) -> b (t u) (h p) (w q) c")

    def coordinates(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, h, w) grid coordinates of token indices of any shape."""
        t, position = tokens // self.num_positions, tokens % self.num_positions
        return t, position // self.columns, position % self.columns

    def token_share(self, pixels: Tensor) -> Tensor:
        """Share of each token's pixels that are set: bool [B, T, H, W] -> float32 [B, N] in [0, 1]."""
        return self.patchify(pixels.unsqueeze(-1)).float().mean(-1)


def hidden_tokens(visible: Tensor, num_tokens: int) -> Tensor:
    """The N - K token indices, ascending, that are not in ``visible`` [B, K] -> [B, N - K]."""
    shown = visible_mask(visible, num_tokens)
    # A stable sort keeps index order and, unlike nonzero(), does not wait for the device.
    return shown.byte().sort(dim=1, stable=True).indices[:, : num_tokens - visible.shape[1]]


def visible_mask(visible: Tensor, num_tokens: int) -> Tensor:
    """Indices [B, K] -> bool [B, N], True where a token is visible."""
    mask = torch.zeros(visible.shape[0], num_tokens, dtype=torch.bool, device=visible.device)
    return mask.scatter_(1, visible, True)
