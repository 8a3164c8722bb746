"""Sets of videos, decoded into clips: rendered ones, folders and lists of files, and the field's data sets.

Importing this loads neither torch nor a decoder: the worker processes come through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tats_env.data.listing import RENDERED, Listing, parse_spec
from tats_env.data.reader import DataError

if TYPE_CHECKING:
    import numpy as np

    from tats_env.data.video_set import VideoSet
    from tats_env.data.video_set import write_bad_videos as write_bad_videos

SPLITS = ("train", "validation")
RENDERED_VIDEOS = 60  # a short prefix, rendered in a few seconds: four or five videos a class


def __getattr__(name: str) -> Any:
    if name in ("VideoSet", "write_bad_videos"):
        from tats_env.data import video_set

        return getattr(video_set, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def list_videos(
    spec: str, split: str = "train", num_videos: int | None = None, seed: int = 0, progress: bool = False
) -> Listing:
    """The files of one split of a data set, none of them opened; arguments and errors as for ``open_dataset``."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; give one of {', '.join(SPLITS)}")
    if num_videos is not None and num_videos < 1:
        raise DataError(f"num_videos={num_videos}: must be at least 1")
    if seed < 0:
        raise DataError(f"seed={seed}: must not be negative")
    parsed = parse_spec(spec)
    kind, root, options = parsed.kind, parsed.root, parsed.options
    if kind in RENDERED:
        from tats_env.data.rendered import load_set, render

        count, names = num_videos or RENDERED_VIDEOS, list(load_set(kind).CLASS_NAMES)
        paths = render(kind, seed, split, count, progress=progress)
        return Listing(paths, [i % len(names) for i in range(count)], names, flips=False)
    if kind == "folder":
        from tats_env.data import folder

        listing = folder.list_folder(root, split)
    elif kind == "shards":
        from tats_env.data import shards

        listing = shards.list_shards(root, split)
    else:
        # Not as an attribute of this package, where ``annotations`` is the feature imported above
        from tats_env.data.annotations import list_file, list_hmdb51, list_kinetics400, list_ssv2, list_ucf101

        listers: dict[str, Callable[..., Listing]] = {
            "list": list_file,
            "ssv2": list_ssv2,
            "kinetics400": list_kinetics400,
            "ucf101": list_ucf101,
            "hmdb51": list_hmdb51,
        }
        listing = listers[kind](root, split, *options.values())  # which of its splits, where it has several
    if num_videos is None or num_videos >= len(listing.paths):
        return listing
    import numpy as np

    picks = sorted(np.random.default_rng(seed).choice(len(listing.paths), num_videos, replace=False))
    paths, labels = ([whole[i] for i in picks] for whole in (listing.paths, listing.labels))
    return replace(listing, paths=paths, labels=labels)


def open_dataset(
    spec: str,
    *,
    split: str = "train",
    num_frames: int = 16,
    frame_stride: int = 1,
    size: tuple[int, int] = (32, 32),
    num_videos: int | None = None,
    seed: int = 0,
    sampling: str = "dense",
    augment: str = "none",
    flip: bool = False,
    decoder: str = "decord",
    workers: int = 0,
    cache: str | Path | None = None,
    cache_gb: float = 50.0,
    progress: bool = False,
) -> VideoSet:
    """Open the set of videos that ``spec`` names.

    - ``"motion"`` and ``"scenes"``: rendered into real H.264 files on first use (see the modules of these names).
      ``num_videos`` is how many of the split there are, 60 if None; more of them begin with the same ones. ``seed``
      chooses the set.
    - ``"folder:/path"``: every video file under a folder; the first-level subfolder is the class (see
      ``tats_env.data.folder``).
    - ``"list:/file.csv"``: a line ``path label`` a video, a fifth of them held out for validation; or a folder with
      ``train.csv`` and ``val.csv``.
    - ``"ssv2:/root"``, ``"kinetics400:/root"``, ``"ucf101:/root?split=1"``, ``"hmdb51:/root?split=1"``: from their
      official annotation files (see ``tats_env.data.annotations``).
    - ``"shards:/folder"``: tar files as webdataset has them (see ``tats_env.data.shards``).

    For all but the rendered ones ``num_videos`` is how many there are at most, a choice by ``seed``; None takes all.

    Args:
        split: ``"train"`` or ``"validation"``.
        num_frames: frames in a clip, T.
        frame_stride: frames of the video from one frame of a clip to the next.
        size: (H, W) of the clips in pixels; a video is scaled to cover it and cropped at the centre.
        sampling: ``"dense"``, or ``"uniform"``: one frame out of each of T equal parts of the video.
        augment: ``"none"``, ``"multi_scale"`` or ``"random_resized"``: how a clip that comes with a key is cropped.
        flip: mirror half of the clips that come with a key, unless left or right is the label in this set.
        decoder: ``"decord"`` or ``"torchcodec"``.
        workers: processes that decode a set too large for memory; 0 decodes in threads.
        cache: folder for decoded, resized videos.
        cache_gb: its size in gigabytes (10^9 bytes); 0 reads what is there.
        progress: show progress bars while rendering and decoding.

    Raises:
        DataError: for an unknown spec or split, an impossible size, annotation files or a folder that are missing, a
            set of which no video is there, or one of which more than half cannot be decoded.
    """
    for name, value in (("num_frames", num_frames), ("frame_stride", frame_stride), ("size", min(size))):
        if value < 1:
            raise DataError(f"{name}={size if name == 'size' else value}: must be at least 1")
    for name, text, known in (
        ("sampling", sampling, ("dense", "uniform")),
        ("augment", augment, ("none", "multi_scale", "random_resized")),
    ):
        if text not in known:
            raise DataError(f"{name} {text!r} is unknown; give one of {', '.join(known)}")
    listing = list_videos(spec, split, num_videos, seed, progress)
    from tats_env.data.video_set import VideoSet

    frames = None
    if cache is not None:
        from tats_env.data.cache import FrameCache

        frames = FrameCache(Path(cache).expanduser(), int(cache_gb * 1e9))
    truth = None
    if spec in RENDERED:
        from tats_env.data.rendered import load_set

        scenes = load_set(spec)

        def truth(path: Path, canvas: tuple[int, int]) -> np.ndarray:
            return scenes.foreground_masks(seed, split, int(path.stem), canvas)

    return VideoSet(
        spec, split, listing,
        num_frames=num_frames, frame_stride=frame_stride, size=size, sampling=sampling, augment=augment, flip=flip,
        decoder=decoder, workers=workers, cache=frames, truth=truth, progress=progress,
    )  # fmt: skip
