"""MAE checkpoints: safetensors of ours, a Hugging Face folder or a released file; loading one never runs code."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.huggingface import PREFIX, read_huggingface
from tats_env.mae.learner import MAELearner
from tats_env.mae.model import SIZES, MAESize
from tats_env.mae.released import is_released, read_released
from tats_env.mae.translation import ForeignMAE, few

FORMAT = "tats-env mae 1"
_log = logging.getLogger("tats_env.mae")


def save_learner(learner: MAELearner, path: str | Path) -> None:
    """Write the MAE's weights, size and token grid to one safetensors file."""
    size = learner.size if isinstance(learner.size, str) else json.dumps(asdict(learner.size))
    metadata = {"format": FORMAT, "size": size, "grid": json.dumps(asdict(learner.grid))}
    save_tensors(learner.model.state_dict(), path, metadata)


def load_learner(
    path: str | Path, *, device: str | torch.device = "auto", grid: TokenGrid | None = None, **options: Any
) -> MAELearner:
    """Bring back a learner from ``save_learner``'s file, or make one of another program's; the optimiser is new.

    A folder or file without a decoder (VideoMAEModel, VideoMAEForVideoClassification, a fine-tuned release) gives the
    encoder; the decoder then starts from its initial weights, and a warning is logged. So is one that names what was
    left behind.

    Args:
        path: the safetensors file; or ``hf:`` and a local folder as ``save_pretrained`` writes it, or just the folder;
            or ``pth:`` and a file of VideoMAE's or AdaMAE's original release, or just the file if it ends in .pth or
            .pt.
        device: where to put it.
        grid: token geometry of the clips, which a released file does not hold. The others have their own.
        **options: of ``MAELearner``.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it is not such a checkpoint.
    """
    if str(path).startswith(PREFIX) or Path(path).is_dir():
        return _learner(path, read_huggingface(str(path).removeprefix(PREFIX)), device, options)
    if is_released(path):
        return _learner(path, read_released(path, grid), device, options)
    metadata, weights = read_checkpoint(path, FORMAT)
    try:
        made_for, named = TokenGrid(**json.loads(metadata["grid"])), metadata["size"]
        size = named if named in SIZES else MAESize(**json.loads(named))
        learner = MAELearner(made_for, size, device=device, **options)
        learner.model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from error
    return learner


def _learner(path: str | Path, found: ForeignMAE, device: str | torch.device, options: dict[str, Any]) -> MAELearner:
    learner = MAELearner(found.grid, found.size, device=device, **options)
    learner.model.load_state_dict(learner.model.state_dict() | found.weights)
    if not found.has_decoder:
        _log.warning("%s holds an encoder alone: the decoder starts from its initial weights", path)
    if found.left_behind:
        _log.warning("%s: left behind, for it is no part of an MAE: %s", path, few(found.left_behind))
    return learner


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to one safetensors file, which others may read."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, str(path), metadata)
    Path(path).chmod(0o644)  # the library has it for its owner alone


def read_checkpoint(path: str | Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file whose ``format`` is as expected.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable safetensors file of that format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist, or is not a file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != expected:
        raise ValueError(f"{path} is not a checkpoint of format {expected!r}, but of {metadata.get('format')!r}")
    return metadata, tensors
