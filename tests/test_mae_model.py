"""The masked autoencoder's network against VideoMAE written out literally, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tats_env.grid import TokenGrid, hidden_tokens
from tats_env.mae import SIZES, MAESize, VideoMAE
from tats_env.mae.model import gather_tokens, position_table

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)
N, K = GRID.num_tokens, 6
SMALLEST = MAESize(24, 2, 3, 12, 1, 2)


def masks(batch: int = 2) -> Tensor:
    scores = torch.rand(batch, N, generator=torch.Generator().manual_seed(0))
    return scores.argsort(1)[:, :K].sort(1).values


def randomised(size: MAESize) -> VideoMAE:
    """Float64, and far from initialisation, so that biases, norms and attention all matter."""
    torch.manual_seed(0)
    model = VideoMAE(GRID, size).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def random_patches(batch: int = 2) -> Tensor:
    return torch.randn(batch, N, GRID.patch_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model: VideoMAE, patches: Tensor, visible: Tensor) -> Tensor:
    return model(gather_tokens(patches, visible), visible, hidden_tokens(visible, N))


def literal_sinusoid(position: int, dim: int, longest: float) -> list[float]:
    angles = [position / math.pow(longest, 2 * (j // 2) / dim) for j in range(dim)]
    return [math.cos(angle) if j % 2 else math.sin(angle) for j, angle in enumerate(angles)]


def literal_positions(dim: int, separable: bool) -> Tensor:
    """[N, D]: of the flat token index, or of its time, row and column side by side."""
    if separable:
        places = [(t, h, w) for t in range(2) for h in range(4) for w in range(4)]
        table = [[x for axis in place for x in literal_sinusoid(axis, dim // 3, 100)] for place in places]
    else:
        table = [literal_sinusoid(i, dim, 10000) for i in range(N)]
    return torch.tensor(table, dtype=torch.float64)


def literal_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    deviation = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def literal_linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = torch.einsum("oi,ni->no", w[f"{name}.weight"], x)
    return y if name == "decoder_embed" else y + w[f"{name}.bias"]


def literal_block(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Pre-norm transformer block on one clip's tokens [n, D]."""
    n, dim = x.shape
    y = literal_linear(w, f"{name}.attn.qkv", literal_norm(w, f"{name}.norm1", x))
    q, k, v = y.reshape(n, 3, heads, dim // heads).unbind(1)
    logits = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(dim // heads)
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    x = x + literal_linear(w, f"{name}.attn.proj", torch.einsum("hnm,mhd->nhd", shares, v).reshape(n, dim))
    z = literal_linear(w, f"{name}.mlp.fc1", literal_norm(w, f"{name}.norm2", x))
    return x + literal_linear(w, f"{name}.mlp.fc2", z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))


def literal_encoder(w: dict[str, Tensor], size: MAESize, patches: Tensor, visible: list[int]) -> Tensor:
    """Latents [K, D] of one clip's normalised patches [N, P]."""
    positions = literal_positions(size.embed_dim, size.separable_positions)
    x = literal_linear(w, "patch_embed", patches[visible]) + positions[visible]
    for i in range(size.depth):
        x = literal_block(w, f"blocks.{i}", x, size.num_heads)
    return literal_norm(w, "norm", x)


def literal_videomae(w: dict[str, Tensor], size: MAESize, patches: Tensor, visible: list[int]) -> Tensor:
    """Predicted hidden patches [N - K, P] of one clip: bridge, mask tokens, positions, decoder, norm, head."""
    hidden = [i for i in range(len(patches)) if i not in visible]
    positions = literal_positions(size.decoder_embed_dim, size.separable_positions)
    latents = literal_encoder(w, size, patches, visible)
    x = torch.empty(len(patches), size.decoder_embed_dim, dtype=torch.float64)
    x[visible] = literal_linear(w, "decoder_embed", latents) + positions[visible]
    x[hidden] = w["mask_token"].reshape(-1) + positions[hidden]
    for i in range(size.decoder_depth):
        x = literal_block(w, f"decoder_blocks.{i}", x, size.decoder_num_heads)
    return literal_linear(w, "decoder_head", literal_norm(w, "decoder_norm", x))[hidden]


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("dim", [6, 24, 96])
def test_positions_are_sinusoids_of_the_flat_token_index_or_of_each_coordinate(dim: int, separable: bool) -> None:
    found = position_table(GRID, dim, separable)[0]
    torch.testing.assert_close(found.double(), literal_positions(dim, separable), rtol=0, atol=1e-7)


@pytest.mark.parametrize("separable", [False, True])
def test_the_network_is_videomae_term_by_term(separable: bool) -> None:
    size = replace(SMALLEST, separable_positions=separable)
    model, patches, visible = randomised(size), random_patches(), masks()
    found, w = run(model, patches, visible), model.state_dict()
    expected = [literal_videomae(w, size, *clip) for clip in zip(patches, visible.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)  # positions are float32


def test_the_encoder_runs_on_the_visible_tokens_only_and_the_decoder_on_all() -> None:
    model, seen = randomised(SMALLEST), []
    for block in (*model.blocks, *model.decoder_blocks):
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].shape[1], output.shape[1])))
    assert run(model, random_patches(), masks()).shape == (2, N - K, GRID.patch_dim)
    assert seen == [(K, K)] * SMALLEST.depth + [(N, N)] * SMALLEST.decoder_depth


def test_attention_is_scaled_dot_product_attention_in_every_block() -> None:
    class Calls(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.nn.functional.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    with Calls() as calls:
        run(randomised(SMALLEST), random_patches(), masks())
    assert calls.count == SMALLEST.depth + SMALLEST.decoder_depth


def test_embedding_gathered_patches_is_gathering_the_embedding_of_all() -> None:
    model, patches, visible = randomised(SMALLEST), random_patches(), masks()
    entered: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.encode(gather_tokens(patches, visible), visible)
    torch.testing.assert_close(entered[0], gather_tokens(model.tokens(patches), visible), rtol=0, atol=1e-12)


def test_the_order_of_visible_tokens_does_not_matter_but_their_places_do() -> None:
    model, visible = randomised(SMALLEST), masks(batch=1)
    hidden = hidden_tokens(visible, N)
    pixels = random_patches(1)[:, :K]
    expected = model(pixels, visible, hidden)
    torch.testing.assert_close(model(pixels.flip(1), visible.flip(1), hidden), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(pixels, visible, hidden.flip(1)).flip(1), expected, rtol=0, atol=1e-9)
    assert (model(pixels.flip(1), visible, hidden) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("size", "encoder", "everything"), [("small", 22.0, None), ("base", 86.2, 94.2), ("large", 304.0, None)]
)
def test_sizes_have_the_published_numbers_of_parameters(size: str, encoder: float, everything: float | None) -> None:
    with torch.device("meta"):
        model = VideoMAE(TokenGrid(), SIZES[size])
    millions = {name: x.numel() / 1e6 for name, x in model.named_parameters()}
    of_encoder = sum(n for name, n in millions.items() if name.startswith(("patch_embed", "blocks", "norm")))
    assert of_encoder == pytest.approx(encoder, rel=0.01)
    assert everything is None or sum(millions.values()) == pytest.approx(everything, rel=0.005)


def test_a_full_size_network_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = VideoMAE(TokenGrid(), SIZES["base"])
        patches = torch.empty(2, 78, TokenGrid().patch_dim)
        visible, hidden = torch.empty(2, 78, dtype=torch.int64), torch.empty(2, 1490, dtype=torch.int64)
        predicted = model(patches, visible, hidden)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers(), predicted))
    assert predicted.shape == (2, 1490, TokenGrid().patch_dim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=24"),
        ({"decoder_num_heads": 0}, "decoder_num_heads=0 does not divide decoder_embed_dim=12"),
        ({"decoder_embed_dim": 16, "separable_positions": True}, "decoder_embed_dim=16: .* a multiple of 3"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALLEST, **changes)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.5), ("mini", 3)])
def test_a_small_size_has_about_so_many_parameters_in_the_default_environment(size: str, millions: float) -> None:
    model = VideoMAE(TokenGrid(16, 32, 32, 2, 8), SIZES[size])
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)
