from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import floor

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp, kstest, spearmanr
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.tv_tensors import Image, Mask

from tats_env.data import augment
from tats_env.data.augment import crop_and_flip, crop_boxes, flips, rand_augment, random_erase

KEYS = torch.arange(4000) * 7919 - 1_000_000
UNFLIPPED = torch.tensor([False])


def noise_clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(30, 200, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth_clips(num: int, frames: int, height: int, width: int) -> Tensor:
    """Clips in which neighbouring pixels differ, but not by so much that everything is noise."""
    small = noise_clips(num, frames, 6, 7, 3)
    large = torch.nn.functional.interpolate(small.flatten(0, 1).movedim(-1, 1).float(), (height, width), mode="bicubic")
    return large.clamp(0, 255).byte().movedim(1, -1).view(num, frames, height, width, 3)


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multi_scale": lambda clips, keys: crop_and_flip(
        clips, crop_boxes("multi_scale", keys, (20, 24)), flips(keys), (16, 16)
    ),
    "random_resized": lambda clips, keys: crop_and_flip(
        clips, crop_boxes("random_resized", keys, (20, 24)), flips(keys), (16, 16)
    ),
    "rand_augment": lambda clips, keys: rand_augment(clips, keys, 2, 15),
    "random_erase": lambda clips, keys: random_erase(clips, keys, 0.6),
}


@pytest.fixture(params=AUGMENTATIONS)
def augmented(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], Tensor]:
    return AUGMENTATIONS[request.param]


def test_a_clip_alone_comes_out_as_it_does_within_any_batch(augmented: Callable[[Tensor, Tensor], Tensor]) -> None:
    clips, keys = smooth_clips(12, 2, 20, 24), KEYS[:12]
    whole = augmented(clips, keys)
    for b in range(12):
        assert torch.equal(augmented(clips[b : b + 1], keys[b : b + 1])[0], whole[b])
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augmented(clips[shuffled], keys[shuffled]), whole[shuffled])


def test_only_the_key_decides(augmented: Callable[[Tensor, Tensor], Tensor]) -> None:
    clips, keys = smooth_clips(1, 2, 20, 24).expand(30, -1, -1, -1, -1), KEYS[:30]
    before = clips.clone()
    torch.manual_seed(1)
    first = augmented(clips, keys)
    torch.manual_seed(2)
    assert torch.equal(augmented(clips, keys), first)
    assert torch.equal(clips, before)
    assert first.dtype == torch.uint8
    assert len({clip.numpy().tobytes() for clip in first}) > 10


def test_the_global_generators_are_left_as_they_were(augmented: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    augmented(smooth_clips(4, 2, 20, 24), KEYS[:4])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_clip_that_stands_still_stands_still_after(augmented: Callable[[Tensor, Tensor], Tensor]) -> None:
    clips = smooth_clips(40, 1, 20, 24).expand(-1, 3, -1, -1, -1)
    out = augmented(clips, KEYS[:40])
    assert out.shape[1] == 3
    assert (out == out[:, :1]).all()


def test_flips_are_a_fair_coin() -> None:
    flip = flips(KEYS)
    assert flip.dtype == torch.bool and flip.shape == KEYS.shape
    assert chisquare(np.bincount(flip.numpy())).pvalue > 1e-3


def test_what_is_drawn_for_one_augmentation_says_nothing_about_another() -> None:
    num = 2000
    erased = erased_rectangles(num, 32, 32, 0.5)
    certain = erased_rectangles(num, 32, 32, 1.0)
    corners, areas = (crop_boxes(kind, KEYS[:num], (96, 96)) for kind in ("multi_scale", "random_resized"))
    drawn = {
        "flip": flips(KEYS[:num]).double(),
        "corners": corners[:, 2],
        "areas": areas[:, 2] * areas[:, 3],
        "erased": torch.tensor([box is not None for box in erased]).double(),
        "erased area": torch.tensor([box[2] * box[3] for box in certain if box is not None]).double(),
    }
    for one, other in combinations(drawn, 2):
        if (one, other) != ("corners", "areas"):  # two kinds of crop, which never meet
            assert spearmanr(drawn[one].numpy(), drawn[other].numpy()).pvalue > 1e-3, (one, other)


def reference_multi_scale(height: int, width: int) -> Counter[tuple[int, int, int, int]]:
    """VideoMAE's boxes, each with the number of ways in which it comes about."""
    sides = [int(min(height, width) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    boxes: Counter[tuple[int, int, int, int]] = Counter()
    for i in range(4):
        for j in range(max(0, i - 1), min(4, i + 2)):
            h, w = sides[i], sides[j]
            dy, dx = (height - h) // 4, (width - w) // 4
            corners_and_centre = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
            middles_and_quarters = [(2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
            for y, x in corners_and_centre + middles_and_quarters:
                boxes[y * dy, x * dx, h, w] += 1
    return boxes


@pytest.mark.parametrize("canvas", [(256, 340), (120, 90), (16, 16), (3, 2), (1, 1)])
def test_multi_scale_draws_each_of_videomaes_boxes_as_often(canvas: tuple[int, int]) -> None:
    boxes = crop_boxes("multi_scale", KEYS, canvas)
    assert boxes.dtype == torch.float32 and boxes.shape == (len(KEYS), 4)
    if canvas == (1, 1):  # no smaller than a pixel
        assert (boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()
        return
    expected = reference_multi_scale(*canvas)
    got = Counter((int(t), int(x), int(h), int(w)) for t, x, h, w in boxes.tolist())
    assert sum(expected.values()) == 130 and set(got) == set(expected)
    if len(expected) > 1:
        ways = np.array([expected[box] for box in expected])
        assert chisquare([got[box] for box in expected], ways / 130 * len(KEYS)).pvalue > 1e-3


@pytest.mark.parametrize("canvas", [(90, 120), (40, 400), (400, 40)])  # the last two fall back on the centre at times
def test_random_resized_draws_as_torchvision_does(canvas: tuple[int, int]) -> None:
    boxes = crop_boxes("random_resized", KEYS, canvas).double().numpy()
    assert (boxes == boxes.round()).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= canvas).all()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(8)
        draws = [crop.make_params([torch.empty(3, *canvas)]) for _ in range(len(KEYS))]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in draws])
    measures: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2],
    ]  # fmt: skip
    for measure in measures:
        assert ks_2samp(measure(boxes), measure(theirs)).pvalue > 1e-3


def test_random_resized_falls_back_on_the_centre_of_a_canvas_too_long_for_any_box() -> None:
    # 0.08 of 4 x 4000 at 4/3 is 41 pixels wide and 31 high
    assert (crop_boxes("random_resized", KEYS[:50], (4, 4000)) == torch.tensor([0.0, 1997.0, 4.0, 5.0])).all()
    assert (crop_boxes("random_resized", KEYS[:50], (4000, 4)) == torch.tensor([1997.0, 0.0, 5.0, 4.0])).all()


def test_an_unknown_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="crop 'center' is unknown; give multi_scale or random_resized"):
        crop_boxes("center", KEYS[:2], (8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(20, 24), (16, 16), (37, 15), (33, 50)])
def test_cropping_is_torchvisions_clip_by_clip(size: tuple[int, int]) -> None:
    clips = noise_clips(40, 2, 20, 24, 3)
    boxes = torch.cat(
        [crop_boxes("random_resized", KEYS[:20], (20, 24)), crop_boxes("multi_scale", KEYS[20:40], (20, 24))]
    )
    flip = flips(KEYS[:40])
    assert 5 < flip.sum() < 35
    got = crop_and_flip(clips, boxes, flip, size)
    assert got.dtype == torch.uint8 and got.shape == (40, 2, *size, 3)
    for b in range(40):
        top, left, height, width = boxes[b].int().tolist()
        frames = Image(clips[b].movedim(-1, 1).float())  # in floating point: its uint8 form rounds twice
        want = TF.resized_crop(frames, top, left, height, width, list(size), antialias=False)
        if flip[b]:
            want = TF.horizontal_flip(want)
        difference = (got[b].float() - want.movedim(1, -1)).abs().max()
        assert difference <= 0.51, (b, boxes[b], difference)  # rounding to whole levels, and no more


def test_the_whole_canvas_at_its_own_size_is_left_as_it_is() -> None:
    for height, width in ((20, 24), (7, 1), (224, 171)):
        clips = torch.randint(0, 256, (3, 2, height, width, 3), dtype=torch.uint8)
        masks = clips[..., 0] > 100
        whole = torch.tensor([[0.0, 0.0, height, width]]).expand(3, 4)
        for given in (clips, masks):
            same = crop_and_flip(given, whole, torch.zeros(3, dtype=torch.bool), (height, width))
            mirrored = crop_and_flip(given, whole, torch.ones(3, dtype=torch.bool), (height, width))
            assert same.dtype == given.dtype and torch.equal(same, given)
            assert torch.equal(mirrored, given.flip(3))


def test_a_flip_mirrors_the_crop_exactly() -> None:
    clips = noise_clips(30, 1, 20, 24, 3)
    boxes, flip = crop_boxes("random_resized", KEYS[:30], (20, 24)), flips(KEYS[:30])
    for given in (clips, clips[..., 0] > 120):
        straight = crop_and_flip(given, boxes, torch.zeros(30, dtype=torch.bool), (9, 10))
        mirrored = crop_and_flip(given, boxes, torch.ones(30, dtype=torch.bool), (9, 10))
        mixed = crop_and_flip(given, boxes, flip, (9, 10))
        assert torch.equal(mirrored, straight.flip(3))
        assert torch.equal(mixed, torch.where(flip.view(30, *[1] * (given.ndim - 1)), mirrored, straight))


@pytest.mark.parametrize("size", [(10, 12), (16, 16), (37, 15), (5, 6)])
def test_masks_take_the_pixel_on_which_each_centre_falls(size: tuple[int, int]) -> None:
    masks = noise_clips(40, 2, 20, 24) > 115
    boxes = crop_boxes("random_resized", KEYS[:40], (20, 24))
    boxes[0] = torch.tensor([0, 0, 20, 24])  # centres that fall between two pixels, at two of the sizes
    got = crop_and_flip(masks, boxes, torch.zeros(40, dtype=torch.bool), size)
    assert got.dtype == torch.bool and got.shape == (40, 2, *size)
    for b in range(40):
        top, left, height, width = boxes[b].int().tolist()
        rows = [top + floor(Fraction(2 * i + 1, 2) * height / size[0]) for i in range(size[0])]
        columns = [left + floor(Fraction(2 * i + 1, 2) * width / size[1]) for i in range(size[1])]
        assert torch.equal(got[b], masks[b][:, rows][:, :, columns])
    mask = Mask(masks[0])
    interpolation = v2.InterpolationMode.NEAREST_EXACT
    assert torch.equal(got[0], TF.resize(Image(mask.float()), list(size), interpolation, antialias=False).bool())


def test_pixels_and_masks_of_a_scene_stay_together() -> None:
    masks = torch.zeros(20, 1, 40, 48, dtype=torch.bool)
    masks[:, :, 10:30, 12:36] = True
    clips = masks[..., None].expand(-1, -1, -1, -1, 3).byte() * 255
    boxes, flip = crop_boxes("multi_scale", KEYS[:20], (40, 48)), flips(KEYS[:20])
    moved = crop_and_flip(clips, boxes, flip, (32, 32))
    agree = (moved[..., 0] > 127) == crop_and_flip(masks, boxes, flip, (32, 32))
    assert agree.float().mean() > 0.99


def test_a_box_between_pixels_samples_between_pixels() -> None:
    ramp = torch.arange(0, 200, 10, dtype=torch.uint8).view(1, 1, 1, 20, 1).expand(1, 1, 4, 20, 1)
    got = crop_and_flip(ramp, torch.tensor([[0.0, 2.3, 4.0, 10.0]]), UNFLIPPED, (4, 10))
    assert got[0, 0, 0, :, 0].tolist() == [23 + 10 * i for i in range(10)]


def test_crops_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, boxes, flip = noise_clips(7, 2, 20, 24, 3), crop_boxes("multi_scale", KEYS[:7], (20, 24)), flips(KEYS[:7])
    at_once = crop_and_flip(clips, boxes, flip, (16, 16))
    for chunk in (1, 2 * 2 * 20 * 24 * 3):  # a clip at a time, two at a time
        monkeypatch.setattr(augment, "_CHUNK", chunk)
        assert torch.equal(crop_and_flip(clips, boxes, flip, (16, 16)), at_once)


def test_rand_augment_does_to_every_frame_what_torchvision_does_to_one() -> None:
    clips = smooth_clips(60, 2, 16, 18)
    out = rand_augment(clips, KEYS[:60], 2, 9)
    assert out.shape == clips.shape
    for b in range(60):
        for t in range(2):
            assert torch.equal(rand_augment(clips[b : b + 1, t : t + 1], KEYS[b : b + 1], 2, 9)[0, 0], out[b, t])


def test_rand_augment_draws_each_of_torchvisions_operations_as_often() -> None:
    clip, count = noise_clips(1, 1, 24, 28, 3), 1400  # equalize leaves fewer pixels than 256 as they are
    frame = Image(clip[0, 0].movedim(-1, 0))
    operations = v2.RandAugment(1, 15, interpolation=v2.InterpolationMode.BILINEAR, fill=128.0)
    possible: Counter[bytes] = Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(count):
            possible[operations(frame).movedim(0, -1).contiguous().numpy().tobytes()] += 1
    got = Counter(x.numpy().tobytes() for x in rand_augment(clip.expand(count, -1, -1, -1, -1), KEYS[:count], 1, 15))
    assert len(possible) == 14 + 9  # nine of them go either way
    assert set(got) == set(possible)
    assert chi2_contingency([[got[x] for x in possible], list(possible.values())]).pvalue > 1e-3


def test_rand_augment_is_stronger_at_a_higher_magnitude_and_nothing_without_operations() -> None:
    clips, keys = smooth_clips(1, 1, 16, 16).expand(100, -1, -1, -1, -1), KEYS[:100]
    assert torch.equal(rand_augment(clips, keys, 0, 9), clips)
    mild, strong = (rand_augment(clips, keys, 2, m).float().sub(clips).abs().mean() for m in (3, 25))
    assert strong > 2 * mild


def erased_rectangles(num: int, height: int, width: int, probability: float) -> list[tuple[int, int, int, int] | None]:
    """Where pixels changed, as (top, left, height, width) of each clip, checking that it is one rectangle."""
    out = random_erase(torch.zeros(num, 1, height, width, 3), KEYS[:num], probability)
    found: list[tuple[int, int, int, int] | None] = []
    for clip in (out[:, 0] != 0).all(dim=-1):
        if not clip.any():
            found.append(None)
            continue
        rows, columns = clip.any(dim=1).nonzero().flatten(), clip.any(dim=0).nonzero().flatten()
        assert clip.sum() == len(rows) * len(columns)
        found.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    return found


@pytest.mark.parametrize(("height", "width"), [(32, 32), (12, 60)])
def test_random_erase_draws_as_torchvision_does(height: int, width: int) -> None:
    count = 2000
    ours = erased_rectangles(count, height, width, 0.4)
    boxes = np.array([box for box in ours if box is not None])
    eraser = v2.RandomErasing(1.0, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [eraser.make_params([torch.empty(3, height, width)]) for _ in range(count)]
    theirs = np.array([[d["i"], d["j"], d["h"], d["w"]] for d in draws if d["v"] is not None])
    assert chisquare([len(boxes), count - len(boxes)], [0.4 * len(theirs), count - 0.4 * len(theirs)]).pvalue > 1e-3
    for side in range(4):
        assert ks_2samp(boxes[:, side], theirs[:, side]).pvalue > 1e-3
    assert ks_2samp(boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


def test_erased_pixels_are_normal_noise_and_the_others_untouched() -> None:
    pixels = torch.full((60, 2, 24, 24, 3), 9.0)
    out = random_erase(pixels, KEYS[:60], 1.0)
    assert (pixels == 9).all()
    gone = out != 9
    assert (gone.all(dim=-1) == gone.any(dim=-1)).all()
    assert torch.equal(out[:, 0], out[:, 1])
    noise = out[:, 0][gone[:, 0]].numpy()
    assert len(noise) > 5000 and kstest(noise, "norm").pvalue > 1e-3
    per_channel = out[:, 0][gone[:, 0].all(dim=-1)]
    assert np.abs(np.corrcoef(per_channel.numpy().T)[np.triu_indices(3, 1)]).max() < 0.05
    neighbours = gone[:, 0, :, 1:].all(dim=-1) & gone[:, 0, :, :-1].all(dim=-1)
    left, right = out[:, 0, :, :-1][neighbours].ravel(), out[:, 0, :, 1:][neighbours].ravel()
    assert abs(np.corrcoef(left.numpy(), right.numpy())[0, 1]) < 0.05


def test_erased_grey_levels_are_the_same_noise_before_normalisation() -> None:
    keys = KEYS[:60]
    mean, std = (255 * torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    levels = random_erase(torch.zeros(60, 1, 24, 24, 3, dtype=torch.uint8), keys, 1.0)
    normalised = random_erase(torch.full((60, 1, 24, 24, 3), 9.0), keys, 1.0)
    assert levels.dtype == torch.uint8
    expected = torch.where(normalised == 9, 0, (normalised * std + mean).clamp(0, 255))
    assert (levels.float() - expected).abs().max() < 0.51


def test_nothing_is_erased_at_probability_0_and_always_something_at_1() -> None:
    assert erased_rectangles(200, 32, 32, 0.0) == [None] * 200
    assert None not in erased_rectangles(200, 32, 32, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_augments_as_the_cpu_does(augmented: Callable[[Tensor, Tensor], Tensor]) -> None:
    clips, keys = smooth_clips(12, 2, 20, 24), KEYS[:12]
    on_gpu = augmented(clips.cuda(), keys)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu().int() - augmented(clips, keys).int()).abs().float().mean() < 0.5
