"""One progress display for a run, and the same numbers as lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.logger import KVWriter

from agents.hooks import Hook

SHOWN = {
    "rollout/ep_rew_mean": "reward {:.3f}",
    "mae/loss": "MAE loss {:.3f}",
    "mask/random_mask_error": "random-mask {:.3f}",
    "mask/motion_lift": "lift {:.2f}",
    "time/fps": "{:.0f} clips/s",
    "time/data_wait": "data wait {:.0%}",
    "finetune/loss": "loss {:.3f}",
}
LINES = 10
"""Lines printed for a run where there is no terminal to draw a bar on."""


class RunProgress(KVWriter, Hook):
    """A bar with time remaining: a hook that counts steps, and a writer that shows what is logged beside it.

    Args:
        console: where to draw.
        total_steps: over all samplers that the run trains.
    """

    def __init__(self, console: Console, total_steps: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.console, self.total_steps = console, total_steps
        self.task = self.progress.add_task("", total=total_steps, numbers="")
        self.steps_to_line = 0

    def start(self, name: str) -> None:
        """Show the bar, for the sampler of that name."""
        self.name = name
        self.progress.update(self.task, description=name)
        self.progress.start()

    def skip(self, steps: int) -> None:
        """Count steps that were done before, whose time says nothing about those to come."""
        done = self.progress.tasks[0].completed + steps
        self.progress.reset(self.task, completed=int(done), start=self.progress.live.is_started)

    def on_step(self, agent: Any) -> None:
        """Count a step."""
        self.steps_to_line -= 1
        self.progress.advance(self.task)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Show what was logged."""
        numbers = "  ".join(text.format(key_values[key]) for key, text in SHOWN.items() if key in key_values)
        self.progress.update(self.task, numbers=numbers)
        if not self.console.is_terminal and self.steps_to_line <= 0:
            self.steps_to_line = self.total_steps // LINES
            done = self.progress.tasks[0].completed
            left = self.progress.tasks[0].time_remaining
            self.console.print(
                f"{self.name}: step {done:.0f} of {self.total_steps}, "
                f"{'?' if left is None else round(left)} s left: {numbers}",
                soft_wrap=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        self.progress.stop()
