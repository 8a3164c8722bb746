"""The same numbers twice, on a GPU too."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Have torch take deterministic algorithms wherever it has them; to be called before anything is on a GPU.

    Where it has none, as for an operation of a policy of one's own, torch warns and names it: that a run might not
    repeat is no reason to refuse it.
    """
    from torch._inductor import config  # here, for it takes a second

    # Read by cuBLAS when it starts: workspaces that streams don't share
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Whether torch.compile pads a matrix product goes by what it timed, and sums differ with it
    config.shape_padding = False
