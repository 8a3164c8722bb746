"""What ``tats bench`` measures, and at which sizes: its schema, and options on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from experiments.config import parse, parse_config
from experiments.refusals import ConfigError
from experiments.schema import AgentConfig, RunConfig
from experiments.section import Section, check_divides, check_text
from experiments.yaml_files import packaged_configs, read_yaml, set_options

_NEEDED = {
    "mae.init": None,
    "mae.frozen": False,
    "mae.update_every": 1,
    "agent.n_steps": 1,
    "agent.update_every": 1,
    "rounds": 1,
    "micro_batch_size": None,
}
"""What a run must have for its step to be told apart into parts."""


class AttentionConfig(Section):
    """Trajectory attention on its own, over the tokens of the run's clips."""

    width: PositiveInt = 768
    """Channels."""
    num_heads: PositiveInt = 12
    """Heads."""
    clips: PositiveInt = 16
    """Clips in a step."""


class ClipSizeConfig(Section):
    """A clip's size; how it is cut into tokens, the run says."""

    num_frames: PositiveInt = 16
    """Frames in a clip."""
    size: PositiveInt = 224
    """Height and width, in pixels."""


class GrowthConfig(Section):
    """Sizes at which time and memory are measured, one varied at a time."""

    batches: list[PositiveInt] = Field(default=[16, 32, 64, 128, 256])
    """Clips in a step."""
    batch_size: PositiveInt = 16
    """Clips in a step while tokens or the model vary."""
    clips: list[ClipSizeConfig] = Field(default=[])
    """Sizes of clips, for the growth with tokens."""
    models: list[Literal["tiny", "small", "base", "large"]] = Field(default=[])
    """Sizes of the MAE."""


class FeedConfig(Section):
    """Decoding of video files, made for it, that feeds the joint step."""

    repeats: PositiveInt = 4
    """Clips of a batch that share one decoded video."""
    key_frame_every: PositiveInt = 12
    """Frames from one key frame of a file to the next, where decoding can begin."""
    seconds: PositiveFloat = 10.0
    """For which the loader alone and the step that it feeds are measured, each."""


class BenchConfig(Section):
    """Time a training step, its parts and what they are measured against, side by side in one process."""

    name: str = "bench"
    """What the folder is called."""
    out: str = "runs"
    """Folder in which that folder is made, or found again."""
    minutes: NonNegativeFloat | None = None
    """No row is started later than that; the same command goes on with what is left. None measures all."""
    warmup: PositiveInt = 3
    """Repetitions before the timed ones."""
    repeats: PositiveInt = 20
    """Timed repetitions."""
    batches: list[PositiveInt] = Field(default=[64, 256], min_length=1)
    """Clips in a step, for the step and its parts."""
    decode_ratio: PositiveFloat = 0.5
    """Share of the hidden tokens that is decoded in the row that decodes some."""
    matrix: PositiveInt = 8192
    """Rows and columns of the matrix product that is the ceiling of operations."""
    copy_mib: PositiveInt = 1024
    """Size of the copy that is the ceiling of bytes."""
    attention: AttentionConfig = AttentionConfig()
    mask_ratios: list[float] = Field(default=[])
    """At which memory is measured, at the first batch."""
    feed: FeedConfig | None = None
    """Files that feed the step, at the first batch; None leaves it out."""
    growth: GrowthConfig = GrowthConfig()
    predict: str | None = None
    """Another such file, whose steps' times on an H100 are predicted from their operations and bytes."""
    run: dict[str, Any] = Field(default={})
    """MAE, sampler and clips, as in a run's own configuration."""

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        return check_text("name", value)

    def base(self, source: str) -> RunConfig:
        """The run whose step is measured, at the first batch.

        Raises:
            ConfigError: if it can't be run, or its step can't be told apart into parts.
        """
        where = f"{source}: run"
        if given := [key for key in ("name", "out", "batch_size") if key in self.run]:
            raise ConfigError(f"{where}.{given[0]}: the bench itself says this; leave it out")
        run = parse_config({**self.run, "name": self.name, "out": self.out, "batch_size": self.batches[0]}, where)
        if not isinstance(run.agent, AgentConfig):
            raise ConfigError(f"{where}.agent.class: {run.agent.class_!r} is given; the parts timed are those of ppo")
        for key, right in _NEEDED.items():
            section, _, name = key.rpartition(".")
            if (value := getattr(getattr(run, section) if section else run, name)) != right:
                raise ConfigError(f"{where}.{key}: {value} is given; the parts of a step can be told apart at {right}")
        if self.feed is not None:
            try:
                check_divides(run.batch_size, self.feed.repeats, "the first of batches")
            except ValueError as error:
                raise ConfigError(f"{source}: feed.repeats: {error}") from None
        for clip in self.growth.clips:
            try:
                check_divides(clip.num_frames, run.clip.tubelet_size, "num_frames")
                check_divides(clip.size, run.clip.patch_size, "size")
            except ValueError as error:
                raise ConfigError(f"{source}: growth.clips: {error}") from None
        return run


def load_bench(path_or_name: str, overrides: Sequence[str] = ()) -> tuple[BenchConfig, RunConfig]:
    """A bench from YAML with options on top, such as ``--run.clip.size 64``, and the run it measures.

    Raises:
        ConfigError: one line for each problem found.
    """
    values = read_yaml(path_or_name, "bench")
    if isinstance(values, dict):
        set_options(values, overrides)
    config = parse(BenchConfig, values, path_or_name)
    return config, config.base(path_or_name)


def bench_usage() -> str:
    """What ``tats bench --help`` prints."""
    lines = [
        "usage: tats bench BENCH [--profile] [--KEY VALUE ...]",
        f"\n{BenchConfig.__doc__}\n",
        f"BENCH is a YAML file or one that comes with the package: {', '.join(packaged_configs('bench'))}.",
        "Rows that are measured are not measured again, so the same command goes on where the last one stopped.\n",
        "  --profile        only write a trace of a few joint steps, and print the costliest operations",
    ]
    for name, field in BenchConfig.model_fields.items():
        lines.append(f"  --{name.replace('_', '-') + ' ...':14} {field.description or field.annotation.__doc__}")
    lines.append("\nValues are YAML, and paths go deeper: --batches 16 32 --run.compile true --growth.models '[small]'")
    return "\n".join(lines)
