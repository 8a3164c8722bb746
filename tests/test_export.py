"""``tats export`` in every format, the code of its model cards, and ``agents.load``."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

import agents
from agents.adamae import AdaMAE, AdaMAESampler
from agents.base import Stepwise, resolve_agent
from agents.policies import TrajectoryPolicy
from agents.ppo import PPO
from experiments.config import dump_config, load_config, parse_config
from experiments.export import export
from experiments.export_onnx import random_clips, random_tokens, write_sampler
from experiments.model_card import command
from experiments.refusals import ConfigError
from experiments.run import run
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner, MAESize, load_learner, save_learner

GRID = TokenGrid(4, 32, 32, 2, 8)
# As the named sizes but tiny are: positions by flat index, Hugging Face's epsilon
SIZE = MAESize(48, 2, 3, 24, 1, 3, norm_eps=1e-5, decoder_norm_eps=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained, fine-tuned and compared, by name like one that comes with the package."""
    out = tmp_path_factory.mktemp("runs")
    save_learner(MAELearner(GRID, SIZE, device="cpu"), out / "start.safetensors")
    options = f"""--steps 4 --log-interval 2 --batch-size 4 --num-videos 12 --mask-ratio 0.75 --clip.num-frames 4
        --agent.width 16 --loader.workers 0 --device cpu --mae.init {out / "start.safetensors"} --out {out}
        --evaluate.num-videos 12 --evaluate.clips 16 --evaluate.no-pictures --evaluate.tasks finetune
        --finetune.epochs 1 --finetune.warmup-epochs 0 --finetune.batch-size 4 --finetune.test-crops 1"""
    assert run(load_config("quickstart", options.split())) == 0
    return out / "quickstart"


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to do anything with."""
    return Path(shutil.copytree(trained, tmp_path / "quickstart"))


def made_up(folder: Path, agent: str | None = None, size: str | MAESize = SIZE, **settings: Any) -> Path:
    """A run's folder as far as an export needs it, of an untrained MAE and an agent that learns nothing."""
    folder.mkdir()
    values = {"clip": {"num_frames": 4}, "mask_ratio": 0.75, "agent": {"class": agent or "ppo"}, **settings}
    (folder / "config.yaml").write_text(dump_config(parse_config(values, "test")))
    save_learner(MAELearner(GRID, size, device="cpu"), folder / "mae.safetensors")
    if agent is not None:
        resolve_agent(agent)().save(folder / "policy.json")
    return folder


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run each Python block of an export's card in its folder; returns what each defined."""
    monkeypatch.chdir(folder)
    spaces: list[dict[str, Any]] = []
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        spaces.append({})
        exec(compile(block, "README.md", "exec"), spaces[-1])
    assert spaces
    return spaces


def test_policy_export_acts_as_the_trained_sampler_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "elsewhere" / "policy"
    assert export([str(trained), "--format", "policy", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "SHA256SUMS", "config.yaml", "mae.safetensors", "policy.safetensors",
    }  # fmt: skip
    tokens = load_learner(trained / "mae.safetensors", device="cpu").tokens(random_clips(GRID, 3))
    expected, _ = PPO.load(trained / "policy.safetensors").predict(tokens, deterministic=True)
    for path in (out, out / "policy.safetensors", str(trained)):
        scores, _ = agents.load(path).predict(tokens, deterministic=True)
        assert torch.equal(scores, expected)
    (card,) = run_code(out, monkeypatch)
    assert card["visible"].shape == (2, 8) and isinstance(card["sampler"], PPO)


def test_card_tells_data_command_and_results_of_run_and_baseline(trained: Path, tmp_path: Path) -> None:
    for folder, out in ((trained, tmp_path / "own"), (trained / "random", tmp_path / "baseline")):
        assert export([str(folder), "--format", "policy", "--out", str(out)]) == 0
        _, header, text = (out / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(header)["datasets"] == ["motion"] and yaml.safe_load(header)["library_name"] == "tats-env"
        summary = json.loads((trained / "summary.json").read_text())
        for sampler in ("ppo", "random"):
            row = next(line for line in text.splitlines() if line.startswith(f"| `{sampler}` |"))
            assert f"{summary[sampler]['finetune_top1']:.3f}" in row
        assert "Not measured: linear probe, attentive probe, k-NN." in text
        assert "12 videos" in text and "16, in batches of 4" in text and "16 clips are too few" in text
        assert "rendered videos only" in text and "not finished" not in text and "--steps 4" in text
        assert f"torch {summary['versions']['torch']}" in text
        assert ("baseline of the run" in text) == (folder != trained)
    assert isinstance(agents.load(tmp_path / "baseline"), resolve_agent("random"))


def test_card_of_an_interrupted_run_says_so(home: Path) -> None:
    for name in ("summary.json", "trained.json"):
        (home / name).unlink()
    assert export([str(home), "--format", "policy"]) == 0
    text = (home / "export" / "policy" / "README.md").read_text()
    assert "Nothing was measured" in text and "not finished" in text
    assert "16, in batches of 4" in text  # as the last line of metrics has it


@pytest.mark.parametrize("name", ["quickstart", "mine"])
def test_command_of_the_card_makes_the_same_configuration(name: str) -> None:
    options = ["--mask-ratio", "0.75", "--agent.class", "motion", "--agent.camera", "true", "--data", "list:/a b.csv"]
    options += ["--evaluate.no-baseline", "--evaluate.tasks", "knn", "linear", "--compile", "--name", name]
    config = load_config("quickstart", [*options, "--num-videos", "None"])
    told = command(config)
    if name == "mine":
        assert told == "tats run config.yaml"
        return
    assert told.startswith("tats run quickstart --") and "'list:/a b.csv'" in told and "--steps" not in told
    assert load_config("quickstart", shlex.split(told)[3:]) == config


def test_hf_export_loads_in_transformers_as_model_and_as_classifier(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    assert export([str(trained), "--format", "hf", "--out", str(out)]) == 0
    differences = [float(x) for x in re.findall(r"differs by at most (\S+)", capsys.readouterr().out)]
    assert len(differences) == 3 and max(differences) < 1e-5
    model, classifier = run_code(out, monkeypatch)
    assert model["features"].shape == (1, GRID.num_tokens, 48)
    assert isinstance(model["mae"], transformers.VideoMAEForPreTraining)
    assert len(classifier["classifier"].config.id2label) > 1
    mae = load_learner(trained / "mae.safetensors", device="cpu")
    patches = mae.normalize(GRID.patchify(random_clips(GRID, 2)))
    every = torch.arange(GRID.num_tokens).expand(2, -1)
    with torch.no_grad():
        found = transformers.VideoMAEModel.from_pretrained(out).eval()(GRID.unpatchify(patches).movedim(-1, 2))[0]
        torch.testing.assert_close(found, mae.model.encode(patches, every), atol=1e-5, rtol=0)


def test_fine_tuning_of_weights_from_elsewhere_is_exported_as_the_classifier_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (home / "mae.safetensors").unlink()  # `tats finetune` of a configuration leaves none
    (home / "summary.json").unlink()
    assert export([str(home), "--format", "hf"]) == 0
    out = home / "export" / "hf"
    assert not (out / "config.json").exists() and (out / "classifier-motion" / "config.json").is_file()
    assert len(run_code(out, monkeypatch)) == 1
    card = (out / "README.md").read_text()
    top1 = json.loads((home / "downstream" / "motion" / "finetune" / "finetune.json").read_text())["top1"]
    assert "tats finetune config.yaml" in card and f"{top1:.3f}" in card and "interrupted" not in card
    assert not any(f"| {row} |" in card.split("## Results")[0] for row in ("clips seen", "tokens", "sampler"))
    with pytest.raises(ConfigError, match="holds no mae"):
        export([str(home), "--format", "onnx"])


def test_hf_export_says_when_transformers_is_not_there_to_compare(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export([str(home), "--format", "hf"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert "not compared" in (home / "export" / "hf" / "README.md").read_text()


def test_hf_export_of_positions_that_a_videomae_has_not_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "tiny", size="tiny")
    with pytest.raises(ConfigError, match="positions"):
        export([str(folder), "--format", "hf"])
    assert not any((folder / "export").iterdir())


def test_onnx_export_computes_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "onnx"
    assert export([str(trained), "--format", "onnx", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("differs by at most") == 2
    (card,) = run_code(out, monkeypatch)
    assert card["latents"].shape == (2, 8, 48)
    mae = load_learner(trained / "mae.safetensors", device="cpu")
    policy = PPO.load(trained / "policy.safetensors")
    encoder, sampler = (onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encoder", "sampler"))
    for count, num_visible in ((1, 1), (1, GRID.num_tokens), (7, 8)):
        clips, visible = random_clips(GRID, count), random_tokens(GRID, count, num_visible)
        every = mae.normalize(GRID.patchify(clips))
        shown = every[torch.arange(count)[:, None], visible]
        with torch.no_grad():
            expected = mae.model.encode(shown, visible).numpy()
        (found,) = encoder.run(None, {"clips": clips.numpy(), "visible": visible.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
        (logits,) = sampler.run(None, {"clips": clips.numpy()})
        scores, _ = policy.predict(mae.tokens(clips), deterministic=True)
        np.testing.assert_allclose(logits, policy.logits(mae.tokens(clips)), atol=1e-4)
        for one, theirs in zip(scores, logits, strict=True):
            assert set(one.topk(num_visible).indices.tolist()) == set(np.argsort(-theirs)[:num_visible])


def test_onnx_export_of_a_sampler_that_is_no_network_has_the_encoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    folder = made_up(tmp_path / "run", "tube")
    assert export([str(folder), "--format", "onnx"]) == 0
    assert "no sampler.onnx: TubeMask is no network" in capsys.readouterr().out
    assert not (folder / "export" / "onnx" / "sampler.onnx").exists()
    (card,) = run_code(folder / "export" / "onnx", monkeypatch)
    assert card["latents"].shape == (2, 8, 48)


def test_onnx_graphs_of_other_networks_are_told_apart_from_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    mae = MAELearner(GRID, SIZE, device="cpu")
    shape = GRID.num_steps, GRID.num_positions, mae.embed_dim
    assert "of the 40 tokens" in write_sampler(mae, AdaMAESampler(shape), 8, tmp_path / "sampler.onnx")

    class Fickle(torch.nn.Module):
        calls = 0

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            self.calls += 1  # so what was traced is not what is compared with it
            return observation.mean(-1).flatten(1) + self.calls

    with pytest.raises(ConfigError, match=r"differs by [1-9]\.0e\+00"):
        write_sampler(mae, Fickle(), 8, tmp_path / "fickle.onnx")


def test_missing_package_of_the_extra_is_named_with_the_command_that_brings_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs onnxruntime: pip install 'tats-env\[onnx\]'"):
        export([str(home), "--format", "onnx"])
    assert not (home / "export").exists()


def test_what_can_t_be_exported_is_refused_in_a_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    started = made_up(tmp_path / "started")
    (started / "mae.safetensors").unlink()
    without = made_up(tmp_path / "without")
    with zipfile.ZipFile(made_up(tmp_path / "sb3", "random") / "policy.zip", "w"):
        (tmp_path / "sb3" / "policy.json").unlink()
    cases = {
        "onx": (without, r"--format onx: is unknown; there are hf, onnx, policy; did you mean onnx\?"),
        "hf": (tmp_path / "nowhere", "there is no such folder; give a run's"),
        "policy": (empty, "is not the folder of a run: it holds no config.yaml"),
        "policy ": (started, "holds no mae.safetensors: no training has come to its end there"),
        " policy": (without, "holds no policy.safetensors"),
        " policy ": (tmp_path / "sb3", "a zip, as stable-baselines3 writes"),
    }
    for form, (folder, message) in cases.items():
        with pytest.raises(ConfigError, match=message):
            export([str(folder), "--format", form.strip()])


def test_export_replaces_its_own_work_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = home / "export" / "policy"
    for _ in range(2):
        assert export([str(home), "--format", "policy"]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["policy"]  # no leftovers
    for name in ("README.md", "notes.txt"):
        (out / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name} there is not as tats export wrote it"):
            export([str(home), "--format", "policy"])
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    with pytest.raises(ConfigError, match="not as tats export wrote it"):
        export([str(home), "--format", "policy", "--out", str(home)])
    (elsewhere := home / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    for _ in range(2):
        assert export([str(home), "--format", "policy", "--out", "."]) == 0
        monkeypatch.chdir(elsewhere)  # which is a new one
    assert (elsewhere / "policy.safetensors").is_file()
    with pytest.raises(ConfigError, match="is a file"):
        export([str(home), "--format", "policy", "--out", str(home / "metrics.csv")])
    with pytest.raises(ConfigError, match="a file in the place of a folder"):
        export([str(home), "--format", "policy", "--out", str(home / "metrics.csv" / "export")])
    assert (home / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("agent", "rounds", "names"),
    [("motion", 1, "pixels"), ("greedy", 1, "env"), ("oracle", 1, "env"), ("block", 2, "env")],
)
def test_code_of_the_card_fits_what_the_sampler_sees(
    agent: str, rounds: int, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_up(tmp_path / "run", agent, rounds=rounds)
    assert export([str(folder), "--format", "policy"]) == 0
    (card,) = run_code(folder / "export" / "policy", monkeypatch)
    if names == "env":
        assert card["scores"].shape == (2, GRID.num_tokens) and card["reward"].isfinite().all()
    else:
        assert card["visible"].shape == (2, 8)


def saved(agent: Any, folder: Path) -> Path:
    path = folder / f"policy{agent.suffix}"
    agent.save(path)
    return path


def test_every_agent_of_ours_comes_back_as_what_it_was(tmp_path: Path) -> None:
    shape = (2, 16, 8)
    made = [resolve_agent(name)(seed=3) for name in agents.AGENTS if name not in ("ppo", "adamae")]
    made += [AdaMAE(observation_shape=shape, seed=3), PPO(None, TrajectoryPolicy(shape, 8, 2), explore=0.25, seed=3)]
    for agent in made:
        found = agents.load(saved(agent, tmp_path).rename(tmp_path / "renamed"))
        assert type(found) is type(agent) and found.seed == 3
    assert isinstance(found, PPO) and found.explore == 0.25


def test_loading_takes_an_environment_to_learn_in(tmp_path: Path) -> None:
    path = saved(resolve_agent("random")(), tmp_path)
    assert agents.load(path, "TATSMasking-v0").env.num_envs == 32
    with pytest.raises(TypeError, match="make_vec"):
        agents.load(path, gym.make_vec("CartPole-v1", 2))


class Changes(Stepwise):
    def scores(self, observation: torch.Tensor, deterministic: bool) -> torch.Tensor:
        return observation.mean(-1).flatten(1)


def test_a_class_of_ones_own_is_left_to_its_own_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written by Changes, .*own load: Changes\.load"):
        agents.load(saved(Changes(), tmp_path))


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_file_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "was-run"
    pickled = pickle.dumps(Hostile(mark))
    pickle.loads(pickled)
    mark.rmdir()  # so it would be seen
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "policy"
    torch.save(Hostile(mark), tmp_path / "torch.zip")
    with zipfile.ZipFile(tmp_path / "sb3.zip", "w") as file:
        file.writestr("data", pickled)
        file.writestr("_stable_baselines3_version", "2.9.2")
    settings = {"agent": "RandomMask", "env": "evil:Evil", "seed": 0}
    contents = {
        "no agent of tats-env": pickled,
        "a zip, as stable-baselines3 writes: its loader unpickles.*resolve_agent": (tmp_path / "sb3.zip").read_bytes(),
        "a zip, .*a class of your own": (tmp_path / "torch.zip").read_bytes(),
        "evil:Evil, which is none of": b'{"agent": "evil:Evil"}',
        "damaged, or of another version": json.dumps(settings).encode(),
        "not readable JSON": b'{"agent": ' + b"[" * 100_000,
        "was written by no agent": b'{"agent": ["RandomMask"]}',
        "is not a readable safetensors": b"\x10\0\0\0\0\0\0\0{" + pickled,
        "no agent of tats-env, and": b"",
    }
    for message, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            agents.load(path)
        assert not mark.exists()


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = saved(PPO(None, TrajectoryPolicy((2, 16, 8), 8, 2)), tmp_path)
    content = path.read_bytes()
    for cut in (0, 5, 9, 200, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"policy\.safetensors"):
            agents.load(path)
    path.write_bytes(content.replace(b'\\"width\\": 8', b'\\"width\\": 4'))
    with pytest.raises(ValueError, match="damaged, or of another version"):
        agents.load(path)
    save_learner(MAELearner(GRID, device="cpu"), path)
    with pytest.raises(ValueError, match="format 'tats-env mae 1'"):
        agents.load(path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        agents.load(tmp_path / "nothing")


def test_naming_agents_takes_no_torch() -> None:
    code = "import agents, sys; agents.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
