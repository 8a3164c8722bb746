"""Which frames make up a clip, and which videos make up a batch: pure functions of their arguments, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def dense_frames(lengths: np.ndarray, start_frame: np.ndarray, num_frames: int, stride: int) -> np.ndarray:
    """Frames ``start_frame + t * stride`` of each video, modulo its length: a video too short for them is looped.

    Args:
        lengths: frames in each video, int64 [B].
        start_frame: first frame of each clip, int64 [B]; taken modulo the length as well.
        num_frames: frames in a clip, T.
        stride: frames of the video from one frame of the clip to the next.

    Returns:
        int64 [B, T].
    """
    steps = np.arange(num_frames, dtype=np.int64) * stride
    return (np.asarray(start_frame, np.int64)[:, None] + steps) % np.asarray(lengths, np.int64)[:, None]


def uniform_frames(lengths: np.ndarray, num_frames: int, offsets: ArrayLike | None = None) -> np.ndarray:
    """One frame out of each of T equal parts of the video (TSN: Wang et al., ECCV 2016).

    Part t is the stretch of time from ``t / T`` to ``(t + 1) / T`` of the video; its bounds need not fall between two
    frames. With uniform offsets all frames of a video are therefore equally likely, where TSN and VideoMAE round the
    parts down to whole frames and never show the last ``length % T``. In a video shorter than T frames some repeat.

    Args:
        lengths: frames in each video, int64 [B].
        num_frames: frames in a clip, T.
        offsets: where in its part each frame is taken, in [0, 1), broadcast to [B, T]; None is the middle. The j-th
            of n test clips has the offset ``(j + 0.5) / n``.

    Returns:
        int64 [B, T], each row ascending and below the video's length.
    """
    length = np.asarray(lengths, np.int64)[:, None]
    part = np.arange(num_frames, dtype=np.int64)
    taken = np.floor((part + np.asarray(0.5 if offsets is None else offsets, np.float64)) * length / num_frames)
    # An offset just below 1 may have been rounded up to the next part, or to the end
    return np.clip(taken.astype(np.int64), part * length // num_frames, ((part + 1) * length - 1) // num_frames)


def test_starts(lengths: np.ndarray, span: int, j: int, n: int) -> np.ndarray:
    """First frame of the j-th of n dense test clips, spread evenly over the video.

    The first clip starts with the video and the last one ends with it; a single one lies in the middle. Where a video
    is no longer than a clip, all start with it.

    Args:
        lengths: frames in each video, int64 [B].
        span: frames of the video from the first to the last of a clip, ``(T - 1) * stride + 1``.

    Returns:
        int64 [B].

    Raises:
        ValueError: if there is no such clip.
    """
    if not 0 <= j < n:
        raise ValueError(f"test clip {j} of {n}: must be one of 0 to n - 1")
    last = np.maximum(np.asarray(lengths, np.int64) - span, 0)
    return last // 2 if n == 1 else last * j // (n - 1)


def epoch_order(num: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which ``num`` items are visited in an epoch: a permutation, int64 [num].

    A function of its arguments and of numpy's version, so that any epoch can be entered without walking through those
    before.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(num)


def rank_share(order: np.ndarray, rank: int, world_size: int, batch: int) -> np.ndarray:
    """The items that one of several processes loads in each step of an epoch; row s is step s.

    A step takes the next ``world_size * batch`` items of the order, rank by rank, so that the items of a step depend
    on that product only. All processes take the same number of full batches: every item is loaded once, and the last
    step is filled up with items from the beginning of the order (from its beginning again, where the order is
    shorter than a step). Whoever must count each item once, leaves out those at
    ``(s * world_size + rank) * batch + i >= len(order)``.

    Args:
        order: int64 [V].
        batch: items a process takes in a step.

    Returns:
        int64 [steps, batch], with ``steps = ceil(V / (world_size * batch))``.

    Raises:
        ValueError: if there are no items, or no such process.
    """
    if not len(order):
        raise ValueError("an epoch of no items: there is nothing to fill a batch with")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: must be one of 0 to world_size - 1")
    steps = -(-len(order) // (world_size * batch))
    return np.resize(order, (steps, world_size, batch))[:, rank]
