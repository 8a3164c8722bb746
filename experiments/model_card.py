"""The README.md of an export: what it is, how to use it, where it comes from, what it is worth and where that ends."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.config import load_config, to_values
from experiments.downstream import FOLDER as DOWNSTREAM
from experiments.downstream import top1_figures
from experiments.folder import stored
from experiments.metrics import METRICS, heading, in_digits, shown
from experiments.refusals import items
from experiments.run import SHORT, TRAINED
from experiments.schema import RunConfig
from experiments.yaml_files import dump_yaml, packaged_configs
from tats_env import __version__
from tats_env.grid import TokenGrid, token_budget
from tats_env.mae import MAELearner

RENDERED, UNNAMED = ("motion", "scenes"), ("folder", "list", "shards")
"""Data without real videos, and data of one's own."""


class Contents(NamedTuple):
    """What an export holds."""

    library: str
    """Whose loader takes it, in the Hub's words."""
    about: str
    """A paragraph."""
    code: list[str]
    """Python that uses it, to be run in its folder."""
    checks: list[str]
    """What was compared, or why it was not."""


def model_card(
    folder: Path, home: Path, config: RunConfig, mae: MAELearner, contents: Contents, pretrained: bool
) -> str:
    """The card as Markdown.

    Args:
        folder: of the run or the baseline whose weights these are.
        home: the run's own folder.
        config: the run's.
        mae: the trained one.
        contents: what was exported.
        pretrained: whether the run trained the MAE, rather than fine-tuned one from elsewhere.
    """
    baseline = folder.resolve() != home.resolve()
    sampler = folder.resolve().name if baseline else config.agent.class_
    kind = config.data.partition(":")[0]
    header = {
        "library_name": contents.library,
        "tags": ["video", "masked-autoencoder", "videomae", "token-selection", "tats-env"],
        **({} if kind in UNNAMED else {"datasets": [kind]}),
    }
    code = "\n\n".join(f"```python\n{block}```" for block in contents.code)
    checks = "".join(f"\n- {check}" for check in contents.checks) + "\n" * bool(contents.checks)
    of_run = ", the baseline of the run below, under uniform random masks" if baseline else ""
    summary = stored(home / "summary.json") if pretrained else {"fine-tuned": _fine_tuned(folder, config)}
    again = "tats run" if pretrained else "tats finetune"
    trained = stored(folder / TRAINED)
    clips = config.steps * config.batch_size if trained else _clips_logged(folder / "metrics.csv", config.rounds)
    versions = ", ".join(f"{name} {value}" for name, value in summary.get("versions", {}).items())
    return f"""---
{dump_yaml(header)}---

# {config.name}{f" ({sampler})" if baseline else ""}

{contents.about}{of_run}. Made by [`tats export`](#training) of tats-env {__version__}.

## Use

In this folder:

{code}
{checks}
## Training

| | |
|---|---|
{_training(config, mae, sampler, clips, trained, home, pretrained)}

The command:

```bash
{command(config) if pretrained else f"{again} config.yaml"}
```

`config.yaml`, in this folder, holds all settings; `{again} config.yaml` does the same again.

## Results

{_results(summary)}

## Limits

{_limits(config, summary, clips, pretrained)}

## Versions

Trained with {versions or "releases that were not noted down"}. Exported with torch {torch.__version__}. `sha256sum -c
SHA256SUMS` tells whether all files are as they were written.
"""


def command(config: RunConfig) -> str:
    """``tats run`` as it makes such a run: with options on top of what comes with the package, where that is one."""
    if config.name in packaged_configs():
        usual = dict(items(to_values(load_config(config.name))))
        config = config.model_copy(update={"out": usual["out"]})  # which says nothing elsewhere
        options: list[str] = []
        for key, value in items(to_values(config)):
            if isinstance(value, dict) or (key in usual and usual[key] == value):
                continue
            group, dot, name = key.replace("_", "-").rpartition(".")
            if isinstance(value, bool):
                options.append(f"--{group}{dot}{'' if value else 'no-'}{name}")
            else:
                options += [f"--{group}{dot}{name}", *map(str, value if isinstance(value, list) else [value])]
        with suppress(ValueError, SystemExit):
            if load_config(config.name, options) == config:
                return shlex.join(["tats", "run", config.name, *options])
    return "tats run config.yaml"


def _training(
    config: RunConfig,
    mae: MAELearner,
    sampler: str,
    clips: int | None,
    trained: Mapping[str, Any],
    home: Path,
    pretrained: bool,
) -> str:
    grid, clip, found = mae.grid, config.clip, trained.get("videos", {}).get("num_videos")
    videos = f"{found or config.num_videos or 'all'} videos"
    bad = home / "bad_videos.txt"
    if bad.is_file() and (lines := len(bad.read_text("utf-8", errors="replace").splitlines())):
        videos += f"; {lines} that were listed could not be read (those of validation counted)"
    stride = f", one in {clip.frame_stride} of the video's," if clip.frame_stride > 1 else ""
    size = mae.size if isinstance(mae.size, str) else "of its own size"
    parameters = sum(x.numel() for x in mae.model.parameters()) / 1e6
    origin = f"from `{config.mae.init}`" if config.mae.init else "from scratch"
    updates = trained.get("results", {}).get("mae_updates")
    if config.mae.frozen:
        origin += ", left as it was"
    elif updates is not None:
        origin += f", {updates:,} updates"
    rows = {
        "data": f"`{config.data}`, split train, {videos}",
        "clips seen": "not known" if clips is None else f"{clips:,}, in batches of {config.batch_size}",
        "a clip": f"{grid.num_frames} frames{stride}, {grid.height} x {grid.width} pixels, RGB",
        "tokens": f"{grid.num_tokens} of {grid.tubelet_size} x {grid.patch_size} x {grid.patch_size} pixels; "
        f"{token_budget(grid.num_tokens, config.mask_ratio)} stayed visible (mask ratio {config.mask_ratio:g})"
        + (f", chosen in {config.rounds} rounds" if config.rounds > 1 else ""),
        "masked autoencoder": f"{size}, {parameters:.1f} M parameters with its decoder, {origin}",
        "sampler": f"`{sampler}`",
        "seed": str(config.seed),
    }
    if not pretrained:
        for name in ("clips seen", "tokens", "sampler"):
            del rows[name]
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())


def _results(summary: Mapping[str, Any]) -> str:
    results = {name: x for name, x in summary.items() if isinstance(x, dict) and name != "versions"}
    metrics = shown(results.values())
    if not metrics:
        return "Nothing was measured: the run did not come to its evaluation."
    rows = [["sampler", *map(heading, metrics)], ["---"] * (len(metrics) + 1)]
    rows += [[f"`{name}`", *(in_digits(figures, x) for x in metrics)] for name, figures in results.items()]
    table = "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
    there = {metric.partition("@")[0] for metric in metrics}
    missing = ", ".join(METRICS[metric] for metric in METRICS if metric not in there)
    return f"""On validation clips; each sampler has an MAE of its own, trained on the same clips for as long.

{table}

Errors are in units of a patch's variance. Motion lift is the share of moving foreground among the visible tokens over
its share among all; 1 is chance. Probes and fine-tuning are top-1 accuracies. Not measured: {missing or "nothing"}."""


def _limits(config: RunConfig, summary: Mapping[str, Any], clips: int | None, pretrained: bool) -> str:
    limits = []
    if clips is not None and clips < SHORT:
        limits.append(
            f"{clips:,} clips are too few to train a representation on; under {SHORT:,} don't expect features that are "
            "better than an untrained encoder's."
        )
    if config.data.partition(":")[0] in RENDERED:
        limits.append("It has seen rendered videos only, never a real one.")
    if not summary or "interrupted" in summary:
        limits.append("The run was not finished: what is missing above was not done.")
    if not pretrained:
        limits.append("One fine-tuning with one seed.")
    elif config.evaluate.baseline and config.agent.class_ != "random":
        limits.append("One run with one seed. What a sampler is worth is told by several: `tats compare`.")
    else:
        limits.append("Nothing was trained beside it under uniform random masks, so nothing tells what its masks did.")
    limits.append(
        "Clips must have the frames and pixels of the table above. A sampler fits the embedding of its own MAE alone."
    )
    limits.append("No licence is stated. Before you pass it on, choose one that the videos allow.")
    return "\n".join(f"- {limit}" for limit in limits)


def _fine_tuned(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Accuracies by data set, under the names that they have in summary.json."""
    found = {path.parts[-3]: stored(path) for path in (folder / DOWNSTREAM).glob("*/finetune/finetune.json")}
    return top1_figures({data: {"finetune": scores} for data, scores in found.items()}, config)


def _clips_logged(path: Path, rounds: int) -> int | None:
    """Clips up to the last line of a table of metrics."""
    with suppress(OSError, ValueError, TypeError):
        with path.open(newline="") as file:
            steps = [row.get("time/total_timesteps") for row in csv.DictReader(file)]
        return int(float(steps[-1] or "")) // rounds if steps else None
    return None


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _frames(grid: TokenGrid) -> str:
    return f"{grid.num_frames}, {grid.height}, {grid.width}, 3"


def huggingface_code(mae: MAELearner) -> str:
    """Features of a clip, by transformers."""
    grid = mae.grid
    return f"""import numpy as np
import torch
from transformers import VideoMAEForPreTraining, VideoMAEImageProcessor

frames = list(np.random.randint(0, 256, ({_frames(grid)}), dtype=np.uint8))  # yours: RGB
inputs = VideoMAEImageProcessor.from_pretrained(".")(frames, return_tensors="pt")
mae = VideoMAEForPreTraining.from_pretrained(".").eval()  # VideoMAEModel takes the encoder alone
with torch.no_grad():
    features = mae.videomae(**inputs).last_hidden_state
print(features.shape)  # [1, {grid.num_tokens}, {mae.embed_dim}]
"""


def classifier_code(folder: str, grid: TokenGrid) -> str:
    """The class of a clip, by transformers."""
    return f"""import numpy as np
import torch
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

frames = list(np.random.randint(0, 256, ({_frames(grid)}), dtype=np.uint8))  # yours: RGB
inputs = VideoMAEImageProcessor.from_pretrained("{folder}")(frames, return_tensors="pt")
classifier = VideoMAEForVideoClassification.from_pretrained("{folder}").eval()
with torch.no_grad():
    print(classifier.config.id2label[int(classifier(**inputs).logits.argmax())])
"""


def onnx_code(grid: TokenGrid, num_visible: int, with_sampler: bool) -> str:
    """Latents of the tokens that the sampler, or chance, keeps visible."""
    if with_sampler:
        choose = """sampler = onnxruntime.InferenceSession("sampler.onnx")
(logits,) = sampler.run(None, {"clips": clips})"""
    else:
        choose = f"logits = np.random.rand(2, {grid.num_tokens})  # by chance"
    return f"""import numpy as np
import onnxruntime

clips = np.random.randint(0, 256, (2, {_frames(grid)}), dtype=np.uint8)  # yours: RGB
{choose}
visible = np.sort(np.argsort(-logits, axis=1)[:, :{num_visible}], axis=1)  # the tokens that rank highest
encoder = onnxruntime.InferenceSession("encoder.onnx")
(latents,) = encoder.run(None, {{"clips": clips, "visible": visible}})
print(latents.shape)  # (2, {num_visible}, width); any number of clips and tokens will do
"""


def policy_code(grid: TokenGrid, num_visible: int, observation: str) -> str:
    """The tokens that a sampler keeps of clips; ``observation`` is tokens or else, seen or not, pixels."""
    if observation == "tokens":
        seen = "mae.tokens(clips)"
    else:
        shape = "(mae.grid.num_steps, mae.grid.num_positions)"
        seen = f"mae.normalize(mae.grid.patchify(clips)).unflatten(1, {shape})"
    return f"""import torch

import agents
from tats_env.mae import load_learner

sampler, mae = agents.load("."), load_learner("mae.safetensors", device="cpu")
clips = torch.randint(0, 256, (2, {_frames(grid)}), dtype=torch.uint8)  # yours: RGB
scores, _ = sampler.predict({seen}, deterministic=True)
visible = scores.topk({num_visible}).indices.sort(dim=1).values
print(visible)  # of each clip, in the order (time, row, column)
"""


def environment_code(config: RunConfig, observation: str) -> str:
    """A decision of a sampler that sees more than clips."""
    clip = config.clip
    options: dict[str, Any] = {
        "mae": "mae.safetensors",
        "mask_ratio": config.mask_ratio,
        "num_frames": clip.num_frames,
        "size": clip.size,
        "tubelet_size": clip.tubelet_size,
        "patch_size": clip.patch_size,
        "observation": observation,
        "device": "cpu",
    }
    name = "TATSMasking-v0"
    if config.rounds > 1:
        name, options["rounds"] = "TATSMaskingSequential-v0", config.rounds
    listed = "\n".join(f"    {key}={json.dumps(value)}," for key, value in options.items())
    return f"""import gymnasium as gym

import agents
import tats_env

env = gym.make_vec(
    "{name}",
    num_envs=2,
    vectorization_mode="vector_entry_point",
    output="torch",
{listed}
)
sampler = agents.load(".", env)
observation, _ = env.reset(seed=0)
scores, _ = sampler.predict(observation, deterministic=True)
_, reward, *_ = env.step(scores)
print(reward)
"""
