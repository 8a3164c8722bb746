"""The bridge to stable-baselines3: adapter, callback, policy and agents, against its own and against ours."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize
from torch import Tensor

from agents.base import Stepwise, resolve_agent
from agents.heuristics import RandomMask
from agents.hooks import Hook, LogHook, MAEUpdateHook
from agents.ppo import PPO as OurPPO
from agents.sb3 import MAEUpdateCallback, SB3VecEnv, SubsetActorCriticPolicy
from agents.sb3_agent import buffer_memory, check_memory, peer
from tats_env.env import TATSMaskingEnv
from tats_env.rewards import Decision
from tats_env.sequential import TATSMaskingSequentialEnv, TATSMaskingSequentialVectorEnv
from tats_env.vector_env import TATSMaskingVectorEnv
from tats_env.wrappers import CoTrainMAE, CoTrainMAEVector

SIZES: dict[str, Any] = {"size": 16, "num_videos": 15, "device": "cpu"}  # N = 32, K = 3
SMALL: dict[str, Any] = {"width": 16, "num_heads": 2}
SUBSET = "agents.sb3.SubsetActorCriticPolicy"


def make_env(num_envs: int = 4, output: str = "torch", **options: Any) -> TATSMaskingVectorEnv:
    return TATSMaskingVectorEnv(num_envs, output=output, **SIZES | options)


def scores(seed: int, num_envs: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (num_envs, 32)).astype(np.float32)


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("rounds", [None, 3])
def test_a_step_tells_what_the_native_and_single_environments_tell(output: str, rounds: int | None) -> None:
    batched: Any = TATSMaskingSequentialVectorEnv if rounds else TATSMaskingVectorEnv
    single: Any = TATSMaskingSequentialEnv if rounds else TATSMaskingEnv
    more = {"rounds": rounds} if rounds else {"horizon": 2}
    ours = SB3VecEnv(batched(4, output=output, **SIZES, **more))
    native = batched(4, **SIZES, **more)
    theirs = DummyVecEnv([lambda: single(**SIZES, **more)] * 4)
    assert ours.seed(5) == theirs.seed(5)
    first, _ = native.reset(seed=5)
    np.testing.assert_array_equal(ours.reset(), first)
    np.testing.assert_allclose(theirs.reset(), first, atol=1e-5)
    assert ours.reset_infos == theirs.reset_infos
    for step in range(5):
        observation, reward, done, infos = ours.step(scores(step))
        by_hand = native.step(scores(step))
        assert observation.dtype == reward.dtype == np.float32 and done.dtype == bool
        np.testing.assert_array_equal(observation, by_hand[0])
        np.testing.assert_array_equal(reward, by_hand[1])
        np.testing.assert_array_equal(done, by_hand[2])
        if done.any():
            final = np.stack([info["terminal_observation"] for info in infos])
            np.testing.assert_array_equal(final, by_hand[4]["final_obs"])
        expected = theirs.step(scores(step))
        np.testing.assert_array_equal(done, expected[2])
        assert ours.reset_infos == theirs.reset_infos
        for info, of_single in zip(infos, expected[3], strict=True):
            assert info.keys() == of_single.keys()
            for name, value in of_single.items():
                np.testing.assert_allclose(info[name], value, atol=1e-4, err_msg=name)
        np.asarray(observation)[:] = reward[:] = np.nan  # what is handed out is the caller's own


def test_stock_wrappers_and_ppo_run_on_it() -> None:
    monitor = VecMonitor(VecCheckNan(SB3VecEnv(make_env(horizon=2)), raise_exception=True))
    model = PPO("MlpPolicy", VecNormalize(monitor), n_steps=4, batch_size=8, n_epochs=1).learn(32)
    episodes: Any = model.ep_info_buffer
    assert [episode["l"] for episode in episodes] == [2] * 16
    assert monitor.episode_count == 16 and np.isfinite([episode["r"] for episode in episodes]).all()


def test_attributes_methods_and_pictures_come_from_every_layer() -> None:
    env = SB3VecEnv(CoTrainMAE(make_env(render_mode="rgb_array")))
    task = env.env.unwrapped.task
    assert env.get_attr("render_mode") == ["rgb_array"] * 4 and env.render_mode == "rgb_array"
    assert env.get_attr("mae", [0, 2]) == [task.mae] * 2
    assert env.get_attr("num_picks", 1) == [3]
    assert env.get_attr("updates")[0].every == 1
    assert not env.has_attr("no_such")
    assert env.env_is_wrapped(CoTrainMAEVector, [0]) == [True] and env.env_is_wrapped(VecMonitor)[0] is False
    env.set_attr("always_probe", True)
    assert task.always_probe
    with pytest.raises(ValueError, match="share one 'always_probe'"):
        env.set_attr("always_probe", False, indices=0)
    env.reset()
    env.step(scores(0))
    assert task.mae.num_updates == 1
    assert env.env_method("check", indices=[1]) == [None]
    pictures = env.get_images()
    assert len(pictures) == 4 and all(picture is not None and picture.dtype == np.uint8 for picture in pictures)
    with pytest.raises(Exception, match="NaN"):
        env.step(np.full((4, 32), np.nan, np.float32))
    with pytest.raises(TypeError, match="vector_entry_point"):
        SB3VecEnv(DummyVecEnv([lambda: TATSMaskingEnv(**SIZES)]))  # type: ignore[arg-type]


class Replay(Stepwise):
    """Acts as it is told; its seed of 0 is the environment's too."""

    def __init__(self, env: Any, actions: list[np.ndarray]) -> None:
        super().__init__(env)
        self.actions = iter(actions)

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        return torch.from_numpy(next(self.actions))


@pytest.mark.parametrize("every", [1, 3])
def test_callback_trains_the_mae_as_the_hook_does_bit_by_bit(every: int) -> None:
    class Recorded(SB3VecEnv):
        def step_async(self, actions: np.ndarray) -> None:
            taken.append(actions.copy())
            super().step_async(actions)

    taken: list[np.ndarray] = []
    env, reference = make_env(horizon=2), make_env(horizon=2)
    vec_env = Recorded(env)
    PPO("MlpPolicy", vec_env, n_steps=4, batch_size=8, seed=0).learn(32, MAEUpdateCallback(every))
    Replay(reference, taken).learn(32, MAEUpdateHook(every))
    assert env.mae.num_updates == reference.mae.num_updates == 8 // every
    untrained = make_env().mae.model.state_dict()
    for name, weight in env.mae.model.state_dict().items():
        assert torch.equal(weight, reference.mae.model.state_dict()[name]), name
    assert any(not torch.equal(weight, untrained[name]) for name, weight in env.mae.model.state_dict().items())


def test_callback_refuses_environments_with_an_mae_each() -> None:
    alone = DummyVecEnv([lambda: TATSMaskingEnv(**SIZES)])
    A2C("MlpPolicy", alone, n_steps=2).learn(4, MAEUpdateCallback())
    assert alone.get_attr("mae")[0].num_updates == 4
    two = DummyVecEnv([lambda: TATSMaskingEnv(**SIZES)] * 2)
    with pytest.raises(ValueError, match=r"2 separate environment.*SB3VecEnv.*CoTrainMAE"):
        A2C("MlpPolicy", two, n_steps=2).learn(4, MAEUpdateCallback())


def subset_policy(explore: float = 0.3) -> tuple[SubsetActorCriticPolicy, Tensor]:
    env = make_env(8)
    torch.manual_seed(0)
    policy = SubsetActorCriticPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 1e-3, num_picks=3, explore=explore, **SMALL
    )
    with torch.no_grad():
        policy.network.actor.weight *= 100  # far from uniform
    return policy, env.reset(seed=1)[0]


def test_log_probability_and_entropy_are_those_of_draws_without_replacement_for_each_pick() -> None:
    policy, observation = subset_policy()
    action, value, log_prob = policy(observation)
    stored = torch.from_numpy(np.clip(action.numpy(), -1, 1).reshape(8, -1))  # as the buffer keeps it
    values, evaluated, entropy = policy.evaluate_actions(observation, stored)
    assert torch.equal(evaluated, log_prob) and torch.equal(values, value) and value.shape == (8, 1)
    assert torch.equal(policy.predict_values(observation), value)
    p = 0.7 * policy.logits(observation).double().softmax(1) + 0.3 / 32
    for i in range(8):
        left, total, bits = p[i].clone(), 0.0, 0.0
        for pick in stored[i].argsort(descending=True)[:3]:
            q = left[left > 0] / left.sum()
            total, bits = total + float((left[pick] / left.sum()).log()), bits - float((q * q.log()).sum())
            left[pick] = 0
        assert evaluated[i].item() == pytest.approx(total / 3, abs=1e-5)
        assert entropy[i].item() == pytest.approx(bits / 3, abs=1e-5)
    (evaluated.mean() + entropy.mean() + values.mean()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in policy.network.parameters())


def test_draws_follow_set_random_seed_and_the_policy_survives_its_own_file(tmp_path: Path) -> None:
    policy, observation = subset_policy()
    draws = []
    for seed in (3, 3, 4):
        set_random_seed(seed)
        draws.append(policy.predict(observation.numpy())[0])
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    policy.save(str(tmp_path / "policy.pt"))
    again = SubsetActorCriticPolicy.load(str(tmp_path / "policy.pt"))
    mode = policy.predict(observation.numpy(), deterministic=True)[0]
    np.testing.assert_array_equal(again.predict(observation.numpy(), deterministic=True)[0], mode)
    best = policy.logits(observation).topk(3).indices.numpy()
    np.testing.assert_array_equal((-mode).argsort(1, kind="stable")[:, :3], best)
    assert (again.num_picks, again.explore, again.network.options) == (3, 0.3, policy.network.options)


def test_in_rounds_only_tokens_that_are_hidden_are_picked() -> None:
    env = TATSMaskingSequentialVectorEnv(4, output="torch", rounds=4, mask_ratio=0.5, **SIZES | {"size": 8})
    agent = peer("A2C")(env, policy=SUBSET, n_steps=4, policy_kwargs=SMALL)  # N = 8, K = 4
    observation, _ = env.reset(seed=0)
    for _ in range(4 * 4):
        action = agent.predict(observation)[0]
        shown, picks = env.task.shown, action.topk(env.task.num_picks).indices
        assert not (picks[:, :, None] == shown[:, None]).any()
        assert (action.gather(1, picks) > 0).all()
        observation, *_ = env.step(action)
    agent.learn(4 * 8, MAEUpdateHook(every=4))
    assert env.mae.num_updates == 2


OFF_POLICY = {"buffer_size": 64, "learning_starts": 4, "batch_size": 4, "policy_kwargs": {"net_arch": [16]}}
ON_POLICY = {"n_steps": 2, "batch_size": 8}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "PPO": ON_POLICY,
    "A2C": {"n_steps": 2},
    "SAC": OFF_POLICY,
    "TD3": OFF_POLICY,
    "DDPG": OFF_POLICY | {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    "TRPO": ON_POLICY,
    "TQC": OFF_POLICY,
    "CrossQ": OFF_POLICY,
    "RecurrentPPO": ON_POLICY | {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}},
    "ARS": {"n_delta": 1, "n_eval_episodes": 8},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_with_one_mae_update_a_step_and_is_saved_and_asked(name: str, tmp_path: Path) -> None:
    if name not in ("PPO", "A2C", "SAC", "TD3", "DDPG"):
        pytest.importorskip("sb3_contrib")
    env = make_env()
    agent = resolve_agent(f"sb3:{name}")(env, **ALGORITHMS[name])
    assert agent.learn(4 * 7, [MAEUpdateHook()]) is agent
    assert agent.num_timesteps == agent.model.num_timesteps == 28
    assert env.mae.num_updates == 7
    measured = agent.metrics()
    assert measured and all(key.startswith("train/") for key in measured)
    assert agent.metrics() == {}
    agent.save(tmp_path / f"policy{agent.suffix}")
    again = type(agent).load(tmp_path / "policy.zip")
    observation, _ = env.reset(seed=1)
    expected, _ = agent.predict(observation, deterministic=True)
    assert expected.shape == (4, 32) and isinstance(expected, Tensor) and not hasattr(agent, "logits")
    assert torch.equal(again.predict(observation, deterministic=True)[0], expected)
    one = again.predict(observation[0].numpy(), deterministic=True)[0]
    assert isinstance(one, np.ndarray) and one.shape == (32,)
    np.testing.assert_allclose(one, expected[0], atol=1e-5)


class Recorder(Hook):
    """Notes what was called, and the videos and first frames that were scored."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.clips: list[list[int]] = []

    def on_step(self, agent: Any) -> None:
        self.calls.append("step")
        self.clips.append([*agent.env.unwrapped.task.video_index, *agent.env.unwrapped.task.start_frame])

    def on_rollout_end(self, agent: Any) -> None:
        self.calls.append("rollout")

    def on_update_end(self, agent: Any) -> None:
        self.calls.append("update")
        assert "train/loss" in agent.model.logger.name_to_value


def test_learning_stops_in_mid_rollout_and_sees_the_clips_of_all_other_agents(tmp_path: Path) -> None:
    recorders = [Recorder() for _ in range(3)]
    agent = peer("PPO")(make_env(), seed=3, policy=SUBSET, policy_kwargs=SMALL, **ON_POLICY)
    agent.learn(4 * 5, recorders[0])
    assert recorders[0].calls == ["step", "step", "rollout", "update"] * 2 + ["step"]
    agent.save(tmp_path / "policy.zip")
    again = peer("PPO").load(tmp_path / "policy.zip", make_env())
    again.learn(4 * 4, recorders[1])
    assert recorders[1].calls == ["step", "step", "rollout", "update"] * 2
    assert (again.seed, again.num_timesteps, agent.num_timesteps) == (3, 36, 20)

    class Silent(Recorder):
        def on_update_end(self, agent: Any) -> None:
            pass

    RandomMask(make_env(), seed=3).learn(4 * 5, silent := Silent())
    assert recorders[0].clips == silent.clips and recorders[1].clips == silent.clips[:4]
    assert agent.logits(make_env().reset(seed=0)[0]).shape == (4, 32)
    agent.learn(4 * 4, [recorders[2], LogHook(agent.model.logger, every=2)])
    assert recorders[2].clips == silent.clips[:4]  # as under our own agents, each learn() begins anew
    with pytest.raises(ValueError, match=r"n_steps=2 make a rollout.*give n_steps=1 or less"):
        agent.learn(4)
    with pytest.raises(ValueError, match="loaded without an environment"):
        peer("PPO").load(tmp_path / "policy.zip").learn(4)


def first_slot(decision: Decision) -> Tensor:
    """Share of the visible tokens that lie in the first of the 8 time slots; chance is 1/8."""
    return decision.visible[:, :4].float().sum(1) / decision.visible.float().sum(1)


def test_ppo_with_the_subset_policy_learns_what_our_ppo_learns() -> None:
    steps, num_envs, rate = 36, 16, 5e-3

    def frozen(num_envs: int) -> TATSMaskingVectorEnv:
        env = make_env(num_envs, reward=first_slot)
        env.mae.train(False)
        return env

    def cosine(remaining: float) -> float:
        return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (1 - remaining))))

    same: dict[str, Any] = {
        "n_steps": 2, "n_epochs": 4, "clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "gamma": 0.0,
        "gae_lambda": 0.95, "target_kl": None, "max_grad_norm": 1.0, "normalize_advantage": True,
    }  # fmt: skip
    shares: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(3):
        ours = OurPPO(
            frozen(num_envs), credit="clip", explore=0.0, learning_rate=rate, policy_kwargs=SMALL, seed=seed, **same
        )
        theirs = peer("PPO")(
            frozen(num_envs), policy=SUBSET, learning_rate=cosine, batch_size=2 * num_envs, seed=seed,
            policy_kwargs=SMALL | {"optimizer_class": torch.optim.AdamW}, **same,
        )  # fmt: skip
        for a, b in zip(ours.policy.parameters(), theirs.model.policy.network.parameters(), strict=True):
            assert torch.equal(a, b)  # they start alike
        judge = frozen(256)
        for name, agent in (("ours", ours), ("theirs", theirs)):
            agent.learn(steps * num_envs)
            observation, _ = judge.reset(seed=7)
            _, reward, *_ = judge.step(agent.predict(observation)[0])
            shares[name].append(float(reward.mean()))
    means, spread = {k: np.mean(v) for k, v in shares.items()}, np.std(list(shares.values()), axis=1, ddof=1)
    assert min(min(values) for values in shares.values()) > 3 / 8, shares
    assert abs(means["ours"] - means["theirs"]) < np.sqrt((spread**2).mean()) + 0.05, shares


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PPO", {"n_steps": 6}),
        ("A2C", {}),
        ("RecurrentPPO", {"n_steps": 6, "policy": "MlpLstmPolicy", "policy_kwargs": {"n_lstm_layers": 2}}),
        ("SAC", {"buffer_size": 10}),
        ("DDPG", ALGORITHMS["DDPG"]),
    ],
)
def test_memory_is_that_of_the_buffer_itself(name: str, options: dict[str, Any]) -> None:
    if name == "RecurrentPPO":
        pytest.importorskip("sb3_contrib")
    agent = peer(name)(make_env(), **options)
    memory = buffer_memory(agent.algorithm, agent.model.get_env(), options)
    assert memory is not None
    buffer = getattr(agent.model, "rollout_buffer", None) or agent.model.replay_buffer
    assert memory.num_bytes == sum(x.nbytes for x in vars(buffer).values() if isinstance(x, np.ndarray))


def test_a_buffer_that_does_not_fit_is_refused_with_the_sum_and_what_would_fit() -> None:
    env = SB3VecEnv(make_env())
    huge: Any = buffer_memory(SAC, env, {"buffer_size": 10**12})
    with pytest.raises(ValueError, match=r"buffer_size 1,000,000,000,000 x \(2 x 3,072 observation \+ 32 action") as no:
        check_memory(huge)
    fits = int(str(no.value).split("give buffer_size=")[1].split()[0])
    fitting: Any = buffer_memory(SAC, env, {"buffer_size": fits * 9 // 10})
    check_memory(fitting)
    with pytest.raises(
        ValueError, match=r"x 4 environments x .*at least twice that while it is read out.*give n_steps=\d+ or"
    ):
        peer("PPO")(env.env, n_steps=10**9)
    assert buffer_memory(peer("PPO").algorithm, env).value == 2048  # type: ignore[union-attr]


def test_what_cannot_be_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for make, message in (
        (lambda: peer("ppo"), "did you mean PPO"),
        (lambda: peer("DQN"), "N scores"),
        (lambda: peer("PPO")(make_env(), n_step=2), "takes no 'n_step'; did you mean n_steps"),
        (lambda: peer("PPO")(make_env(), policy="Mlp"), "give one of MlpPolicy"),
        (lambda: peer("PPO")(make_env(), policy="agents.sb3_agent:peer"), "BasePolicy"),
        (lambda: peer("PPO")(make_env(), n_steps=2, batch_size=1), "batch_size.*greater than 1"),
        (lambda: peer("SAC")(make_env(), policy=SUBSET), "for PPO and A2C"),
        (lambda: peer("A2C")(make_env(), policy=SUBSET, use_sde=True), "use_sde"),
    ):
        with pytest.raises(ValueError, match=message):
            make()  # type: ignore[no-untyped-call]
    peer.cache_clear()
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ValueError, match=r"pip install 'tats-env\[contrib\]'"):
        peer("TRPO")


def test_a_loss_that_is_not_finite_is_reported() -> None:
    agent = peer("A2C")(make_env(), policy=SUBSET, n_steps=1, policy_kwargs=SMALL)
    with torch.no_grad():
        agent.model.policy.network.critic.bias.fill_(float("nan"))
    agent.learn(4)
    with pytest.raises(FloatingPointError, match=r"loss of A2C is nan: try a lower agent\.learning_rate"):
        agent.metrics()
