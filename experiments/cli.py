"""The command ``tats``: a table of verbs. What a verb needs is imported when it starts."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.config import load_config, override_config
from experiments.distributed import check_shares, num_started, said_once
from experiments.grid import compare_usage, load_grid
from experiments.refusals import ConfigError
from experiments.resume import is_finished, resumed, split_resume
from experiments.schema import RunConfig
from experiments.yaml_files import packaged_configs

_HELP = ("-h", "--help")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""What a disk that is full or read-only answers."""


class Verb(NamedTuple):
    """One thing that ``tats`` does."""

    summary: str
    example: str
    main: Callable[[Sequence[str]], int]
    """Takes what follows the verb on the command line, returns the exit code."""


def _run(args: Sequence[str]) -> int:
    with said_once():
        config, dry, folder = _run_config(args)
        if folder is not None and is_finished(folder):
            print(f"{folder}: this run is finished; summary.json there holds its results")
            return 0
        check_shares(config, num_started(), dry)
    if dry:
        from experiments.dry_run import dry_run

        return dry_run(config)
    from experiments.run import run

    return run(config, folder)


def _run_config(args: Sequence[str]) -> tuple[RunConfig, bool, Path | None]:
    """What to run, whether in miniature only, and the folder of the run to go on with."""
    if args and args[0] in _HELP:
        override_config(RunConfig(), ["--help"], prog="tats run CONFIG")
    if not args or args[0].startswith("-"):
        raise ConfigError(
            "tats run: a configuration comes first, then options: tats run CONFIG [--steps 100 ...]\n"
            f"CONFIG is a YAML file or one that comes with the package: {', '.join(packaged_configs())}\n"
            "With --dry-run it says what the run would take, and makes two steps of it at a small size\n"
            "With --resume [RUN] it goes on with a run's folder, by default the newest of that name, or begins one"
        )
    options, resume, run = split_resume(args[1:])
    dry, options = "--dry-run" in options, [arg for arg in options if arg != "--dry-run"]
    config = load_config(args[0], options, prog=f"tats run {args[0]}")
    if not resume:
        return config, dry, None
    if dry:
        raise ConfigError("--resume: --dry-run goes on with nothing; give one of the two")
    folder, config = resumed(config, options, run, prog=f"tats run {args[0]}")
    return config, dry, folder


def _compare(args: Sequence[str]) -> int:
    if not args or args[0] in _HELP or args[0].startswith("-"):
        usage = compare_usage()
        if args and args[0] in _HELP:
            print(usage)
            return 0
        raise ConfigError(f"tats compare: a grid comes first, then options\n{usage}")
    grid, minutes = load_grid(args[0], args[1:])
    from experiments.compare import compare

    return compare(grid, minutes)


def _trained(verb: str, args: Sequence[str]) -> int:
    if not args or args[0].startswith("-"):
        say = f"usage: tats {verb} RUN [--KEY VALUE ...]\nRUN is a run's folder, or a configuration with mae.init"
        if args and args[0] in _HELP:
            override_config(RunConfig(), ["--help"], prog=f"tats {verb} RUN")
        raise ConfigError(say)
    from experiments.trained import evaluate_trained

    return evaluate_trained(verb, args)


def _bench(args: Sequence[str]) -> int:
    from experiments.bench_schema import bench_usage, load_bench

    if not args or args[0].startswith("-"):
        if args and args[0] in _HELP:
            print(bench_usage())
            return 0
        raise ConfigError(f"tats bench: a bench comes first, then options\n{bench_usage()}")
    options = [arg for arg in args[1:] if arg != "--profile"]
    config, run = load_bench(args[0], options)
    from experiments.bench import bench

    return bench(config, run, f"tats bench {shlex.join(args)}", len(options) < len(args) - 1)


def _report(args: Sequence[str]) -> int:
    from experiments.report import report

    return report(args)


def _export(args: Sequence[str]) -> int:
    from experiments.export import export

    return export(args)


def _data(args: Sequence[str]) -> int:
    from experiments.data import data

    return data(args)


VERBS = {
    "run": Verb("train the MAE and the token sampler together, then evaluate", "tats run quickstart --steps 100", _run),
    "compare": Verb(
        "run a grid of agents, mask ratios and seeds, and compare", "tats compare compare_quick --minutes 9", _compare
    ),
    "probe": Verb(
        "classify with a run's frozen encoder: linear, attentive, k-NN",
        "tats probe runs/quickstart --evaluate.data motion scenes",
        partial(_trained, "probe"),
    ),
    "finetune": Verb(
        "fine-tune a run's encoder into a classifier",
        "tats finetune runs/quickstart --finetune.epochs 10",
        partial(_trained, "finetune"),
    ),
    "report": Verb(
        "write a run's report.html anew, or one that compares several", "tats report runs/quickstart", _report
    ),
    "export": Verb(
        "write what a run trained for other tools: transformers, onnxruntime, agents.load",
        "tats export runs/quickstart --format policy",
        _export,
    ),
    "bench": Verb(
        "time a training step, its parts and what they are measured against", "tats bench bench_cpu --minutes 2", _bench
    ),
    "data": Verb("look into a data set before a run does", "tats data check 'ucf101:/root?split=1'", _data),
}


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    examples = "\n".join(f"  {verb.example}" for verb in VERBS.values())
    return (
        "usage: tats VERB ...    (tats VERB --help says more, tats --version which release this is)\n\n"
        f"verbs:\n{verbs}\n\nexample:\n{examples}"
    )


def _is_ours(error: ValueError) -> bool:
    # By name, since the data code is too heavy to import for this.
    return isinstance(error, ConfigError) or any(kind.__name__ == "DataError" for kind in type(error).__mro__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 2 for what the user can mend, 130 when interrupted.

    Raises:
        SystemExit: by tyro, after ``--help`` or an option that is unknown or can't be read.
    """
    verb, *args = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in _HELP:
        print(_usage())
        return 0
    if verb == "--version":
        from tats_env import __version__

        print(f"tats-env {__version__}")
        return 0
    if verb not in VERBS:
        near = "".join(f"; did you mean tats {name}?" for name in get_close_matches(verb, VERBS, n=1))
        print(f"tats: {verb}: unknown verb; there are {', '.join(VERBS)}{near}", file=sys.stderr)
        return 2
    # Last, so that a module of one's own can be named in a configuration but can't take another's place.
    sys.path.append(os.getcwd())
    try:
        if verb != "run" and num_started() > 1:
            with said_once():
                raise ConfigError(f"tats {verb}: is done by one process; start it without torchrun")
        return VERBS[verb].main(args)
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"{error.filename or 'a file of the run'}: can't be written: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
