"""What the processes of one data-parallel run tell each other; with one process nothing is sent.

Whoever starts torch.distributed (``torchrun``, and in our own runs accelerate) makes learners and agents data-parallel:
each process steps its share of the environments, and all make the same updates.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes take part: 1 where torch.distributed was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


@torch.no_grad()
def average(*tensors: Tensor) -> None:
    """Replace each tensor, all of one dtype and device, by its mean over the processes: one message for all of them."""
    if num_processes() == 1:
        return
    # Summed and then divided, since gloo knows no averages
    flat = torch.cat([x.reshape(-1) for x in tensors]) / num_processes()
    dist.all_reduce(flat)
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The rows of all processes in their order: [M, ...] of each -> [R * M, ...]."""
    if num_processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(num_processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
