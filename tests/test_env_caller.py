"""What the environment owes its caller: arrays of its own, any memory layout, any mode, and clear refusals."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from torch.utils._python_dispatch import TorchDispatchMode

import tats_env
from tats_env.data import VideoSet, open_dataset
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner
from tats_env.wrappers import CoTrainMAE

ID = "TATSMasking-v0"
N, K = 128, 12


@functools.cache
def videos() -> VideoSet:
    return open_dataset("motion", num_videos=15)


@functools.cache
def frozen() -> MAELearner:
    """A learner that no test trains, and that all may share."""
    return MAELearner(TokenGrid(16, 32, 32, 2, 8), device="cpu").train(False)


def make(**options: Any) -> gym.Env[Any, Any]:
    return gym.make(ID, **{"dataset": videos(), "mae": frozen(), **options})


def make_vec(num_envs: int, **options: Any) -> Any:
    options = {"dataset": videos(), "mae": frozen(), **options}
    return gym.make_vec(ID, num_envs=num_envs, vectorization_mode="vector_entry_point", **options)


def scores(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def leaves(result: Any) -> Iterator[Any]:
    """All arrays and numbers in a nested result."""
    if not isinstance(result, (dict, tuple)):
        yield result
        return
    for part in result.values() if isinstance(result, dict) else result:
        yield from leaves(part)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested results hold the same numbers, but for rounding."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(np.allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5) for x, y in pairs)


def weights(learner: MAELearner) -> np.ndarray:
    return np.concatenate([x.detach().cpu().flatten().numpy() for x in learner.model.parameters()])


@pytest.mark.parametrize("horizon", [1, 2])
def test_no_step_returns_memory_of_an_earlier_one(horizon: int) -> None:
    for env, shape in ((make(horizon=horizon), (N,)), (make_vec(2, horizon=horizon), (2, N))):
        results: list[Any] = [env.reset(seed=0)]
        for step in range(4):
            results.append(env.step(scores(*shape, seed=step)))
            if results[-1][2] is True:
                results.append(env.reset())
        arrays = [[x for x in leaves(result) if isinstance(x, np.ndarray)] for result in results]
        for earlier, later in itertools.pairwise(arrays):
            assert not any(np.shares_memory(a, b) for a in earlier for b in later)


def test_writing_into_flags_and_info_changes_no_later_step() -> None:
    spoiled, plain = make_vec(2, horizon=2), make_vec(2, horizon=2)
    for env in (spoiled, plain):
        env.reset(seed=0)
    for step in range(4):
        mine, other = spoiled.step(scores(2, N, seed=step)), plain.step(scores(2, N, seed=step))
        assert equal(mine, other)
        for array in leaves(mine[1:]):
            array[...] = ~array if array.dtype == bool else 1 - array


def test_an_observation_written_into_is_whole_again_in_final_obs() -> None:
    env, batch = make(), make_vec(2)
    observation, observations = env.reset(seed=0)[0], batch.reset(seed=0)[0]
    expected = observation.copy(), observations.copy()
    observation *= 0
    observations *= 0
    assert np.array_equal(env.step(scores(N))[0], expected[0])
    assert np.array_equal(batch.step(scores(2, N))[4]["final_obs"], expected[1])


@pytest.mark.parametrize("layout", ["reversed", "strided", "read-only", "list"])
def test_scores_may_lie_in_memory_in_any_way(layout: str, recwarn: pytest.WarningsRecorder) -> None:
    plain = scores(2, N)
    laid = {"reversed": plain[:, ::-1].copy()[:, ::-1], "strided": np.repeat(plain, 2, 1)[:, ::2],
            "read-only": plain.copy(), "list": plain.tolist()}[layout]  # fmt: skip
    if layout == "read-only":
        laid.flags.writeable = False
    env, batch = make().unwrapped, make_vec(2)
    shown = []
    for actions in (plain, laid):
        env.reset(seed=0)
        batch.reset(seed=0)
        recwarn.clear()
        shown.append((env.step(actions[0])[4]["visible"], batch.step(actions)[4]["visible"]))
    assert equal(shown[0], shown[1])
    assert not recwarn.list


def test_an_invalid_action_leaves_the_episode_as_it_was() -> None:
    bad = scores(2, N)
    bad[1, 3:5] = np.nan
    env, untouched = make(), make()
    batch, untouched_batch = make_vec(2), make_vec(2)
    for each in (env, untouched, batch, untouched_batch):
        each.reset(seed=0)
    with pytest.raises(InvalidAction, match="the action holds 2 NaN"):
        env.step(bad[1])
    with pytest.raises(InvalidAction, match="the actions held 2 NaN"):
        batch.step(bad)
    assert equal(env.step(scores(N)), untouched.step(scores(N)))
    assert equal(batch.step(scores(2, N)), untouched_batch.step(scores(2, N)))


def test_a_vector_says_that_it_was_never_reset() -> None:
    with pytest.raises(ResetNeeded):
        make_vec(2).step(scores(2, N))
    with pytest.raises(ResetNeeded):
        make_vec(2, render_mode="rgb_array").render()


def test_a_list_of_seeds_may_leave_some_to_chance_and_an_empty_one_is_refused() -> None:
    env = make_vec(2)
    assert equal(make().reset(seed=2), tuple(x[0] if i == 0 else {k: v[0] for k, v in x.items()}
                                             for i, x in enumerate(env.reset(seed=[2, None]))))  # fmt: skip
    with pytest.raises(ValueError, match="0 seeds for 2 environments"):
        env.reset(seed=[])


def test_an_open_set_of_another_clip_shape_is_refused() -> None:
    # 2 tubelets of 8 x 8 patches are 128 tokens too, so that nothing fails by itself
    other = open_dataset("motion", num_videos=1, num_frames=4, size=(64, 64))
    with pytest.raises(ValueError, match="64"):
        make(dataset=other)


def test_making_and_stepping_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    env = CoTrainMAE(make_vec(2, mae="tiny", device="cpu"))
    env.reset(seed=0)
    env.step(scores(2, N))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


def test_rolling_out_in_inference_mode_and_then_not_is_the_same() -> None:
    results = []
    for modes in ((False, False, False), (True, False, True)):
        env = make_vec(2, output="torch", foreground=True, mae="tiny", device="cpu", render_mode="rgb_array",
                       dataset=open_dataset("motion", num_videos=15))  # fmt: skip
        for step, mode in enumerate(modes):
            with torch.inference_mode(mode):
                if step == 0:
                    env.reset(seed=0)
                result = env.step(torch.from_numpy(scores(2, N, seed=step)))
                env.unwrapped.mae.update()
            env.render()
        results.append(result)
    assert equal(*results)


class ReadsOnTheHost(TorchDispatchMode):
    """Collects operations whose result the host must wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_with_torch_output_no_step_and_no_update_reads_a_tensors_value() -> None:
    env = CoTrainMAE(make_vec(2, output="torch", mae="tiny", device="cpu", horizon=2))
    env.reset(seed=0)
    with ReadsOnTheHost() as reads:
        for _ in range(3):
            env.step(torch.zeros(2, N))
    assert reads.seen == []
    with ReadsOnTheHost() as reads:
        env.unwrapped.check()
    assert reads.seen != []


def test_clips_are_uniform_over_videos_and_their_first_frames() -> None:
    from scipy.stats import chisquare

    task = make_vec(1).unwrapped.task
    task.seed([0])
    video, start = np.concatenate([task._choose(episode, 0)[:2] for episode in range(15 * 25 * 10)], axis=1)
    assert chisquare(np.bincount(video * 25 + start, minlength=15 * 25)).pvalue > 1e-3


def test_the_top_level_tells_of_the_clip_that_is_observed() -> None:
    env = make_vec(3, horizon=2)
    env.reset(seed=0)
    for step in range(4):
        observations, *_, info = env.step(scores(3, N, seed=step))
        clips = videos().clips(info["video_index"], info["start_frame"], frozen().device)
        assert equal(frozen().tokens(clips).numpy(), observations)
        assert np.array_equal(info["label"], videos().labels[info["video_index"]])


def test_a_co_trained_vector_of_one_learns_what_the_single_environment_does() -> None:
    # Pixels: a vector's first observation of an episode is made in the step, and so before that step's update
    options = {"mae": "tiny", "device": "cpu", "horizon": 2, "observation": "pixels"}
    batch, single = CoTrainMAE(make_vec(1, **options)), CoTrainMAE(make(**options))
    assert equal(single.reset(seed=5)[0], batch.reset(seed=5)[0][0])
    for step in range(8):
        action = scores(N, seed=step)
        observations, rewards, terminated, _, info = batch.step(action[None])
        observation, reward, ended, _, single_info = single.step(action)
        assert equal(reward, rewards[0]) and ended == terminated[0]
        assert equal(single_info["token_error"], info["token_error"][0])
        assert equal(single.reset()[0] if ended else observation, observations[0])
    np.testing.assert_allclose(weights(single.unwrapped.mae), weights(batch.unwrapped.mae), atol=1e-4)


def test_evaluating_with_a_live_learner_leaves_its_training_alone() -> None:
    finals = []
    for evaluated in (False, True):
        env = CoTrainMAE(make_vec(2, mae="tiny", device="cpu"))
        live = env.unwrapped.mae
        evaluation = make_vec(3, mae=live)
        env.reset(seed=0)
        for step in range(3):
            env.step(scores(2, N, seed=step))
            if evaluated:
                live.train(False)
                evaluation.reset(seed=100)
                evaluation.step(scores(3, N, seed=step))
                live.train(True)
        finals.append(weights(live))
    assert np.array_equal(finals[0], finals[1])


WORKERS = f"""
import sys
import gymnasium as gym
import numpy as np
import tats_env

def make():
    return gym.make("{ID}", num_videos=15)

if __name__ == "__main__":
    if sys.argv[1] == "async":
        env = gym.vector.AsyncVectorEnv([make, make])
    else:
        from stable_baselines3.common.vec_env import SubprocVecEnv
        env = SubprocVecEnv([make, make])
    env.reset()
    print(env.step(np.zeros((2, {N}), np.float32))[1].shape)
    env.close()
"""


@pytest.mark.parametrize("kind", ["async", "subproc"])
def test_worker_processes_start_from_a_parent_that_has_used_torch(kind: str, tmp_path: Path) -> None:
    # With torch's default threads: a forked child that waits for the parent's OpenMP threads waits for ever
    (tmp_path / "workers.py").write_text(WORKERS)
    several_threads = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment = {**several_threads, "PYTHONPATH": str(Path(tats_env.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "workers.py", kind], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, complaints = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers that hang outlive their parent
            os.killpg(process.pid, signal.SIGKILL)
    assert said == "(2,)\n", complaints
