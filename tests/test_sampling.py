from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from scipy.stats import chisquare

from tats_env.data import sampling
from tats_env.data.sampling import dense_frames, epoch_order, rank_share, uniform_frames


def test_dense_frames_are_a_stride_apart_and_loop_a_short_video() -> None:
    frames = dense_frames(np.array([100, 5, 1]), np.array([7, 3, 0]), num_frames=4, stride=2)
    assert frames.dtype == np.int64
    assert frames.tolist() == [[7, 9, 11, 13], [3, 0, 2, 4], [0, 0, 0, 0]]


def test_a_start_beyond_the_video_is_taken_modulo_its_length() -> None:
    assert dense_frames(np.array([10]), np.array([23]), 3, 4).tolist() == [[3, 7, 1]]


def test_uniform_frames_lie_where_exact_arithmetic_puts_them() -> None:
    offsets = np.random.default_rng(0).random((200, 16))
    for length in (1, 2, 5, 15, 16, 17, 31, 250, 10**9 + 7):
        got = uniform_frames(np.full(200, length), 16, offsets)
        exact = [[floor((t + Fraction(float(o))) * length / 16) for t, o in enumerate(row)] for row in offsets]
        assert got.tolist() == exact


def test_middle_frames_are_the_default_and_one_offset_serves_all() -> None:
    lengths = np.arange(1, 60)
    middle = [[(2 * t + 1) * length // 16 for t in range(8)] for length in lengths]
    assert uniform_frames(lengths, 8).tolist() == middle
    assert uniform_frames(lengths, 8, 0.5).tolist() == middle
    assert uniform_frames(np.array([80]), 8, 0.25).tolist() == [[2, 12, 22, 32, 42, 52, 62, 72]]


@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2.0**-53, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_uniform_frames_stay_in_range_and_in_order_for_every_length(offset: float) -> None:
    lengths = np.concatenate([np.arange(1, 400), [10**9, 2**31, 2**40 + 1]])
    for num_frames in (1, 3, 8, 16, 49):
        frames = uniform_frames(lengths, num_frames, np.full((len(lengths), num_frames), offset))
        assert (frames >= 0).all() and (frames < lengths[:, None]).all()
        assert (np.diff(frames, axis=1) >= 0).all()
        # In the part that each belongs to: neither before it nor wholly after
        parts = np.arange(num_frames)
        assert (num_frames * (frames + 1) > parts * lengths[:, None]).all()
        assert (num_frames * frames < (parts + 1) * lengths[:, None]).all()


@pytest.mark.parametrize("length", [5, 8, 13, 29])
def test_all_frames_of_a_video_are_equally_likely_under_uniform_offsets(length: int) -> None:
    num_clips = 4000
    offsets = np.random.default_rng(1).random((num_clips, 8))
    counts = np.bincount(uniform_frames(np.full(num_clips, length), 8, offsets).ravel(), minlength=length)
    # Draws without clustering: a chi-square is conservative here, so a failure means bias
    assert chisquare(counts).pvalue > 1e-3


def test_dense_test_clips_span_the_video_evenly() -> None:
    lengths, span = np.array([100, 31, 32, 40]), 31
    starts = np.stack([sampling.test_starts(lengths, span, j, 5) for j in range(5)], axis=1)
    assert starts.dtype == np.int64
    assert starts[:, 0].tolist() == [0, 0, 0, 0]
    assert (starts[:, -1] + span == lengths).all()
    gaps = np.diff(starts, axis=1)
    assert (gaps.max(axis=1) - gaps.min(axis=1) <= 1).all()
    assert sampling.test_starts(lengths, span, 0, 1).tolist() == [34, 0, 0, 4]


def test_all_test_clips_of_a_short_video_start_with_it() -> None:
    for j in range(3):
        assert sampling.test_starts(np.array([1, 10, 30]), 31, j, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("j", "n"), [(3, 3), (-1, 3), (0, 0)])
def test_a_test_clip_that_does_not_exist_is_refused(j: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"test clip {j} of {n}"):
        sampling.test_starts(np.array([100]), 16, j, n)


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)}
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(50))
        assert (order == epoch_order(50, seed, epoch)).all()
    assert len({tuple(order) for order in orders.values()}) == 9


def test_every_permutation_is_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(epoch_order(4, 5, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_an_epochs_order_leaves_numpys_global_generator_alone() -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    epoch_order(10, 0, 0)
    assert np.random.random() == expected


@pytest.mark.parametrize(("num", "world_size", "batch"), [(24, 2, 3), (25, 2, 3), (29, 4, 2), (5, 1, 5), (3, 4, 2)])
def test_processes_share_out_every_item_once_and_then_begin_again(num: int, world_size: int, batch: int) -> None:
    order = epoch_order(num, seed=1, epoch=2)
    shares = [rank_share(order, rank, world_size, batch) for rank in range(world_size)]
    steps = shares[0].shape[0]
    assert {share.shape for share in shares} == {(steps, batch)}
    assert 0 <= steps * world_size * batch - num < world_size * batch
    walked = [item for s in range(steps) for share in shares for item in share[s].tolist()]
    assert walked == [int(order[i % num]) for i in range(len(walked))]
    counted_once = [
        int(share[s, i])
        for rank, share in enumerate(shares)
        for s in range(steps)
        for i in range(batch)
        if (s * world_size + rank) * batch + i < num
    ]
    assert sorted(counted_once) == list(range(num))


def test_a_steps_items_depend_on_the_global_batch_only() -> None:
    order = epoch_order(50, 0, 0)
    one = rank_share(order, 0, 1, 12)
    three = np.concatenate([rank_share(order, rank, 3, 4) for rank in range(3)], axis=1)
    assert (one == three).all()


def test_a_share_of_nothing_or_of_no_process_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        rank_share(np.array([], np.int64), 0, 1, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_share(np.arange(4), 2, 2, 4)


def test_sampling_loads_neither_torch_nor_a_decoder() -> None:
    import subprocess
    import sys

    code = "import tats_env.data.sampling, sys; print(sorted({'torch', 'decord'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
