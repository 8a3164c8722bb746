"""Several processes that make one run: started by torchrun, brought together by accelerate.

All of them train; process 0 alone writes, tells and evaluates. A run of one process starts nothing of this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from experiments.config import parse_config, to_values
from experiments.refusals import ConfigError
from experiments.schema import RunConfig

TIMEOUT = timedelta(hours=1)
"""For which processes wait for one another: opening a large set of videos for the first time takes long."""
_T = TypeVar("_T")


def num_started() -> int:
    """How many processes torchrun started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_started_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def said_once(rank: str = "RANK") -> Iterator[None]:
    """For what all processes find alike, such as a mistake in the configuration: process 0 alone tells of it.

    Args:
        rank: the variable by which torchrun tells a process which it is; with LOCAL_RANK one on each machine tells.
    """
    if num_started() == 1 or os.environ[rank] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except ConfigError:
            sys.exit(2)


def check_shares(config: RunConfig, count: int, dry: bool = False) -> None:
    """Refuse what that many processes can't share.

    Args:
        dry: whether it is to be done in miniature only.

    Raises:
        ConfigError: with what they could.
    """
    if count == 1:
        return
    if dry:
        raise ConfigError("--dry-run: is done by one process; start it without torchrun")
    if config.agent.class_.startswith("sb3:"):
        raise ConfigError(
            f"agent.class: {config.agent.class_} learns in one process only, and there are {count}; give one of ours, "
            "or start it without torchrun"
        )
    if ":" in config.device:
        raise ConfigError(f"device: {config.device} is one GPU for {count} processes; give cuda, for one each")
    share, rest = divmod(config.batch_size, count)
    if rest:
        unit = count * config.loader.repeats
        below = config.batch_size // unit * unit
        nearest = " or ".join(str(size) for size in (below, below + unit) if size)
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {count} processes; give {nearest}")
    parse_config(to_values(config) | {"batch_size": share}, f"batch_size / {count} processes = {share}")


def join(config: RunConfig) -> str:
    """Meet the processes that torchrun started, if there are several; returns this one's device.

    That is a GPU of its own, with NCCL between them, or the CPU, with gloo.

    Raises:
        ConfigError: if there is no such device, or there are fewer GPUs than processes.
    """
    if num_started() == 1:
        return config.device
    import torch

    from tats_env.mae.learner import resolve_device

    with said_once("LOCAL_RANK"):
        try:
            cpu = resolve_device(config.device).type == "cpu"
        except ValueError as error:
            raise ConfigError(f"device: {error}") from error
        here, there_are = num_started_here(), torch.cuda.device_count()
        if not cpu and here > there_are:
            raise ConfigError(
                f"device: {here} processes were started where torch sees {there_are} GPUs; start one for each GPU, or "
                "give cpu"
            )
    from accelerate import PartialState

    state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=TIMEOUT)
    return "cpu" if cpu else str(state.device)


def first_then_others(make: Callable[[Any], _T], tell: Callable[[_T], Any]) -> _T:
    """What each process makes, process 0 first; should that fail, the others end with it.

    Args:
        make: in process 0 from None, in the others from what was told.
        tell: what the others need to know of what process 0 made.
    """
    from torch.distributed import broadcast_object_list

    from tats_env.processes import num_processes, process_index

    if num_processes() == 1:
        return make(None)
    told: list[Any] = [None]
    if process_index():
        broadcast_object_list(told)
        return make(told[0]) if told[0] is not None else sys.exit(2)
    try:
        made = make(None)
        told = [tell(made)]
    finally:
        broadcast_object_list(told)
    return made


def part(x: _T) -> list[_T]:
    """What each process has, in their order; and the end of what they do together."""
    from torch import distributed

    from tats_env.processes import num_processes

    if num_processes() == 1:
        return [x]
    every: list[Any] = [None] * num_processes()
    distributed.all_gather_object(every, x)
    distributed.destroy_process_group()
    return every


@contextlib.contextmanager
def led_by_first() -> Iterator[None]:
    """Ctrl-C is for process 0 to act upon, and reaches all: the others go on until it has gone, and then end as well.

    So it is not kept waiting by them, and can save what there is.
    """
    from tats_env.processes import process_index

    if not process_index():
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    except RuntimeError:  # of a collective that process 0 does not take part in any more
        if not pressed:
            raise
        sys.exit(130)
