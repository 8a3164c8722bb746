"""Masking in rounds: what a round shows, what it earns, and that agents can act and learn in it."""

from __future__ import annotations

import doctest
import functools
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tats_env.sequential
from agents.heuristics import GreedyOracle, RandomMask
from agents.hooks import MAEUpdateHook
from agents.meter import step_values
from agents.ppo import PPO
from tats_env.data import VideoSet, open_dataset
from tats_env.grid import TokenGrid, visible_mask
from tats_env.mae import MAELearner
from tats_env.rendering import HIDDEN_GREY, decision_rows
from tats_env.wrappers import CoTrainMAE

ID = "TATSMaskingSequential-v0"
N, K, ROUNDS, WIDTH = 32, 8, 4, 96
GRID = TokenGrid(16, 16, 16, 2, 8)
NOTHING = torch.zeros(2, 0, dtype=torch.int64)


@functools.cache
def videos() -> VideoSet:
    return open_dataset("motion", num_videos=15, size=(16, 16))


def make(**options: Any) -> Any:
    return gym.make(ID, **{"dataset": videos(), "size": 16, "mask_ratio": 0.75, "device": "cpu"} | options)


def make_vec(num_envs: int = 2, name: str = ID, **options: Any) -> Any:
    options = {"dataset": videos(), "size": 16, "mask_ratio": 0.75, "device": "cpu"} | options
    return gym.make_vec(name, num_envs, "vector_entry_point", **options)


@functools.cache
def trained() -> MAELearner:
    """A frozen MAE that has learned from uniform masks for 200 updates."""
    env = CoTrainMAE(make_vec(16, "TATSMasking-v0", output="torch", reward="reconstruction_error"))
    env.reset(seed=0)
    for _ in range(200):
        env.step(torch.zeros(16, N))
    return env.unwrapped.mae.train(False)


def scores(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def total_fall(env: Any, agent: Any) -> np.ndarray:
    """Returns [B] of one episode of each environment."""
    observation, _ = env.reset(seed=10**6)
    returns = torch.zeros(env.num_envs)
    for _ in range(env.unwrapped.task.horizon):
        observation, reward, *_ = env.step(agent.predict(observation)[0])
        returns += reward
    return returns.numpy()


# What a round shows


def test_gymnasium_checker_has_nothing_to_say_but_infinite_bounds() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(make(render_mode="rgb_array").unwrapped)
    assert all("infinity" in str(w.message) for w in said), [str(w.message) for w in said]


def test_docstring_example_runs() -> None:
    assert doctest.testmod(tats_env.sequential).attempted == 4
    assert doctest.testmod(tats_env.sequential).failed == 0


def test_each_round_reveals_the_highest_scores_among_the_hidden_tokens_of_one_clip() -> None:
    env, one_shot = make(), gym.make("TATSMasking-v0", dataset=videos(), size=16, device="cpu")
    for episode in range(2):
        observation, start = env.reset(seed=3 if episode == 0 else None)
        assert one_shot.reset(seed=3 if episode == 0 else None)[1] == start  # the one-shot environment's clips
        visible = np.zeros(N, bool)
        for step in range(ROUNDS):
            assert np.array_equal(observation[..., WIDTH].ravel(), visible)
            action = scores(N, seed=step)
            action[visible] = 1.0  # in vain
            visible[np.where(visible, -2.0, action).argsort()[-K // ROUNDS :]] = True
            observation, _, terminated, truncated, info = env.step(action)
            assert np.array_equal(info["visible"], visible)
            assert np.array_equal(info["token_error"] == 0, visible)
            assert {name: info[name] for name in start} == start
            assert (terminated, truncated) == (step == ROUNDS - 1, False)
        assert np.array_equal(observation[..., WIDTH].ravel(), visible)
    with pytest.raises(ResetNeeded, match="ended with its 4 rounds"):
        env.step(action)


def test_the_prediction_in_view_follows_from_visible_pixels_alone() -> None:
    def seen(change: str) -> np.ndarray:
        env = make(mae=trained())
        first, _ = env.reset(seed=0)
        task = env.unwrapped.task
        visible = visible_mask(task._pick(torch.from_numpy(scores(1, N))), N)
        changed = {"hidden": ~visible, "visible": visible, "nothing": visible & ~visible}[change]
        patches = GRID.patchify(task.clips)
        task.clips = GRID.unpatchify(torch.where(changed[..., None], 255 - patches, patches))
        return np.stack([first, env.step(scores(N))[0]])

    as_it_was, hidden, visible = seen("nothing"), seen("hidden"), seen("visible")
    assert not np.array_equal(as_it_was[1, ..., :WIDTH], hidden[1, ..., :WIDTH])
    assert np.array_equal(as_it_was[..., WIDTH:], hidden[..., WIDTH:])
    assert np.abs(as_it_was[1, ..., WIDTH:] - visible[1, ..., WIDTH:]).max() > 0.1
    shown = as_it_was[1, ..., WIDTH] == 1
    assert (as_it_was[1, shown, WIDTH + 1 :] == 0).all() and (as_it_was[1, ~shown, WIDTH + 1 :] != 0).any(-1).all()


def test_before_the_first_round_the_prediction_is_the_same_for_every_clip() -> None:
    env = make_vec(2, mae=trained())
    observation, _ = env.reset(seed=0)
    assert np.allclose(observation[0, ..., WIDTH:], observation[1, ..., WIDTH:], atol=1e-5)
    assert not np.allclose(observation[0, ..., :WIDTH], observation[1, ..., :WIDTH])


def test_with_nothing_visible_the_decoder_predicts_from_positions_and_can_be_trained() -> None:
    mae = MAELearner(GRID, device="cpu")
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 16, 3), np.uint8))
    found = mae.reconstruct(clips, NOTHING, keep_prediction=True)
    every = torch.arange(N).expand(2, -1)
    assert torch.equal(found.prediction, mae.model.decode(torch.zeros(2, 0, WIDTH), NOTHING, every))
    pixels = GRID.patchify(clips).double().div(255).unflatten(2, (-1, 3)).numpy()
    target = (pixels - pixels.mean(2, keepdims=True)) / (pixels.std(2, ddof=1, keepdims=True) + 1e-6)
    error = (found.prediction.numpy().reshape(target.shape) - target) ** 2
    np.testing.assert_allclose(found.token_error.numpy(), error.mean((2, 3)), rtol=1e-4)
    mae.update()
    assert mae.metrics()["mae/skipped_updates"] == 0


def test_a_picture_shows_what_is_visible_after_each_round() -> None:
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    shape = env.render().shape
    for step in range(ROUNDS):
        shown = env.step(scores(N, seed=step))[4]["visible"]
        assert env.render().shape == shape
        rows = decision_rows(env.unwrapped.task, 0)
        patches = {name: GRID.patchify(torch.from_numpy(clip)[None])[0].numpy() for name, clip in rows.items()}
        for name in ("visible", "reconstruction"):
            assert np.array_equal(patches[name][shown], patches["clip"][shown])
        assert (patches["visible"][~shown] == HIDDEN_GREY).all()
        assert not (patches["reconstruction"][~shown] == patches["clip"][~shown]).all(-1).any()


# What a round earns


@pytest.mark.parametrize("co_train", [False, True])
def test_rewards_sum_to_the_fall_of_the_error_from_nothing_visible_to_the_complete_mask(co_train: bool) -> None:
    env: Any = make_vec(2, mae="tiny")
    env = CoTrainMAE(env) if co_train else env
    env.reset(seed=0)
    for _ in range(2):
        task, mae = env.unwrapped.task, env.unwrapped.mae
        clips, sums, rewards = task.clips, [task._found.token_error.sum(1).numpy()], []
        for step in range(ROUNDS):
            sums_now = mae.errors(clips, task.shown).token_error.sum(1).numpy()
            # What was found counts, not what the MAE would say by now
            assert np.allclose(sums_now, sums[-1], rtol=1e-5) == (not co_train or mae.num_updates == 0)
            _, reward, terminated, _, info = env.step(scores(2, N, seed=step))
            sums.append(info["token_error"].sum(1))
            rewards.append(reward)
        assert terminated.all()
        np.testing.assert_allclose(np.array(rewards), -np.diff(sums, axis=0) / N, atol=1e-5)
        np.testing.assert_allclose(sum(rewards), (sums[0] - sums[-1]) / N, atol=1e-5)
        hidden = info["reconstruction_error"] * (N - K)
        np.testing.assert_allclose(sums[-1], hidden, rtol=1e-5)


@pytest.mark.parametrize("vector", [False, True])
def test_co_training_every_rounds_steps_learns_from_complete_masks_only(vector: bool) -> None:
    env: Any = CoTrainMAE(make_vec(2) if vector else make(), every=ROUNDS)
    for _ in range(2):
        if not vector or env.unwrapped.mae.num_updates == 0:
            env.reset()
        updates = []
        for step in range(ROUNDS):
            info = env.step(scores(2, N, seed=step) if vector else scores(N, seed=step))[4]
            updates.append(env.unwrapped.mae.num_updates)
        assert [u - updates[0] for u in updates] == [0, 0, 0, 1]
        assert env.unwrapped.mae.metrics()["mae/loss"] == pytest.approx(np.mean(info["reconstruction_error"]), rel=1e-5)


# Contracts shared with the one-shot environment


@pytest.mark.parametrize("observation", ["tokens", "pixels"])
def test_single_and_vector_environments_agree(observation: str) -> None:
    options = {"mae": trained(), "observation": observation, "rounds": 2}
    vector, singles = make_vec(2, **options), [make(**options) for _ in range(2)]
    seen, _ = vector.reset(seed=11)
    alone = [env.reset(seed=11 + i)[0] for i, env in enumerate(singles)]
    for step in range(5):
        assert seen.shape[1:] == vector.single_observation_space.shape == singles[0].observation_space.shape
        assert np.allclose(seen, np.stack(alone), atol=1e-5)
        action = np.zeros((2, N), np.float32) if step == 2 else scores(2, N, seed=step)  # ties as well
        seen, reward, terminated, _, info = vector.step(action)
        for i, env in enumerate(singles):
            alone[i], one_reward, one_terminated, _, one_info = env.step(action[i])
            assert one_reward == pytest.approx(float(reward[i]), abs=1e-5)
            assert np.array_equal(one_info["visible"], info["visible"][i])
            assert one_terminated == terminated[i]
            if one_terminated:
                assert np.allclose(info["final_obs"][i], alone[i], atol=1e-5)
                assert info["final_obs"][i, ..., -GRID.patch_dim - 1].sum() == K
                assert np.array_equal(info["final_info"]["visible"][i], one_info["visible"])
                assert info["final_info"]["video_index"][i] == one_info["video_index"]
                alone[i], one_info = env.reset()
            assert one_info["start_frame"] == info["start_frame"][i]


def test_what_a_mask_did_is_logged_once_it_is_complete() -> None:
    env = make_vec(2, foreground=True, output="torch")
    env.reset(seed=0)
    logged = []
    for _ in range(2 * ROUNDS):
        env.step(torch.zeros(2, N))
        logged.append("mask/reconstruction_error" in step_values(env.unwrapped.task))
    assert logged == [False, False, False, True] * 2


class ReadsOnTheHost(TorchDispatchMode):
    """Counts operations whose result the host must wait for on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_torch_output_stays_on_the_device_and_any_inference_mode_will_do() -> None:
    results = []
    for modes in (False, True):
        env = CoTrainMAE(make_vec(2, output="torch"))
        env.reset(seed=0)
        with ReadsOnTheHost() as reads:
            for step in range(ROUNDS + 1):
                with torch.inference_mode(modes and step % 2 == 0):
                    observation, reward, *_ = env.step(torch.zeros(2, N))
        assert reads.count == 0 and isinstance(observation, Tensor)
        results.append((observation, reward))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 3}, "rounds=3 does not divide K=8 visible tokens: give one of 1, 2, 4, 8"),
        ({"rounds": 0}, "rounds=0 does not divide"),
        ({"reward": "surprise"}, "reward is no argument of the sequential task: its reward is the fall"),
        ({"horizon": 2}, "horizon is no argument .* give rounds="),
    ],
)
def test_impossible_arguments_are_refused_with_a_remedy(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(**options)


# Agents


def test_the_greedy_oracle_with_one_token_a_round_is_the_literal_greedy_choice() -> None:
    env = make_vec(2, mae=trained(), rounds=4, mask_ratio=0.875, output="torch")
    observation, _ = env.reset(seed=1)
    clips, oracle, chosen = env.unwrapped.task.clips, GreedyOracle(env), [[], []]  # type: ignore[var-annotated]
    for _ in range(4):
        observation, _, _, _, info = env.step(oracle.predict(observation)[0])
        for b in range(2):
            errors = {}
            for token in set(range(N)) - set(chosen[b]):
                visible = torch.tensor([sorted([*chosen[b], token])])
                errors[token] = float(trained().errors(clips[b : b + 1], visible).token_error.sum())
            chosen[b].append(min(errors, key=lambda token: errors[token]))
            assert set(info["visible"][b].nonzero()[:, 0].tolist()) == set(chosen[b])


def test_greedy_choices_in_rounds_lower_the_error_more_than_random_and_one_shot_ones() -> None:
    def falls(agent: type, rounds: int) -> np.ndarray:
        env = make_vec(48, mae=trained(), rounds=rounds, output="torch")
        return total_fall(env, agent(env))

    in_rounds, random, at_once = falls(GreedyOracle, K), falls(RandomMask, K), falls(GreedyOracle, 1)
    for other in (random, at_once):  # on the same clips
        gain = in_rounds - other
        assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain)), f"{in_rounds.mean():.3f}, {other.mean():.3f}"


@pytest.mark.parametrize("credit", ["clip", "pick_surprise", "token_motion"])
def test_our_ppo_never_picks_a_visible_token_and_trains_without_a_skipped_update(credit: str) -> None:
    env = make_vec(4, output="torch")
    agent = PPO(
        env, credit=credit, gamma=1.0, n_steps=ROUNDS, n_minibatches=2, policy_kwargs={"width": 16, "num_heads": 2}
    )
    rollout, _ = agent._collect(env.reset(seed=0)[0], [])
    by_clip = rollout.picks.view(ROUNDS, 4, K // ROUNDS).transpose(0, 1).flatten(1)
    assert all(len(set(picks.tolist())) == K for picks in by_clip)
    agent._train(rollout)
    # Nearly uniform at the start, among 32, 30, 28 and 26 tokens
    assert agent.meter.means()["mask/effective_tokens"] == pytest.approx(29, abs=0.2)
    agent.learn(4 * ROUNDS * 3, MAEUpdateHook())
    assert agent.check()["train/skipped_updates"] == 0
    assert all(np.isfinite(value) for value in agent.meter.means().values())


class Positions(nn.Module):
    """A logit for each position, and a value for each round."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.values = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.zeros(K + 1))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        shown = observation[..., WIDTH].flatten(1).sum(1).long()
        return self.logits.expand(len(shown), -1), self.values[shown]


def test_our_ppo_with_gamma_one_lowers_the_error_further_than_random_masks() -> None:
    env = make_vec(64, mae=trained(), output="torch")
    agent = PPO(
        env, Positions(), credit="clip", gamma=1.0, n_steps=ROUNDS, n_epochs=4, target_kl=None, explore=0.0,
        ent_coef=0.0, learning_rate=0.1,
    ).learn(64 * ROUNDS * 80)  # fmt: skip
    fresh = make_vec(512, mae=trained(), output="torch")
    gain = total_fall(fresh, agent) - total_fall(fresh, RandomMask(fresh))
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain)), f"{gain.mean():.4f}"


def test_the_yardstick_of_a_clip_is_the_same_mask_in_every_round_and_in_one_shot() -> None:
    one_shot = make_vec(name="TATSMasking-v0", output="torch").unwrapped
    rounds = make_vec(output="torch", rounds=ROUNDS).unwrapped
    masks = []
    for env, steps in ((one_shot, 1), (rounds, ROUNDS)):
        env.reset(seed=3)
        for _ in range(steps):
            env.step(torch.zeros(2, N))
            masks.append(env.task.decision.uniform_visible)
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])
