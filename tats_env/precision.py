"""In which precision networks run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, enabled: bool = True) -> AbstractContextManager[object]:
    """bfloat16 for matrix products on a GPU, float32 elsewhere, and everywhere if not ``enabled``.

    A caller's own autocast does not reach in: its cache would keep weights from before an update.
    """
    if device.type == "meta":  # no values, no precision
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled and device.type == "cuda", cache_enabled=False)
