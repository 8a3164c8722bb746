"""Curves and pictures sent to Weights & Biases, through accelerate's tracker."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import Image, KVWriter

from experiments.config import to_values
from experiments.refusals import ConfigError
from experiments.schema import RunConfig

PROJECT = "tats-env"


def check_tracker(config: RunConfig) -> None:
    """Raise ConfigError unless what the configuration's ``tracker`` needs is installed."""
    try:
        if config.tracker is not None:
            version("wandb")  # a folder of that name, as it leaves behind, could be imported as well
    except PackageNotFoundError:
        raise ConfigError("tracker: wandb is not installed; pip install 'tats-env[wandb]'") from None


class Tracker(KVWriter):
    """One sampler's training as a run of Weights & Biases, which a training that is resumed goes on with.

    Args:
        config: told with it.
        run: the folder of the run, after which it is called.
        folder: the sampler's, where wandb leaves its files.

    Raises:
        ConfigError: if wandb can't begin, for want of a key or a network.
    """

    def __init__(self, config: RunConfig, run: Path, folder: Path) -> None:
        import wandb
        from accelerate import PartialState
        from accelerate.tracking import WandBTracker

        PartialState()  # without which accelerate would not log
        before = sorted(folder.glob("wandb/*run-*-*"))
        self.tracker = WandBTracker(
            PROJECT,
            name="/".join([run.name, *folder.relative_to(run).parts]),
            group=run.name,
            config=to_values(config),
            dir=str(folder),
            id=before[-1].name.rpartition("-")[2] if before else None,
            resume="allow",
            settings=wandb.Settings(console="off"),  # it would take the place of stdout
        )
        try:
            self.tracker.start()
        except wandb.errors.Error as error:
            raise ConfigError(f"tracker: Weights & Biases could not begin: {error}") from error

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Send numbers and pictures."""
        pictures = {key: [value.image] for key, value in key_values.items() if isinstance(value, Image)}
        numbers = {key: value for key, value in key_values.items() if key not in pictures}
        if numbers:
            self.tracker.log(numbers, step)
        if pictures:
            self.tracker.log_images(pictures, step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self.tracker.finish()
