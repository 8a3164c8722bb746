"""``tats probe`` and ``tats finetune``: what the encoder of a finished run, or one from elsewhere, is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.build import agent_maker, load_mae, masking_env, new_learner
from experiments.config import dump_config, load_config
from experiments.deterministic import make_deterministic
from experiments.downstream import downstream, downstream_table
from experiments.folder import hold, new_folder
from experiments.probes import PROBES
from experiments.refusals import ConfigError
from experiments.schema import RunConfig
from experiments.videos import Videos
from tats_env.data import write_bad_videos
from tats_env.mae import MAELearner

MAE_FILE = "mae.safetensors"


def evaluate_trained(verb: str, args: Sequence[str]) -> int:
    """Carry out ``probe`` or ``finetune`` for a run's folder or a configuration; returns the exit code.

    Args:
        verb: which of the two.
        args: the folder of a run or of an earlier call, or a YAML file with ``mae.init``; then options as of ``tats
            run``.
    """
    console = Console()
    given = Path(args[0])
    trained = (given / MAE_FILE).is_file()
    # The run under random masks that a run may hold has its configuration
    home = given if (given / "config.yaml").is_file() or not trained else given.parent
    stored = home / "config.yaml"
    config = load_config(str(stored) if stored.is_file() else args[0], args[1:], prog=f"tats {verb} {args[0]}")
    if config.deterministic:
        make_deterministic()
    if trained:
        if any(arg.partition("=")[0] == "--mae.init" for arg in args):
            raise ConfigError(f"--mae.init: {given} has an MAE of its own; give a configuration in its place")
        folder, mae = given, load_mae(given / MAE_FILE, config, str(given), device=config.device)
    else:
        mae = new_learner(config)
        # The folder of an earlier call, which is gone on with, or a new one
        folder = given if stored.is_file() else new_folder(Path(config.out), f"{config.name}-{verb}")
        if not stored.is_file():
            (folder / "config.yaml").write_text(dump_config(config))
    with hold(folder):
        videos = Videos(config)
        chosen = verb == "finetune" and config.finetune.sampler == "policy"
        agent = _agent(config, folder, mae, videos) if chosen else None
        tasks = list(PROBES) if verb == "probe" else ["finetune"]
        found = downstream(config, tasks, mae, agent, videos, folder, console)
        write_bad_videos(folder, *videos.opened())
    if not any(found.values()):
        raise ConfigError(f"data: {', '.join(found)}: there are not two classes to tell apart")
    origin = str(given) if trained else config.mae.init or f"{args[0]}, from scratch"
    console.print(downstream_table(found, f"{verb}: {origin}"))
    console.print(f"Written to {folder / 'downstream'}", soft_wrap=True)
    return 0


def _agent(config: RunConfig, folder: Path, mae: MAELearner, videos: Videos) -> Any:
    """The sampler that the run trained, on the MAE's device."""
    make, _ = agent_maker(config.agent, config)
    path = folder / f"policy{getattr(make, 'suffix', '')}"
    if not path.exists():
        raise ConfigError(f"finetune.sampler: policy needs a run's folder with its sampler; {path} is not there")
    test_set = videos((config.evaluate.data or [config.data])[0], "validation")
    return make.load(path, masking_env(config, test_set, mae, 1, getattr(make, "observation", "tokens")))
