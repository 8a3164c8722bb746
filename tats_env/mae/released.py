"""Files of VideoMAE's and AdaMAE's original releases: what they hold, read without running any of it.

Source of names, shapes and what is not stored: https://github.com/MCG-NJU/VideoMAE (``modeling_pretrain.py``,
``modeling_finetune.py``, ``utils.py``) and https://github.com/wgcban/adamae (``models/pretrain/vit.py``). The network
is that of ``VideoMAE``; AdaMAE's has a sampler beside it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.huggingface import DAMAGE
from tats_env.mae.model import MAESize
from tats_env.mae.translation import RELEASED, ForeignMAE, few, to_ours

PREFIX = "pth:"
SUFFIXES = (".pth", ".pt")

# Channels of an attention head, by the width: not stored, and 64 in most of the networks that were released.
_HEAD = {1280: 80, 640: 80, 1408: 88}
_NORM_EPS = 1e-6
# What is no part of an MAE: a classifier's head, AdaMAE's sampler.
_IGNORED = ("fc_norm.", "head.", *(f"{prefix}{name}" for prefix in ("", "encoder.") for name in (
    "pos_embed_probs", "get_token_probs.",
)))  # fmt: skip


def is_released(path: str | Path) -> bool:
    """Whether a path names such a file: ``pth:`` and a path, or one that ends in .pth or .pt."""
    return str(path).startswith(PREFIX) or str(path).endswith(SUFFIXES)


def read_released(path: str | Path, grid: TokenGrid | None) -> ForeignMAE:
    """Read a checkpoint of a pre-training, or of a fine-tuning, which holds the encoder alone.

    The weights are under ``model`` or, as DeepSpeed writes them, ``module``. Besides tensors, numbers and text, the
    file may hold the ``argparse.Namespace`` of its command line, and nothing else.

    Args:
        path: of the file.
        grid: token geometry of the clips, for the file has only that of a token.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else or not all of it, or its network is for other clips.
    """
    path = Path(str(path).removeprefix(PREFIX)).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist, or is not a file")
    if grid is None:
        raise ValueError(f"{path}: a file of the original release does not say for which clips it is: give a grid")
    content = _load(path)
    tensors = _tensors(content, path)
    try:
        _check(content.get("args"), grid)
        prefix = "encoder." if any(name.startswith("encoder.") for name in tensors) else ""
        has_decoder = any(name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in tensors)
        size = _size(tensors, prefix, has_decoder, grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = to_ours(tensors, RELEASED, grid, size, prefix=prefix, decoder=has_decoder, ignored=_IGNORED)
    if found.complaints:
        raise ValueError(f"the weights in {path} are not those of a released VideoMAE: {found.complaints}")
    return ForeignMAE(grid, size, found.weights, has_decoder, found.left_behind)


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        # torch's own words recommend to run what is in there
        found = re.search(r"GLOBAL (\S+)", str(error))
        more = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, numbers, text and an argparse.Namespace{more}, and was "
            "not loaded"
        ) from error
    return content if isinstance(content, dict) else {}


def _tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for key in ("model", "module"):
        if isinstance(tensors := content.get(key), dict) and tensors and all(isinstance(x, str) for x in tensors):
            # As a network wrapped for several processes has them
            wrapped = all(name.startswith("module.") for name in tensors)
            return {name.removeprefix("module.") if wrapped else name: x for name, x in tensors.items()}
    held = f"has {few([str(key) for key in content])}" if content else "holds no dictionary"
    raise ValueError(f"{path} {held}; the weights must be under 'model' or 'module', as the releases have them")


def _check(args: Any, grid: TokenGrid) -> None:
    """Raise ValueError if the command line, where the file holds it, tells of what ours would do otherwise."""
    given = vars(args) if isinstance(args, argparse.Namespace) else {}
    # Positions are by flat index: on clips of another size a token would get the position of one elsewhere
    for theirs, ours in (("num_frames", ("num_frames",)), ("input_size", ("height", "width"))):
        for name in ours:
            if (found := given.get(theirs, getattr(grid, name))) != getattr(grid, name):
                raise ValueError(f"trained on clips of {theirs}={found}, but these have {name}={getattr(grid, name)}")
    if not given.get("normlize_target", True):  # their spelling
        raise ValueError("trained with normlize_target=False: this decoder predicts plain pixels, ours normalised ones")
    if not given.get("imagenet_default_mean_and_std", True):
        raise ValueError("trained with imagenet_default_mean_and_std=False: its pixels are normalised otherwise")


def _size(tensors: dict[str, Tensor], prefix: str, has_decoder: bool, grid: TokenGrid) -> MAESize:
    """Widths and depths by the tensors' shapes, the rest as it was released.

    Raises:
        ValueError: if there is no telling, or tokens are cut otherwise.
    """
    kernel = tensors.get(f"{prefix}patch_embed.proj.weight")
    if not isinstance(kernel, Tensor) or kernel.ndim != 5:
        raise ValueError(f"{prefix}patch_embed.proj.weight is missing, or of no three-dimensional convolution")
    width, _, *token = kernel.shape
    if token != [grid.tubelet_size, grid.patch_size, grid.patch_size]:
        raise ValueError(
            f"its tokens are {' x '.join(map(str, token))} frames and pixels, but these clips are cut into "
            f"{grid.tubelet_size} x {grid.patch_size} x {grid.patch_size}: give tubelet_size={token[0]}, "
            f"patch_size={token[1]}"
        )
    depth, heads, mlp_dim = _part(tensors, f"{prefix}blocks", width)
    if not has_decoder:  # one in proportion, which starts from its initial weights
        decoder_width = width // 2
        decoder = (4, max(1, heads // 2), 4 * decoder_width)
    else:
        bridge = tensors.get("encoder_to_decoder.weight")
        if not isinstance(bridge, Tensor) or bridge.ndim != 2:
            raise ValueError("encoder_to_decoder.weight is missing, or of no linear map")
        decoder_width = len(bridge)
        decoder = _part(tensors, "decoder.blocks", decoder_width)
    return MAESize(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=mlp_dim,
        decoder_embed_dim=decoder_width,
        decoder_depth=decoder[0],
        decoder_num_heads=decoder[1],
        decoder_mlp_dim=decoder[2],
        norm_eps=_NORM_EPS,
        decoder_norm_eps=_NORM_EPS,
        final_norm=f"{prefix}norm.weight" in tensors,
    )


def _part(tensors: dict[str, Tensor], blocks: str, width: int) -> tuple[int, int, int]:
    """(depth, heads, hidden width of the MLPs) of encoder or decoder.

    Raises:
        ValueError: if there is no telling.
    """
    head = _HEAD.get(width, 64)
    if width % head:
        raise ValueError(f"{blocks} has width {width}, which none of the released networks has: its heads are unknown")
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))}
    first = tensors.get(f"{blocks}.0.mlp.fc1.weight")
    if not isinstance(first, Tensor) or first.ndim != 2:
        raise ValueError(f"{blocks}.0.mlp.fc1.weight is missing, or of no linear map")
    return len(numbers), width // head, len(first)
