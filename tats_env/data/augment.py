"""Augmentation of clips, the same for all frames of a clip, on whatever device they lie.

All randomness is a hash of a key for each clip: what happens to a clip depends neither on which process loads it nor
on the others in its batch, nor on any generator's state.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tats_env.keyed import keyed_bits, keyed_uniform

# Each keeps its draws apart from the others', and from those of whoever salts the same key with small numbers
_CROP, _FLIP, _RANDAUGMENT, _ERASE, _RECTANGLE, _NOISE = range(1 << 40, (1 << 40) + 6)

_SCALES = (1.0, 0.875, 0.75, 0.66)
_ATTEMPTS = 10  # torchvision's
_CHUNK = 1 << 24  # values in floating point at once when cropping
_GREY = 128.0  # what timm's RandAugment, which VideoMAE uses, moves in from outside the picture
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which inputs are normalised


def flips(keys: Tensor) -> Tensor:
    """Whether to mirror each clip, as a fair coin does: int64 [B] -> bool [B]."""
    return keyed_uniform(keys, _FLIP) < 0.5


def crop_boxes(kind: Literal["multi_scale", "random_resized"], keys: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Draw the part of each clip to keep.

    - ``"multi_scale"``: VideoMAE's pre-training (its ``GroupMultiScaleCrop``, from TSN). Height and width are 1, 0.875,
      0.75 or 0.66 of the canvas's shorter side, at most one of these steps apart; the box lies at one of 13 places:
      corners, centre, middles of the sides, centres of the quarters. VideoMAE also rounds a side less than 3 pixels
      off the output's to it; this does not.
    - ``"random_resized"``: Inception's, as in fine-tuning: torchvision's ``RandomResizedCrop``, with 0.08 to 1 of the
      canvas's area and an aspect of 3/4 to 4/3.

    Args:
        keys: int64 [B].
        canvas: (h, w) of the clips in pixels.

    Returns:
        (top, left, height, width) in whole pixels, float32 [B, 4], where the keys are.
    """
    if kind == "random_resized":
        return _random_resized(keys, canvas)
    if kind == "multi_scale":
        return _multi_scale(keys, canvas)
    raise ValueError(f"crop {kind!r} is unknown; give multi_scale or random_resized")


def _multi_scale(keys: Tensor, canvas: tuple[int, int]) -> Tensor:
    sides = [max(1, int(min(canvas) * scale)) for scale in _SCALES]
    shapes = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    # In quarters of the room there is: both coordinates even, or both odd
    places = [(y, x) for y in range(5) for x in range(5) if y % 2 == x % 2]

    def chosen(options: list[tuple[int, int]], salt: int) -> Tensor:
        pick = (keyed_uniform(keys, _CROP, salt) * len(options)).long()
        return torch.tensor(options, device=keys.device)[pick]

    shape, place = chosen(shapes, 0), chosen(places, 1)
    quarter = (torch.tensor(canvas, device=keys.device) - shape) // 4
    return torch.cat([place * quarter, shape], dim=1).float()


def _random_resized(keys: Tensor, canvas: tuple[int, int]) -> Tensor:
    ratio = 3 / 4, 4 / 3
    boxes, found = _rectangles(keys, _CROP, canvas, (0.08, 1.0), ratio, canvas)
    height, width = min(canvas[0], round(canvas[1] / ratio[0])), min(canvas[1], round(canvas[0] * ratio[1]))
    central = ((canvas[0] - height) // 2, (canvas[1] - width) // 2, height, width)
    return torch.where(found[:, None], boxes, boxes.new_tensor(central))


def _rectangles(
    keys: Tensor,
    salt: int,
    canvas: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    largest: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Random rectangles inside the canvas, by rejection.

    The area, as a share of the canvas's, is uniform and the aspect ``width / height`` log-uniform, until height and
    width are within 1 to ``largest``.

    Returns:
        (top, left, height, width), float32 [B, 4], and whether one of the attempts was good, bool [B].
    """
    draws = keyed_uniform(keys[:, None], salt, torch.arange(2 * _ATTEMPTS + 2, device=keys.device))
    size = (area[0] + (area[1] - area[0]) * draws[:, :_ATTEMPTS]) * (canvas[0] * canvas[1])
    low, high = (math.log(r) for r in ratio)
    aspect = (low + (high - low) * draws[:, _ATTEMPTS:-2]).exp()
    height, width = (size / aspect).sqrt().round(), (size * aspect).sqrt().round()
    good = (height >= 1) & (height <= largest[0]) & (width >= 1) & (width <= largest[1])
    first = good.byte().argmax(dim=1, keepdim=True)
    shape = torch.cat([height.gather(1, first), width.gather(1, first)], dim=1)
    room = torch.tensor(canvas, device=keys.device) - shape
    return torch.cat([(draws[:, -2:] * (room + 1)).floor(), shape], dim=1).float(), good.any(dim=1)


def crop_and_flip(clips: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop clips to boxes, scale what is left to ``size``, then mirror some.

    One box and one flip for all frames of a clip. Pixels are interpolated between the four nearest, as
    ``resize(..., antialias=False)`` does, and masks take the nearest. Nothing is low-passed: below half the box's
    size pixels are passed over, so decode frames not much larger than the clips. The whole canvas at its own size
    comes back as it is.

    Args:
        clips: uint8 [B, T, h, w, C] or bool [B, T, h, w].
        boxes: (top, left, height, width) in pixels, within the canvas and no less than one pixel, float32 [B, 4].
        flip: bool [B].
        size: (H, W) of the result in pixels.

    Returns:
        uint8 [B, T, H, W, C] or bool [B, T, H, W], where the clips are.
    """
    top, left, height, width = boxes.to(clips.device, torch.float64, non_blocking=True).unbind(1)
    rows, columns = _positions(top, height, size[0]), _positions(left, width, size[1])
    columns = torch.where(flip.to(clips.device, non_blocking=True)[:, None], columns.flip(1), columns)
    if clips.dtype == torch.bool:
        b = torch.arange(len(clips), device=clips.device)[:, None, None, None]
        t = torch.arange(clips.shape[1], device=clips.device)[:, None, None]
        y, x = ((place + 0.5).long() for place in (rows, columns))
        return clips[b, t, y[:, None, :, None], x[:, None, None, :]]

    num_clips, num_frames, h, w, channels = clips.shape
    y, x = (2 * rows + 1) / h - 1, (2 * columns + 1) / w - 1  # grid_sample's: -1 and 1 are the canvas's edges
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1).float()
    out = clips.new_empty((num_clips, num_frames, *size, channels))
    # A batch of real clips takes gigabytes as float
    chunk = max(1, _CHUNK // (num_frames * channels * max(h * w, size[0] * size[1])))
    for part in torch.arange(num_clips).split(chunk):
        some = slice(int(part[0]), int(part[-1]) + 1)
        pixels = clips[some].permute(0, 1, 4, 2, 3).reshape(-1, num_frames * channels, h, w).float()
        taken = F.grid_sample(pixels, grid[some], mode="bilinear", padding_mode="border", align_corners=False)
        out[some] = taken.round_().view(-1, num_frames, channels, *size).permute(0, 1, 3, 4, 2)
    return out


def _positions(start: Tensor, extent: Tensor, num: int) -> Tensor:
    """Where ``num`` pixels that share out a stretch [B] of the canvas have their centres, in pixels: [B, num].

    Kept half a pixel inside the stretch: as in resizing a picture that was cropped before, nothing beyond it shows.
    """
    start, extent = start[:, None], extent[:, None]
    centres = start + (torch.arange(num, device=start.device) + 0.5) * extent / num - 0.5
    return centres.maximum(start).minimum(start + extent - 1)


def rand_augment(clips: Tensor, keys: Tensor, num_ops: int, magnitude: int) -> Tensor:
    """RandAugment (Cubuk et al., 2020) through torchvision, with one draw of operations for all frames of a clip.

    A loop over the clips, because torchvision's operations take one parameter a call. torchvision draws from torch's
    CPU generator, which is seeded from the key meanwhile and put back after: no other thread may draw from it then.

    Args:
        clips: uint8 [B, T, H, W, 3].
        keys: int64 [B].
        num_ops: operations applied to a clip, one after the other.
        magnitude: their strength, 0 to 30.

    Returns:
        uint8 [B, T, H, W, 3], where the clips are.
    """
    from torchvision.transforms import v2
    from torchvision.tv_tensors import Video

    augment = v2.RandAugment(num_ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=_GREY)
    out = torch.empty_like(clips)
    with torch.random.fork_rng(devices=[]):
        for b, seed in enumerate(keyed_bits(keys, _RANDAUGMENT).tolist()):
            torch.default_generator.manual_seed(seed)
            out[b] = augment(Video(clips[b].movedim(-1, -3))).movedim(-3, -1)
    return out


def random_erase(pixels: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al., AAAI 2020): noise in place of a rectangle of some clips.

    As in VideoMAE's fine-tuning: one rectangle of 0.02 to 1/3 of the area for all frames, with an aspect of 0.3 to
    1/0.3, and normal noise for each pixel and channel. VideoMAE draws the noise anew for each frame; here, as with
    torchvision's ``RandomErasing``, it stands still, so that no motion is added.

    Args:
        pixels: normalised pixels, floating point [B, T, H, W, 3], where the noise is normal(0, 1); or uint8, where it
            has ImageNet's mean and standard deviation.
        keys: int64 [B].
        probability: of erasing from a clip.

    Returns:
        A copy of ``pixels``, where they are.
    """
    height, width = pixels.shape[2:4]
    boxes, found = _rectangles(
        keys, _RECTANGLE, (height, width), (0.02, 1 / 3), (0.3, 1 / 0.3), (height - 1, width - 1)
    )  # fmt: skip
    erased = (keyed_uniform(keys, _ERASE) < probability) & found
    out = pixels.clone()
    for b in erased.nonzero().flatten().tolist():
        top, left, h, w = (int(side) for side in boxes[b].tolist())
        values = torch.arange(h * w * 3, device=pixels.device)
        uniform = keyed_uniform(keys[b].to(pixels.device), _NOISE, values).clamp(2**-53, 1 - 2**-53)
        noise = torch.special.ndtri(uniform).view(h, w, 3)
        if pixels.dtype == torch.uint8:
            noise = ((noise * noise.new_tensor(_STD) + noise.new_tensor(_MEAN)) * 255).round().clamp(0, 255)
        out[b, :, top : top + h, left : left + w] = noise.to(pixels.dtype)
    return out
