"""The original releases' files, against a network of their names written out here."""

from __future__ import annotations

import argparse
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tats_env.env import TATSMaskingEnv
from tats_env.grid import TokenGrid, visible_mask
from tats_env.mae import load_learner, save_learner
from tats_env.mae.learner import IMAGENET_MEAN, IMAGENET_STD

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)
N, K = GRID.num_tokens, 6
SAMPLER = ("encoder.pos_embed_probs", "encoder.get_token_probs.")


class Heads(nn.Module):
    """Self-attention with biases for queries and values alone."""

    def __init__(self, dim: int, heads: int, biased: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        if biased:
            self.q_bias, self.v_bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        q, k, v = (x @ weight.T for weight in self.qkv.weight.split(dim))
        q, v = q + self.q_bias, v + self.v_bias
        mixed = []
        for h in range(self.heads):
            own = slice(h * dim // self.heads, (h + 1) * dim // self.heads)
            logits = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(dim / self.heads)
            mixed.append(torch.softmax(logits, -1) @ v[..., own])
        return self.proj(torch.cat(mixed, -1))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, biased: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Heads(dim, heads, biased)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def waves(n: int, dim: int) -> Tensor:
    rows = [[i / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for i in range(n)]
    return torch.tensor([[math.cos(x) if j % 2 else math.sin(x) for j, x in enumerate(row)] for row in rows])


class Encoder(nn.Module):
    """``norm`` after pre-training; ``fc_norm`` and ``head`` after fine-tuning."""

    def __init__(self, dim: int, depth: int, heads: int, classes: int = 0, sampler: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dim, (2, 4, 4), (2, 4, 4))})
        self.blocks = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        if classes:
            self.fc_norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        else:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        if sampler:
            self.pos_embed_probs = nn.Parameter(torch.empty(1, N, dim))
            self.get_token_probs = nn.Sequential(Layer(dim, 8, biased=False), nn.Linear(dim, 1), nn.Flatten(1))

    def tokens(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        return x + waves(x.shape[1], x.shape[2])

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.through(self.tokens(pixels)).mean(1)))


class Pretraining(nn.Module):
    def __init__(
        self, dim: int = 128, heads: int = 2, decoder_dim: int = 64, decoder_heads: int = 1, sampler: bool = False
    ) -> None:
        super().__init__()
        self.encoder = Encoder(dim, 2, heads, sampler=sampler)
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList([Layer(decoder_dim, decoder_heads)])
        self.decoder.norm, self.decoder.head = nn.LayerNorm(decoder_dim, eps=1e-6), nn.Linear(decoder_dim, 96)
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))

    def forward(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Predictions [B, M, P] of the hidden tokens; ``hidden`` is bool [B, N]."""
        found = []
        for tokens, mask in zip(self.encoder.tokens(pixels), hidden, strict=True):
            latents = self.encoder_to_decoder(self.encoder.norm(self.encoder.through(tokens[~mask][None])))
            places = waves(N, latents.shape[-1])
            x = torch.cat([latents + places[~mask], self.mask_token + places[mask]], dim=1)
            for block in self.decoder.blocks:
                x = block(x)
            found.append(self.decoder.head(self.decoder.norm(x[:, -int(mask.sum()) :])))
        return torch.cat(found)


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Far from initialisation, so that biases, norms and attention all matter."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Attention that is neither level nor on one token, in whatever width
            spread = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.2
            parameter.normal_(std=spread).add_(isinstance(module, nn.LayerNorm) and name == "weight")
    return model


def command_line(**changes: Any) -> argparse.Namespace:
    """Some of what their scripts are called with, of every type that is there."""
    given = {
        "model": "pretrain_videomae_base_patch16_224", "input_size": 16, "num_frames": 4, "lr": 1.5e-4,
        "opt_betas": [0.9, 0.95], "window_size": (2, 4, 4), "clip_grad": None, "normlize_target": True,
        "imagenet_default_mean_and_std": True,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def save(path: Path, weights: dict[str, Any], key: str = "model", **changes: Any) -> Path:
    """As their scripts save a training: weights, optimiser, epoch and command line."""
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({key: weights, "optimizer": optimizer, "epoch": 7, "args": command_line(), **changes}, path)
    return path


@pytest.fixture
def theirs() -> Any:
    return randomised(Pretraining())


def clips() -> Tensor:
    shape = (2, GRID.num_frames, GRID.height, GRID.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels() -> Tensor:
    return ((clips() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 4, 1, 2, 3)


def masks() -> Tensor:
    scores = torch.rand(2, N, generator=torch.Generator().manual_seed(1))
    return scores.argsort(1)[:, :K].sort(1).values


@torch.no_grad()
def assert_same_predictions(learner: Any, theirs: Any) -> None:
    found = learner.errors(clips(), masks(), keep_prediction=True).prediction
    expected = theirs(pixels(), ~visible_mask(masks(), N))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def load(path: Path | str, grid: TokenGrid | None = GRID) -> Any:
    return load_learner(path, device="cpu", grid=grid)


# A file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "pth:"])
def test_predictions_are_those_of_the_network_that_was_saved(
    tmp_path: Path, theirs: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / ("checkpoint-799" + (".pth" if not prefix else "")), theirs.state_dict())
    learner = load(f"{prefix}{path}")
    assert_same_predictions(learner, theirs)
    assert learner.model.decoder_norm.eps == 1e-6  # too small to show in the predictions
    assert not caplog.records
    save_learner(learner, tmp_path / "ours.safetensors")
    assert_same_predictions(load_learner(tmp_path / "ours.safetensors", device="cpu"), theirs)


def test_the_widths_of_the_huge_network_have_heads_of_80_channels(tmp_path: Path) -> None:
    theirs = randomised(Pretraining(decoder_dim=640, decoder_heads=8))
    assert_same_predictions(load(save(tmp_path / "huge.pth", theirs.state_dict())), theirs)


def test_adamaes_sampler_is_left_behind_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = randomised(Pretraining(sampler=True))
    assert any(name.startswith("encoder.get_token_probs.0.attn") for name in theirs.state_dict())
    learner = load(save(tmp_path / "adamae.pth", theirs.state_dict()))
    assert_same_predictions(learner, theirs)
    assert "left behind, for it is no part of an MAE: encoder.pos_embed_probs, encoder.get_token_probs.0" in caplog.text


@pytest.mark.parametrize("key", ["model", "module"])
@torch.no_grad()
def test_a_fine_tuned_network_gives_its_encoder_and_the_decoder_starts_anew(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = randomised(Encoder(128, 2, 2, classes=5))
    learner = load(save(tmp_path / "finetuned.pth", theirs.state_dict(), key))
    assert "holds an encoder alone: the decoder starts from its initial weights" in caplog.text
    assert (
        "left behind, for it is no part of an MAE: fc_norm.weight, fc_norm.bias, head.weight and 1 more" in caplog.text
    )
    patches, every = learner.normalize(GRID.patchify(clips())), torch.arange(N).expand(2, -1)
    pooled = learner.model.encode(patches, every).mean(1)
    torch.testing.assert_close(theirs.head(theirs.fc_norm(pooled)), theirs.logits(pixels()), rtol=0, atol=1e-5)
    assert learner.errors(clips(), masks()).reconstruction_error.isfinite().all()


def test_names_of_a_network_wrapped_for_several_processes_are_understood(tmp_path: Path, theirs: Any) -> None:
    wrapped = {f"module.{name}": x for name, x in theirs.state_dict().items()}
    assert_same_predictions(load(save(tmp_path / "ddp.pth", wrapped)), theirs)


def test_half_precision_and_torchs_old_format_load_too(tmp_path: Path, theirs: Any) -> None:
    path = tmp_path / "old.pth"
    content = {"model": theirs.half().state_dict(), "args": command_line()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_same_predictions(load(path), theirs.float())


def test_an_environment_takes_one_and_gives_it_its_clips(tmp_path: Path, theirs: Any) -> None:
    path = save(tmp_path / "checkpoint.pth", theirs.state_dict())
    options: dict[str, Any] = {"num_frames": 4, "size": 16, "tubelet_size": 2, "patch_size": 4, "num_videos": 4}
    for name in (f"pth:{path}", path):
        assert_same_predictions(TATSMaskingEnv(mae=name, **options).mae, theirs)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TATSMaskingEnv(mae="pth:/nowhere.pth", **options)


def test_training_goes_on_from_there(tmp_path: Path, theirs: Any) -> None:
    path = save(tmp_path / "checkpoint.pth", theirs.state_dict())
    learner, losses = load_learner(path, device="cpu", grid=GRID, learning_rate=3e-3), []
    for _ in range(20):
        losses.append(float(learner.reconstruct(clips(), masks()).reconstruction_error.mean()))
        learner.update()
    assert losses[-1] < 0.9 * losses[0]


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, "does not say for which clips it is: give a grid"),
        (TokenGrid(4, 16, 16, 2, 8), "tokens are 2 x 4 x 4 .* cut into 2 x 8 x 8: give tubelet_size=2, patch_size=4"),
        (TokenGrid(4, 16, 16, 4, 4), "tokens are 2 x 4 x 4 .* cut into 4 x 4 x 4: give tubelet_size=2, patch_size=4"),
        (TokenGrid(8, 16, 16, 2, 4), "trained on clips of num_frames=4, but these have num_frames=8"),
        (TokenGrid(4, 16, 32, 2, 4), "trained on clips of input_size=16, but these have width=32"),
    ],
)
def test_other_clips_than_it_was_trained_on_are_refused(
    tmp_path: Path, theirs: Any, grid: TokenGrid | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.pth.*{message}"):
        load(save(tmp_path / "checkpoint.pth", theirs.state_dict()), grid)


def test_without_its_command_line_the_clips_are_left_to_the_caller(tmp_path: Path, theirs: Any) -> None:
    path = save(tmp_path / "bare.pth", theirs.state_dict(), args=None)
    assert load(path, TokenGrid(8, 32, 16, 2, 4)).grid.num_tokens == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normlize_target": False}, "this decoder predicts plain pixels"),
        ({"imagenet_default_mean_and_std": False}, "its pixels are normalised otherwise"),
    ],
)
def test_a_network_for_other_pixels_is_refused(
    tmp_path: Path, theirs: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "checkpoint.pth", theirs.state_dict(), args=command_line(**given)))


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.blocks.1.attn.q_bias"), r"missing: encoder\.blocks\.1\.attn\.q_bias$"),
        (lambda w: w.pop("mask_token"), "missing: mask_token$"),
        (lambda w: w.pop("decoder.head.bias"), r"missing: decoder\.head\.bias$"),
        (lambda w: w.pop("encoder.patch_embed.proj.weight"), r"patch_embed\.proj\.weight is missing"),
        (lambda w: w.pop("encoder_to_decoder.weight"), r"encoder_to_decoder\.weight is missing"),
        (lambda w: w.pop("decoder.blocks.0.mlp.fc1.weight"), r"decoder\.blocks\.0\.mlp\.fc1\.weight is missing"),
        (lambda w: w.update({"mask_token": 3}), "missing: mask_token$"),
        (
            lambda w: w.update({"mask_token": torch.zeros(1, 1, 65)}),
            r"of another shape: mask_token, \(1, 1, 65\) rather than \(1, 1, 64\)$",
        ),
        (
            lambda w: w.update({"encoder.blocks.0.attn.qkv.weight": torch.zeros(96, 128)}),
            r"of another shape: encoder\.blocks\.0\.attn\.qkv\.weight, \(96, 128\) rather than \(384, 128\)$",
        ),
        (lambda w: w.update({"encoder.blocks.0.gamma_1": torch.ones(128)}), r"not asked for: .*\.gamma_1$"),
        (lambda w: w.update({"encoder.pos_embed": torch.ones(1, 33, 128)}), r"not asked for: encoder\.pos_embed$"),
        (
            lambda w: w.update({x.replace("blocks.1", "blocks.2"): w.pop(x) for x in list(w) if "blocks.1" in x}),
            r"missing: encoder\.blocks\.1\..*; not asked for: encoder\.blocks\.2\.",
        ),
        (
            lambda w: w.update({"encoder.patch_embed.proj.weight": torch.zeros(100, 3, 2, 4, 4)}),
            r"encoder\.blocks has width 100, which none of the released networks has",
        ),
        (
            lambda w: w.update({"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 4, 4)}),
            "of no three-dimensional convolution",
        ),
    ],
)
def test_weights_of_another_network_are_refused_and_named(
    tmp_path: Path, theirs: Any, change: Change, message: str
) -> None:
    weights = theirs.state_dict()
    change(weights)
    with pytest.raises(ValueError, match=f"(?s)checkpoint.pth.*{message}"):
        load(save(tmp_path / "checkpoint.pth", weights))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 3}, "has state_dict, epoch; the weights must be under 'model' or 'module'"),
        ({"model": {}}, "has model; the weights must be"),
        ({"model": {0: torch.zeros(1)}}, "has model; the weights must be"),
        (torch.zeros(3), "holds no dictionary; the weights must be"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"odd.pth {message}"):
        load(tmp_path / "odd.pth")


def test_a_missing_or_damaged_file_is_told(tmp_path: Path, theirs: Any) -> None:
    for path in (tmp_path / "none.pth", f"pth:{tmp_path / 'none'}", f"pth:{tmp_path}"):
        with pytest.raises(FileNotFoundError, match="does not exist, or is not a file"):
            load(path)
    good = save(tmp_path / "good.pth", theirs.state_dict()).read_bytes()
    for content in (*(good[: len(good) * i // 8] for i in range(8)), good[:-1], b"no checkpoint at all"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pth is damaged, or holds more than tensors"):
            load(tmp_path / "bad.pth")


class Bomb:
    """Leaves a trace should anything unpickle it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


class Other(argparse.Namespace):
    """Not the class that is allowed."""


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path, theirs: Any, zipped: bool) -> None:
    weights, bomb, path = theirs.state_dict(), Bomb(tmp_path / "trace"), tmp_path / "hostile.pth"
    contents: list[tuple[Any, str]] = [
        ({"model": weights, "args": bomb}, "posix.mkdir"),
        ({"model": weights, "args": command_line(hidden=bomb)}, "posix.mkdir"),
        ({"model": {**weights, "mask_token": bomb}}, "posix.mkdir"),
        ({"model": weights, "args": Other(model="base")}, "Other"),
        ({"model": weights, "args": types.SimpleNamespace(model="base")}, "SimpleNamespace"),
    ]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    for content, name in contents:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"an argparse\.Namespace \([\w.]*{name}\), and was not loaded"):
            load(path)
        assert not bomb.trace.exists()
    # Nor is more allowed to whoever loads next
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    torch.load(path, weights_only=False)  # the last one is harmless
    torch.save(contents[0][0], path)
    torch.load(path, weights_only=False)
    assert bomb.trace.is_dir()  # had it been run, it would have shown
