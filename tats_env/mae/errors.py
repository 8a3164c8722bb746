"""How well hidden tokens were predicted: targets, errors, and what a masked pass found."""

from typing import NamedTuple

import torch
from torch import Tensor


class Reconstruction(NamedTuple):
    """What one masked forward pass found, detached; errors are 0 where a token was visible, or not decoded."""

    token_error: Tensor
    """[B, N] mean squared error over a hidden token's pixels, normalised by the patch's own mean and deviation."""
    motion_error: Tensor
    """[B, N] error of the change within the tubelet, in squared units of pixels in [0, 1]."""
    reconstruction_error: Tensor
    """[B] mean of ``token_error`` over the tokens ``scored``."""
    scored: Tensor
    """bool [B, N], the hidden tokens that were decoded: all of them, unless some were left out."""
    prediction: Tensor = torch.empty(0)
    """[B, N - K, P] predicted pixels of the hidden tokens, ascending, normalised as for ``token_error``; if asked."""


def patch_targets(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise each patch per channel by its own mean and unbiased standard deviation (VideoMAE's reference form).

    Args:
        patches: [..., tubelet * p * p, C] pixels in [0, 1].

    Returns:
        Targets of the same shape, and the per-channel variance [..., 1, C].
    """
    centred = patches - patches.mean(dim=-2, keepdim=True)
    # On a CPU ``var`` over a dimension that is not the last takes as long as all the rest of this
    variance = centred.square().sum(dim=-2, keepdim=True) / (patches.shape[-2] - 1)
    return centred / (variance.sqrt() + 1e-6), variance


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
