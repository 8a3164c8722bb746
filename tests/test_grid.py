"""Token geometry against literal loops, sets and exact fractions."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tats_env.grid import TokenGrid, hidden_tokens, token_budget, visible_mask

# usual, uneven sides with tubelets of three, tubelets of one, a single token
GRIDS = [TokenGrid(4, 16, 16, 2, 4), TokenGrid(6, 8, 12, 3, 4), TokenGrid(3, 4, 6, 1, 2), TokenGrid(2, 8, 8, 2, 8)]


def random_clips(grid: TokenGrid, batch: int = 2, seed: int = 0) -> Tensor:
    shape = (batch, grid.num_frames, grid.height, grid.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def literal_tokens(grid: TokenGrid, clip: Tensor) -> list[Tensor]:
    """The tubelets of one clip [T, H, W, C], time first, then rows, then columns."""
    u, p = grid.tubelet_size, grid.patch_size
    return [
        clip[t : t + u, y : y + p, x : x + p]
        for t in range(0, grid.num_frames, u)
        for y in range(0, grid.height, p)
        for x in range(0, grid.width, p)
    ]


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_tubelets_in_time_row_column_order_with_channels_last(grid: TokenGrid) -> None:
    clips = random_clips(grid)
    patches = grid.patchify(clips)
    assert patches.dtype == torch.uint8
    for clip, found in zip(clips, patches, strict=True):
        tokens = literal_tokens(grid, clip)
        assert found.shape == (len(tokens), tokens[0].numel()) == (grid.num_tokens, grid.patch_dim)
        for token, row in zip(tokens, found, strict=True):
            assert row.tolist() == [
                int(token[u, y, x, c])
                for u in range(grid.tubelet_size)
                for y in range(grid.patch_size)
                for x in range(grid.patch_size)
                for c in range(3)
            ]


@pytest.mark.parametrize("grid", GRIDS)
def test_unpatchify_puts_every_pixel_back(grid: TokenGrid) -> None:
    clips = random_clips(grid)
    assert torch.equal(grid.unpatchify(grid.patchify(clips)), clips)
    patches = torch.randn(2, grid.num_tokens, grid.patch_dim)
    assert torch.equal(grid.patchify(grid.unpatchify(patches)), patches)


@pytest.mark.parametrize("grid", GRIDS)
def test_counts_and_coordinates_follow_from_the_token_order(grid: TokenGrid) -> None:
    assert (grid.num_steps, grid.rows, grid.columns) == (
        grid.num_frames // grid.tubelet_size,
        grid.height // grid.patch_size,
        grid.width // grid.patch_size,
    )
    every = [(t, h, w) for t in range(grid.num_steps) for h in range(grid.rows) for w in range(grid.columns)]
    assert len(every) == grid.num_tokens == grid.num_steps * grid.num_positions
    coordinates = grid.coordinates(torch.arange(grid.num_tokens).reshape(1, -1))
    assert [tuple(c) for c in torch.cat(coordinates).T.tolist()] == every


def test_the_default_grid_is_videomaes() -> None:
    grid = TokenGrid()
    assert (grid.num_tokens, grid.num_positions, grid.patch_dim) == (1568, 196, 1536)


@pytest.mark.parametrize("grid", GRIDS)
def test_token_share_is_the_mean_of_a_tokens_pixels(grid: TokenGrid) -> None:
    pixels = random_clips(grid)[..., 0] < 100
    share = grid.token_share(pixels)
    assert share.dtype == torch.float32
    for clip, found in zip(pixels, share, strict=True):
        expected = [int(token.sum()) / token.numel() for token in literal_tokens(grid, clip)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert (grid.token_share(torch.ones_like(pixels)) == 1).all()
    assert (grid.token_share(torch.zeros_like(pixels)) == 0).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_frames": 15}, "tubelet_size=2 does not divide num_frames=15"),
        ({"height": 225}, "patch_size=16 does not divide height=225"),
        ({"width": 8}, "patch_size=16 does not divide width=8"),
        ({"tubelet_size": 3}, "tubelet_size=3 does not divide num_frames=16: give a divisor of 16"),
        ({"tubelet_size": 0}, "tubelet_size=0 does not divide num_frames=16"),
        ({"patch_size": -4}, "patch_size=-4 does not divide height=224"),
        ({"num_frames": 0}, "does not divide num_frames=0"),
    ],
)
def test_a_grid_that_does_not_fit_the_clip_is_refused_by_name(setting: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGrid(**setting)


def test_clips_of_another_size_than_the_grids_are_refused() -> None:
    grid = GRIDS[0]
    for shape in ((8, 16, 16), (4, 32, 16), (4, 16, 8)):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape"):
            grid.patchify(torch.zeros(1, *shape, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "k"), [(1568, 0.95, 78), (128, 0.9, 12), (1568, 0.9, 156), (2, 0.5, 1)]
)
def test_budget_of_known_settings(num_tokens: int, mask_ratio: float, k: int) -> None:
    assert token_budget(num_tokens, mask_ratio) == k


def test_budget_is_the_exact_floor_where_floating_point_would_fall_short() -> None:
    traps = 0
    for n in (10, 20, 100, 128, 160, 196, 250, 512, 1000, 1568, 3136):
        for percent in range(1, 200):
            ratio = percent / 200
            exact = math.floor(n * (1 - Fraction(percent, 200)))
            traps += int(n * (1 - ratio)) != exact
            if 1 <= exact < n:
                assert token_budget(n, ratio) == exact, (n, ratio)
    assert traps > 20  # or the naive floor would have passed as well


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, -0.5, 1.5, 0.995])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_ratio={mask_ratio} keeps -?\d+ of 128 tokens"):
        token_budget(128, mask_ratio)


@pytest.mark.parametrize("num_tokens", [8, 32, 128, 1568, 3136])
def test_the_bounds_that_the_error_names_are_accepted(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="mask_ratio") as error:
        token_budget(num_tokens, 1.0)
    low, high = re.findall(r"0\.\d+", str(error.value))[-2:]
    assert 1 <= token_budget(num_tokens, float(high)) < token_budget(num_tokens, float(low)) < num_tokens


@pytest.mark.parametrize(("num_tokens", "k"), [(7, 1), (7, 6), (32, 3), (300, 40)])
def test_hidden_and_visible_part_the_tokens_as_sets(num_tokens: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    visible = torch.rand(4, num_tokens, generator=generator).argsort(1)[:, :k]  # in any order
    hidden, mask = hidden_tokens(visible, num_tokens), visible_mask(visible, num_tokens)
    assert mask.dtype == torch.bool and mask.shape == (4, num_tokens)
    for shown, rest, flags in zip(visible.tolist(), hidden.tolist(), mask.tolist(), strict=True):
        assert rest == sorted(set(range(num_tokens)) - set(shown))
        assert {i for i, flag in enumerate(flags) if flag} == set(shown)
