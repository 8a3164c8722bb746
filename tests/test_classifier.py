"""The encoder as a classifier against its parts written out, timm's layer decay by hand, and the choice of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from agents.heuristics import MotionMask, OracleMask, TubeMask
from agents.ppo import PPO
from experiments.classifier import HEAD_SCALE, PolicySampler, VideoClassifier, choose_tokens, tokens_kept
from tats_env.grid import TokenGrid
from tats_env.keyed import keyed_order
from tats_env.mae import MAESize, VideoMAE
from tats_env.mae.model import gather_tokens
from tats_env.vector_env import TATSMaskingVectorEnv

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)
N, DEPTH, WIDTH, CLASSES = GRID.num_tokens, 3, 24, 5


def randomised(module: torch.nn.Module) -> None:
    """Far from initialisation, so that biases, norms and attention all matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


@pytest.fixture
def mae() -> VideoMAE:
    torch.manual_seed(0)
    model = VideoMAE(GRID, MAESize(WIDTH, DEPTH, 3, 12, 1, 2))
    randomised(model)
    return model


@pytest.fixture
def patches() -> Tensor:
    return torch.randn(3, N, GRID.patch_dim, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_head_of_the_normalised_mean_of_the_blocks_without_the_encoders_own_norm(
    mae: VideoMAE, patches: Tensor
) -> None:
    model = VideoClassifier(mae, CLASSES)
    randomised(model.fc_norm)
    randomised(model.head)
    with torch.no_grad():
        x = mae.tokens(patches)
        for block in mae.blocks:
            x = block(x)
        mean = x.double().mean(1)
        deviation = ((mean - mean.mean(1, keepdim=True)).square().mean(1, keepdim=True) + 1e-5).sqrt()
        normalised = (mean - mean.mean(1, keepdim=True)) / deviation * model.fc_norm.weight + model.fc_norm.bias
        expected = normalised @ model.head.weight.double().T + model.head.bias
        assert torch.allclose(model(patches).double(), expected, atol=1e-4)


def test_only_the_tokens_that_are_present_count(mae: VideoMAE, patches: Tensor) -> None:
    model = VideoClassifier(mae, CLASSES)
    randomised(model.head)
    visible = torch.tensor([[0, 3, 17], [5, 6, 31], [1, 2, 4]])
    with torch.no_grad():
        logits = model(patches, visible)
        latents = mae.encode(gather_tokens(patches, visible), visible, final_norm=False)
        assert torch.allclose(logits, model.head(model.fc_norm(latents.mean(1))), atol=1e-5)
        others = torch.randn_like(patches).scatter(
            1, visible[..., None].expand(-1, -1, GRID.patch_dim), gather_tokens(patches, visible)
        )
        assert torch.equal(model(others, visible), logits)
        everything = torch.arange(N).expand(3, -1)
        assert torch.allclose(model(patches, everything), model(patches), atol=1e-5)


def test_a_classifier_shares_nothing_with_the_mae_that_it_starts_from(mae: VideoMAE) -> None:
    before = {name: x.clone() for name, x in mae.state_dict().items()}
    model = VideoClassifier(mae, CLASSES, drop_path=0.1)
    randomised(model)
    assert all(torch.equal(x, before[name]) for name, x in mae.state_dict().items())
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in mae.blocks)


def test_training_starts_from_nearly_level_logits(mae: VideoMAE, patches: Tensor) -> None:
    model = VideoClassifier(mae, 400)
    with torch.no_grad():
        assert float(model(patches).abs().max()) < 1e-3
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02 * HEAD_SCALE, rel=0.05)
    assert not model.head.bias.any()


def test_drop_path_rises_linearly_from_none_to_the_last_block(mae: VideoMAE) -> None:
    model = VideoClassifier(mae, CLASSES, drop_path=0.5)
    rates = [block.get_submodule(name).drop_prob for block in model.blocks for name in ("drop_path1", "drop_path2")]
    assert rates == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5])


@torch.no_grad()
def test_drop_path_leaves_out_branches_clip_by_clip_in_training_alone(mae: VideoMAE, patches: Tensor) -> None:
    model, full = VideoClassifier(mae, CLASSES, drop_path=0.25), VideoClassifier(mae, CLASSES)
    randomised(model.head)
    full.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(patches), full(patches))
    x = model.patch_embed(patches[:1]) + model.pos_embed
    without_last = model.head(model.fc_norm(model.blocks[1](model.blocks[0](x)).mean(1)))
    model.blocks[1].drop_path1.drop_prob = 0.0  # the same for both of its branches
    logits = model.train()(patches[:1].expand(4000, -1, -1))
    share = ((logits - without_last).abs().amax(1) < 1e-4).float().mean()
    assert float(share) == pytest.approx(1 / 16, abs=0.015)  # four standard deviations


def test_layer_decay_scales_the_learning_rate_layer_by_layer(mae: VideoMAE) -> None:
    model = VideoClassifier(mae, CLASSES, drop_path=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    CosineLRScheduler(optimizer, t_initial=100, t_in_epochs=False).step_update(0)
    by_hand = {
        "patch_embed": 0.75**4,
        "blocks.0": 0.75**3,
        "blocks.1": 0.75**2,
        "blocks.2": 0.75,
        "fc_norm": 1,
        "head": 1,
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            (layer,) = [layer for layer in by_hand if name.startswith(layer + ".")]
            assert group["lr_scale"] == pytest.approx(by_hand[layer]), name
            assert group["lr"] == pytest.approx(1e-3 * by_hand[layer]), name
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
            seen.add(name)
    assert seen == set(names.values())


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"), [(1568, 0.05, 78), (10, 0.3, 3), (128, 1.0, 128), (8, 0.01, 1)]
)
def test_a_share_of_the_tokens_is_kept_rounded_down_but_one_at_least(num_tokens: int, ratio: float, kept: int) -> None:
    assert tokens_kept(num_tokens, ratio) == kept


def test_chance_keeps_every_token_equally_often() -> None:
    visible = choose_tokens(3, keyed_order(torch.arange(8000), 12))
    assert visible is not None
    assert (visible.diff(dim=1) > 0).all()
    share = torch.bincount(visible.flatten(), minlength=12) / 8000
    assert torch.allclose(share, torch.full((12,), 0.25), atol=0.02)  # four standard deviations


def test_the_highest_scores_are_kept_and_ties_are_left_to_chance() -> None:
    order = keyed_order(torch.arange(4000), 6)
    visible = choose_tokens(3, order, torch.tensor([[0.0, 2.0, 0.0, 3.0, 0.0, -1.0]]).expand(4000, -1))
    assert visible is not None
    kept = torch.zeros(4000, 6).scatter(1, visible, 1.0).mean(0)
    assert torch.allclose(kept, torch.tensor([1 / 3, 1, 1 / 3, 1, 1 / 3, 0]), atol=0.03)
    assert choose_tokens(6, order) is None


@pytest.fixture(scope="module")
def env() -> TATSMaskingVectorEnv:
    env = TATSMaskingVectorEnv(3, dataset="motion", num_frames=8, observation="tokens", device="cpu", output="torch")
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("make", [PPO, MotionMask])
def test_an_agent_sees_in_a_classifiers_input_what_it_sees_in_its_environment(
    env: TATSMaskingVectorEnv, make: Callable[..., Any]
) -> None:
    agent, task = make(env), env.task
    task.observation = make.observation
    if make is PPO:
        randomised(agent.policy)
    seen = task.observe()
    scores = PolicySampler(agent, env.mae)(env.mae.normalize(env.mae.grid.patchify(task.clips)))
    assert torch.equal(scores, agent.logits(seen))
    assert scores.std() > 0.01


class NeverDrawing(TubeMask):
    """Whole columns of tokens, for those who ask for no draw."""

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        assert deterministic
        return super().scores(observation, deterministic)


def test_an_agent_without_logits_is_asked_for_its_best_scores(env: TATSMaskingVectorEnv) -> None:
    grid = env.mae.grid
    scores = PolicySampler(NeverDrawing(env), env.mae)(torch.zeros(2, grid.num_tokens, grid.patch_dim))
    visible = choose_tokens(2 * grid.num_steps, keyed_order(torch.arange(2), grid.num_tokens), scores)
    assert visible is not None
    for row in visible:
        assert len(set((row % grid.num_positions).tolist())) == 2


def test_an_agent_that_must_be_shown_the_truth_is_refused(env: TATSMaskingVectorEnv) -> None:
    with pytest.raises(ValueError, match="OracleMask must be shown the foreground"):
        PolicySampler(OracleMask(env), env.mae)
