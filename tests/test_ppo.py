"""Our PPO: that it learns, what its safeguards catch, and that hooks, saving and asking work."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.credit import FORMS
from agents.heuristics import RandomMask
from agents.hooks import Hook, LogHook, MAEUpdateHook
from agents.meter import motion_lift
from agents.policies import TrajectoryPolicy
from agents.ppo import PPO
from agents.rollout import Rollout
from tats_env.vector_env import TATSMaskingVectorEnv

SMALL = {"width": 16, "num_heads": 2}


def make_env(num_envs: int = 8, **options: Any) -> TATSMaskingVectorEnv:
    options = {"reward": "reconstruction_error", "foreground": True, "device": "cpu"} | options
    return TATSMaskingVectorEnv(num_envs, output="torch", **options)


class Recorder(Hook):
    """Notes what was called, and the values that the logger got."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step(self, agent: object) -> None:
        self.calls.append("step")

    def on_rollout_end(self, agent: object) -> None:
        self.calls.append("rollout")

    def on_update_end(self, agent: object) -> None:
        self.calls.append("update")


def rollout_of(agent: PPO, advantage: Tensor) -> Rollout:
    """A rollout of one batch with advantages made by hand."""
    observation, _ = agent.env.reset(seed=0)
    rollout, _ = agent._collect(observation, [])
    return rollout._replace(advantage=advantage.expand_as(rollout.advantage))


def test_learned_sampler_finds_motion_far_above_chance() -> None:
    # The quickstart's recipe at a fifth of its length. Chance is 1; seeds 0, 1 and 2 reach 1.73, 2.50 and 2.07.
    env = make_env(32, num_videos=120)
    agent = PPO(env, policy_kwargs={"width": 32, "num_heads": 2}, seed=0)
    agent.learn(120 * 32, MAEUpdateHook())
    fresh = make_env(256, num_videos=60, split="validation", mae=env.mae.train(False))

    def lift(sampler: Any) -> float:
        observation, _ = fresh.reset(seed=1)
        _, _, _, _, info = fresh.step(sampler.predict(observation)[0])
        return float(motion_lift(info["final_info"]["visible"], info["final_info"]["foreground"]))

    learned, random = lift(agent), lift(RandomMask(fresh, seed=0))
    assert 0.85 < random < 1.15
    assert learned > 1.5, f"lift {learned:.2f} after training, {random:.2f} at random"


@pytest.mark.parametrize("credit", ["clip", "pick_surprise", "token_error", "token_motion"])
@pytest.mark.parametrize("form", FORMS)
def test_every_credit_and_form_trains_without_a_skipped_update(credit: str, form: str) -> None:
    agent = PPO(make_env(4), credit=credit, form=form, n_steps=2, n_minibatches=2, policy_kwargs=SMALL)
    before = [p.clone() for p in agent.policy.parameters()]
    agent.learn(4 * 2 * 3, MAEUpdateHook())
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert agent.check()["train/skipped_updates"] == 0
    assert all(math.isfinite(value) for value in agent.meter.means().values())


@pytest.mark.parametrize(("reward", "sign"), [("surprise", 1), ("reconstruction_error", -1)])
def test_clip_credit_moves_probability_the_way_the_reward_prefers(reward: str, sign: int) -> None:
    # A policy that sees positions only, on an environment whose error is high in the lower half by construction:
    # `surprise` must come to show that half, `reconstruction_error` to hide it.
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(128))

        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
            batch = observation.shape[0]
            return self.logits.expand(batch, -1), torch.zeros(batch) + 0 * self.logits.sum()

    env = make_env(64, foreground=False, reward=reward)
    lower = torch.arange(128) % 16 >= 8
    with torch.no_grad():  # an MAE that predicts nothing in the upper half and noise in the lower
        for parameter in env.mae.model.decoder_head.parameters():
            parameter.zero_()
        env.mae.model.decoder_norm.weight.zero_()
        env.mae.model.decoder_norm.bias.zero_()
    real_forward = env.mae.model.forward

    def forward(patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        prediction = real_forward(patches, visible, hidden)
        return prediction + 2.0 * lower[hidden][..., None]

    env.mae.model.forward = forward
    env.mae.train(False)
    agent = PPO(env, Positions(), credit="clip", explore=0.0, ent_coef=0.0, learning_rate=0.05, target_kl=None)
    agent.learn(64 * 60)
    logits = agent.policy.logits.detach()
    assert sign * float(logits[lower].mean() - logits[~lower].mean()) > 0.2


def test_hooks_are_called_in_order_and_the_mae_is_updated_every_k_steps() -> None:
    env = make_env(2)
    recorder = Recorder()
    PPO(env, n_steps=3, policy_kwargs=SMALL).learn(2 * 3 * 2, [recorder, MAEUpdateHook(every=2)])
    assert recorder.calls == ["step", "step", "step", "rollout", "update"] * 2
    assert env.mae.num_updates == 3


@pytest.mark.parametrize("n_steps", [1, 2])
def test_the_sampler_learns_from_every_kth_rollout_only(n_steps: int) -> None:
    agent = PPO(make_env(2), n_steps=n_steps, n_epochs=2, update_every=3, policy_kwargs=SMALL)
    weights: list[torch.Tensor] = []
    graphs: list[bool] = []

    class Keep(Hook):
        def on_rollout_end(self, agent: PPO) -> None:
            assert agent._drawn is not None
            graphs.append(agent._drawn[0].requires_grad)

        def on_update_end(self, agent: PPO) -> None:
            weights.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))

    agent.learn(2 * n_steps * 7, [Keep(), MAEUpdateHook()])
    # A rollout of one step is drawn by the update's own forward pass, with a graph, which the others do without
    assert graphs == [n_steps == 1 and i % 3 == 0 for i in range(7)]
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [False, False, True, False, False, True]
    assert agent.num_updates == 3 * 2
    assert agent.env.mae.num_updates == n_steps * 7


def test_random_masks_call_the_same_hooks() -> None:
    env = make_env(2)
    recorder = Recorder()
    RandomMask(env).learn(4, [recorder, MAEUpdateHook()])
    assert recorder.calls == ["step", "rollout", "update"] * 2
    assert env.mae.num_updates == 2


def test_log_lines_carry_stable_baselines3_keys_and_ours() -> None:
    from stable_baselines3.common.logger import KVWriter, Logger

    lines: list[dict[str, float]] = []

    class Writer(KVWriter):
        def write(self, key_values: dict, key_excluded: dict, step: int = 0) -> None:  # type: ignore[type-arg]
            lines.append(dict(key_values))

        def close(self) -> None:
            pass

    env = make_env(4)
    PPO(env, policy_kwargs=SMALL).learn(4 * 4, [MAEUpdateHook(), LogHook(Logger(None, [Writer()]), every=2)])
    assert len(lines) == 2
    keys = {
        *(
            f"train/{k}"
            for k in ["approx_kl", "clip_fraction", "entropy_loss", "explained_variance", "loss", "value_loss"]
        ),
        *("train/policy_gradient_loss", "train/learning_rate", "train/n_updates", "rollout/ep_rew_mean", "time/fps"),
        *("mae/loss", "mask/random_mask_error", "mask/motion_lift", "mask/effective_tokens"),
        "mask/plackett_luce_entropy",
    }
    assert keys <= lines[-1].keys()
    assert lines[-1]["time/total_timesteps"] == 16
    # Near uniform at the start: 12 draws of 128 tokens have an entropy just under 12 log 128
    assert 120 < lines[0]["mask/effective_tokens"] <= 128.01
    assert 56 < lines[0]["mask/plackett_luce_entropy"] < 12 * math.log(128)


def test_updates_stop_once_the_kl_exceeds_its_target() -> None:
    agent = PPO(make_env(4), n_epochs=6, target_kl=1e-4, learning_rate=0.05, ent_coef=0.0, policy_kwargs=SMALL)
    free = PPO(make_env(4), n_epochs=6, target_kl=None, learning_rate=0.05, ent_coef=0.0, policy_kwargs=SMALL)
    for each in (agent, free):
        each.learn(4)
    means = agent.meter.means()
    assert means["train/stopped_by_kl"] == 1

    def moved(each: PPO) -> float:
        start = PPO(make_env(4), policy_kwargs=SMALL).policy
        return sum(
            float((a - b).detach().abs().sum())
            for a, b in zip(start.parameters(), each.policy.parameters(), strict=True)
        )

    assert 0 < moved(agent) < 0.5 * moved(free)
    assert agent.check()["train/skipped_updates"] == 0  # a stop is not a broken update


def test_a_loss_that_is_not_finite_leaves_the_policy_alone_and_is_counted() -> None:
    agent = PPO(make_env(4), n_epochs=1, policy_kwargs=SMALL)
    broken = rollout_of(agent, torch.tensor(float("nan")))
    before = [p.clone() for p in agent.policy.parameters()]
    agent._train(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert agent.check()["train/skipped_updates"] == 1
    for _ in range(19):
        agent._train(broken)
    with pytest.raises(FloatingPointError, match=r"policy.*20 updates in a row.*agent\.learning_rate"):
        agent.check()


def test_many_epochs_of_negative_advantages_stay_finite() -> None:
    # Without the dual clip and the cap on logits this is the run in which ratios left every bound.
    agent = PPO(make_env(4), n_epochs=80, target_kl=None, learning_rate=0.1, explore=0.0, ent_coef=0.0)
    agent._train(rollout_of(agent, torch.tensor(-3.0)))
    observation, _ = agent.env.reset(seed=1)
    logits, _ = agent.policy(observation)
    assert torch.isfinite(logits).all()
    assert float(logits.detach().abs().max()) <= 8.0
    assert agent.check()["train/skipped_updates"] == 0


def test_entropy_floor_keeps_a_sampler_from_collapsing() -> None:
    def effective(floor: float | None) -> float:
        agent = PPO(
            make_env(8), explore=0.0, ent_coef=0.0, learning_rate=0.02, entropy_floor=floor, target_kl=None,
            n_epochs=4, policy_kwargs=SMALL,
        )  # fmt: skip
        advantage = torch.where(torch.arange(128) < 8, 3.0, -0.2)[None]
        for _ in range(30):
            agent._train(rollout_of(agent, advantage))
        agent.meter.means()
        agent._train(rollout_of(agent, advantage))
        return agent.meter.means()["mask/effective_tokens"]

    without, with_floor = effective(None), effective(60.0)
    assert without < 40
    assert with_floor > 50


def test_logits_never_leave_their_cap() -> None:
    policy = TrajectoryPolicy((4, 4, 12), width=8, num_heads=2, logit_cap=2.0)
    nn.init.normal_(policy.actor.weight, std=1e4)
    logits, values = policy(torch.randn(3, 4, 4, 12))
    assert logits.shape == (3, 16) and values.shape == (3,)
    assert float(logits.detach().abs().max()) <= 2.0
    assert float(logits.detach().std()) > 1.0


@pytest.mark.parametrize("as_numpy", [True, False])
def test_predict_speaks_the_kind_and_shape_it_was_asked_in(as_numpy: bool) -> None:
    agent = PPO(make_env(4), policy_kwargs=SMALL)
    batch = torch.randn(3, 8, 16, 96)
    observation = batch.numpy() if as_numpy else batch
    scores, state = agent.predict(observation)
    assert state is None and isinstance(scores, np.ndarray if as_numpy else Tensor)
    assert scores.shape == (3, 128) and agent.predict(observation[0])[0].shape == (128,)
    assert np.abs(np.asarray(scores)).max() <= 1
    fixed = [agent.predict(observation, deterministic=True)[0] for _ in range(2)]
    assert np.array_equal(np.asarray(fixed[0]), np.asarray(fixed[1]))
    assert not np.array_equal(np.asarray(scores), np.asarray(agent.predict(observation)[0]))


def test_deterministic_scores_rank_tokens_as_the_logits_do() -> None:
    agent = PPO(make_env(4), policy_kwargs=SMALL)
    nn.init.normal_(agent.policy.actor.weight)  # type: ignore[arg-type]
    observation = torch.randn(2, 8, 16, 96)
    scores, _ = agent.predict(observation, deterministic=True)
    logits, _ = agent.policy(observation)
    assert torch.equal(scores.argsort(1, descending=True), logits.argsort(1, descending=True))


def test_saved_agent_comes_back_with_its_settings_and_predictions(tmp_path) -> None:  # type: ignore[no-untyped-def]
    agent = PPO(make_env(4), credit="pick_surprise", explore=0.25, target_kl=None, policy_kwargs=SMALL)
    agent.learn(8)
    agent.save(tmp_path / "policy.safetensors")
    loaded = PPO.load(tmp_path / "policy.safetensors")
    assert (loaded.credit, loaded.explore, loaded.target_kl, loaded.max_grad_norm) == ("pick_surprise", 0.25, None, 1.0)
    observation = np.random.default_rng(0).normal(size=(2, 8, 16, 96)).astype(np.float32)
    assert np.array_equal(agent.predict(observation, True)[0], loaded.predict(observation, True)[0])
    with pytest.raises(ValueError, match="without an environment"):
        loaded.learn(4)
    env = make_env(4)
    PPO.load(tmp_path / "policy.safetensors", env).learn(4)
    from tats_env.mae import save_learner

    save_learner(env.mae, tmp_path / "mae.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of format 'tats-env ppo 2'"):
        PPO.load(tmp_path / "mae.safetensors")


def test_random_agent_is_saved_and_loaded_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    agent = RandomMask(seed=7)
    agent.save(tmp_path / "random.json")
    loaded = RandomMask.load(tmp_path / "random.json")
    observation = np.zeros((2, 8, 16, 96), np.float32)
    assert np.array_equal(agent.predict(observation)[0], loaded.predict(observation)[0])


def test_same_seed_gives_the_same_agent_and_another_seed_another() -> None:
    def trained(seed: int) -> Tensor:
        agent = PPO(make_env(4), seed=seed, policy_kwargs=SMALL)
        agent.learn(4 * 4, MAEUpdateHook())
        return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_impossible_settings_are_refused_with_a_sentence() -> None:
    env = make_env(4)
    with pytest.raises(ValueError, match=r"credit 'x' is unknown; give one of clip"):
        PPO(env, credit="x")
    with pytest.raises(ValueError, match="form 'x' is unknown"):
        PPO(env, form="x")
    with pytest.raises(ValueError, match="n_minibatches=3 does not divide"):
        PPO(env, n_minibatches=3).learn(4)
    with pytest.raises(ValueError, match="at least 1"):
        PPO(env, n_epochs=0)
    with pytest.raises(ValueError, match="at least 1"):
        PPO(env, update_every=0)
    with pytest.raises(TypeError, match="output='torch'"):
        PPO(TATSMaskingVectorEnv(2, device="cpu"))
    with pytest.raises(ValueError, match="give env= or policy="):
        PPO(None)
    with pytest.raises(ValueError, match="every=0"):
        MAEUpdateHook(every=0)
