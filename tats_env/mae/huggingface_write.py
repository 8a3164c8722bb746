"""Hugging Face's VideoMAE, written to a local folder without the transformers package."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tats_env.grid import TokenGrid
from tats_env.mae.checkpoint import save_tensors
from tats_env.mae.huggingface import DECODER_NORM_EPS, DEFAULTS
from tats_env.mae.learner import IMAGENET_MEAN, IMAGENET_STD, MAELearner
from tats_env.mae.model import SIZES, MAESize
from tats_env.mae.translation import HUGGING_FACE, to_theirs

_log = logging.getLogger("tats_env.mae")


def write_huggingface(learner: MAELearner, folder: str | Path) -> None:
    """Write a folder that VideoMAEForPreTraining.from_pretrained loads, and VideoMAEModel's too.

    Both compute what the learner's network does. Biases of keys are left out: theirs have none, and softmax does not
    see them. The decoder's last LayerNorm has an epsilon of 1e-5 there; a warning is logged where ours is another.

    Args:
        learner: whose network is written, in float32.
        folder: for config.json, model.safetensors and preprocessor_config.json; made if it is not there.

    Raises:
        ValueError: if their network can't be this one.
        OSError: if it can't be written.
    """
    size = SIZES[learner.size] if isinstance(learner.size, str) else learner.size
    config = _config("VideoMAEForPreTraining", learner.grid, size, use_mean_pooling=not size.final_norm)
    if size.decoder_norm_eps != DECODER_NORM_EPS:
        factor = abs(size.decoder_norm_eps - DECODER_NORM_EPS) / 2
        _log.warning(
            "the decoder's last LayerNorm has an epsilon of %g, and transformers' always %g: what it gives for a token "
            "differs by about %.2g / v of itself, v being the variance of its channels; that matters where v is small",
            size.decoder_norm_eps, DECODER_NORM_EPS, factor,
        )  # fmt: skip
    weights = to_theirs(learner.model.state_dict(), HUGGING_FACE, learner.grid, "videomae.")
    _write(Path(folder), config, weights)


def write_huggingface_classifier(
    weights: Mapping[str, Tensor],
    grid: TokenGrid,
    size: str | MAESize,
    class_names: Sequence[str],
    folder: str | Path,
) -> None:
    """Write a folder that VideoMAEForVideoClassification.from_pretrained loads.

    It is an encoder without its last LayerNorm, the mean of its tokens, a LayerNorm with an epsilon of 1e-5 and a
    linear head. Biases of keys are left out, as ``write_huggingface`` does.

    Args:
        weights: by ``VideoMAE``'s names ``patch_embed.*`` and ``blocks.*``, then ``fc_norm.*`` [D] and ``head.*``
            [C, D] and [C].
        grid: token geometry of its clips.
        size: of the MAE whose encoder it is.
        class_names: C names, by label.
        folder: as for ``write_huggingface``.

    Raises:
        ValueError: if their network can't be this one, or the head has another number of classes.
        OSError: if it can't be written.
    """
    if len(weights["head.bias"]) != len(class_names):
        raise ValueError(f"the head tells {len(weights['head.bias'])} classes apart, but {len(class_names)} have names")
    size = SIZES[size] if isinstance(size, str) else size
    config = _config("VideoMAEForVideoClassification", grid, size, use_mean_pooling=True)
    config["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    config["label2id"] = {name: i for i, name in enumerate(class_names)}
    encoder = {name: x for name, x in weights.items() if name.partition(".")[0] not in ("fc_norm", "head")}
    theirs = to_theirs(encoder, HUGGING_FACE, grid, "videomae.")
    for ours, name in (("fc_norm", "fc_norm"), ("head", "classifier")):
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = weights[f"{ours}.{kind}"].detach().cpu().contiguous()
    _write(Path(folder), config, theirs)


def _config(architecture: str, grid: TokenGrid, size: MAESize, *, use_mean_pooling: bool) -> dict[str, Any]:
    """What config.json says of such a network.

    Raises:
        ValueError: if theirs can't be this one.
    """
    if size.separable_positions:
        able = ", ".join(name for name, other in SIZES.items() if not other.separable_positions)
        raise ValueError(
            "this MAE tells tokens apart by (t, h, w) (separable_positions), and transformers' VideoMAE by flat index, "
            f"so it can't be written as one; train one of size {able}, or of a size of your own without "
            "separable_positions"
        )
    fields = {
        "image_size": grid.height if grid.height == grid.width else [grid.height, grid.width],
        "patch_size": grid.patch_size,
        "num_frames": grid.num_frames,
        "tubelet_size": grid.tubelet_size,
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim or 4 * size.embed_dim,
        "decoder_hidden_size": size.decoder_embed_dim,
        "decoder_num_hidden_layers": size.decoder_depth,
        "decoder_num_attention_heads": size.decoder_num_heads,
        "decoder_intermediate_size": size.decoder_mlp_dim or 4 * size.decoder_embed_dim,
        "layer_norm_eps": size.norm_eps,
        "use_mean_pooling": use_mean_pooling,
    }
    # Fields that are as by default too, for defaults may change
    return {"architectures": [architecture], "model_type": "videomae", "torch_dtype": "float32", **DEFAULTS, **fields}


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    height, width = config["image_size"] if isinstance(config["image_size"], list) else [config["image_size"]] * 2
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": max(height, width)},  # so that the crop lies within
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
