"""Hugging Face's VideoMAE, read from a local folder without the transformers package.

Source of names, shapes and defaults: transformers, ``models/videomae``. The architecture is the one of ``VideoMAE`` but
for what ``MAESize`` says; keys have no bias there, which a bias of zero equals, for softmax does not see it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.model import MAESize

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
_DECODER_NORM_EPS = 1e-5
_DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


class HuggingFaceMAE(NamedTuple):
    """What a folder holds, in our terms."""

    grid: TokenGrid
    size: MAESize
    weights: dict[str, Tensor]
    """Named as in ``VideoMAE``; the encoder's alone where the folder has no decoder."""
    has_decoder: bool


def read_huggingface(folder: str | Path) -> HuggingFaceMAE:
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
    translation = _Translation(tensors, bias=bool(config.get("qkv_bias", config["qv_bias"])))
    translation.encoder(grid, size, "videomae." if any(name.startswith("videomae.") for name in tensors) else "")
    if has_decoder:
        translation.decoder(grid, size)
    wrong = translation.complaints()
    if wrong:
        raise ValueError(f"the weights in {folder} are not those that its config.json describes: {wrong}")
    return HuggingFaceMAE(grid, size, translation.ours, has_decoder)


def _read_config(path: Path) -> dict[str, Any]:
    """A VideoMAE's configuration, with every field that we read."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give a folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
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
        decoder_norm_eps=_DECODER_NORM_EPS,
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
            name.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias"): x for name, x in tensors.items()
        }
    except FileNotFoundError as error:
        asked = "model.safetensors (or its shards beside model.safetensors.index.json) or pytorch_model.bin"
        raise ValueError(f"{folder} lacks weights: it must hold {asked}: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"the weights in {folder} are damaged, or more than tensors: {error}") from error


class _Translation:
    """Their tensors, taken one by one into ours; what is wrong with them is told all at once."""

    def __init__(self, theirs: dict[str, Tensor], *, bias: bool) -> None:
        self.theirs, self.bias = dict(theirs), bias
        self.ours: dict[str, Tensor] = {}
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def take(self, name: str, *shape: int) -> Tensor:
        x = self.theirs.pop(name, None)
        if isinstance(x, Tensor) and x.shape == shape:
            return x
        if isinstance(x, Tensor):
            self.misshapen.append(f"{name}, {tuple(x.shape)} rather than {shape}")
        else:
            self.missing.append(name)
        return torch.empty(0, *shape[1:])  # goes no further than complaints(), whatever size was asked for

    def affine(self, ours: str, theirs: str, *shape: int) -> None:
        self.ours[f"{ours}.weight"] = self.take(f"{theirs}.weight", *shape)
        self.ours[f"{ours}.bias"] = self.take(f"{theirs}.bias", shape[0])

    def block(self, ours: str, theirs: str, dim: int, mlp_dim: int) -> None:
        attention = f"{theirs}.attention.attention"
        weights, biases = [], []
        # Some versions of transformers gave keys a bias as well.
        for part, biased in (
            ("query", self.bias),
            ("key", f"{attention}.key.bias" in self.theirs),
            ("value", self.bias),
        ):
            weights.append(self.take(f"{attention}.{part}.weight", dim, dim))
            biases.append(self.take(f"{attention}.{part}.bias", dim) if biased else torch.zeros(dim))
        self.ours[f"{ours}.attn.qkv.weight"], self.ours[f"{ours}.attn.qkv.bias"] = torch.cat(weights), torch.cat(biases)
        self.affine(f"{ours}.norm1", f"{theirs}.layernorm_before", dim)
        self.affine(f"{ours}.attn.proj", f"{theirs}.attention.output.dense", dim, dim)
        self.affine(f"{ours}.norm2", f"{theirs}.layernorm_after", dim)
        self.affine(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense", mlp_dim, dim)
        self.affine(f"{ours}.mlp.fc2", f"{theirs}.output.dense", dim, mlp_dim)

    def encoder(self, grid: TokenGrid, size: MAESize, prefix: str) -> None:
        convolution, dim = f"{prefix}embeddings.patch_embeddings.projection", size.embed_dim
        self.affine("patch_embed", convolution, dim, 3, grid.tubelet_size, grid.patch_size, grid.patch_size)
        # A convolution that does not overlap is a linear map of patches.
        self.ours["patch_embed.weight"] = rearrange(self.ours["patch_embed.weight"], "d c u p q -> d (u p q c)")
        for i in range(size.depth):
            self.block(f"blocks.{i}", f"{prefix}encoder.layer.{i}", dim, size.mlp_dim or 4 * dim)
        if size.final_norm:
            self.affine("norm", f"{prefix}layernorm", dim)

    def decoder(self, grid: TokenGrid, size: MAESize) -> None:
        dim = size.decoder_embed_dim
        self.ours["decoder_embed.weight"] = self.take("encoder_to_decoder.weight", dim, size.embed_dim)
        self.ours["mask_token"] = self.take("mask_token", 1, 1, dim)
        for i in range(size.decoder_depth):
            theirs = f"decoder.decoder_layers.{i}"
            self.block(f"decoder_blocks.{i}", theirs, dim, size.decoder_mlp_dim or 4 * dim)
        self.affine("decoder_norm", "decoder.norm", dim)
        self.affine("decoder_head", "decoder.head", grid.patch_dim, dim)

    def complaints(self) -> str:
        """What is missing, misshapen or left over, in a few words; empty if nothing is."""
        surplus = [name for name in self.theirs if not name.startswith(("classifier.", "fc_norm."))]
        found = {"missing": self.missing, "of another shape": self.misshapen, "not asked for": surplus}
        return "; ".join(f"{what}: {_few(names)}" for what, names in found.items() if names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
