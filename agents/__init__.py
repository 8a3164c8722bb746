"""Agents that choose which tokens stay visible."""

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
