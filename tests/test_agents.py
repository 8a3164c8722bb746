"""What makes an agent, how one is named, and that all of them are given the same world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import AGENTS
from agents.base import resolve_agent
from agents.hooks import Hook, MAEUpdateHook
from tats_env.mae import MAELearner
from tats_env.vector_env import TATSMaskingVectorEnv

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"policy_kwargs": {"width": 16, "num_heads": 2}},
    "sb3:PPO": {"n_steps": 2, "batch_size": 4},
    "sb3:SAC": {"buffer_size": 100, "learning_starts": 4},
}


class Witness(Hook):
    """Notes which clips were scored."""

    def __init__(self) -> None:
        self.clips: list[np.ndarray] = []

    def on_step(self, agent: Any) -> None:
        self.clips.append(agent.env.unwrapped.task.decision.clips.clone().numpy())


@pytest.fixture(scope="module")
def clips_of_random() -> np.ndarray:
    return clips_seen("random")[0]


def clips_seen(name: str) -> tuple[np.ndarray, MAELearner]:
    make = resolve_agent(name)
    env = TATSMaskingVectorEnv(
        4, output="torch", observation=make.observation, size=16, num_videos=15, device="cpu", mae_seed=3
    )
    initial = torch.cat([p.detach().flatten() for p in env.mae.model.parameters()])
    fresh = TATSMaskingVectorEnv(1, size=16, num_videos=15, device="cpu", mae_seed=3).mae.model
    assert torch.equal(initial, torch.cat([p.detach().flatten() for p in fresh.parameters()]))
    witness = Witness()
    make(env, seed=3, **SETTINGS.get(name, {})).learn(24, [witness, MAEUpdateHook()])
    return np.stack(witness.clips), env.mae


@pytest.mark.parametrize("name", [*(name for name in AGENTS if name != "random"), "sb3:PPO", "sb3:SAC"])
def test_all_agents_see_the_same_clips_in_the_same_order_and_train_the_mae_as_often(
    name: str, clips_of_random: np.ndarray
) -> None:
    clips, mae = clips_seen(name)
    assert np.array_equal(clips, clips_of_random) and mae.num_updates == 6
    assert len(np.unique(clips.reshape(24, -1), axis=0)) > 12


def test_a_class_that_is_no_agent_is_refused_with_the_missing_methods() -> None:
    with pytest.raises(ValueError, match=r"agent class 'fractions:Fraction' has no method learn and no predict and no"):
        resolve_agent("fractions:Fraction")
    with pytest.raises(ValueError, match=r"agent class 'agents\.base:Stepwise' has no method scores; an"):
        resolve_agent("agents.base:Stepwise")
    with pytest.raises(ValueError, match=r"agent class 'tueb' is unknown; give one of ppo.*; did you mean tube\?"):
        resolve_agent("tueb")
    with pytest.raises(ValueError, match="agent class 'no_such:Agent' can't be imported: No module named 'no_such'"):
        resolve_agent("no_such:Agent")


def test_readme_agent_is_trained_by_its_import_path_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"<!-- own agent example -->\n```python\n(.*?)```", text, re.DOTALL)
    shell = re.search(r"<!-- own agent command -->\n```bash\nv/bin/tats (.*?)\n```", text, re.DOTALL)
    assert code and shell
    (tmp_path / "my_agent.py").write_text(code.group(1))
    quick = ["--steps", "8", "--batch-size", "4", "--num-videos", "15"]
    quick += ["--evaluate.num-videos", "15", "--evaluate.clips", "16"]
    console = [sys.executable, "-c", "import sys; sys.path.pop(0); from experiments.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*console, *shell.group(1).split(), *quick], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["my_agent:Changes"]["mae_updates"] == summary["random"]["mae_updates"] == 8
