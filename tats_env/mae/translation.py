"""Names that other programs give to the weights of a VideoMAE, and the way from theirs to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.model import MAESize, VideoMAE

_FEW = 3  # names that a message lists


class Layout(NamedTuple):
    """One program's names for parts of ``VideoMAE``, by ours."""

    encoder: dict[str, str]
    """Parts of the encoder, to which a prefix may belong."""
    decoder: dict[str, str]
    block: dict[str, str]
    """Parts of a block, of both."""
    weights: tuple[str, ...]
    """Of a block's attention, which make up ours one after another along the first axis."""
    biases: tuple[str, str, str]
    """Of query, key and value. Keys need none, for it adds the same to all logits of a query: softmax does not see it.
    It is read where there is one, zero where there is none, and never written."""

    def names(self, ours: str, prefix: str) -> tuple[str, ...]:
        """Their names of the tensors that make up ours, one after another along the first axis."""
        part, _, rest = ours.partition(".")
        home = self.decoder[part] if part in self.decoder else prefix + self.encoder[part]
        if not part.endswith("blocks"):
            return (f"{home}.{rest}" if rest else home,)
        index, _, rest = rest.partition(".")
        module, _, kind = rest.rpartition(".")
        if module == "attn.qkv":
            return tuple(f"{home}.{index}.{name}" for name in (self.weights if kind == "weight" else self.biases))
        return (f"{home}.{index}.{self.block[module]}.{kind}",)


HUGGING_FACE = Layout(
    encoder={"patch_embed": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer", "norm": "layernorm"},
    decoder={
        "decoder_embed": "encoder_to_decoder",
        "mask_token": "mask_token",
        "decoder_blocks": "decoder.decoder_layers",
        "decoder_norm": "decoder.norm",
        "decoder_head": "decoder.head",
    },
    block={
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    weights=tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    biases=("attention.attention.q_bias", "attention.attention.key.bias", "attention.attention.v_bias"),
)
RELEASED = Layout(
    encoder={"patch_embed": "patch_embed.proj", "blocks": "blocks", "norm": "norm"},
    decoder=HUGGING_FACE.decoder | {"decoder_blocks": "decoder.blocks"},
    block={name: name for name in HUGGING_FACE.block},
    weights=("attn.qkv.weight",),
    biases=("attn.q_bias", "attn.k_bias", "attn.v_bias"),
)


class ForeignMAE(NamedTuple):
    """What another program's files hold, in our terms."""

    grid: TokenGrid
    size: MAESize
    weights: dict[str, Tensor]
    """Named as in ``VideoMAE``; the encoder's alone where there is no decoder."""
    has_decoder: bool
    left_behind: list[str]
    """Their names of what belongs to no MAE."""


class Translated(NamedTuple):
    """Another program's weights by our names, and what came of the others."""

    weights: dict[str, Tensor]
    left_behind: list[str]
    """Their names of what is no part of the network that was asked for."""
    complaints: str
    """What is missing, misshapen or not asked for, in a few words; empty if nothing is."""


def to_ours(
    theirs: Mapping[str, Tensor],
    layout: Layout,
    grid: TokenGrid,
    size: MAESize,
    *,
    prefix: str,
    decoder: bool,
    biased: bool = True,
    ignored: tuple[str, ...] = (),
) -> Translated:
    """Translate weights; what is wrong with them is told all at once.

    Args:
        theirs: tensors by their names.
        prefix: of the encoder's names.
        decoder: whether the decoder is wanted as well.
        biased: whether query and value have biases.
        ignored: how names begin that may be left behind.
    """
    remaining, ours = dict(theirs), {}
    missing, misshapen = [], []

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        x = remaining.pop(name, None)
        if isinstance(x, Tensor) and x.shape == shape:
            return x
        if isinstance(x, Tensor):
            misshapen.append(f"{name}, {tuple(x.shape)} rather than {shape}")
        else:
            missing.append(name)
        return torch.empty(0, *shape[1:])  # goes no further than the complaints, whatever size was asked for

    with torch.device("meta"):
        wanted = VideoMAE(grid, size).state_dict()
    wanted["patch_embed.weight"] = _as_convolution(wanted["patch_embed.weight"], grid)
    for name, like in wanted.items():
        if not decoder and name.partition(".")[0] in layout.decoder:
            continue
        names = layout.names(name, prefix)
        shape = (len(like) // len(names), *like.shape[1:])
        parts = []
        for i, part in enumerate(names):
            optional = name.endswith("attn.qkv.bias") and (not biased or i == 1)
            absent = optional and (i != 1 or part not in remaining)
            parts.append(torch.zeros(shape) if absent else take(part, shape))
        ours[name] = torch.cat(parts)
    # A convolution that does not overlap is a linear map of patches
    ours["patch_embed.weight"] = rearrange(ours["patch_embed.weight"], "d c u p q -> d (u p q c)")
    left_behind = [name for name in remaining if name.startswith(ignored)]
    surplus = [name for name in remaining if not name.startswith(ignored)]
    wrong = {"missing": missing, "of another shape": misshapen, "not asked for": surplus}
    return Translated(ours, left_behind, "; ".join(f"{what}: {few(names)}" for what, names in wrong.items() if names))


def to_theirs(ours: Mapping[str, Tensor], layout: Layout, grid: TokenGrid, prefix: str) -> dict[str, Tensor]:
    """Weights by their names, on the CPU, each with memory of its own.

    Args:
        ours: weights of a ``VideoMAE``, all or the encoder's alone.
        prefix: of the encoder's names.
    """
    theirs = {}
    for name, x in ours.items():
        x = _as_convolution(x, grid) if name == "patch_embed.weight" else x
        names = layout.names(name, prefix)
        for part, piece in zip(names, x.detach().cpu().chunk(len(names)), strict=True):
            if not part.endswith(layout.biases[1]):
                theirs[part] = piece.clone(memory_format=torch.contiguous_format)
    return theirs


def few(names: list[str]) -> str:
    """Some of the names, for a message."""
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _as_convolution(weight: Tensor, grid: TokenGrid) -> Tensor:
    """[D, P] -> [D, 3, tubelet, p, p]."""
    return rearrange(weight, "d (u p q c) -> d c u p q", u=grid.tubelet_size, p=grid.patch_size, q=grid.patch_size)
