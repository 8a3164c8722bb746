"""A strip of frames: clip, visible tokens, reconstruction, error map and, where there is a policy, its heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tats_env.grid import TokenGrid

if TYPE_CHECKING:
    from tats_env.task import MaskingTask

MAX_FRAMES = 8
MIN_FRAME_PIXELS = 64
MAX_FRAME_PIXELS = 128
FONT_PIXELS = 12
LABEL_PIXELS = 92
GAP = 2
HIDDEN_GREY = 64


def render_task(task: MaskingTask, index: int) -> np.ndarray:
    """The last decision of environment ``index``, uint8 [height, width, 3]; before the first, its clip and blanks."""
    if task.decision is None:
        clip = task.clips[index].cpu().numpy()
        blank = np.full_like(clip, HIDDEN_GREY)
        return strip({"clip": clip, "visible": blank, "reconstruction": blank, "error": blank}, task.grid)
    return strip(decision_rows(task, index), task.grid)


def decision_rows(task: MaskingTask, index: int, heat: Tensor | None = None) -> dict[str, np.ndarray]:
    """What there is to see of the last decision of environment ``index``: named clips, uint8 [T, H, W, 3].

    Args:
        task: the masking task, after a step.
        index: which of its environments.
        heat: [N], a policy's logits, drawn as one more row.
    """
    assert task.decision is not None, "decision_rows() follows step()"
    clips, shown = task.decision.clips[index : index + 1], task.decision.visible[index : index + 1]
    visible = shown[0].nonzero().T
    error = task.decision.reconstruction.token_error[index]
    clip = clips[0].cpu().numpy()
    rows = {
        "clip": clip,
        "visible": np.where(_spread(shown[0], task.grid)[..., None], clip, np.uint8(HIDDEN_GREY)),
        "reconstruction": task.mae.predict_pixels(clips, visible)[0].cpu().numpy(),
        "error": _heat(error / error.max().clamp_min(1e-12), task.grid),
    }
    if heat is not None:
        rows["policy"] = _heat((heat - heat.max()).exp().sqrt(), task.grid)
    return rows


def strip(rows: dict[str, np.ndarray], grid: TokenGrid) -> np.ndarray:
    """Labelled rows of clips [T, H, W, 3], the first frame of up to 8 tubelets side by side."""
    steps = np.unique(np.linspace(0, grid.num_steps - 1, min(MAX_FRAMES, grid.num_steps)).round().astype(int))
    return _mosaic({label: clip[steps * grid.tubelet_size] for label, clip in rows.items()})


def animation(examples: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Examples side by side, what ``decision_rows`` gave for each as a column: one picture for each of T frames."""
    num_frames = len(next(iter(examples[0].values())))
    return [
        _mosaic({label: np.stack([rows[label][t] for rows in examples]) for label in examples[0]})
        for t in range(num_frames)
    ]


def _mosaic(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Labelled rows of pictures [n, H, W, 3], a whole number of times larger or smaller where they are small or large.

    Height and width are even, as H.264 and its players want them.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, height, width = next(iter(rows.values())).shape[:3]
    enlarge, shrink = -(-MIN_FRAME_PIXELS // min(height, width)), -(-min(height, width) // MAX_FRAME_PIXELS)
    height, width = -(-height * enlarge // shrink) + GAP, -(-width * enlarge // shrink) + GAP
    full = height * len(rows) - GAP, LABEL_PIXELS + width * n - GAP
    image = Image.new("RGB", (full[1] + full[1] % 2, full[0] + full[0] % 2), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_PIXELS)
    for r, (label, pictures) in enumerate(rows.items()):
        draw.text((4, r * height + height // 2), label, "black", font, anchor="lm")
        for c, picture in enumerate(pictures):
            large = Image.fromarray(picture.repeat(enlarge, 0).repeat(enlarge, 1))
            image.paste(large.reduce(shrink), (LABEL_PIXELS + c * width, r * height))
    return np.array(image)


def _spread(token_values: Tensor, grid: TokenGrid) -> np.ndarray:
    """Values of the tokens [N], repeated over their pixels: [T, H, W]."""
    volume = token_values.reshape(grid.num_steps, grid.rows, grid.columns).cpu().numpy()
    return volume.repeat(grid.tubelet_size, 0).repeat(grid.patch_size, 1).repeat(grid.patch_size, 2)


def _heat(values: Tensor, grid: TokenGrid) -> np.ndarray:
    """Values in [0, 1] of the tokens [N] as colours [T, H, W, 3]: black through red to pale yellow."""
    v = _spread(values.float().clamp(0, 1), grid)[..., None]
    colour = np.clip(np.concatenate([2.2 * v, 2.2 * v - 0.8, 3.0 * v - 2.0], -1), 0, 1)
    return (colour * 255).astype(np.uint8)
