"""``tats run X --dry-run``: what X takes at full size, and two steps of it at a size that takes seconds."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.config import parse_config, to_values
from experiments.estimate import estimate
from experiments.run import run
from experiments.schema import OtherAgentConfig, RunConfig
from experiments.section import RENDERED_SETS
from tats_env.data.miniature import MINIATURES

CLASSES, PER_CLASS = 3, 4
SIZE, PATCH_SIZE = 32, 8


def dry_run(config: RunConfig) -> int:
    """Print parameters, tokens, memory and time of a run, then carry it out in miniature; returns the exit code.

    The miniature has the run's data set in its own layout, its sampling, augmentation, credit and tasks, and differs
    in all that takes long: tiny networks, clips of 32 pixels, twelve made-up videos, two steps. It leaves nothing.
    """
    console = Console()
    console.print(_table(config))
    with tempfile.TemporaryDirectory(prefix="tats-dry-run-") as folder:
        console.print("\nIn miniature:")
        logging.getLogger("tats_env.data").setLevel(logging.ERROR)  # of twelve videos nobody misses any
        return run(miniature(config, Path(folder)))


def _table(config: RunConfig) -> Table:
    found = estimate(config)
    table = Table("at full size", "", title=config.name)
    table.columns[1].justify = "right"
    clips = config.steps * config.batch_size
    for name, value in (
        ("encoder", f"{found.encoder_parameters / 1e6:.1f} M parameters"),
        ("decoder", f"{found.decoder_parameters / 1e6:.1f} M parameters"),
        ("sampler", f"{found.sampler_parameters / 1e6:.2f} M parameters" if found.sampler_parameters else "-"),
        ("tokens of a clip, visible", f"{found.num_tokens}, {found.num_visible}"),
        ("a training step", f"{config.batch_size} clips, {found.flops_per_clip / 1e9:.0f} GFLOP each"),
        ("pre-training", f"{config.steps:,} steps, {clips / 1e6:.1f} M clips"),
        ("its memory on the device, about", f"{found.memory_bytes / 2**30:.1f} GiB"),
        ("its time on one H100, about", f"{found.seconds / 3600:.1f} h, if decoding keeps up"),
        ("fine-tuning there, about", f"{found.finetune_clips_a_second:.0f} clips/s"),
    ):
        table.add_row(name, value)
    return table


def miniature(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration at reduced size, with its data made in ``folder``."""
    kind = config.data.partition(":")[0]
    count = CLASSES * PER_CLASS
    data = config.data if kind in RENDERED_SETS else MINIATURES[kind](folder / "data", PER_CLASS, CLASSES)
    values = to_values(config)
    tokens = config.clip.num_frames // config.clip.tubelet_size * (SIZE // PATCH_SIZE) ** 2
    # As many rounds as there may be of few tokens, and as many tokens in each
    rounds = min(config.rounds, 2)
    visible = max(1, int(tokens * (1 - config.mask_ratio) / rounds)) * rounds
    repeats, epochs = config.loader.repeats, config.finetune.repeats
    rollout = 1 if isinstance(config.agent, OtherAgentConfig) else config.agent.n_steps * config.agent.n_minibatches
    changes: dict[str, Any] = {
        "data": data, "num_videos": count, "batch_size": 2 * repeats * rollout, "steps": 2 * rollout,
        "out": str(folder), "log_interval": 1, "device": "cpu", "compile": False,
        "micro_batch_size": None, "rounds": rounds, "mask_ratio": 1 - visible / tokens,
        "clip": {"size": SIZE, "patch_size": PATCH_SIZE},
        "loader": {"workers": 0, "cache": None},
        "mae": {"size": "tiny", "init": None, "base_learning_rate": None, "learning_rate": None, "warmup_steps": 1},
        "probe": {"epochs": 1, "restarts": 1},
        "finetune": {"epochs": 1, "warmup_epochs": 0, "batch_size": 2 * epochs, "repeats": epochs},
        "evaluate": {"num_videos": count, "clips": 8, "baseline": False, "data": []},
    }  # fmt: skip
    if not isinstance(config.agent, OtherAgentConfig):
        changes["agent"] = {"width": 16, "num_heads": 2, "entropy_floor": None}
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return parse_config(values, "dry run")
