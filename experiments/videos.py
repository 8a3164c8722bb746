"""The data sets of a configuration, each opened once."""

from __future__ import annotations

from experiments.distributed import num_started_here
from experiments.schema import RunConfig
from tats_env.data import VideoSet, open_dataset
from tats_env.data.reader import num_cores
from tats_env.processes import process_index


class Videos:
    """Opens the sets that a run trains and is tested on; one asked for twice is the same.

    Args:
        config: whose clips, loader and numbers of videos hold for all of them.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._open: dict[tuple[str, str, str, str, bool], VideoSet] = {}

    def __call__(
        self, data: str, split: str, sampling: str | None = None, augment: str = "none", flip: bool = False
    ) -> VideoSet:
        """The set of that name.

        Args:
            data: as ``open_dataset`` has it.
            split: train or validation.
            sampling: None is that of ``clip``.
            augment, flip: of clips that come with a key.

        Raises:
            DataError: if it cannot be opened.
        """
        clip, loader = self.config.clip, self.config.loader
        key = data, split, sampling or clip.sampling, augment, flip
        if key not in self._open:
            self._open[key] = open_dataset(
                data,
                split=split,
                num_frames=clip.num_frames,
                frame_stride=clip.frame_stride,
                size=(clip.size, clip.size),
                seed=0 if split == "train" else self.config.evaluate.seed,
                num_videos=self.config.num_videos if split == "train" else self.config.evaluate.num_videos,
                sampling=key[2],
                augment=augment,
                flip=flip,
                decoder=loader.decoder,
                workers=max(1, num_cores() // num_started_here()) if loader.workers is None else loader.workers,
                cache=loader.cache,
                cache_gb=loader.cache_gb,
                progress=process_index() == 0,
            )
        return self._open[key]

    def opened(self) -> list[VideoSet]:
        """All that were asked for so far."""
        return list(self._open.values())
