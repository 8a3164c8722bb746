"""The learner of the masked autoencoder: what it measures, how it steps, and its checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import SIZES, MAELearner, MAESize, load_learner, save_learner
from tats_env.mae.errors import motion_errors, patch_targets
from tats_env.mae.model import gather_tokens

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)  # N = 32
N, K = GRID.num_tokens, 6
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def make(**options: Any) -> MAELearner:
    return MAELearner(GRID, device="cpu", **options)


def moving_ramps(batch: int = 2, seed: int = 0) -> Tensor:
    """Ramps of brightness in any direction, steeper in some channels, that drift: uint8 [B, T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    angle, speed = rng.uniform(0, 2 * np.pi, (batch, 1, 1, 1)), rng.uniform(-3, 3, (batch, 1, 1, 1))
    t, y, x = (np.arange(n).reshape(shape) - (n - 1) / 2 for n, shape in ((4, (-1, 1, 1)), (16, (-1, 1)), (16, -1)))
    ramp = np.sin(angle) * y + np.cos(angle) * x + speed * t
    return torch.from_numpy((127.5 + ramp[..., None] * np.array([8, -6, 4])).astype(np.uint8))


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


# What the learner measures ---------------------------------------------------------------------------------


def float_patches(clips: Tensor) -> np.ndarray:
    """Pixels in [0, 1], float64 [B, N, tubelet * p * p, 3]."""
    return GRID.patchify(clips).unflatten(2, (-1, 3)).double().numpy() / 255


def test_targets_are_patches_less_their_mean_over_their_unbiased_deviation_per_channel() -> None:
    pixels = float_patches(moving_ramps())
    target, variance = patch_targets(torch.from_numpy(pixels))
    deviation = np.std(pixels, axis=2, ddof=1, keepdims=True)
    np.testing.assert_allclose(target, (pixels - pixels.mean(2, keepdims=True)) / (deviation + 1e-6), atol=1e-10)
    np.testing.assert_allclose(variance, deviation**2, atol=1e-12)


def test_a_flat_patch_has_a_target_of_zero() -> None:
    target, variance = patch_targets(torch.full((1, 1, 32, 3), 0.5))
    assert (target == 0).all() and (variance == 0).all()


def test_the_network_sees_pixels_normalised_by_imagenets_mean_and_deviation() -> None:
    learner, clips, visible = make(), moving_ramps(), masks()
    model, every = learner.model, torch.arange(N).expand(2, -1)
    pixels = torch.from_numpy(((float_patches(clips) - MEAN) / STD).reshape(2, N, -1)).float()
    expected = model(gather_tokens(pixels, visible), visible, hidden_tokens(visible, N))
    torch.testing.assert_close(predictions(learner, clips, visible), expected, rtol=0, atol=1e-5)
    for found, expected in (
        (learner.tokens(clips), model.tokens(pixels)),
        (learner.features(clips), model.encode(pixels, every)),
    ):
        assert found.shape == (2, GRID.num_steps, GRID.num_positions, learner.embed_dim)
        assert not found.requires_grad
        torch.testing.assert_close(found.flatten(1, 2), expected, rtol=0, atol=1e-5)


def test_predictions_depend_on_visible_pixels_and_not_on_hidden_ones() -> None:
    learner, clips, visible = make(), moving_ramps(), masks()
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


def test_errors_by_token_equal_literal_loops_over_pixels() -> None:
    learner, clips, visible = make(), moving_ramps(batch=3), masks(batch=3)
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
    tensors = [torch.from_numpy(x) for x in (prediction, target, variance)]
    found = motion_errors(tensors[0], tensors[1], tensors[2], tubelet)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_pictures_keep_visible_pixels_and_undo_the_normalisation_of_hidden_ones() -> None:
    learner, clips, visible = make(), moving_ramps(), masks()
    found, patches = GRID.patchify(learner.predict_pixels(clips, visible)), GRID.patchify(clips)
    shown, hidden = visible_mask(visible, N), hidden_tokens(visible, N)
    assert torch.equal(found[shown], patches[shown])
    truth = np.take_along_axis(float_patches(clips), hidden.numpy()[:, :, None, None], 1)
    predicted = predictions(learner, clips, visible).unflatten(2, (-1, 3)).numpy()
    drawn = predicted * truth.std(2, ddof=1, keepdims=True) + truth.mean(2, keepdims=True)
    painted = gather_tokens(found, hidden).unflatten(2, (-1, 3)).numpy()
    np.testing.assert_allclose(painted, drawn.clip(0, 1) * 255, atol=1.01)


# One forward pass, one step --------------------------------------------------------------------------------


def test_an_update_learns_from_the_newest_reconstruction_only() -> None:
    twice, once = make(), make()
    twice.reconstruct(moving_ramps(seed=1), masks(seed=1))
    for learner in (twice, once):
        learner.reconstruct(moving_ramps(seed=2), masks(seed=2))
        learner.update()
    assert same(weights(twice), weights(once))
    assert not same(weights(twice), weights(make()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_an_update_does_not_care_for_the_callers_gradient_mode(mode: Any) -> None:
    learner, plain = make(), make()
    for step in range(3):
        plain.reconstruct(moving_ramps(seed=step), masks(seed=step))
        plain.update()
        with mode():
            result = learner.reconstruct(moving_ramps(seed=step), masks(seed=step))
            learner.update()
        assert not any(x.requires_grad for x in result)
    assert same(weights(learner), weights(plain))
    with mode():
        assert learner.metrics() == plain.metrics()


def test_an_update_without_a_forward_pass_of_its_own_is_an_error() -> None:
    learner = make()
    with pytest.raises(RuntimeError, match="reconstruct"):
        learner.update()
    learner.reconstruct(moving_ramps(), masks())
    learner.update()
    with pytest.raises(RuntimeError, match="reconstruct"):
        learner.update()
    assert learner.metrics()["mae/n_updates"] == 1


def test_outside_training_mode_no_graph_is_kept() -> None:
    learner = make()
    assert learner.train(False) is learner
    found = learner.reconstruct(moving_ramps(), masks())
    with pytest.raises(RuntimeError, match=r"train\(True\)"):
        learner.update()
    expected = learner.train().reconstruct(moving_ramps(), masks())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_asking_for_errors_leaves_the_waiting_graph_alone() -> None:
    learner, plain = make(), make()
    for each in (learner, plain):
        each.reconstruct(moving_ramps(seed=1), masks(seed=1))
    learner.errors(moving_ramps(seed=2), masks(seed=2))
    learner.tokens(moving_ramps(seed=2))
    learner.features(moving_ramps(seed=2))
    learner.predict_pixels(moving_ramps(seed=2), masks(seed=2))
    for each in (learner, plain):
        each.update()
    assert same(weights(learner), weights(plain))


def test_an_update_is_adamw_on_the_mean_hidden_error_that_decays_matrices_only() -> None:
    learner = make(learning_rate=1e-2, weight_decay=10)
    model = copy.deepcopy(learner.model)
    matrices = [p for name, p in model.named_parameters() if name.endswith("weight") and "norm" not in name]
    rest = [p for name, p in model.named_parameters() if not (name.endswith("weight") and "norm" not in name)]
    groups = [{"params": matrices, "weight_decay": 10}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=True)
    for step in range(3):
        clips, visible = moving_ramps(seed=step), masks(seed=step)
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
        assert learner.metrics()["mae/loss"] == pytest.approx(float(loss.detach()), rel=1e-3)
    for (name, found), expected in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        if name.endswith("qkv.bias"):  # softmax does not see the key's bias, so Adam scales up its rounding noise
            found, expected = (x.unflatten(0, (3, -1))[[0, 2]] for x in (found, expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3, msg=name)


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
    with pytest.raises(ValueError, match="'huge' is unknown; give one of tiny, mini, small, base, large"):
        make(size="huge")


def rates(learner: MAELearner, updates: int) -> list[float]:
    """The learning rate of each update."""
    found = []
    for _ in range(updates):
        found.append(learner.optimizer.param_groups[0]["lr"])
        assert all(group["lr"] == found[-1] for group in learner.optimizer.param_groups)
        learner.reconstruct(moving_ramps(1), masks(1))
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


# Steps that go wrong ---------------------------------------------------------------------------------------


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
        learner.reconstruct(moving_ramps(1), masks(1))
        learner.update()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(what: str, steps_before: int) -> None:
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


# Learners as a whole ---------------------------------------------------------------------------------------


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


def test_the_loss_falls_far_below_that_of_a_constant_where_there_is_something_to_learn() -> None:
    learner, test = make(), (moving_ramps(32, seed=999), masks(32, seed=999))
    for i in range(60):
        learner.reconstruct(moving_ramps(8, seed=i), masks(8, seed=i))
        learner.update()
    constant = 31 / 32  # the error of predicting each patch's mean: its unbiased variance is 1
    assert float(learner.errors(*test).reconstruction_error.mean()) < 0.3 * constant


# Checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_the_same_errors_back(tmp_path: Path) -> None:
    learner = make(seed=5)
    step(learner, 2)
    save_learner(learner, tmp_path / "mae.safetensors")
    again = load_learner(tmp_path / "mae.safetensors", device="cpu", learning_rate=2e-4)
    assert (again.grid, again.size) == (GRID, "tiny")
    assert again.metrics()["mae/learning_rate"] == pytest.approx(2e-4)
    found, expected = (x.errors(moving_ramps(), masks()) for x in (again, learner))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    step(again)
    assert not same(weights(again), weights(learner))


def test_a_size_of_ones_own_trains_and_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    size = MAESize(24, 2, 3, 22, 1, 2, mlp_dim=31, decoder_mlp_dim=49, norm_eps=1e-3, final_norm=False)
    learner = make(size=size)
    widths = [block.mlp.fc1.out_features for block in (*learner.model.blocks, *learner.model.decoder_blocks)]
    assert widths == [31, 31, 49] and learner.embed_dim == 24
    step(learner, 2)
    save_learner(learner, tmp_path / "mae.safetensors")
    again = load_learner(tmp_path / "mae.safetensors", device="cpu")
    assert again.size == size
    assert torch.equal(
        again.errors(moving_ramps(), masks()).token_error, learner.errors(moving_ramps(), masks()).token_error
    )
    assert same(weights(make(size=SIZES["tiny"], seed=2)), weights(make(size="tiny", seed=2)))


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
    cases += [
        (learner.model.state_dict(), {**good, "size": size}) for size in ('{"wide": 3}', '{"embed_dim": 24', "[]")
    ]
    cases += [(learner.model.state_dict(), {k: v for k, v in good.items() if k != key}) for key in good]
    for tensors, metadata in cases:
        save_file(dict(tensors), tmp_path / "partial", metadata)
        with pytest.raises(ValueError, match="partial"):
            load_learner(tmp_path / "partial", device="cpu")
