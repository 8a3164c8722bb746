"""Hugging Face's VideoMAE, read from a local folder without the transformers package.

Source of names, shapes and defaults: transformers, ``models/videomae``. The architecture is the one of ``VideoMAE`` but
for what ``MAESize`` says; keys have no bias there, which a bias of zero equals, for softmax does not see it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.model import MAESize
from tats_env.mae.translation import HUGGING_FACE, ForeignMAE, to_ours

PREFIX = "hf:"

# What VideoMAEConfig takes for a field that config.json leaves out.
DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2,
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "decoder_hidden_size": 384, "decoder_num_hidden_layers": 4, "decoder_num_attention_heads": 6,
    "decoder_intermediate_size": 1536, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qv_bias": True,
    "use_mean_pooling": True, "norm_pix_loss": True,
}  # fmt: skip
_INTEGERS = [name for name, value in DEFAULTS.items() if type(value) is int]
# The decoder's last LayerNorm is made without the configuration's epsilon, hence with torch's default.
DECODER_NORM_EPS = 1e-5
DAMAGE = (
    SafetensorError,
    OSError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def read_huggingface(folder: str | Path) -> ForeignMAE:
    """Read what ``save_pretrained`` wrote: VideoMAEForPreTraining, VideoMAEModel or VideoMAEForVideoClassification.

    Weights are model.safetensors, whole or in shards, or else pytorch_model.bin, of which nothing but tensors is
    unpickled. A classification head is left behind.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else, or not all of it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; a model of the Hugging Face Hub has to be downloaded first: "
            "hf download OWNER/NAME --local-dir FOLDER"
        )
    config = _read_config(folder / "config.json")
    tensors = _read_tensors(folder)
    architectures = config.get("architectures") or []
    has_decoder = "VideoMAEForPreTraining" in architectures or any(
        name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in tensors
    )
    try:
        _check(config, has_decoder)
        grid, size = _grid(config), _size(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    found = to_ours(
        tensors,
        HUGGING_FACE,
        grid,
        size,
        prefix="videomae." if any(name.startswith("videomae.") for name in tensors) else "",
        decoder=has_decoder,
        biased=bool(config.get("qkv_bias", config["qv_bias"])),
        ignored=("classifier.", "fc_norm."),
    )
    if found.complaints:
        raise ValueError(f"the weights in {folder} are not those that its config.json describes: {found.complaints}")
    return ForeignMAE(grid, size, found.weights, has_decoder, found.left_behind)


def _read_config(path: Path) -> dict[str, Any]:
    """A VideoMAE's configuration, with every field that we read."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give a folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "videomae":
        raise ValueError(f"{path}: model_type is {found!r}; it must be 'videomae'")
    return DEFAULTS | config


def _check(config: dict[str, Any], has_decoder: bool) -> None:
    """Raise ValueError on a field that is no number where one is due, or asks for a network that ours can't be."""
    for name in _INTEGERS:
        value = config[name]
        pair = isinstance(value, list) and len(value) == 2 and name in ("image_size", "patch_size")
        numbers = value if pair else [value]
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
    if type(config["layer_norm_eps"]) not in (int, float):
        raise ValueError(f"layer_norm_eps is {config['layer_norm_eps']!r}; it must be a number")
    for name, only in (("num_channels", 3), ("hidden_act", "gelu")):
        if config[name] != only:
            raise ValueError(f"{name} is {config[name]!r}; it must be {only!r}, the one that can be built here")
    if has_decoder and not config["norm_pix_loss"]:
        raise ValueError(
            "norm_pix_loss is false, so this decoder predicts plain pixels rather than normalised ones; "
            "save the encoder alone (model.videomae.save_pretrained) and load that"
        )


def _grid(config: dict[str, Any]) -> TokenGrid:
    def pair(name: str) -> list[int]:
        return config[name] if isinstance(config[name], list) else [config[name]] * 2

    (height, width), patch = pair("image_size"), pair("patch_size")
    if patch[0] != patch[-1]:
        raise ValueError(f"patch_size is {patch}; patches must be square")
    return TokenGrid(config["num_frames"], height, width, config["tubelet_size"], patch[0])


def _size(config: dict[str, Any]) -> MAESize:
    return MAESize(
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        decoder_embed_dim=config["decoder_hidden_size"],
        decoder_depth=config["decoder_num_hidden_layers"],
        decoder_num_heads=config["decoder_num_attention_heads"],
        decoder_mlp_dim=config["decoder_intermediate_size"],
        norm_eps=float(config["layer_norm_eps"]),
        decoder_norm_eps=DECODER_NORM_EPS,
        final_norm=not config["use_mean_pooling"],
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, the biases of query and value by one name whatever version wrote them."""
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    files = [folder / "model.safetensors"]
    try:
        if not files[0].is_file() and index.is_file():
            files = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        if not files[0].is_file() and pickled.is_file():
            tensors = dict(torch.load(pickled, map_location="cpu", weights_only=True))
        else:
            tensors = {name: x for file in files for name, x in load_file(file).items()}
        # transformers 4 and newer versions of 5 write q_bias and v_bias, others of 5 query.bias and value.bias.
        return {
            name.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias"): x for name, x in tensors.items()
        }
    except FileNotFoundError as error:
        asked = "model.safetensors (or its shards beside model.safetensors.index.json) or pytorch_model.bin"
        raise ValueError(f"{folder} lacks weights: it must hold {asked}: {error}") from error
    except DAMAGE as error:
        raise ValueError(f"the weights in {folder} are damaged, or more than tensors: {error}") from error
