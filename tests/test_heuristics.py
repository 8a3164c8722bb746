"""Masks that need no learning: their shapes, their priors, and what they are told from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import AGENTS
from agents.base import resolve_agent
from agents.heuristics import (
    BlockMask,
    FrameMask,
    MotionMask,
    OracleMask,
    RandomMask,
    TubeMask,
    global_shift,
    motion_energy,
)
from agents.hooks import MAEUpdateHook
from agents.meter import motion_lift
from tats_env.grid import TokenGrid
from tats_env.sequential import TATSMaskingSequentialVectorEnv
from tats_env.vector_env import TATSMaskingVectorEnv

T, S, K = 8, 16, 20  # N = 128


def kept(scores: Tensor, k: int = K) -> Tensor:
    """bool [B, T', S], what an environment would keep."""
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    return mask.unflatten(1, (T, S))


def scores_of(agent: RandomMask, batch: int = 400) -> Tensor:
    return agent.predict(torch.zeros(batch, T, S, 1))[0]


@pytest.mark.parametrize("make", [RandomMask, TubeMask, FrameMask, BlockMask])
def test_geometric_masks_show_every_token_equally_often_and_never_the_same_mask_twice(make: type[RandomMask]) -> None:
    agent = make(seed=3)
    masks = kept(scores_of(agent, 4000))
    assert (masks.sum((1, 2)) == K).all()
    share = masks.float().mean(0)
    # Tokens of a group go together, so a share is as uncertain as 4000 draws of a group make it.
    assert (share - K / (T * S)).abs().max() < 5 * (K / (T * S) / 4000) ** 0.5
    assert not torch.equal(kept(scores_of(agent)), kept(scores_of(agent)))
    assert scores_of(agent).abs().max() <= 1


def test_tube_keeps_whole_columns_and_the_rest_in_random_slots_of_one_more() -> None:
    masks = kept(scores_of(TubeMask(seed=0)))
    per_column = masks.sum(1)  # [B, S]
    assert ((per_column == T).sum(1) == K // T).all()
    assert ((per_column == K % T).sum(1) == 1).all() and (per_column > 0).sum(1).eq(K // T + 1).all()
    rest = masks.transpose(1, 2)[per_column == K % T]  # [B, T']
    assert len({tuple(row.tolist()) for row in rest}) > 20


def test_frame_keeps_whole_slots_of_time_and_the_rest_in_random_positions_of_one_more() -> None:
    per_slot = kept(scores_of(FrameMask(seed=0))).sum(2)
    assert ((per_slot == S).sum(1) == K // S).all() and ((per_slot == K % S).sum(1) == 1).all()


def test_block_keeps_whole_cubes_of_neighbouring_tokens() -> None:
    masks = kept(scores_of(BlockMask(seed=0))).float().unflatten(2, (4, 4))
    cubes = masks.unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).sum(-1).flatten(1)  # [B, cubes]
    assert ((cubes == 8).sum(1) == K // 8).all() and ((cubes == K % 8).sum(1) == 1).all()
    uneven = kept(scores_of(BlockMask(steps=3, side=3, seed=0)))  # cubes that the grid cuts off
    assert (uneven.sum((1, 2)) == K).all()
    with pytest.raises(ValueError, match="at least one token each way"):
        BlockMask(side=0)
    with pytest.raises(ValueError, match="15 positions are not a square grid"):
        BlockMask().predict(torch.zeros(1, T, 15, 1))


def literal_energy(clip: np.ndarray, tubelet: int, patch: int) -> np.ndarray:
    """Frame by frame, token by token: float64 [T, H, W, 3] -> [N]."""
    frames, height, width, _ = clip.shape
    change = [(clip[max(t, 1)] - clip[max(t, 1) - 1]) ** 2 for t in range(frames)]
    return np.array([
        np.mean([
            change[t + u][y : y + patch, x : x + patch].mean() for u in range(tubelet)
        ])
        for t in range(0, frames, tubelet) for y in range(0, height, patch) for x in range(0, width, patch)
    ])  # fmt: skip


@pytest.mark.parametrize("tubelet", [1, 2, 4])
def test_motion_energy_equals_the_literal_loop(tubelet: int) -> None:
    grid = TokenGrid(8, 16, 16, tubelet, 4)
    clips = np.random.default_rng(0).normal(size=(3, 8, 16, 16, 3))
    patches = grid.patchify(torch.from_numpy(clips)).unflatten(1, (grid.num_steps, grid.num_positions))
    expected = np.stack([literal_energy(clip, tubelet, 4) for clip in clips])
    np.testing.assert_allclose(motion_energy(patches, tubelet, camera=False).numpy(), expected, rtol=1e-12)


def panning_clips(velocity: tuple[int, int], size: int = 32, frames: int = 8) -> np.ndarray:
    """A textured world seen by a camera that moves, with a square that moves through it: [T, H, W, 3]."""
    rng = np.random.default_rng(1)
    world = rng.normal(size=(size + 64, size + 64)).cumsum(0).cumsum(1)
    world = (world - world.mean()) / world.std() + 0.3 * rng.normal(size=world.shape)
    views = []
    for t in range(frames):
        y, x = 32 + velocity[0] * t, 32 + velocity[1] * t
        view = world[y : y + size, x : x + size].copy()
        view[12:20, 2 + 2 * t : 10 + 2 * t] = 2.0  # its own way, whatever the camera does
        views.append(view)
    return np.repeat(np.stack(views)[..., None], 3, -1)


def test_global_shift_finds_how_the_picture_moved() -> None:
    for velocity in ((0, 0), (1, 2), (-2, 1), (0, -3)):
        frames = torch.from_numpy(panning_clips(velocity)[..., 0]).float()
        shift = global_shift(frames[:-1], frames[1:])
        found = shift.float().median(0).values.tolist()
        assert found == [-velocity[0], -velocity[1]]  # the picture moves against the camera


def test_taking_the_camera_out_leaves_what_moves_on_its_own() -> None:
    grid = TokenGrid(8, 32, 32, 2, 4)
    patches = grid.patchify(torch.from_numpy(panning_clips((1, 2)))[None]).float().unflatten(1, (4, 64))
    raw, compensated = (motion_energy(patches, 2, camera=camera).view(4, 8, 8)[1:] for camera in (False, True))
    far = torch.ones(8, dtype=torch.bool)
    far[2:5] = False  # rows of tokens that the square or its place in the frame before can touch
    assert raw[:, far].mean() > 0.1 and compensated[:, far].max() < 1e-6
    assert compensated[:, ~far].amax((1, 2)).min() > 3


def test_motion_prior_draws_in_proportion_to_its_energy_sharper_when_cold_and_uniformly_when_told() -> None:
    pixels = torch.zeros(1, T, S, 2 * 8 * 8 * 3)
    pixels[0, 3, 5, :192] = 2.0  # the first frame of one token, so its second differs, and the token before's does not
    many = pixels.expand(4000, -1, -1, -1)

    def share(**settings: float) -> float:
        return float(kept(MotionMask(seed=0, **settings).predict(many)[0], 1)[:, 3, 5].float().mean())  # type: ignore[arg-type]

    assert share(explore=0.0) > 0.99
    assert share(explore=0.5) == pytest.approx(0.5 + 0.5 / 128, abs=0.03)
    assert share(explore=1.0) == pytest.approx(1 / 128, abs=0.008)
    # One token of energy 4 among 127 of 1: 4 / 131 of the draws, and 16 / 143 at half the temperature
    pixels = torch.zeros(1, T, S, 384)
    pixels[..., 192:] = 1.0
    pixels[..., :192] = 0.0
    pixels[0, 3, 5, 192:] = 2.0
    energy = motion_energy(pixels, 2, camera=False)[0]
    expected = [float(energy[3 * S + 5] / energy.sum()), float(energy[3 * S + 5] ** 2 / (energy**2).sum())]
    many = pixels.expand(4000, -1, -1, -1)
    for temperature, probability in zip((1.0, 0.5), expected, strict=True):
        assert share(explore=0.0, temperature=temperature) == pytest.approx(probability, abs=0.02)
    for bad in ({"temperature": 0.0}, {"explore": 1.5}):
        with pytest.raises(ValueError, match="give a"):
            MotionMask(**bad)


def test_oracle_and_motion_prior_find_the_moving_foreground_of_rendered_clips() -> None:
    lift = {}
    for name in ("random", "motion", "oracle"):
        make = resolve_agent(name)
        env = TATSMaskingVectorEnv(64, output="torch", observation=make.observation, foreground=True, device="cpu")
        agent = make(env, seed=0)
        agent.learn(64)
        lift[name] = float(motion_lift(env.task.decision.visible, env.task.decision.foreground))  # type: ignore[union-attr, arg-type]
        assert agent.num_timesteps == 64
    assert 0.7 < lift["random"] < 1.3
    assert lift["motion"] > 2 and lift["oracle"] > 2.5


def test_foreground_is_observed_on_rendered_sets_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    env = TATSMaskingVectorEnv(4, observation="foreground", device="cpu")
    observation, _ = env.reset(seed=0)
    assert observation.shape == (4, 8, 16, 1)
    np.testing.assert_array_equal(observation[..., 0].reshape(4, -1), env.task.foreground().numpy())
    from tats_env.data import motion

    for index, source in enumerate(motion.render(0, "train", 4)):
        (tmp_path / f"{index}.mp4").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="observation='foreground': the truth is known for rendered sets only"):
        TATSMaskingVectorEnv(1, observation="foreground", dataset=f"folder:{tmp_path}", device="cpu")


@pytest.mark.parametrize("kind", [TATSMaskingVectorEnv, TATSMaskingSequentialVectorEnv])
@pytest.mark.parametrize("name", [name for name in AGENTS if name != "ppo"])
def test_every_agent_trains_the_mae_is_saved_and_comes_back_the_same(name: str, kind, tmp_path) -> None:  # type: ignore[no-untyped-def]
    make = resolve_agent(name)
    rounds = {"rounds": 3} if kind is TATSMaskingSequentialVectorEnv else {}
    env = kind(
        4, output="torch", observation=make.observation, size=16, num_videos=15, device="cpu", mask_ratio=0.9, **rounds
    )
    agent = make(env, seed=5)
    assert agent.learn(12, MAEUpdateHook()) is agent
    assert env.mae.num_updates == 3
    path = tmp_path / f"agent{make.suffix}"
    agent.save(path)
    observation, _ = env.reset(seed=1)
    first, second = (make.load(path, env).predict(observation)[0] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4, 32)
    fixed = [make.load(path, env).predict(observation, deterministic=True)[0] for _ in range(2)]
    assert torch.equal(*fixed)
    as_numpy = make.load(path, env).predict(observation.numpy())[0]
    assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, first.numpy())


def test_a_saved_agent_is_refused_by_another(tmp_path) -> None:  # type: ignore[no-untyped-def]
    TubeMask(seed=1).save(tmp_path / "tube.json")
    with pytest.raises(ValueError, match=r"was not written by FrameMask\.save"):
        FrameMask.load(tmp_path / "tube.json")
    assert OracleMask(explore=0.25).settings() == {"explore": 0.25, "seed": 0}
