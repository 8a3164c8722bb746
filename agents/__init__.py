"""Agents that choose which tokens stay visible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from agents.base import Agent

AGENTS = {
    "ppo": "agents.ppo:PPO",
    "adamae": "agents.adamae:AdaMAE",
    "random": "agents.heuristics:RandomMask",
    "tube": "agents.heuristics:TubeMask",
    "frame": "agents.heuristics:FrameMask",
    "block": "agents.heuristics:BlockMask",
    "motion": "agents.heuristics:MotionMask",
    "oracle": "agents.heuristics:OracleMask",
    "greedy": "agents.heuristics:GreedyOracle",
}
"""What ``agent.class`` of a configuration may name, besides ``sb3:ALGORITHM`` and ``package.module:Class``."""


def load(path: str | Path, env: Any = None) -> Agent:
    """Bring back an agent of ``AGENTS`` from what it saved: the file itself says which of them wrote it.

    Nothing in the file is ever run, wherever it comes from.

    Args:
        path: a file that ``save`` wrote, or a folder with one: a run's, or what ``tats export --format policy`` wrote.
        env: a ``TATSMasking`` vector environment with ``output="torch"``, an id, or None (to predict only).

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: if another class wrote it: one of your own, or stable-baselines3; or if it is damaged.
        TypeError: for an environment of another kind.
    """
    from agents.loading import load_agent  # with torch, which naming the agents above does without

    return load_agent(path, env)
