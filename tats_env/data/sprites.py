"""Where a sprite lies in each frame of a rendered video, on a picture that is a torus."""

from __future__ import annotations

import numpy as np

OUTLINE_ANGLES = 256
"""Angles at which an outline is given."""

Index = tuple[np.ndarray, ...]


def sprite_window(
    centre: np.ndarray, angle: np.ndarray, radius: np.ndarray, outline: np.ndarray, size: int
) -> tuple[Index, np.ndarray, np.ndarray, np.ndarray]:
    """The pixels round a sprite of T frames.

    Args:
        centre: (y, x) in pixels, y down, modulo the picture's size [T, 2].
        angle: in radians, clockwise [T].
        radius: of the circle round the sprite, in pixels [T].
        outline: the sprite's edge as a share of its radius, by angle [OUTLINE_ANGLES].
        size: side of the picture in pixels.

    Returns:
        The pixels' index into [T, size, size], how much of each the sprite covers [T, n, n], and where they lie in
        the sprite's own frame of reference, y and x in radii, [T, n, n] each.
    """
    reach = int(radius.max()) + 1
    offset = np.arange(-reach, reach + 1)
    corner = np.floor(centre).astype(np.int64)
    pixel = (corner[:, :, None] + offset) % size  # [T, 2, n]
    index = (np.arange(len(centre))[:, None, None], pixel[:, 0, :, None], pixel[:, 1, None, :])
    away = (corner[:, :, None] + offset + 0.5 - centre[:, :, None]).astype(np.float32)  # from the pixel's middle
    dy, dx = away[:, 0, :, None], away[:, 1, None, :]
    radius = radius.astype(np.float32)[:, None, None]
    cos, sin = (f(angle).astype(np.float32)[:, None, None] / radius for f in (np.cos, np.sin))
    y, x = cos * dy - sin * dx, sin * dy + cos * dx
    bearing = np.arctan2(y, x) * np.float32(OUTLINE_ANGLES / (2 * np.pi))
    edge = outline.astype(np.float32)[np.rint(bearing).astype(np.int64) % OUTLINE_ANGLES]
    covered = np.clip((edge - np.hypot(y, x)) * radius + 0.5, 0, 1)  # antialiased: a ramp one pixel wide
    return index, covered, y, x


def paste(picture: np.ndarray, index: Index, covered: np.ndarray, colour: np.ndarray) -> None:
    """Draw a sprite of ``colour`` [T, n, n, 3] over ``picture`` [T, size, size, 3], in place."""
    behind = picture[index]
    picture[index] = behind + covered[..., None] * (colour - behind)
