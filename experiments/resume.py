"""``tats run --resume``: which run to go on with, and what of its configuration may be different now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.config import load_config, override_config, to_values
from experiments.folder import stored
from experiments.refusals import ConfigError, items
from experiments.schema import RunConfig

FREE = (
    "device", "tracker", "out", "log_interval", "checkpoint_minutes", "compile", "micro_batch_size",
    "mae.checkpointing",
    "loader.decoder", "loader.workers", "loader.cache", "loader.cache_gb", "evaluate.num_videos", "evaluate.clips",
    "evaluate.tasks", "evaluate.data", "evaluate.pictures",
)  # fmt: skip
"""What trains on as before, but for rounding."""
FREE_SECTIONS = ("probe.", "finetune.", "guards.")
"""Of what comes after training, or only looks on."""


def split_resume(args: Sequence[str]) -> tuple[list[str], bool, str | None]:
    """The other options of ``tats run``, whether there is ``--resume``, and the run that it names."""
    rest: list[str] = []
    resume, run = False, None
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option == "--resume":
            resume, run = True, value or run
        elif i and args[i - 1] == "--resume" and not arg.startswith("-"):
            run = arg
        else:
            rest.append(arg)
    return rest, resume, run


def resumed(config: RunConfig, options: Sequence[str], run: str | None, prog: str) -> tuple[Path | None, RunConfig]:
    """The folder to go on with and what counts there; None and ``config`` where there is no such run yet.

    Args:
        config: says what the run is called and where its folder is.
        options: of the command line, which go on top of the folder's own configuration.
        run: that folder, if it was named.
        prog: as of ``load_config``.

    Raises:
        ConfigError: if that is no run's folder, or an option changes how the run would go on.
    """
    folder = _newest(Path(config.out), config.name) if run is None else Path(run)
    if folder is None:
        return None, config
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume: {folder} is not the folder of a run: it holds no config.yaml")
    stored = load_config(str(folder / "config.yaml"))
    wanted = override_config(stored, options, prog) if options else stored
    before, now = (dict(items(to_values(x))) for x in (stored, wanted))
    for key in [*before, *now]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) or old == new or key in FREE or key.startswith(FREE_SECTIONS):
            continue
        raise ConfigError(
            f"--resume: {key} is {new!r} here, but the run in {folder} was started with {old!r} and goes on as it "
            "was; leave the option out, or start another run, without --resume"
        )
    return folder, wanted


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    summary = stored(folder / "summary.json")
    return bool(summary) and "interrupted" not in summary


def _newest(out: Path, name: str) -> Path | None:
    """The folder in ``out`` of the run of that name that was started last."""
    found: list[tuple[int, Path]] = []
    for path in out.glob(f"{name}*/config.yaml"):
        number = path.parent.name.removeprefix(name)
        if not number or (number[0] == "-" and number[1:].isdecimal()):
            found.append((int(number[1:] or 1), path.parent))
    return max(found)[1] if found else None
