"""PPO for `TATSMasking-v0` in one file, in the manner of CleanRL: read it from top to bottom, then edit it.

    python -m experiments.cleanrl_ppo --total-timesteps 20000

It needs nothing of ours but the environment. An action is a score for each of the N tokens, the K highest of which
stay visible. The policy puts Gumbel noise on its logits and hands over the sum, so that the K tokens come from a
Plackett-Luce distribution, whose log-probability is exact. The MAE learns from every step, beside the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import tats_env  # noqa: F401 (registers the environment)
from tats_env.wrappers import CoTrainMAE


@dataclass
class Args:
    """PPO on TATSMasking-v0, in one file."""

    env_id: str = "TATSMasking-v0"
    """a one-shot masking task"""
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
    anneal: bool = True
    """let the learning rate fall to 0 along a line"""
    gamma: float = 0.0
    """discount; actions don't change observations, so 0 fits"""
    gae_lambda: float = 0.95
    """of generalised advantage estimation; without effect at gamma 0"""
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
    target_kl: float | None = 0.05
    """no further pass over a rollout beyond this KL"""
    seed: int = 0
    """of everything"""
    device: str = "auto"
    """auto, cpu, cuda"""
    log_dir: Path = Path("runs/cleanrl_ppo")
    """folder for TensorBoard"""


class Agent(nn.Module):
    """An MLP for each token that is told of the mean over the clip: observation [B, T', S, D] -> logits, values."""

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.LayerNorm(width))
        self.actor, self.critic = nn.Linear(width, 1), nn.Linear(width, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # start near uniform masks

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T', S, D] -> logits [B, N], values [B]."""
        x = self.embed(observation.flatten(1, 2))
        x = self.mix(torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1))
        return self.actor(x).squeeze(-1), self.critic(x.mean(1)).squeeze(-1)


def perturb(logits: Tensor) -> Tensor:
    """Gumbel noise on the logits [B, N]: the order of the sum is a draw without replacement (Kool et al., 2019)."""
    return logits - torch.empty_like(logits).exponential_().clamp_min(1e-20).log()


def log_prob_and_entropy(logits: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Plackett-Luce log-probability [B] of the ordered picks [B, K], and the entropy [B] of the first of them."""
    log_p = logits.log_softmax(1)
    drawn = log_p.gather(1, picks)
    never = log_p.scatter(1, picks, -torch.inf).logsumexp(1, keepdim=True)
    # What was left before each pick: that pick, those after it, and what was never drawn.
    left = torch.cat([drawn, never], 1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
    return (drawn - left).sum(1), -(log_p.exp() * log_p).sum(1)


@torch.no_grad()
def evaluate(env: Any, agent: Agent, seed: int, num_steps: int = 32) -> dict[str, float]:
    """The rewards of the policy's draws and of uniform random masks on the same fresh clips, with the MAE at rest."""
    env = env.unwrapped  # without the MAE's training
    env.mae.train(False)
    rewards = {}
    for name in ("trained", "random"):
        observation, _ = env.reset(seed=seed)
        found = []
        for _ in range(num_steps):
            logits, _ = agent(observation)
            observation, reward, *_ = env.step(perturb(logits if name == "trained" else torch.zeros_like(logits)))
            found.append(reward)
        rewards[name] = torch.cat(found)
    difference = rewards["trained"] - rewards["random"]
    result = {name: float(reward.mean()) for name, reward in rewards.items()}
    return result | {"standard_error": float(difference.std()) / len(difference) ** 0.5}


def main(args: Args) -> dict[str, float]:
    """Train; returns the rewards ``trained`` and ``random``, and the ``standard_error`` of their difference."""
    torch.manual_seed(args.seed)
    env: Any = CoTrainMAE(
        gym.make_vec(
            args.env_id, args.num_envs, vectorization_mode="vector_entry_point", output="torch", device=args.device,
            dataset=args.dataset, num_videos=args.num_videos, size=args.size, mask_ratio=args.mask_ratio,
            reward=args.reward, mae_seed=args.seed,
        )
    )  # fmt: skip
    task = env.unwrapped.task
    k, device = task.num_visible, task.device
    agent = Agent(env.single_observation_space.shape[-1]).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    shape = (args.num_steps, args.num_envs)
    observations = torch.zeros(*shape, *env.single_observation_space.shape, device=device)
    picks = torch.zeros(*shape, k, dtype=torch.int64, device=device)
    log_probs, rewards, dones, values = torch.zeros(4, *shape, device=device).unbind()

    observation, _ = env.reset(seed=args.seed)
    num_iterations = max(1, args.total_timesteps // (args.num_envs * args.num_steps))
    with Progress() as progress, SummaryWriter(args.log_dir) as writer:
        bar = progress.add_task("PPO", total=num_iterations)
        for iteration in range(num_iterations):
            if args.anneal:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

            # Rollout
            with torch.no_grad():
                for step in range(args.num_steps):
                    observations[step] = observation
                    logits, values[step] = agent(observation)
                    scores = perturb(logits)
                    picks[step] = scores.topk(k).indices
                    log_probs[step], _ = log_prob_and_entropy(logits, picks[step])
                    observation, rewards[step], terminated, truncated, _ = env.step(scores)
                    dones[step] = terminated | truncated

                # Generalised advantage estimation
                advantages = torch.zeros_like(rewards)
                following, advantage = agent(observation)[1], torch.zeros(args.num_envs, device=device)
                for step in reversed(range(args.num_steps)):
                    goes_on = args.gamma * (1 - dones[step])
                    delta = rewards[step] + goes_on * following - values[step]
                    advantage = delta + goes_on * args.gae_lambda * advantage
                    advantages[step], following = advantage, values[step]
                returns = advantages + values

            # Update
            flat = [x.flatten(0, 1) for x in (observations, picks, log_probs, advantages, returns)]
            for _ in range(args.update_epochs):
                for index in torch.randperm(len(flat[0]), device=device).chunk(args.num_minibatches):
                    seen, chosen, old_log_prob, advantage, target = (x[index] for x in flat)
                    logits, value = agent(seen)
                    log_prob, entropy = log_prob_and_entropy(logits, chosen)
                    log_ratio = log_prob - old_log_prob
                    ratio = log_ratio.exp()
                    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                    value_loss = 0.5 * (value - target).square().mean()
                    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean()
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                approx_kl = (ratio - 1 - log_ratio).mean().detach()
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break

            # Log
            names = ("rollout/reward", "losses/policy", "losses/value", "losses/entropy", "losses/approx_kl")
            numbers = torch.stack([rewards.mean(), policy_loss, value_loss, entropy.mean(), approx_kl]).tolist()
            for name, number in [*zip(names, numbers, strict=True), *env.unwrapped.mae.metrics().items()]:
                writer.add_scalar(name, number, (iteration + 1) * args.num_envs * args.num_steps)
            progress.update(bar, advance=1, description=f"{args.reward} {numbers[0]:.2f}")
    env.unwrapped.check()

    result = evaluate(env, agent, seed=args.seed + 1_000_000)
    print("{}: {:.3f} learned, {:.3f} random, difference's standard error {:.3f}".format(args.reward, *result.values()))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
