"""The masked autoencoder and its learner against VideoMAE written out literally, in float64."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import SIZES, MAELearner, MAESize, VideoMAE, load_learner, save_learner
from tats_env.mae.learner import motion_errors, patch_targets
from tats_env.mae.model import gather_tokens, position_table

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)  # N = 32
N, K = GRID.num_tokens, 6
SMALLEST = MAESize(24, 2, 3, 12, 1, 2)
SIZE = SIZES["tiny"]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def make(**options: Any) -> MAELearner:
    return MAELearner(GRID, device="cpu", **options)


def moving_gradients(batch: int = 2, seed: int = 0) -> Tensor:
    """Smooth colour waves that drift: clips with something to learn, uint8 [B, T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    wave, phase = rng.uniform(-0.4, 0.4, (batch, 1, 1, 1, 1, 3)), rng.uniform(0, 6.28, (batch, 1, 1, 1, 3))
    t, y, x = (np.arange(n).reshape(shape) for n, shape in ((4, (-1, 1, 1, 1)), (16, (-1, 1, 1)), (16, (-1, 1))))
    angle = wave[..., 0] * y + wave[..., 1] * x + 2 * wave[..., 2] * t + phase
    return torch.from_numpy((127.5 + 120 * np.sin(angle)).astype(np.uint8))


def masks(batch: int = 2, k: int = K, seed: int = 0) -> Tensor:
    scores = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(1)[:, :k].sort(1).values


def weights(learner: MAELearner) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in learner.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def predictions(learner: MAELearner, clips: Tensor, visible: Tensor) -> Tensor:
    """What the network says when the learner scores clips: [B, N - K, P]."""
    found: list[Tensor] = []
    handle = learner.model.register_forward_hook(lambda module, args, output: found.append(output))
    learner.errors(clips, visible)
    handle.remove()
    return found[0]


def randomised(size: MAESize) -> VideoMAE:
    """Float64, and far from initialisation, so that biases, norms and attention all matter."""
    torch.manual_seed(0)
    model = VideoMAE(GRID, size).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# The network, term by term ------------------------------------------------------------------------------------


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
    return torch.einsum("oi,ni->no", w[f"{name}.weight"], x) + w.get(f"{name}.bias", torch.zeros(1))


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
    model, visible = randomised(size), masks()
    patches = torch.randn(2, N, GRID.patch_dim, dtype=torch.float64)
    found = model(gather_tokens(patches, visible), visible, hidden_tokens(visible, N))
    w = model.state_dict()
    expected = [literal_videomae(w, size, *clip) for clip in zip(patches, visible.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)  # positions are float32


def test_the_encoder_runs_on_the_visible_tokens_only_and_the_decoder_on_all() -> None:
    learner, seen = make(), []
    for block in (*learner.model.blocks, *learner.model.decoder_blocks):
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].shape[1], output.shape[1])))
    learner.reconstruct(moving_gradients(), masks())
    assert seen == [(K, K)] * len(learner.model.blocks) + [(N, N)] * len(learner.model.decoder_blocks)


def test_attention_is_scaled_dot_product_attention_in_every_block() -> None:
    class Calls(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.nn.functional.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    learner = make()
    with Calls() as calls:
        learner.reconstruct(moving_gradients(), masks())
    assert calls.count == len(learner.model.blocks) + len(learner.model.decoder_blocks)


def test_embedding_gathered_patches_is_gathering_the_embedding_of_all() -> None:
    model, visible = randomised(SMALLEST), masks()
    patches = torch.randn(2, N, GRID.patch_dim, dtype=torch.float64)
    entered: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.encode(gather_tokens(patches, visible), visible)
    torch.testing.assert_close(entered[0], gather_tokens(model.tokens(patches), visible), rtol=0, atol=1e-12)


def test_predictions_depend_on_visible_pixels_and_not_on_hidden_ones() -> None:
    learner, clips, visible = make(), moving_gradients(), masks()
    patches = GRID.patchify(clips)
    noise = torch.randint(0, 256, patches.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shown = visible_mask(visible, N)[..., None]
    before = predictions(learner, clips, visible)
    assert torch.equal(predictions(learner, GRID.unpatchify(torch.where(shown, patches, noise)), visible), before)
    changed = patches.clone()
    changed[0, visible[0, 0], 0] ^= 255  # one value of one visible token of the first clip
    after = predictions(learner, GRID.unpatchify(changed), visible)
    assert (after[0] != before[0]).any(dim=1).all()
    assert torch.equal(after[1], before[1])


def test_the_order_of_visible_tokens_does_not_matter_but_their_places_do() -> None:
    model, visible = randomised(SMALLEST), masks(batch=1)
    hidden = hidden_tokens(visible, N)
    pixels = torch.randn(1, K, GRID.patch_dim, dtype=torch.float64)
    expected = model(pixels, visible, hidden)
    torch.testing.assert_close(model(pixels.flip(1), visible.flip(1), hidden), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(pixels, visible, hidden.flip(1)).flip(1), expected, rtol=0, atol=1e-9)
    assert (model(pixels.flip(1), visible, hidden) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("size", "encoder", "everything"), [("small", 22.0, None), ("base", 86.2, 94.2), ("large", 304.0, None)])
def test_sizes_have_the_published_numbers_of_parameters(size: str, encoder: float, everything: float | None) -> None:
    with torch.device("meta"):
        model = VideoMAE(TokenGrid(), SIZES[size])
    millions = {name: x.numel() / 1e6 for name, x in model.named_parameters()}
    of_encoder = sum(n for name, n in millions.items() if name.startswith(("patch_embed", "blocks", "norm")))
    assert of_encoder == pytest.approx(encoder, rel=0.01)
    assert everything is None or sum(millions.values()) == pytest.approx(everything, rel=0.005)


def test_the_tiny_size_has_about_half_a_million_parameters_in_the_default_environment() -> None:
    model = VideoMAE(TokenGrid(16, 32, 32, 2, 8), SIZE)
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(0.5e6, rel=0.1)


# What the learner measures --------------------------------------------------------------------------------------


def float_patches(clips: Tensor) -> np.ndarray:
    """Pixels in [0, 1], float64 [B, N, tubelet * p * p, 3]."""
    return GRID.patchify(clips).unflatten(2, (-1, 3)).double().numpy() / 255


def test_targets_are_patches_less_their_mean_over_their_unbiased_deviation_per_channel() -> None:
    pixels = float_patches(moving_gradients())
    target, variance = patch_targets(torch.from_numpy(pixels))
    deviation = np.std(pixels, axis=2, ddof=1, keepdims=True)
    np.testing.assert_allclose(target, (pixels - pixels.mean(2, keepdims=True)) / (deviation + 1e-6), atol=1e-10)
    np.testing.assert_allclose(variance, deviation**2, atol=1e-12)


def test_a_flat_patch_has_a_target_of_zero() -> None:
    target, variance = patch_targets(torch.full((1, 1, 32, 3), 0.5))
    assert (target == 0).all() and (variance == 0).all()


def test_the_network_sees_pixels_normalised_by_imagenets_mean_and_deviation() -> None:
    learner, clips = make(), moving_gradients()
    pixels = torch.from_numpy(((float_patches(clips) - MEAN) / STD).reshape(2, N, -1))
    w = {name: x.double() for name, x in weights(learner).items()}
    positions = literal_positions(SIZE.embed_dim, SIZE.separable_positions)
    tokens = torch.stack([literal_linear(w, "patch_embed", clip) + positions for clip in pixels])
    torch.testing.assert_close(learner.tokens(clips).flatten(1, 2).double(), tokens, rtol=0, atol=1e-4)
    every = list(range(N))
    features = torch.stack([literal_encoder(w, SIZE, clip, every) for clip in pixels])
    torch.testing.assert_close(learner.features(clips).flatten(1, 2).double(), features, rtol=0, atol=1e-4)
    visible = masks()
    expected = [literal_videomae(w, SIZE, *clip) for clip in zip(pixels, visible.tolist(), strict=True)]
    found = predictions(learner, clips, visible)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=1e-4)


def test_errors_by_token_equal_literal_loops_over_pixels() -> None:
    learner, clips, visible = make(), moving_gradients(batch=3), masks(batch=3)
    found = learner.errors(clips, visible)
    predicted = predictions(learner, clips, visible).double().numpy()
    pixels = float_patches(clips)
    token_error, motion_error = np.zeros((3, N)), np.zeros((3, N))
    for b in range(3):
        for row, i in enumerate(sorted(set(range(N)) - set(visible[b].tolist()))):
            prediction = predicted[b, row].reshape(2, 16, 3)  # frame, pixel, channel
            for c in range(3):
                truth = pixels[b, i, :, c].reshape(2, 16)
                mean, deviation = truth.mean(), truth.std(ddof=1)
                token_error[b, i] += ((prediction[..., c] - (truth - mean) / (deviation + 1e-6)) ** 2).mean() / 3
                drawn = prediction[..., c] * deviation + mean  # as pixels: what changes from frame to frame?
                motion_error[b, i] += (((drawn[1] - drawn[0]) - (truth[1] - truth[0])) ** 2).mean() / 2 / 3
    np.testing.assert_allclose(found.token_error, token_error, rtol=1e-4)
    np.testing.assert_allclose(found.motion_error, motion_error, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.reconstruction_error, token_error.sum(1) / (N - K), rtol=1e-4)
    shown = visible_mask(visible, N)
    assert (found.token_error[shown] == 0).all() and (found.motion_error[shown] == 0).all()
    assert (found.token_error[~shown] > 0).all() and (found.motion_error[~shown] > 0).all()


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_motion_error_averages_over_the_pairs_of_frames_in_a_tubelet(tubelet: int) -> None:
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 2, 5, tubelet * 4, 3))
    variance = rng.uniform(0.1, 2, (2, 5, 1, 3))
    expected = np.zeros((2, 5))
    for b, m in np.ndindex(2, 5):
        off = (prediction - target)[b, m].reshape(tubelet, 4, 3)
        changes = [variance[b, m, 0] * (off[u + 1] - off[u]) ** 2 / 2 for u in range(tubelet - 1)]
        expected[b, m] = np.mean(changes) if changes else 0
    found = motion_errors(*(torch.from_numpy(x) for x in (prediction, target, variance)), tubelet)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_pictures_keep_visible_pixels_and_undo_the_normalisation_of_hidden_ones() -> None:
    learner, clips, visible = make(), moving_gradients(), masks()
    found, patches = GRID.patchify(learner.predict_pixels(clips, visible)), GRID.patchify(clips)
    shown, hidden = visible_mask(visible, N), hidden_tokens(visible, N)
    assert torch.equal(found[shown], patches[shown])
    truth = np.take_along_axis(float_patches(clips), hidden.numpy()[:, :, None, None], 1)
    predicted = predictions(learner, clips, visible).unflatten(2, (-1, 3)).numpy()
    drawn = predicted * truth.std(2, ddof=1, keepdims=True) + truth.mean(2, keepdims=True)
    painted = gather_tokens(found, hidden).unflatten(2, (-1, 3)).numpy()
    np.testing.assert_allclose(painted, drawn.clip(0, 1) * 255, atol=1.01)


# One forward pass, one step ---------------------------------------------------------------------------------------


def test_an_update_learns_from_the_newest_reconstruction_only() -> None:
    twice, once = make(), make()
    twice.reconstruct(moving_gradients(seed=1), masks(seed=1))
    for learner in (twice, once):
        learner.reconstruct(moving_gradients(seed=2), masks(seed=2))
        learner.update()
    assert same(weights(twice), weights(once))
    assert not same(weights(twice), weights(make()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_an_update_does_not_care_for_the_callers_gradient_mode(mode: Any) -> None:
    learner, plain = make(), make()
    for step in range(3):
        plain.reconstruct(moving_gradients(seed=step), masks(seed=step))
        plain.update()
        with mode():
            result = learner.reconstruct(moving_gradients(seed=step), masks(seed=step))
            learner.update()
        assert not any(x.requires_grad for x in result)
    assert same(weights(learner), weights(plain))
    with mode():
        assert learner.metrics() == plain.metrics()


def test_an_update_without_a_forward_pass_of_its_own_is_an_error() -> None:
    learner = make()
    with pytest.raises(RuntimeError, match="reconstruct"):
        learner.update()
    learner.reconstruct(moving_gradients(), masks())
    learner.update()
    with pytest.raises(RuntimeError, match="reconstruct"):
        learner.update()
    assert learner.metrics()["mae/n_updates"] == 1


def test_outside_training_mode_no_graph_is_kept() -> None:
    learner = make()
    assert learner.train(False) is learner
    found = learner.reconstruct(moving_gradients(), masks())
    with pytest.raises(RuntimeError, match=r"train\(True\)"):
        learner.update()
    expected = learner.train().reconstruct(moving_gradients(), masks())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_asking_for_errors_leaves_the_waiting_graph_alone() -> None:
    learner, plain = make(), make()
    for each in (learner, plain):
        each.reconstruct(moving_gradients(seed=1), masks(seed=1))
    learner.errors(moving_gradients(seed=2), masks(seed=2))
    learner.tokens(moving_gradients(seed=2))
    learner.features(moving_gradients(seed=2))
    learner.predict_pixels(moving_gradients(seed=2), masks(seed=2))
    for each in (learner, plain):
        each.update()
    assert same(weights(learner), weights(plain))


def test_an_update_is_adamw_on_the_mean_hidden_error_that_decays_matrices_only() -> None:
    learner = make(learning_rate=1e-2, weight_decay=0.5)
    model = copy.deepcopy(learner.model)
    matrices = [p for name, p in model.named_parameters() if name.endswith("weight") and "norm" not in name]
    rest = [p for name, p in model.named_parameters() if not (name.endswith("weight") and "norm" not in name)]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=True)
    for step in range(3):
        clips, visible = moving_gradients(seed=step), masks(seed=step)
        hidden = hidden_tokens(visible, N)
        pixels = torch.from_numpy(float_patches(clips)).float()
        seen = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).flatten(2).float()
        truth = torch.stack([x[i] for x, i in zip(pixels, hidden, strict=True)])
        target = (truth - truth.mean(2, keepdim=True)) / (truth.std(2, keepdim=True) + 1e-6)
        optimizer.zero_grad()
        loss = (model(gather_tokens(seen, visible), visible, hidden) - target.flatten(2)).square().mean()
        loss.backward()
        optimizer.step()
        learner.reconstruct(clips, visible)
        learner.update()
        assert learner.metrics()["mae/loss"] == pytest.approx(float(loss), rel=1e-5)
    for (name, found), expected in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        if name.endswith("qkv.bias"):  # softmax does not see the key's bias, so Adam scales up its rounding noise
            found, expected = (x.unflatten(0, (3, -1))[[0, 2]] for x in (found, expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ("tiny", {"learning_rate": 3e-4, "batch_size": 64}, 3e-4),
        ("tiny", {"base_learning_rate": 1e-3, "batch_size": 64}, 2.5e-4),
        ("tiny", {"batch_size": 64}, 1.5e-3),
        ("small", {"batch_size": 64}, 1.5e-4 / 4),
        ("small", {"batch_size": 512}, 3e-4),
    ],
)
def test_a_learning_rate_is_absolute_and_a_base_one_counts_256_clips(
    size: str, options: dict[str, Any], expected: float
) -> None:
    assert make(size=size, **options).metrics()["mae/learning_rate"] == pytest.approx(expected)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        make(learning_rate=1e-3, base_learning_rate=1e-3)
    with pytest.raises(ValueError, match="'huge' is unknown; give one of tiny, small, base, large"):
        make(size="huge")


def rates(learner: MAELearner, updates: int) -> list[float]:
    """The learning rate of each update."""
    found = []
    for _ in range(updates):
        found.append(learner.optimizer.param_groups[0]["lr"])
        assert all(group["lr"] == found[-1] for group in learner.optimizer.param_groups)
        learner.reconstruct(moving_gradients(1), masks(1))
        learner.update()
    return found


def test_the_rate_warms_up_on_a_line_and_falls_on_a_cosine_to_one_per_cent() -> None:
    found = rates(make(learning_rate=1e-3, warmup_steps=4, total_steps=12), 15)
    warmup = [0.01 + 0.99 * t / 4 for t in range(4)]
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(9)]
    assert found == pytest.approx([1e-3 * x for x in warmup + cosine + [0.01, 0.01]])


def test_without_an_end_the_rate_stays_where_the_warm_up_left_it() -> None:
    assert rates(make(learning_rate=1e-3, warmup_steps=2), 5) == pytest.approx([1e-5, 5.05e-4, 1e-3, 1e-3, 1e-3])
    assert rates(make(learning_rate=1e-3), 3) == pytest.approx([1e-3] * 3)


# Steps that go wrong ------------------------------------------------------------------------------------------------


@contextmanager
def broken(learner: MAELearner, what: str) -> Iterator[None]:
    """Make the loss NaN, or keep it and make one gradient infinite."""
    if what == "loss":
        handle = learner.model.decoder_head.register_forward_hook(lambda module, args, output: output * math.nan)
    else:
        handle = learner.model.mask_token.register_hook(lambda gradient: gradient * math.inf)
    yield
    handle.remove()


def step(learner: MAELearner, times: int = 1) -> None:
    for _ in range(times):
        learner.reconstruct(moving_gradients(1), masks(1))
        learner.update()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone_and_is_counted(what: str, steps_before: int) -> None:
    learner, plain = make(), make()
    step(learner, steps_before)
    step(plain, steps_before)
    with broken(learner, what):
        step(learner, 3)
    assert same(weights(learner), weights(plain))
    step(learner)
    step(plain)
    assert same(weights(learner), weights(plain))  # which differ if a moment or its count of steps did
    found, expected = learner.metrics(), plain.metrics()
    assert (found["mae/skipped_updates"], expected["mae/skipped_updates"]) == (3, 0)
    assert found["mae/loss"] == expected["mae/loss"] and math.isfinite(found["mae/loss"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_twenty_broken_steps_in_a_row_raise_and_nineteen_do_not(what: str) -> None:
    learner = make(learning_rate=0.0015)
    with broken(learner, what):
        step(learner, 19)
        assert learner.metrics()["mae/skipped_updates"] == 19
        step(learner)
        with pytest.raises(FloatingPointError, match=r"20 updates in a row \(learning rate 0.0015\).*learning_rate"):
            learner.metrics()


def test_a_good_step_in_between_starts_the_count_anew() -> None:
    learner = make()
    for _ in range(2):
        with broken(learner, "loss"):
            step(learner, 19)
        step(learner)
        assert learner.metrics()["mae/n_updates"] % 20 == 0
    assert learner.metrics()["mae/skipped_updates"] == 38


# Learners as a whole --------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_weights_and_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert same(weights(first), weights(again)) and same(weights(first), weights(make(seed=3)))
    assert not torch.equal(weights(first)["patch_embed.weight"], weights(other)["patch_embed.weight"])


def test_copying_a_learner_gives_the_same_learner() -> None:
    learner = make()
    assert copy.deepcopy({"mae": [learner]})["mae"][0] is learner


def test_making_a_learner_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    make()
    make(warmup_steps=3, total_steps=10)
    assert not caplog.records


def test_the_loss_falls_where_there_is_something_to_learn() -> None:
    learner, test = make(), (moving_gradients(32, seed=999), masks(32, seed=999))
    before = float(learner.errors(*test).reconstruction_error.mean())
    for i in range(60):
        learner.reconstruct(moving_gradients(8, seed=i), masks(8, seed=i))
        learner.update()
    after = float(learner.errors(*test).reconstruction_error.mean())
    assert after < 0.7 * before, (before, after)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_the_same_errors_back(tmp_path: Path) -> None:
    learner = make(seed=5)
    step(learner, 2)
    save_learner(learner, tmp_path / "mae.safetensors")
    again = load_learner(tmp_path / "mae.safetensors", device="cpu", learning_rate=2e-4)
    assert (again.grid, again.size, again.metrics()["mae/learning_rate"]) == (GRID, "tiny", pytest.approx(2e-4))
    assert same(weights(again), weights(learner))
    for a, b in zip(again.errors(moving_gradients(), masks()), learner.errors(moving_gradients(), masks()), strict=True):
        assert torch.equal(a, b)
    step(again)
    assert not same(weights(again), weights(learner))


def test_a_missing_checkpoint_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_learner(tmp_path / "none.safetensors", device="cpu")


class Bomb:
    """Ends the test should anything unpickle it."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("the file was unpickled",)


def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    save_learner(make(), tmp_path / "good")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    content = {
        "empty": b"",
        "garbage": b"hello, this is no checkpoint at all",
        "pickle": pickle.dumps(Bomb()),
        "cut short": (tmp_path / "good").read_bytes()[:-100],
        "foreign": (tmp_path / "foreign").read_bytes(),
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_learner(tmp_path / name, device="cpu")
    torch.save({"bomb": Bomb()}, tmp_path / "torch")
    with pytest.raises(ValueError, match="torch"):
        load_learner(tmp_path / "torch", device="cpu")


def test_a_checkpoint_with_parts_missing_is_refused(tmp_path: Path) -> None:
    learner = make()
    grid = '{"num_frames": 4, "height": 16, "width": 16, "tubelet_size": 2, "patch_size": 4}'
    good = {"format": "tats-env mae 1", "size": "tiny", "grid": grid}
    part = {name: x for name, x in learner.model.state_dict().items() if name != "mask_token"}
    wide = {**learner.model.state_dict(), "mask_token": torch.zeros(1, 1, 7)}
    cases = [(part, good), (wide, good), (learner.model.state_dict(), {**good, "grid": "{"})]
    cases += [(learner.model.state_dict(), {k: v for k, v in good.items() if k != key}) for key in good]
    for tensors, metadata in cases:
        save_file(dict(tensors), tmp_path / "partial", metadata)
        with pytest.raises(ValueError, match="partial"):
            load_learner(tmp_path / "partial", device="cpu")
