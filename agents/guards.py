"""Warnings that training goes wrong, each with what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger("agents")


@dataclass(frozen=True)
class Thresholds:
    """From when on a guard warns; None switches it off."""

    skipped: float | None = 0.1
    """Share of updates, of the MAE or of the agent, that were skipped since a loss or gradient was not finite."""
    approx_kl: float | None = 0.2
    """KL divergence of the policy in an update from the one that drew."""
    effective_tokens: float | None = 1.0
    """exp(entropy of a draw) as a multiple of K, or of N - K if that is less: below, draws are all but fixed."""
    explained_variance: float | None = 0.02
    """Share of the return's variance that the value function explains: below, it is dead."""
    reward_scale: float | None = 3.0
    """Factor, either way, between the reward's size and the running deviation in units of which it is learnt from."""


LINES = {"skipped": 1, "approx_kl": 1, "effective_tokens": 3, "explained_variance": 20, "reward_scale": 1}
"""Lines of metrics in a row for which a guard has to see trouble; a value function takes long to learn."""


class Sight(NamedTuple):
    """What one guard sees in a line of metrics."""

    guard: str
    bad: bool
    words: str
    """What is wrong, and what to do."""


class Guards:
    """Looks at each line that ``LogHook`` writes, and warns once whenever trouble lasts.

    A warning is logged, and written to a file. In the line itself ``guard/NAME`` is 1 for as long as the trouble lasts.
    A guard is there where its metric is: of an agent without a value function none is watched.

    Args:
        thresholds: of each guard.
        path: of the file, with a line ``step, guard, message`` a warning, separated by tabs; None writes none.

    Attributes:
        warnings: (step, guard, message) so far.
    """

    def __init__(self, thresholds: Thresholds | None = None, path: Path | None = None) -> None:
        self.thresholds, self.path = thresholds or Thresholds(), path
        self.warnings: list[tuple[int, str, str]] = []
        self._lines: dict[str, int] = {}
        self._before: dict[str, float] = {}
        self._write()  # or warnings of a run that was killed, and begins anew, would stay

    def look(self, agent: Any, values: Mapping[str, float], step: int) -> dict[str, float]:
        """What the guards add to a line.

        Args:
            agent: whose line it is.
            values: the line.
            step: clips so far.
        """
        columns = {}
        for guard, bad, words in self._sights(agent, values):
            lines = self._lines[guard] = self._lines.get(guard, 0) + 1 if bad else 0
            if lines == LINES[guard]:
                self._warn(step, guard, words)
            columns[f"guard/{guard}"] = float(lines >= LINES[guard])
        return columns

    def _sights(self, agent: Any, values: Mapping[str, float]) -> Iterator[Sight]:
        limits = self.thresholds
        skipped = {who: self._skipped(who, values) for who in ("mae", "train") if f"{who}/skipped_updates" in values}
        if limits.skipped is not None and skipped:
            who = max(skipped, key=lambda name: skipped[name])
            name, remedy = {
                "mae": ("MAE", "lower mae.learning_rate, lengthen mae.warmup_steps, or look for broken clips"),
                "train": ("policy", "lower agent.learning_rate or agent.logit_cap, or set agent.target_kl"),
            }[who]
            words = (
                f"{skipped[who]:.0%} of the latest updates of the {name} were skipped, for loss or gradient was not "
                f"finite (guards.skipped = {limits.skipped}): {remedy}"
            )
            yield Sight("skipped", skipped[who] > limits.skipped, words)
        kl = values.get("train/approx_kl")
        if limits.approx_kl is not None and kl is not None:
            words = (
                f"the policy moves by a KL divergence of {kl:.3g} an update (guards.approx_kl = {limits.approx_kl}): "
                "lower agent.learning_rate or agent.n_epochs, or set agent.target_kl, to 0.05 say"
            )
            yield Sight("approx_kl", not kl <= limits.approx_kl, words)
        tokens = values.get("mask/effective_tokens")
        if limits.effective_tokens is not None and tokens is not None:
            task = agent.env.unwrapped.task
            # Where most tokens are picked, it is the others that a policy chooses
            bound = limits.effective_tokens * min(task.num_picks, task.grid.num_tokens - task.num_picks)
            remedy = (
                "raise agent.ent_coef or agent.explore, or set agent.entropy_floor"
                if hasattr(agent, "ent_coef")
                else "lower mae.learning_rate, which is the sampler's as well"
            )
            words = (
                f"the policy has narrowed to {tokens:.3g} effective tokens, less than the {bound:g} that "
                f"guards.effective_tokens = {limits.effective_tokens} allows: {remedy}"
            )
            yield Sight("effective_tokens", not tokens >= bound, words)
        explained = values.get("train/explained_variance")
        if limits.explained_variance is not None and explained is not None and getattr(agent, "uses_value", True):
            words = (
                f"the value function explains {explained:.2f} of the return's variance "
                f"(guards.explained_variance = {limits.explained_variance}) and is of no use: raise agent.vf_coef or "
                "agent.n_steps, or take a credit by token, which needs no value"
            )
            yield Sight("explained_variance", explained < limits.explained_variance, words)
        scale = values.get("train/reward_scale")
        if limits.reward_scale is not None and scale is not None:
            words = (
                f"the reward is {scale:.3g} times its running deviation (guards.reward_scale = {limits.reward_scale}), "
                "for it changes faster than what normalises it: lower mae.learning_rate, lengthen mae.warmup_steps, or "
                "take a credit by token, which is normalised clip by clip"
            )
            yield Sight("reward_scale", not 1 / limits.reward_scale <= scale <= limits.reward_scale, words)

    def _skipped(self, who: str, values: Mapping[str, float]) -> float:
        """Share of the updates since the last line that were skipped, of the MAE or the agent."""
        counts = {
            f"{who}/skipped": values[f"{who}/skipped_updates"],
            f"{who}/updates": values.get(f"{who}/n_updates", values["mae/n_updates"]),
        }
        skipped, updates = (now - self._before.get(name, 0.0) for name, now in counts.items())
        self._before |= counts
        return skipped / max(updates, 1.0)

    def _warn(self, step: int, guard: str, words: str) -> None:
        self.warnings.append((step, guard, words))
        _log.warning("after %d clips: %s", step, words)
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.warnings:
            self.path.write_text("".join(f"{step}\t{guard}\t{words}\n" for step, guard, words in self.warnings))
        elif self.path is not None:
            self.path.unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        """What was seen so far, which ``restore`` takes."""
        return {"lines": dict(self._lines), "before": dict(self._before), "warnings": list(self.warnings)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._lines, self._before = dict(state["lines"]), dict(state["before"])
        self.warnings = [tuple(warning) for warning in state["warnings"]]
        self._write()
