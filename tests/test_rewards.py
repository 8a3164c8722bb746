"""What each reward makes an agent prefer, on scenes where the right answer is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import MAELearner, Reconstruction
from tats_env.rewards import (
    REWARDS,
    Decision,
    motion_surprise,
    negative_reconstruction_error,
    pick_surprise,
    reconstruction_error,
    resolve_reward,
    surprise,
)

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)
N, K, B = GRID.num_tokens, 6, 32
EASY, STILL, FLICKER = 0, 1, 2  # kinds of tokens


def scenes(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of one still, smooth ramp, in which some tokens are noise: the same in both frames, or new in each.

    Returns:
        uint8 [B, T, H, W, 3], and each token's kind [B, N].
    """
    rng = np.random.default_rng(seed)
    y, x = np.arange(16)[:, None] - 7.5, np.arange(16) - 7.5
    ramp = (127.5 + (6 * y + 3 * x)[..., None] * np.array([1, -1, 0.5])).astype(np.uint8)
    patches = GRID.patchify(torch.from_numpy(np.broadcast_to(ramp, (batch, 4, 16, 16, 3)).copy()))
    kind = torch.from_numpy(rng.permuted(np.tile([FLICKER] * 4 + [STILL] * 4 + [EASY] * (N - 8), (batch, 1)), axis=1))
    noise = torch.from_numpy(rng.integers(0, 256, (batch, N, 2, GRID.patch_dim // 2), dtype=np.uint8))
    still = noise[:, :, :1].expand_as(noise)
    patches = torch.where(kind[..., None] == FLICKER, noise.flatten(2), patches)
    return GRID.unpatchify(torch.where(kind[..., None] == STILL, still.flatten(2), patches)), kind


def random_picks(batch: int, seed: int, allowed: Tensor | None = None, k: int = K) -> Tensor:
    """K distinct tokens of each clip, of those that are allowed: [B, K], ascending."""
    scores = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed))
    return (scores + (0 if allowed is None else allowed)).topk(k).indices.sort(1).values


@pytest.fixture(scope="module")
def mae() -> MAELearner:
    """A learner that has learned the ramp; noise it can't."""
    learner = MAELearner(GRID, device="cpu")
    for i in range(80):
        learner.reconstruct(scenes(8, i)[0], random_picks(8, i))
        learner.update()
    return learner.train(False)


@pytest.fixture
def clips_and_kinds() -> tuple[Tensor, Tensor]:
    return scenes(B, seed=1000)


def decide(mae: MAELearner, clips: Tensor, visible: Tensor) -> Decision:
    """What the environment hands to a reward."""
    shown = visible_mask(visible, N)
    return Decision(mae, clips, shown, mae.reconstruct(clips, visible), lambda: random_picks(len(clips), seed=77))


def made_up(error: Tensor, shown: Tensor, visible: Tensor) -> Decision:
    """A decision whose pass under a uniform mask found the given errors of token and, ten times as large, of motion."""
    error = error.masked_fill(shown, 0.0)
    found = Reconstruction(error, 10 * error, error.sum(1) / (~shown).sum(1), ~shown)
    decision = Decision(None, torch.empty(0), visible, found, lambda: torch.empty(0))  # type: ignore[arg-type]
    decision.uniform_reconstruction, decision.uniform_visible = found, shown  # type: ignore[misc]
    return decision


def test_surprise_prefers_hard_tokens_visible(mae: MAELearner, clips_and_kinds: tuple[Tensor, Tensor]) -> None:
    clips, kind = clips_and_kinds
    hard, chance, easy = (
        surprise(decide(mae, clips, random_picks(B, 5, allowed))) for allowed in (kind != EASY, None, kind == EASY)
    )
    assert hard.shape == (B,)
    assert (hard > chance).all() and (hard > easy).all()
    assert hard.mean() > 2.5 and chance.mean() == pytest.approx(1, abs=0.3) and easy.mean() < 0.5


def test_surprise_of_the_hardest_tokens_is_above_any_and_of_the_easiest_below(
    mae: MAELearner, clips_and_kinds: tuple[Tensor, Tensor]
) -> None:
    clips, _ = clips_and_kinds
    some = decide(mae, clips, random_picks(B, 5))
    error = some.uniform_reconstruction.token_error
    best = decide(mae, clips, error.topk(K).indices.sort(1).values)
    worst_error = error.masked_fill(some.uniform_visible, math.inf)
    worst = decide(mae, clips, worst_error.topk(K, largest=False).indices.sort(1).values)
    assert (surprise(best) > surprise(some)).all() and (surprise(some) > surprise(worst)).all()


def test_motion_surprise_prefers_what_changes_unpredictably(
    mae: MAELearner, clips_and_kinds: tuple[Tensor, Tensor]
) -> None:
    clips, kind = clips_and_kinds
    flicker, still = (random_picks(B, 5, kind == wanted, k=4) for wanted in (FLICKER, STILL))
    decisions = [decide(mae, clips, picks) for picks in (flicker, still)]
    moving, noisy = (motion_surprise(decision) for decision in decisions)
    assert (moving > 3).all() and (noisy < 0.3).all()
    # noise is as hard to draw whether it moves or not: the plain error does not tell the two apart
    assert all(surprise(decision).mean() > 2.5 for decision in decisions)


def test_the_plain_error_prefers_hard_tokens_hidden_and_its_negative_prefers_them_visible(
    mae: MAELearner, clips_and_kinds: tuple[Tensor, Tensor]
) -> None:
    clips, kind = clips_and_kinds
    hard_visible, hard_hidden = (decide(mae, clips, random_picks(B, 5, kind == k)) for k in (FLICKER, EASY))
    assert (reconstruction_error(hard_hidden) > 1.2 * reconstruction_error(hard_visible)).all()
    for decision in (hard_visible, hard_hidden):
        assert torch.equal(negative_reconstruction_error(decision), -reconstruction_error(decision))
        hidden = hidden_tokens(decision.visible.nonzero()[:, 1].reshape(B, -1), N)
        mean = decision.reconstruction.token_error.gather(1, hidden).double().mean(1)
        torch.testing.assert_close(reconstruction_error(decision).double(), mean, rtol=1e-5, atol=0)


def test_only_surprise_costs_another_pass_and_that_once(
    mae: MAELearner, clips_and_kinds: tuple[Tensor, Tensor]
) -> None:
    decision = decide(mae, clips_and_kinds[0], random_picks(B, 5))
    passes: list[int] = []
    handle = mae.model.register_forward_hook(lambda *_: passes.append(1))
    reconstruction_error(decision), negative_reconstruction_error(decision)
    assert not passes
    surprise(decision), motion_surprise(decision), surprise(decision)
    handle.remove()
    assert len(passes) == 1


@pytest.mark.parametrize(("reward", "scale"), [(surprise, 1.0), (motion_surprise, 10.0)])
def test_surprise_is_the_mean_over_picks_that_the_uniform_mask_hid(reward: object, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(50, N, generator=generator)
    shown, visible = (visible_mask(random_picks(50, seed, k=10), N) for seed in (1, 2))
    assert (shown & visible).any(1).sum() > 25
    expected = []
    for e, s, v in zip(error.double().tolist(), shown.tolist(), visible.tolist(), strict=True):
        hidden = [scale * e[i] for i in range(N) if not s[i]]
        counted = [scale * e[i] for i in range(N) if v[i] and not s[i]]
        expected.append(np.mean(counted) / np.mean(hidden) if counted else 1.0)
    assert reward(made_up(error, shown, visible)).tolist() == pytest.approx(expected, rel=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("reward", [surprise, motion_surprise])
def test_picks_that_the_uniform_mask_showed_too_make_no_difference(reward: object) -> None:
    error = torch.arange(1.0, N + 1)[None]
    shown = torch.arange(N)[None] < 10
    some, more = shown & False, shown & False
    some[0, [15, 31]] = more[0, [0, 3, 9, 15, 31]] = True
    found, with_shown = (reward(made_up(error, shown, visible)) for visible in (some, more))  # type: ignore[operator]
    assert torch.equal(found, with_shown)
    assert found.item() == pytest.approx((16 + 32) / 2 / np.mean(range(11, 33)))


@pytest.mark.parametrize("reward", [surprise, motion_surprise])
def test_with_every_pick_shown_by_the_uniform_mask_surprise_is_exactly_chance(reward: object) -> None:
    shown = visible_mask(random_picks(5, 0), N)
    assert reward(made_up(torch.rand(5, N), shown, shown)).tolist() == [1.0] * 5  # type: ignore[operator]


def test_surprise_of_uniform_random_picks_is_one_on_average() -> None:
    many = 20_000
    error = torch.rand(1, N, generator=torch.Generator().manual_seed(3)).pow(4).expand(many, -1)
    shown, visible = (visible_mask(random_picks(many, seed), N) for seed in (1, 2))
    found = surprise(made_up(error, shown, visible)).double()
    deviation = found.std().item() / math.sqrt(many)
    assert found.mean().item() == pytest.approx(1, abs=4 * deviation)
    assert deviation < 0.01


def test_a_clip_without_any_error_is_at_chance() -> None:
    shown, visible = (visible_mask(random_picks(4, seed), N) for seed in (1, 2))
    error = torch.zeros(4, N)
    assert (pick_surprise(error, shown) == 1).all()
    for reward in (surprise, motion_surprise):
        assert (reward(made_up(error, shown, visible)) == 1).all()


def test_surprise_does_not_depend_on_the_size_of_the_errors() -> None:
    error = torch.rand(8, N, generator=torch.Generator().manual_seed(0))
    shown, visible = (visible_mask(random_picks(8, seed), N) for seed in (1, 2))
    small, large = (surprise(made_up(scale * error, shown, visible)) for scale in (1e-6, 1e3))
    torch.testing.assert_close(small, large)


def my_reward(decision: Decision) -> Tensor:
    return decision.visible.float().mean(1)


def test_a_reward_is_found_by_name_by_import_path_or_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(REWARDS) == {
        "surprise", "motion_surprise", "reconstruction_error", "negative_reconstruction_error"
    }  # fmt: skip
    assert all(resolve_reward(name) is reward for name, reward in REWARDS.items())
    assert resolve_reward("surprise") is surprise
    assert resolve_reward(my_reward) is my_reward
    (tmp_path / "rewards_of_mine.py").write_text("def constant(decision):\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_reward("rewards_of_mine:constant")(None) == 42  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "rewards_of_mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("surprize", "reward 'surprize' is unknown; give one of surprise, motion_surprise, .*package.module:function"),
        ("no_such_module:reward", "reward 'no_such_module:reward' can't be imported: No module named"),
        ("math:no_such_function", "reward 'math:no_such_function' can't be imported: .*no_such_function"),
        ("math:pi", "reward 'math:pi'"),
        (":surprise", "reward ':surprise'"),
        (".rewards:surprise", "reward '.rewards:surprise'"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_reward(name)
