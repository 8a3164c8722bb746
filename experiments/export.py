"""``tats export``: what a run trained, as a folder that other tools load, checked against what it was made of."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError

import agents
from agents.adamae import AdaMAE
from agents.heuristics import GreedyOracle
from agents.loading import policy_file
from agents.ppo import PPO
from experiments.build import load_mae
from experiments.checkpoints import sync
from experiments.classifier import LoadedClassifier, load_classifier
from experiments.config import load_config
from experiments.downstream import FOLDER as DOWNSTREAM
from experiments.export_onnx import check_installed, random_clips, random_tokens, write_encoder, write_sampler
from experiments.finetune import CHECKPOINT
from experiments.model_card import (
    Contents,
    classifier_code,
    environment_code,
    huggingface_code,
    model_card,
    onnx_code,
    policy_code,
)
from experiments.refusals import ConfigError, close, did_you_mean
from experiments.trained import MAE_FILE
from tats_env.grid import hidden_tokens, token_budget, visible_mask
from tats_env.mae import MAELearner, write_huggingface, write_huggingface_classifier
from tats_env.mae.model import gather_tokens

SUMS = "SHA256SUMS"
"""In an exported folder: all files that were written there, as ``sha256sum -c`` takes them."""
ROUNDING = 1e-3
"""The most by which outputs may differ in transformers: a decoder's last epsilon can be another one there."""


@dataclass
class Options:
    """Write what a run trained as a folder for other tools, with a model card, README.md."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder, such as runs/quickstart or, for its baseline, runs/quickstart/random."""
    format: Annotated[str, tyro.conf.arg(metavar="hf|onnx|policy")]
    """hf: the MAE for transformers, with its classifiers if it was fine-tuned. onnx: encoder and sampler for
    onnxruntime. policy: the sampler for agents.load."""
    out: Path | None = None
    """Folder to write, by default export/FORMAT in the run's; one that tats export wrote is replaced."""


class Source:
    """What is exported.

    Args:
        folder: of a run, of the baseline within one, or of a fine-tuning.
        form: what it is exported as.

    Attributes:
        classifiers: what was fine-tuned, by a name.
        pretrained: whether an MAE was trained there.
        mae: that; of a fine-tuning alone one of its shape, whose weights say nothing.

    Raises:
        ConfigError: if it is none, or nothing was trained there yet.
    """

    def __init__(self, folder: Path, form: str) -> None:
        self.folder = folder.resolve()
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder; give a run's, such as runs/quickstart")
        self.home = self.folder if (self.folder / "config.yaml").is_file() else self.folder.parent
        if not (self.home / "config.yaml").is_file():
            raise ConfigError(f"{folder}: is not the folder of a run: it holds no config.yaml")
        self.config = load_config(str(self.home / "config.yaml"))
        self.classifiers = self._classifiers() if form == "hf" else {}
        self.pretrained = (self.folder / MAE_FILE).is_file()
        if self.pretrained:
            self.mae = load_mae(self.folder / MAE_FILE, self.config, str(folder), device="cpu").train(False)
        elif self.classifiers:
            any_of_them = next(iter(self.classifiers.values()))
            self.mae = MAELearner(any_of_them.grid, any_of_them.size, device="cpu")
        else:
            raise ConfigError(f"{folder}: holds no {MAE_FILE}: no training has come to its end there")
        self.num_visible = token_budget(self.mae.grid.num_tokens, self.config.mask_ratio)

    def _classifiers(self) -> dict[str, LoadedClassifier]:
        files = sorted((self.folder / DOWNSTREAM).glob(f"*/finetune/{CHECKPOINT}"))
        try:
            return {f"classifier-{path.parts[-3]}": load_classifier(path) for path in files}
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def agent(self) -> Any:
        """The sampler, on the CPU and without an environment.

        Raises:
            ConfigError: if it can't be brought back without running code of others.
        """
        try:
            return agents.load(self.folder)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error


def export(args: Sequence[str]) -> int:
    """What ``tats export`` does with its arguments; returns the exit code.

    Raises:
        ConfigError: if there is nothing to export, a package is missing, or the folder holds something else.
        SystemExit: by tyro, after ``--help`` or an option that is unknown or can't be read.
    """
    options = tyro.cli(Options, args=args, prog="tats export")
    if options.format not in FORMATS:
        near = did_you_mean(*close(options.format, list(FORMATS)))
        raise ConfigError(f"--format {options.format}: is unknown; there are {', '.join(FORMATS)}{near}")
    if options.format == "onnx":
        check_installed()
    out = (options.out or options.run / "export" / options.format).resolve()
    source = Source(options.run, options.format)
    _check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out}: can't be made: there is a file in the place of a folder above it") from None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside) / "new"
        folder.mkdir()
        try:
            contents = FORMATS[options.format](source, folder)
        except SafetensorError as error:
            raise ConfigError(f"--out {out}: can't be written: {error}") from error
        shutil.copyfile(source.home / "config.yaml", folder / "config.yaml")
        card = model_card(source.folder, source.home, source.config, source.mae, contents, source.pretrained)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _seal(folder)
        if out.exists():
            out.rename(Path(beside) / "old")
        folder.rename(out)
    for check in contents.checks:
        print(check)
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _check_free(out: Path) -> None:
    """Raise ConfigError unless there is nothing at ``out``, or just what was exported there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    there = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]
    listed: dict[str, str] = {}
    if (out / SUMS).is_file():
        lines = (out / SUMS).read_text("utf-8", errors="replace").splitlines()
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sorted(there):
        if name != SUMS and listed.get(name) != _digest(out / name):
            raise ConfigError(
                f"--out {out}: {name} there is not as tats export wrote it, and would be lost; give another folder, or "
                "clear this one"
            )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _seal(folder: Path) -> None:
    """List all files with their checksums, and wait until they are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
    for path in (*files, folder / SUMS):
        sync(path)


def _huggingface(source: Source, folder: Path) -> Contents:
    """The MAE and, in folders of their own, the classifiers that it was fine-tuned into."""
    code = [huggingface_code(source.mae)] if source.pretrained else []
    try:
        if source.pretrained:
            write_huggingface(source.mae, folder)
        for name, (model, classes, grid, size) in source.classifiers.items():
            write_huggingface_classifier(model.state_dict(), grid, size, classes, folder / name)
            code.append(classifier_code(name, grid))
    except ValueError as error:
        raise ConfigError(f"{source.folder}: {error}") from error
    if find_spec("transformers") is None:
        checks = ["not compared with what transformers makes of it, which is not installed here"]
    else:
        checks = [_told(what, *pair) for what, pair in _pairs(source, folder).items()]
    names = ", ".join(source.classifiers)
    if not source.pretrained:
        about = f"Classifiers in VideoMAE's shape, for transformers: {names}"
    else:
        about = "A masked autoencoder in VideoMAE's shape, for transformers"
        about += f", and what it was fine-tuned into: {names}" * bool(names)
    return Contents("transformers", about, code, checks)


@torch.no_grad()
def _pairs(source: Source, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What ours and transformers' networks make of the same random clips, by what it is."""
    from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

    mae, grid, n = source.mae, source.mae.grid, source.mae.grid.num_tokens
    patches = mae.normalize(grid.patchify(random_clips(grid, 2)))
    pixels = grid.unpatchify(patches).movedim(-1, 2)
    pairs = {}
    if source.pretrained:
        everything, visible = random_tokens(grid, 2, n), random_tokens(grid, 2, source.num_visible)
        theirs = VideoMAEForPreTraining.from_pretrained(folder).eval()
        pairs["the encoder"] = mae.model.encode(patches, everything), theirs.videomae(pixels).last_hidden_state
        pairs["the decoder"] = (
            mae.model(gather_tokens(patches, visible), visible, hidden_tokens(visible, n)),
            theirs(pixels, bool_masked_pos=~visible_mask(visible, n)).logits,
        )
    for name, classifier in source.classifiers.items():
        theirs = VideoMAEForVideoClassification.from_pretrained(folder / name).eval()
        pairs[name] = classifier.model(patches), theirs(pixels).logits
    return pairs


def _told(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    difference = float((ours - theirs).abs().max())
    if not difference <= ROUNDING:
        raise ConfigError(f"{what} would differ by {difference:.1e} in transformers, so nothing was exported")
    return f"{what}: differs by at most {difference:.1e} in transformers, on random clips"


def _onnx(source: Source, folder: Path) -> Contents:
    """The encoder, and the sampler if it is a network that sees clips."""
    mae = source.mae
    checks = [write_encoder(mae, folder / "encoder.onnx")]
    network, why = _network(source)
    if network is None:
        checks.append(f"there is no sampler.onnx: {why}")
    else:
        checks.append(write_sampler(mae, network, source.num_visible, folder / "sampler.onnx"))
    about = "The encoder of a masked autoencoder" + (" and its token sampler" if network is not None else "")
    code = onnx_code(mae.grid, source.num_visible, network is not None)
    return Contents("onnx", f"{about}, as ONNX graphs", [code], checks)


def _network(source: Source) -> tuple[torch.nn.Module | None, str]:
    """What makes logits of tokens or, where nothing does, why."""
    try:
        agent = source.agent()
    except ConfigError as error:
        return None, str(error)
    if not isinstance(agent, PPO | AdaMAE):
        return None, f"{type(agent).__name__} is no network"
    if source.config.rounds > 1:
        return None, "the sampler acts in rounds, and sees the reconstruction between them"
    return (agent.policy if isinstance(agent, PPO) else agent.sampler), ""


def _policy(source: Source, folder: Path) -> Contents:
    """The sampler, and the MAE through which it sees."""
    config, agent, file = source.config, source.agent(), policy_file(source.folder)
    for path in (file, source.folder / MAE_FILE):
        shutil.copyfile(path, folder / path.name)
    if config.rounds > 1 or agent.observation == "foreground" or isinstance(agent, GreedyOracle):
        code = environment_code(config, agent.observation)
    else:
        code = policy_code(source.mae.grid, source.num_visible, agent.observation)
    about = "A token sampler, and the masked autoencoder through which it sees"
    return Contents("tats-env", about, [code], [])


FORMATS: dict[str, Callable[[Source, Path], Contents]] = {"hf": _huggingface, "onnx": _onnx, "policy": _policy}
