"""PPO for `TATSMasking-v0` from TorchRL's own parts: its environment wrapper, collector, GAE and clipped loss.

    pip install 'tats-env[torchrl]'
    python -m experiments.torchrl_ppo

What is added is a distribution over orders of tokens, for the action is a score a token and only the order counts,
and `CoTrainMAE`, which trains the MAE at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import torch
import tyro
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.utils.tensorboard import SummaryWriter

try:
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE
except ImportError as error:
    raise ImportError("experiments.torchrl_ppo needs TorchRL 0.14 or newer: pip install 'tats-env[torchrl]'") from error

import tats_env  # noqa: F401 (registers the environment)
from tats_env.wrappers import CoTrainMAE


@dataclass
class Args:
    """PPO on TATSMasking-v0 from TorchRL's parts."""

    dataset: str = "motion"
    """motion, or folder:/path"""
    num_videos: int = 60
    """videos used of it"""
    size: int = 32
    """pixels a side"""
    mask_ratio: float = 0.9
    """share of hidden tokens"""
    reward: str = "surprise"
    """what an agent is to prefer: see TATSMaskingEnv"""
    num_envs: int = 32
    """clips in a step, and in an update of the MAE"""
    num_steps: int = 4
    """steps in a rollout"""
    total_timesteps: int = 20_000
    """clips in all"""
    learning_rate: float = 2e-3
    """of Adam"""
    clip_coef: float = 0.2
    """how far a ratio of probabilities may go from 1"""
    ent_coef: float = 0.1
    """weight of the entropy of the first token drawn"""
    vf_coef: float = 0.5
    """weight of the value's loss"""
    max_grad_norm: float = 0.5
    """gradients are clipped at this norm"""
    update_epochs: int = 4
    """passes over a rollout"""
    num_minibatches: int = 4
    """parts of a rollout, an update each"""
    seed: int = 0
    """of everything"""
    device: str = "auto"
    """auto, cpu, cuda"""
    log_dir: Path = Path("runs/torchrl_ppo")
    """folder for TensorBoard"""


class PlackettLuce(Distribution):
    """Draws without replacement of K of N tokens, as scores in [-1, 1] that have the order drawn: logits [..., N]."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, k: int) -> None:
        self.log_p, self.k = logits.log_softmax(-1), k
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Scores by rank of the logits plus Gumbel noise (Kool et al., 2019)."""
        log_p = self.log_p.detach().expand(self._extended_shape(sample_shape))
        return self._by_rank(log_p - torch.empty_like(log_p).exponential_().clamp_min(1e-20).log())

    @property
    def mode(self) -> Tensor:
        """Scores by rank of the logits."""
        return self._by_rank(self.log_p)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of drawing the K tokens with the highest scores in that order: [..., N] -> [...]."""
        picks = value.topk(self.k).indices
        drawn = self.log_p.gather(-1, picks)
        never = self.log_p.scatter(-1, picks, -torch.inf).logsumexp(-1, keepdim=True)
        # What was left before each pick: that pick, those after it, and what was never drawn.
        left = torch.cat([drawn, never], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
        return (drawn - left).sum(-1)

    def entropy(self) -> Tensor:
        """Of the first token drawn, which is enough for a bonus: [...]."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    @staticmethod
    def _by_rank(x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, x.shape[-1], device=x.device)[x.argsort(-1).argsort(-1)]


class TokenMLP(nn.Module):
    """An MLP for each token that is told of the mean over the clip: observation [..., T', S, D] -> [..., N]."""

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1)
        nn.init.orthogonal_(self.head.weight, 0.01)  # start near uniform masks, and near a value of nothing

    def forward(self, observation: Tensor) -> Tensor:
        """[..., T', S, D] -> [..., N]."""
        x = self.embed(observation.flatten(-3, -2))
        x = self.mix(torch.cat([x, x.mean(-2, keepdim=True).expand_as(x)], -1))
        return self.head(x).squeeze(-1)


class Critic(TokenMLP):
    """Observation [..., T', S, D] -> value [..., 1]."""

    def forward(self, observation: Tensor) -> Tensor:
        """The mean over the tokens."""
        return super().forward(observation).mean(-1, keepdim=True)


@torch.no_grad()
def evaluate(env: Any, actor: Any, seed: int, num_steps: int = 32) -> dict[str, float]:
    """The rewards of the policy's draws and of uniform random masks on the same fresh clips."""
    rewards = {}
    for name, policy in (("trained", actor), ("random", None)):
        env.set_seed(seed)
        rewards[name] = env.rollout(num_steps, policy, break_when_any_done=False)["next", "reward"].flatten()
    difference = rewards["trained"] - rewards["random"]
    result = {name: float(reward.mean()) for name, reward in rewards.items()}
    return result | {"standard_error": float(difference.std()) / len(difference) ** 0.5}


def main(args: Args) -> dict[str, float]:
    """Train; returns the rewards ``trained`` and ``random``, and the ``standard_error`` of their difference."""
    torch.manual_seed(args.seed)
    native: Any = gym.make_vec(
        "TATSMasking-v0", args.num_envs, vectorization_mode="vector_entry_point", output="torch", device=args.device,
        dataset=args.dataset, num_videos=args.num_videos, size=args.size, mask_ratio=args.mask_ratio,
        reward=args.reward, mae_seed=args.seed,
    )  # fmt: skip
    task = native.unwrapped.task
    features, device = native.single_observation_space.shape[-1], task.device
    # Where all episodes end at once, as here at every step, TorchRL resets once more after the native autoreset:
    # one clip in two is drawn and passed over.
    env = GymWrapper(CoTrainMAE(native), device=device, convert_actions_to_numpy=False)
    env.set_seed(args.seed)

    actor = ProbabilisticActor(
        TensorDictModule(TokenMLP(features), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=PlackettLuce,
        distribution_kwargs={"k": task.num_visible},
        return_log_prob=True,
        default_interaction_type="random",
    ).to(device)
    critic = ValueOperator(Critic(features), in_keys=["observation"]).to(device)
    advantage = GAE(gamma=0.0, lmbda=0.95, value_network=critic)  # actions don't change observations
    loss_module = ClipPPOLoss(
        actor, critic, clip_epsilon=args.clip_coef, entropy_coeff=args.ent_coef, critic_coeff=args.vf_coef,
        loss_critic_type="l2", normalize_advantage=True,
    )  # fmt: skip
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=args.learning_rate, eps=1e-5)
    frames_per_batch = args.num_envs * args.num_steps
    num_iterations = max(1, args.total_timesteps // frames_per_batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_iterations)
    collector = Collector(
        env, actor, frames_per_batch=frames_per_batch, total_frames=num_iterations * frames_per_batch, device=device,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    with Progress() as progress, SummaryWriter(args.log_dir) as writer:
        bar = progress.add_task("PPO", total=num_iterations)
        for iteration, rollout in enumerate(collector):
            advantage(rollout)
            flat = rollout.flatten()
            for _ in range(args.update_epochs):
                for index in torch.randperm(len(flat), device=device).chunk(args.num_minibatches):
                    losses = loss_module(flat[index])
                    loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(loss_module.parameters(), args.max_grad_norm)
                    optimizer.step()
            schedule.step()

            reward = float(rollout["next", "reward"].mean())
            numbers = {f"losses/{name}": float(number) for name, number in losses.detach().cpu().items()}
            for name, number in {"rollout/reward": reward, **numbers, **task.mae.metrics()}.items():
                writer.add_scalar(name, number, (iteration + 1) * frames_per_batch)
            progress.update(bar, advance=1, description=f"{args.reward} {reward:.2f}")
    native.unwrapped.check()

    task.mae.train(False)
    result = evaluate(GymWrapper(native, device=device, convert_actions_to_numpy=False), actor, args.seed + 1_000_000)
    print("{}: {:.3f} learned, {:.3f} random, difference's standard error {:.3f}".format(args.reward, *result.values()))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
