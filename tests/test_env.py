"""The environment's contract, through Gymnasium's own doors."""

from __future__ import annotations

import doctest
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction
from gymnasium.utils.env_checker import check_env
from scipy.stats import chisquare
from torch import Tensor

import tats_env.env
from tats_env.grid import TokenGrid
from tats_env.keyed import keyed_bits, keyed_order
from tats_env.mae import MAELearner, save_learner
from tats_env.task import top_tokens
from tats_env.wrappers import CoTrainMAE

N, K = 128, 12
ID = "TATSMasking-v0"


def make(**options: Any) -> gym.Env[Any, Any]:
    return gym.make(ID, **{"device": "cpu", "num_videos": 30, **options})


def make_vec(num_envs: int = 3, **options: Any) -> Any:
    options = {"device": "cpu", "num_videos": 30, **options}
    return gym.make_vec(ID, num_envs, vectorization_mode="vector_entry_point", **options)


def scores(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def weights(env: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in env.unwrapped.mae.model.parameters()])


def subprocess_says(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Doors


def test_all_ways_of_making_it_work_and_the_package_imports_without_torch() -> None:
    assert subprocess_says("import sys, tats_env; print('torch' in sys.modules)") == "False"
    code = f"import gymnasium as gym; e = gym.make('tats_env:{ID}'); print(e.reset(seed=0)[0].shape)"
    assert subprocess_says(code) == "(8, 16, 96)"
    env = gym.make(ID)
    assert env.observation_space.shape == (8, 16, 96) and env.action_space.shape == (N,)
    assert make_vec().single_action_space == env.action_space


def test_gymnasium_checker_has_nothing_to_say_but_infinite_bounds() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(make(render_mode="rgb_array").unwrapped)
    assert all("infinity" in str(w.message) for w in said), [str(w.message) for w in said]


def test_stable_baselines3_checker_passes() -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes three-dimensional boxes for images
        sb3_check_env(make())


def test_docstring_example_runs() -> None:
    assert doctest.testmod(tats_env.env).failed == 0


@pytest.mark.parametrize(("observation", "width"), [("tokens", 96), ("pixels", 2 * 8 * 8 * 3), ("nothing", 1)])
def test_observation_is_the_kind_asked_for(observation: str, width: int) -> None:
    env = make(observation=observation)
    seen, _ = env.reset(seed=0)
    assert seen.shape == (8, 16, width) and seen.dtype == np.float32 and env.observation_space.contains(seen)
    task = env.unwrapped.task  # type: ignore[attr-defined]
    if observation == "pixels":
        patch = task.clips[0, 2:4, 8:16, 16:24].float().flatten()  # tubelet 1, row 1, column 2
        mean, std = (torch.tensor(x).repeat(128) * 255 for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert np.allclose(seen[1, 6], (patch - mean) / std, atol=1e-5)
    if observation == "nothing":
        assert not seen.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 keeps 0 of 128"),
        ({"patch_size": 7}, "patch_size=7 does not divide height=32"),
        ({"observation": "latents"}, "give one of tokens, pixels"),
        ({"horizon": 0}, "at least one clip"),
        ({"reward": "none_such"}, "give one of surprise, motion_surprise"),
        ({"mae": "huge"}, "neither a size .* nor a checkpoint"),
        ({"split": "test"}, "give one of train, validation"),
        ({"dataset": "imagenet"}, "'imagenet' is unknown"),
    ],
)
def test_impossible_arguments_are_refused_with_a_remedy(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(**options)


def test_mistyped_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="mask_raito"):
        make(mask_raito=0.9)


# Same seed, same world


@pytest.mark.parametrize("horizon", [1, 3])
def test_single_and_vector_environments_agree(horizon: int) -> None:
    vector = make_vec(3, horizon=horizon)
    singles = [make(horizon=horizon) for _ in range(3)]
    seen, _ = vector.reset(seed=11)
    alone = [env.reset(seed=11 + i)[0] for i, env in enumerate(singles)]
    for step in range(2 * horizon + 1):
        assert np.allclose(seen, np.stack(alone), atol=1e-6)
        action = scores(3, N, seed=step)
        seen, reward, terminated, truncated, info = vector.step(action)
        for i, env in enumerate(singles):
            one, one_reward, one_terminated, one_truncated, one_info = env.step(action[i])
            assert one_reward == pytest.approx(float(reward[i]), abs=1e-5)
            assert np.array_equal(one_info["visible"], info["visible"][i])
            assert (one_terminated, one_truncated) == (terminated[i], truncated[i])
            if one_terminated:
                assert np.allclose(info["final_obs"][i], one, atol=1e-6)
                assert one_info["video_index"] == info["final_info"]["video_index"][i]
                one, one_info = env.reset()
            assert one_info["video_index"] == info["video_index"][i]
            assert one_info["start_frame"] == info["start_frame"][i]
            alone[i] = one


def test_sharding_the_environments_changes_nothing() -> None:
    whole, parts = make_vec(4), [make_vec(2), make_vec(2)]
    seen, _ = whole.reset(seed=5)
    shared = np.concatenate([part.reset(seed=5 + 2 * i)[0] for i, part in enumerate(parts)])
    assert np.allclose(seen, shared, atol=1e-6)
    action = np.ones((4, N), np.float32)  # all ties
    _, reward, _, _, info = whole.step(action)
    results = [part.step(action[:2]) for part in parts]
    assert np.array_equal(info["visible"], np.concatenate([r[4]["visible"] for r in results]))
    assert np.allclose(reward, np.concatenate([r[1] for r in results]), atol=1e-5)


def test_seed_repeats_everything_and_reset_without_one_goes_on() -> None:
    env = make()
    first, _ = env.reset(seed=3)
    reward = env.step(scores(N))[1]
    second, _ = env.reset()
    assert not np.array_equal(first, second)
    again, _ = env.reset(seed=3)
    assert np.array_equal(first, again) and env.step(scores(N))[1] == reward
    assert np.array_equal(second, env.reset()[0])
    assert not np.array_equal(first, env.reset(seed=4)[0])


def test_vector_environment_takes_a_seed_each() -> None:
    vector = make_vec(2)
    listed, _ = vector.reset(seed=[7, 7])
    assert np.array_equal(listed[0], listed[1])
    with pytest.raises(ValueError, match="3 seeds for 2 environments"):
        vector.reset(seed=[1, 2, 3])


def test_mae_seed_changes_weights_and_not_clips() -> None:
    one, other = make(mae_seed=0), make(mae_seed=1)
    clips = [env.reset(seed=0)[1] for env in (one, other)]
    assert clips[0] == clips[1]
    assert not torch.equal(weights(one), weights(other))
    before = weights(one)
    one.reset(seed=9)
    assert torch.equal(before, weights(one))


# Actions


def test_the_k_highest_scores_stay_visible_and_only_their_order_matters() -> None:
    env, action = make(), scores(N)
    env.reset(seed=0)
    shown = env.step(action)[4]["visible"]
    assert set(np.flatnonzero(shown)) == set(np.argsort(action)[-K:])
    env.reset(seed=0)
    assert np.array_equal(env.step(np.tanh(3 * action))[4]["visible"], shown)


@pytest.mark.parametrize("saturated", [N, 40])
def test_ties_are_broken_uniformly(saturated: int) -> None:
    batch = 6000
    tied = torch.zeros(batch, N)
    tied[:, :saturated] = 1.0
    ties = keyed_order(keyed_bits(torch.arange(batch), 0, 0, 2), N)
    counts = torch.zeros(N).scatter_add_(0, top_tokens(tied, K, ties).flatten(), torch.ones(batch * K)).numpy()
    assert counts[saturated:].sum() == 0
    assert chisquare(counts[:saturated]).pvalue > 1e-3


def test_keyed_bits_are_uniform_in_every_bit_and_differ_by_every_part_of_the_key() -> None:
    keys = torch.arange(20_000)
    for salts in ((0,), (5, 1), (0, 0, 3)):
        bits = keyed_bits(keys, *salts)
        ones = torch.stack([(bits >> b) & 1 for b in range(64)]).float().mean(1)
        assert float((ones - 0.5).abs().max()) < 0.02
    draws = torch.stack([keyed_bits(keys, *salts) for salts in ((0, 1), (1, 0), (0, 2), (1, 1))])
    assert len(draws.unique()) == draws.numel()


def test_wrong_shape_or_nan_is_an_invalid_action() -> None:
    env, vector = make(), make_vec(2)
    env.reset(seed=0)
    vector.reset(seed=0)
    broken = scores(N)
    broken[5] = np.nan
    with pytest.raises(InvalidAction, match="holds 1 NaN"):
        env.step(broken)
    with pytest.raises(InvalidAction, match=r"shape \(3,\); one score a token is \(128,\)"):
        env.step(np.zeros(3, np.float32))
    with pytest.raises(InvalidAction, match=r"\(2, 128\)"):
        vector.step(scores(N))
    with pytest.raises(InvalidAction, match="held 1 NaN"):
        vector.step(np.stack([broken, scores(N)]))


def test_nan_on_the_device_is_reported_when_asked() -> None:
    vector = make_vec(2, output="torch")
    vector.reset(seed=0)
    vector.step(torch.full((2, N), float("nan")))
    with pytest.raises(InvalidAction, match="held 256 NaN"):
        vector.unwrapped.check()
    vector.unwrapped.check()


# What comes back


def test_info_tells_of_the_decision_and_of_the_clip() -> None:
    env = make(foreground=True)
    _, info = env.reset(seed=0)
    assert info.keys() == {"video_index", "start_frame", "label"} and 0 <= info["label"] < 15
    found = env.step(scores(N))[4]
    assert found["visible"].dtype == bool and found["visible"].sum() == K
    for name in ("token_error", "motion_error"):
        assert found[name].shape == (N,) and np.array_equal(found[name] == 0, found["visible"])
    assert found["reconstruction_error"] == pytest.approx(found["token_error"][~found["visible"]].mean(), rel=1e-5)
    assert found["foreground"].shape == (N,) and 0 <= found["foreground"].min() <= found["foreground"].max() <= 1
    assert {k: found[k] for k in info} == info  # the one decision's clip is still the clip observed


def test_vector_info_follows_same_step_autoreset() -> None:
    vector = make_vec(4, foreground=True)
    assert vector.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    acted_on, first = vector.reset(seed=0)
    seen, _, terminated, truncated, info = vector.step(scores(4, N))
    assert terminated.all() and not truncated.any()
    assert info["_final_obs"].all() and info["_final_info"].all()
    assert info["final_obs"].dtype == np.float32 and np.array_equal(info["final_obs"], acted_on)
    for name in ("video_index", "start_frame", "label"):
        assert np.array_equal(info["final_info"][name], first[name])
    for name in ("token_error", "motion_error", "visible", "reconstruction_error", "foreground"):
        assert np.array_equal(info[name], info["final_info"][name])
    assert not np.array_equal(seen, acted_on)
    second = vector.step(scores(4, N))[4]
    assert np.array_equal(second["final_info"]["video_index"], info["video_index"])


def test_showing_the_true_foreground_gives_a_high_lift() -> None:
    from agents.meter import motion_lift

    vector = make_vec(30, foreground=True, output="torch")
    vector.reset(seed=0)
    truth = vector.unwrapped.task.foreground()
    found = vector.step(truth * 2 - 1)[4]["final_info"]
    assert float(motion_lift(found["visible"], found["foreground"])) > 3


def test_episode_walks_through_consecutive_clips_of_one_video() -> None:
    env = make(horizon=2)
    _, start = env.reset(seed=0)
    _, _, terminated, truncated, middle = env.step(scores(N))
    assert not terminated and not truncated
    assert (middle["video_index"], middle["start_frame"]) == (start["video_index"], start["start_frame"] + 16)
    _, _, terminated, truncated, _ = env.step(scores(N))
    assert terminated and not truncated


def test_returned_arrays_are_not_written_to_later() -> None:
    vector = make_vec(2)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    seen, _ = vector.reset(seed=0)
    for step in range(3):
        kept.append((seen, seen.copy()))
        seen, _, _, _, info = vector.step(scores(2, N, seed=step))
        kept += [(info[name], info[name].copy()) for name in ("final_obs", "token_error", "visible")]
    assert all(np.array_equal(a, b) for a, b in kept)


def test_torch_output_is_torch_throughout() -> None:
    vector = make_vec(2, output="torch")
    seen, info = vector.reset(seed=0)
    results = vector.step(torch.from_numpy(scores(2, N)))
    flat = [seen, *info.values(), *results[:4]]
    flat += [x for x in results[4].values() if not isinstance(x, dict)] + list(results[4]["final_info"].values())
    assert all(isinstance(x, Tensor) for x in flat)
    with pytest.raises(ValueError, match="give numpy or torch"):
        make_vec(2, output="jax")


# The MAE


def test_mae_may_be_a_size_a_checkpoint_or_a_live_learner(tmp_path: Path) -> None:
    env = make(mae_seed=3)
    save_learner(env.unwrapped.mae, tmp_path / "mae.safetensors")  # type: ignore[attr-defined]
    loaded = make(mae=str(tmp_path / "mae.safetensors"))
    assert torch.equal(weights(env), weights(loaded))
    live = env.unwrapped.mae  # type: ignore[attr-defined]
    assert make(mae=live).unwrapped.mae is live  # type: ignore[attr-defined]
    assert make_vec(2, mae=live).unwrapped.mae is live
    with pytest.raises(ValueError, match="was made for TokenGrid"):
        make(mae=MAELearner(TokenGrid(16, 32, 32, 2, 16), device="cpu"))


@pytest.mark.parametrize("vector", [False, True])
def test_co_training_updates_the_mae_on_every_kth_step(vector: bool) -> None:
    env: Any = CoTrainMAE(make_vec(2) if vector else make(), every=2)
    action = scores(2, N) if vector else scores(N)
    changed = []
    for step in range(4):
        if step == 0 or not vector:
            env.reset(seed=step)
        before = weights(env)
        env.step(action)
        changed.append(not torch.equal(before, weights(env)))
    assert changed == [False, True, False, True]
    assert env.unwrapped.mae.num_updates == 2
    with pytest.raises(ValueError, match="every=0"):
        CoTrainMAE(env, every=0)


def test_the_mae_learns_only_when_told() -> None:
    env = make()
    before = weights(env)
    for _ in range(3):
        env.reset()
        env.step(scores(N))
    assert torch.equal(before, weights(env))


def test_co_training_lowers_the_error_under_random_masks() -> None:
    vector = CoTrainMAE(make_vec(16, output="torch", reward="reconstruction_error"))
    vector.reset(seed=0)
    errors = [float(vector.step(torch.zeros(16, N))[1].mean()) for _ in range(60)]
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:3])


def test_reward_of_ones_own_comes_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def last(decision):\n    return decision.visible[:, -1].float()\n")
    monkeypatch.syspath_prepend(tmp_path)
    env = make(reward="my_rewards:last")
    for value in (1.0, -1.0):
        env.reset(seed=0)
        action = np.zeros(N, np.float32)
        action[-1] = value
        assert env.step(action)[1] == float(value > 0)


# Other people's code


def test_vector_wrappers_of_gymnasium_work_or_refuse_as_documented() -> None:
    from gymnasium.wrappers import vector as wrappers

    # DictInfoToList of Gymnasium 1.2 still asks for a mask beside every key of the info
    listing = [wrappers.DictInfoToList] if gym.__version__ >= "1.4" else []
    for wrap in (wrappers.RecordEpisodeStatistics, wrappers.NormalizeReward, *listing):
        env: Any = wrap(make_vec(2))
        env.reset(seed=0)
        _, reward, _, _, info = env.step(scores(2, N))
        assert len(reward) == 2
        if wrap is wrappers.RecordEpisodeStatistics:
            assert np.allclose(info["episode"]["r"], reward)
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # the wrapper's own demand
        torch_env: Any = wrappers.NumpyToTorch(make_vec(2))
        torch_env.reset(seed=0)
        assert isinstance(torch_env.step(torch.from_numpy(scores(2, N)))[4]["final_obs"], Tensor)
    for wrap in (wrappers.FlattenObservation, wrappers.NormalizeObservation):
        with pytest.raises((ValueError, AssertionError)):  # the latter with Gymnasium 1.2
            wrap(make_vec(2))


def make_for_worker() -> gym.Env[Any, Any]:
    return make()


def test_daemonic_workers_can_load_videos() -> None:
    from stable_baselines3.common.vec_env import SubprocVecEnv

    workers = gym.vector.AsyncVectorEnv([make_for_worker] * 2)
    seen, _ = workers.reset(seed=0)
    assert np.array_equal(seen[0], make().reset(seed=0)[0])
    workers.step(scores(2, N))
    workers.close()
    sb3_workers: Any = SubprocVecEnv([make_for_worker] * 2)
    sb3_workers.reset()
    assert sb3_workers.step(scores(2, N))[1].shape == (2,)
    sb3_workers.close()


@pytest.mark.parametrize("co_train", [False, True])
@pytest.mark.parametrize("name", ["PPO", "A2C", "SAC", "TD3"])
def test_stock_algorithms_run_without_an_adapter(name: str, co_train: bool) -> None:
    import stable_baselines3

    env: Any = CoTrainMAE(make()) if co_train else make()
    settings: dict[str, Any] = {"PPO": {"n_steps": 8, "batch_size": 8}, "A2C": {}}.get(
        name, {"buffer_size": 50, "learning_starts": 5, "policy_kwargs": {"net_arch": [16]}}
    )
    model = getattr(stable_baselines3, name)("MlpPolicy", env, seed=0, **settings)
    model.learn(10)
    assert env.unwrapped.mae.num_updates >= (10 if co_train else 0)
    assert co_train or env.unwrapped.mae.num_updates == 0


# Pictures


def test_rendering_shows_clip_visible_tokens_reconstruction_and_error() -> None:
    from tats_env.rendering import HIDDEN_GREY, decision_rows

    env: Any = make(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    shown = env.step(scores(N))[4]["visible"]
    picture = env.render()
    assert before.dtype == picture.dtype == np.uint8 and picture.shape[2] == 3
    assert before.shape == picture.shape
    rows = decision_rows(env.unwrapped.task, 0)
    assert list(rows) == ["clip", "visible", "reconstruction", "error"]
    grid = env.unwrapped.task.grid
    patches = {name: grid.patchify(torch.from_numpy(clip)[None])[0].numpy() for name, clip in rows.items()}
    assert np.array_equal(patches["visible"][shown], patches["clip"][shown])
    assert (patches["visible"][~shown] == HIDDEN_GREY).all()
    assert np.array_equal(patches["reconstruction"][shown], patches["clip"][shown])
    assert not np.array_equal(patches["reconstruction"][~shown], patches["clip"][~shown])
    assert (patches["error"][shown] == 0).all() and patches["error"][~shown].max() == 255
    vector = make_vec(2, render_mode="rgb_array")
    vector.reset(seed=0)
    vector.step(scores(2, N))
    assert [p.shape for p in vector.render()] == [picture.shape] * 2
