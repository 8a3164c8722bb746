"""The training step: nothing in it waits for the device, it compiles into whole graphs, and its savings are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.adamae import AdaMAE
from agents.base import Draws, Stepwise
from agents.heuristics import BlockMask, FrameMask, MotionMask, RandomMask, TubeMask
from agents.hooks import LogHook, MAEUpdateHook
from agents.ppo import PPO
from tats_env.data import VideoSet, open_dataset
from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import MAELearner, MAESize
from tats_env.rewards import Decision
from tats_env.sequential import TATSMaskingSequentialVectorEnv
from tats_env.vector_env import TATSMaskingVectorEnv

GRID = TokenGrid(8, 16, 16, 2, 8)
N, K = 16, 4
SIZE = MAESize(24, 2, 2, 12, 1, 2, learning_rate=1e-3)
SMALL = {"width": 8, "num_heads": 2}
CLIPS = {"num_frames": 8, "size": 16, "mask_ratio": 0.75, "num_videos": 15, "output": "torch"}


def learner(**options: Any) -> MAELearner:
    return MAELearner(GRID, SIZE, **{"device": "cpu", "warmup_steps": 2, "total_steps": 50, **options})


def make_env(num_envs: int = 4, mae: MAELearner | None = None, **options: Any) -> TATSMaskingVectorEnv:
    return TATSMaskingVectorEnv(
        num_envs, mae=mae or learner(), **{**CLIPS, "reward": "reconstruction_error", **options}
    )


def cropped_videos() -> VideoSet:
    shape: Any = {"num_frames": 8, "frame_stride": 1, "size": (16, 16), "num_videos": 15}
    return open_dataset("motion", split="train", **shape, augment="multi_scale")


def some_clips(batch: int = 4) -> Tensor:
    return torch.randint(0, 256, (batch, 8, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def masks(batch: int = 4) -> Tensor:
    scores = torch.rand(batch, N, generator=torch.Generator().manual_seed(1))
    return scores.topk(K).indices.sort(dim=1).values


def weights(module: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def assert_moved_alike(found: Tensor, expected: Tensor, start: Tensor) -> None:
    """As a whole: where a gradient is nothing but rounding, as a key's bias has it, Adam makes a step of that."""
    assert (found - expected).norm() < 0.01 * (expected - start).norm()


def waits(decision: Decision) -> Tensor:
    """A reward that reads a value of the device."""
    return decision.reconstruction.reconstruction_error * float(decision.reconstruction.token_error.sum())


@pytest.mark.parametrize(
    ("agent_class", "settings", "options"),
    [
        (PPO, {"policy_kwargs": SMALL}, {"foreground": True}),
        (PPO, {"policy_kwargs": SMALL, "credit": "clip", "n_steps": 2, "n_minibatches": 2}, {"reward": "surprise"}),
        (PPO, {"policy_kwargs": SMALL, "credit": "pick_surprise", "entropy_floor": 2.0}, {"horizon": 2}),
        (PPO, {"policy_kwargs": SMALL, "micro_batch_size": 2}, {"mae": {"decode_ratio": 0.5, "micro_batch_size": 2}}),
        (PPO, {"policy_kwargs": SMALL, "gamma": 1.0}, {"rounds": 2}),
        (AdaMAE, {}, {"mae": {"checkpointing": True}}),
        (RandomMask, {}, {"dataset": "cropped"}),
        (TubeMask, {}, {}),
        (FrameMask, {}, {}),
        (BlockMask, {}, {}),
        (MotionMask, {"camera": True}, {"observation": "pixels"}),
    ],
)
def test_nothing_in_the_loop_waits_for_the_device(agent_class: Any, settings: Any, options: dict[str, Any]) -> None:
    # On `meta` tensors have no values: item(), tolist(), cpu(), a tensor as a condition or as a shape all raise.
    options = dict(options)
    if options.get("dataset") == "cropped":
        options["dataset"] = cropped_videos()
    mae = learner(device="meta", **options.pop("mae", {}))
    if "rounds" in options:
        env: Any = TATSMaskingSequentialVectorEnv(4, mae=mae, **CLIPS, **options)
    else:
        env = make_env(4, mae, **options)
    agent = agent_class(env, **settings)
    steps = Steps()
    with pytest.raises(Stop):
        agent.learn(10_000, [MAEUpdateHook(options.get("rounds", 1)), steps])
    assert steps.count == 4 and env.mae.num_updates >= 2


class Stop(Exception):
    """Enough has been seen; after the loop an agent reads its numbers, which waits."""


class Steps(MAEUpdateHook):
    count = 0

    def on_step(self, agent: Any) -> None: ...

    def on_update_end(self, agent: Any) -> None:
        self.count += 1
        if self.count == 4:
            raise Stop


def test_a_loop_that_waits_is_found_out() -> None:
    agent = RandomMask(make_env(4, learner(device="meta"), reward=waits))
    with pytest.raises(RuntimeError, match="meta"):
        agent.learn(16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cropped", [False, True])
def test_nothing_in_the_loop_waits_for_the_gpu(compile: bool, cropped: bool) -> None:
    mae = learner(device="cuda", compile=compile)
    env = make_env(4, mae, **({"dataset": cropped_videos()} if cropped else {}))
    agent = PPO(env, policy_kwargs=SMALL, compile=compile)
    observation, _ = env.reset(seed=0)
    hooks: list[Any] = [MAEUpdateHook()]
    try:
        for step in range(6):
            if step == 3:  # all is compiled, and allocated
                torch.cuda.set_sync_debug_mode("error")
            rollout, observation = agent._collect(observation, hooks)
            agent._train(rollout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_step_has_no_graph_break_compiles_once_and_is_the_eager_one() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found, start = [], []
    for compile in (False, True):
        env = make_env(4, learner(compile=compile), foreground=True)
        agent = PPO(env, policy_kwargs=SMALL, compile=compile)
        start = [weights(env.mae.model), weights(agent.policy)]
        hooks = [MAEUpdateHook(), LogHook(Lines(), 1)]  # type: ignore[arg-type]
        agent.learn(3 * 4, hooks)
        with torch._dynamo.config.patch(error_on_recompile=True):
            agent.learn(4 * 4, hooks)
        found.append((weights(env.mae.model), weights(agent.policy)))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 5  # tokens, passes with and without gradient, policy, loss
    for eager, compiled, first in zip(*found, start, strict=True):
        assert_moved_alike(compiled, eager, first)


class Lines:
    """A logger that reads what it is given."""

    def record(self, name: str, value: float) -> None: ...

    def dump(self, step: int) -> None: ...


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(ratio: float) -> None:
    found, start = [], []
    for size in (None, 4, 2, 1):
        env = make_env(4, learner(micro_batch_size=size, decode_ratio=ratio))
        agent = PPO(env, policy_kwargs=SMALL, micro_batch_size=size, credit="pick_surprise", target_kl=None)
        start = [weights(env.mae.model), weights(agent.policy)]
        agent.learn(4 * 4, MAEUpdateHook())
        numbers = torch.tensor(list((agent.meter.means() | env.mae.metrics()).values()))
        found.append((weights(env.mae.model), weights(agent.policy), numbers))
    for mae, policy, numbers in found[1:]:
        assert_moved_alike(mae, found[0][0], start[0])
        assert_moved_alike(policy, found[0][1], start[1])
        torch.testing.assert_close(numbers, found[0][2], rtol=1e-3, atol=1e-4)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size=3 does not divide a batch of 4 clips"):
        learner(micro_batch_size=3).reconstruct(some_clips(), masks())
    with pytest.raises(ValueError, match="micro_batch_size=3 does not divide an update's 4 decisions"):
        PPO(make_env(), policy_kwargs=SMALL, micro_batch_size=3).learn(8)


def test_what_a_micro_batch_left_behind_is_not_learned_from() -> None:
    mae, plain = learner(micro_batch_size=2), learner(micro_batch_size=2)
    mae.reconstruct(some_clips().flip(0), masks())  # skipped: no update follows
    for each in (mae, plain):
        each.reconstruct(some_clips(), masks())
        each.update()
    assert torch.equal(weights(mae.model), weights(plain.model))


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    kept, found = [], []
    for checkpointing in (False, True):
        mae = learner(checkpointing=checkpointing)
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mae.reconstruct(some_clips(), masks())
        mae.update()
        kept.append(sum(sizes))
        found.append(weights(mae.model))
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)


def test_half_decoding_scores_half_of_the_hidden_tokens_and_learns_from_these() -> None:
    env = make_env(64, learner(decode_ratio=0.5))
    env.reset(seed=0)
    env.step(torch.rand(64, N, generator=torch.Generator().manual_seed(0)))
    decision = env.task.decision
    assert decision is not None
    found, hidden = decision.reconstruction, ~decision.visible
    assert (found.scored.sum(1) == (N - K) // 2).all() and not (found.scored & decision.visible).any()
    assert (found.token_error[~found.scored] == 0).all() and (found.token_error[found.scored] > 0).all()
    # Each hidden token as often as any other: 64 clips, binomial with standard deviation 4 around 32
    share = (found.scored.sum(0) / hidden.sum(0))[hidden.sum(0) > 30]
    assert share.min() > 0.2 and share.max() < 0.8 and len(found.scored.unique(dim=0)) > 30
    torch.testing.assert_close(found.reconstruction_error, found.token_error.sum(1) / found.scored.sum(1))
    loss = env.mae._loss
    assert loss is not None
    torch.testing.assert_close(loss.detach(), found.reconstruction_error.mean())


def test_a_decoded_share_is_what_the_decoder_says_of_these_tokens_alone() -> None:
    mae, visible = learner(), masks()
    hidden = hidden_tokens(visible, N)[:, ::2]
    found = mae.errors(some_clips(), visible, hidden, keep_prediction=True)
    assert found.prediction.shape == (4, len(hidden[0]), GRID.patch_dim)
    assert torch.equal(found.scored, visible_mask(hidden, N))
    patches = mae.normalize(GRID.patchify(some_clips()))
    shown = patches.gather(1, visible[..., None].expand(-1, -1, GRID.patch_dim))
    with torch.no_grad():
        expected = mae.model(shown, visible, hidden)
    torch.testing.assert_close(found.prediction, expected)


def test_outside_training_and_in_the_yardstick_all_hidden_tokens_are_decoded() -> None:
    mae = learner(decode_ratio=0.5)
    env = make_env(4, mae, reward="surprise")
    env.reset(seed=0)
    env.step(torch.rand(4, N))
    assert env.task.decision is not None
    assert (env.task.decision.uniform_reconstruction.scored.sum(1) == N - K).all()
    mae.train(False)
    env.step(torch.rand(4, N))
    assert (env.task.decision.reconstruction.scored.sum(1) == N - K).all()


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_share_to_decode_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"decode_ratio={ratio} is not a share"):
        learner(decode_ratio=ratio)


def test_in_rounds_a_share_to_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="of all hidden tokens, so give one"):
        TATSMaskingSequentialVectorEnv(2, mae=learner(decode_ratio=0.5), rounds=2, **CLIPS)


def test_the_first_epoch_reuses_the_pass_that_drew_and_this_changes_nothing() -> None:
    calls: list[int] = []
    found = []
    for reuse in (True, False):
        env = make_env(4)
        agent = PPO(env, policy_kwargs=SMALL, n_epochs=2, target_kl=None, micro_batch_size=None if reuse else 4)
        calls.append(0)
        agent.policy.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        agent.learn(5 * 4, MAEUpdateHook())
        found.append(weights(agent.policy))
    assert calls == [5 * 2, 5 * 3]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [RandomMask, MotionMask, lambda env: PPO(env, policy_kwargs=SMALL)])
def test_a_share_of_the_environments_does_what_it_would_do_among_all(make: Callable[[Any], Any]) -> None:
    def shown(num_envs: int, first_env: int) -> Tensor:
        kind = "pixels" if make is MotionMask else "tokens"
        agent = make(make_env(num_envs, first_env=first_env, observation=kind))
        seen = Seen()
        agent.learn(3 * num_envs, seen)
        return torch.stack(seen.masks)

    whole, shares = shown(4, 0), [shown(2, 0), shown(2, 2)]
    if make in (RandomMask, MotionMask):  # PPO alone learns, here from half of the clips
        assert torch.equal(torch.cat(shares, 1), whole)
    assert torch.equal(torch.cat(shares, 1)[0], whole[0])
    assert not torch.equal(shares[0][0], shares[1][0])


class Seen(MAEUpdateHook):
    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def on_step(self, agent: Any) -> None:
        self.masks.append(agent.env.unwrapped.task.decision.visible)


def test_draws_are_uniform_and_differ_by_seed_environment_and_turn() -> None:
    draws, other = Draws(0), Draws(1)
    first, second = draws.uniform(200, 50), draws.uniform(200, 50)
    values = torch.stack([first, second, other.uniform(200, 50)])
    assert values.dtype == torch.float64 and values.min() >= 0 and values.max() < 1
    assert len(values.unique()) == values.numel()
    counts = torch.histc(values.float(), 20, 0, 1)
    assert ((counts - 1500).abs() < 5 * 38).all()  # binomial: standard deviation 38
    centred = values.flatten(1) - 0.5
    assert (centred @ centred.T / (200 * 50) - torch.eye(3) / 12).abs().max() < 0.005
    assert isinstance(RandomMask().draws, Draws) and issubclass(RandomMask, Stepwise)
