"""Checkpoints of a run in training: there as a whole or not at all, checked when read, and running no code then."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from rich.console import Console
from stable_baselines3.common.logger import CSVOutputFormat, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from agents.hooks import Hook, LogHook
from tats_env.processes import average, gathered, num_processes

FORMAT = "tats-env checkpoint 2"
FOLDER = "checkpoints"
KEPT = 2
"""Checkpoints of a sampler's training: should the newest be damaged, there is the one before."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of who obeys SIGTERM, as shells have it."""


class DamagedCheckpoint(ValueError):
    """A file that is not what was written once."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to stand under ``path``: it comes there as a whole and stays, or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # which Python does not say of a write
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write a checkpoint into the folder; of those before it one is kept.

    Args:
        state: tensors, numbers and strings in dicts, lists and tuples.

    Raises:
        OSError: if it can't be written; those that are there stay as they are.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, **state}, content)
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09}.pt"
    with whole(path.with_suffix(".sha256")) as partial:  # first, for it says nothing on its own
        partial.write_text(f"{hashlib.sha256(content.getbuffer()).hexdigest()}  {path.name}\n")
    with whole(path) as partial:
        partial.write_bytes(content.getbuffer())
    # What lies beyond this step was damaged, or it would have been gone on from
    kept = [other.stem for other in _newest_first(folder) if other.name <= path.name][:KEPT]
    for other in folder.iterdir():
        if other.name.partition(".")[0] not in kept:
            other.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``write_checkpoint`` was given, on the CPU.

    Raises:
        DamagedCheckpoint: if that is not what the file holds.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        expected = path.with_suffix(".sha256").read_text().partition(" ")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path} or its checksum can't be read: {error}") from error
    if digest.hexdigest() != expected:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is not the one in {path.stem}.sha256")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and torch's words recommend to run what is in there
        raise DamagedCheckpoint(f"{path} holds more than tensors, numbers and text, and was not loaded") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of format {FORMAT!r}")
    return state


def newest_checkpoint(folder: Path, console: Console) -> dict[str, Any] | None:
    """The newest checkpoint in a folder that is not damaged, if there is one; tells of those that are."""
    for path in _newest_first(folder):
        try:
            return read_checkpoint(path)
        except DamagedCheckpoint as error:
            console.print(f"{error}; the one before it counts, if there is one", style="yellow", soft_wrap=True)
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


class Metrics(CSVOutputFormat):
    """stable-baselines3's CSV, which can go on from a table that there was."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def state(self) -> str:
        """The table so far, which ``restore`` takes."""
        return self.path.read_text()

    def restore(self, state: str) -> None:
        """Go on from that table."""
        self.file.write(state)
        self.file.flush()
        self.keys = state.partition("\n")[0].split(self.separator)


class Curves(TensorBoardOutputFormat):
    """stable-baselines3's TensorBoard curves, which go on after a step: what earlier files have beyond it is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        # Ctrl-C in the midst of a write can keep its thread from hearing that it is to end, until it next looks up
        self.writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=3)
        self._is_closed = False


class Termination:
    """SIGTERM, which a cluster sends before it takes a machine away.

    Attributes:
        asked: whether it came.
        waits: whether it is left to the next checkpoint; otherwise the process ends at once, and in order.
    """

    def __init__(self) -> None:
        self.asked = self.waits = False

    def __enter__(self) -> Termination:
        self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        # Torchrun sends one to those who are still leaving when the first has left
        leaves = self.asked and num_processes() > 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN if leaves else self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.waits:
            raise SystemExit(TERMINATED)


class _Part(Protocol):
    """What a checkpoint holds the state of."""

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Checkpoints(Hook):
    """Writes checkpoints of a sampler's training, right after log lines: nothing waits to be logged then.

    All processes have this hook. A state is the same in each of them, but for what one found out about broken videos,
    of which the writer's is kept; so one can write it, and any number go on from it. But SIGTERM, which may not reach
    all of them, is something to agree upon.

    Args:
        folder: of the checkpoints.
        parts: what they hold the state of, by name, in the order in which it is restored.
        log: what writes the lines.
        minutes: from one checkpoint to the next, at least.
        termination: asked after each line.
        console: where to tell of it.
        writes: whether this process does.
    """

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, _Part],
        log: LogHook,
        minutes: float,
        termination: Termination,
        console: Console,
        writes: bool,
    ) -> None:
        self.folder, self.parts, self.log, self.minutes = folder, parts, log, minutes
        self.termination, self.console, self.writes = termination, console, writes
        self.last = time.perf_counter()

    def around(self, *updates: Hook) -> list[Hook]:
        """What to hang into the loop: these hooks that update the MAE, the log, and this one."""
        return [_Remember(self.log), *updates, self.log, self]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to where a checkpoint was written."""
        for name, part in self.parts.items():
            if name in state:  # pictures may be asked for only now
                part.restore(state[name])

    def on_update_end(self, agent: Any) -> None:
        """Write a checkpoint, if a line was just written and it is time.

        Raises:
            SystemExit: with ``TERMINATED``, after SIGTERM.
        """
        task = agent.env.unwrapped.task
        if self.log.steps or task.shown.shape[1]:
            return
        asked = torch.tensor(float(self.termination.asked), device=task.device)
        if num_processes() > 1:
            average(asked)
        terminates = self.termination.asked = bool(asked > 0)
        if self.writes and (terminates or time.perf_counter() - self.last >= 60 * self.minutes):
            self.write(agent.num_timesteps * num_processes())
        if terminates:
            if num_processes() > 1:
                average(asked)  # who left before the checkpoint is written would have torchrun end its writer
            self.console.print("SIGTERM: stopped; tats run with --resume goes on", soft_wrap=True)
            raise SystemExit(TERMINATED)

    def write(self, step: int) -> None:
        """Write one, or say why not: that is no reason to end a run."""
        try:
            write_checkpoint(self.folder, step, {name: part.state() for name, part in self.parts.items()})
        except OSError as error:
            self.console.print(
                f"No checkpoint could be written to {self.folder} ({error.strerror}); the one before is kept, and the "
                "run goes on",
                style="yellow", soft_wrap=True,
            )  # fmt: skip
        self.last = time.perf_counter()


class _Remember(Hook):
    """Before an update of the MAE and a log line, keeps what the present observation was made with."""

    def __init__(self, log: LogHook) -> None:
        self.log = log

    def on_step(self, agent: Any) -> None:
        if self.log.steps + 1 >= self.log.every:
            agent.env.unwrapped.task.remember()


def check_alike(step: int, device: torch.device) -> None:
    """Raise RuntimeError unless all processes go on from the same step."""
    steps = gathered(torch.tensor([step], device=device)).tolist()
    if len(set(steps)) > 1:
        raise RuntimeError(f"the processes found checkpoints of different steps, {steps}: do they see the same folder?")
