"""Pictures of a report, as bytes within the page: files of the run, masks over training, favoured positions."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from experiments.report_folder import Snapshots

TILE = 96
"""Pixels at most from side to side of a clip in the table of moments; smaller clips are enlarged by the page."""
_TUBELET_MILLISECONDS = 250


class Picture(NamedTuple):
    """An image that a page holds within itself."""

    uri: str
    width: int
    height: int
    still: str = ""
    """Of an animation its middle, for readers who asked for less motion."""


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _encoded(images: list[Image.Image], kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    images[0].save(file, kind, **({"save_all": True, "append_images": images[1:]} if images[1:] else {}), **options)
    return file.getvalue()


def _still(image: Image.Image) -> str:
    return _uri(_encoded([image.convert("RGBA")], "webp", quality=80), "image/webp")


def read_picture(path: Path) -> Picture:
    """A picture file as it is.

    Raises:
        OSError: if it can't be decoded.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        frames = getattr(image, "n_frames", 1)
        image.seek(frames // 2)
        image.load()
        assert image.format is not None
        still = _still(image) if frames > 1 else ""
        return Picture(_uri(content, Image.MIME[image.format]), image.width, image.height, still)


def masks_over_training(found: Snapshots) -> list[Picture]:
    """An animation for each clip, a frame for each tubelet: the clip, then at each moment what is visible of it.

    What is hidden stays there in dark grey. Where there is heat, it stands below: the brighter, the likelier drawn.
    """
    num_steps, height, width = found.clips.shape[1], *found.clips.shape[2:4]
    slots = found.visible.shape[2]
    middles = (np.arange(slots) * (num_steps // slots)) + num_steps // slots // 2
    pictures = []
    for c, clip in enumerate(found.clips[:, middles]):
        grey = (clip @ np.array([0.299, 0.587, 0.114]) * 0.4).astype(np.uint8)[..., None].repeat(3, -1)
        shown = [
            np.where(_over_pixels(visible, height, width)[..., None], clip, grey) for visible in found.visible[:, c]
        ]
        rows = [[clip, *shown]]
        if found.heat is not None:
            heat = np.nan_to_num(found.heat[:, c])
            # The root, so that one can see what is hardly ever drawn as well
            colours = colormaps["inferno"](np.sqrt(heat / max(float(heat.max()), 1e-12)), bytes=True)[..., :3]
            rows.append([None, *(_over_pixels(colour, height, width) for colour in colours)])
        pictures.append(_mosaic(rows, slots))
    return pictures


def _over_pixels(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values of positions [T', H', W', ...], repeated over their pixels."""
    rows, columns = values.shape[1:3]
    return values.repeat(height // rows, 1).repeat(width // columns, 2)


def _mosaic(rows: list[list[np.ndarray | None]], num_frames: int) -> Picture:
    """Rows of clips of the same size, gaps and None transparent, as an animation."""
    height, width = next(clip for clip in rows[0] if clip is not None).shape[1:3]
    shrunk = max(height, width) > TILE
    h, w = (round(x * TILE / max(height, width)) if shrunk else x for x in (height, width))
    gap = max(1, w // 32)
    frames = []
    for t in range(num_frames):
        canvas = Image.new("RGBA", (len(rows[0]) * (w + gap), len(rows) * (h + gap)))
        for r, clips in enumerate(rows):
            for c, clip in enumerate(clips):
                if clip is not None:
                    tile = Image.fromarray(clip[t]).resize((w, h), Image.Resampling.BOX)
                    canvas.paste(tile, (c * (w + gap), r * (h + gap)))
        frames.append(canvas)
    options = {"quality": 75, "alpha_quality": 50} if shrunk else {"lossless": True}
    content = _encoded(frames, "webp", duration=_TUBELET_MILLISECONDS, loop=0, **options)
    return Picture(_uri(content, "image/webp"), *frames[0].size, _still(frames[num_frames // 2]))


def heat_map(shares: np.ndarray, most: float, colour: str) -> Picture:
    """Shares [H', W'] as a pixel each, from transparent at 0, for any page, to the full colour at ``most``."""
    alpha = (255 * np.clip(shares / most, 0, 1)).round().astype(np.uint8)
    red, green, blue = (np.full_like(alpha, round(255 * x)) for x in to_rgb(colour))
    image = Image.fromarray(np.stack([red, green, blue, alpha], -1))
    return Picture(_uri(_encoded([image], "png", optimize=True), "image/png"), *image.size)
