"""Our PPO: rollouts on the device, clip-level or token-level credit, and hooks that let the MAE train in between.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; settings and log keys are named as in
stable-baselines3.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from agents.base import Draws, Resumable, damage_told, env_device, from_batch, open_env, to_batch
from agents.credit import CREDITS, FORMS, Credit, clipped_surrogate, log_ratio, standardised, token_credit
from agents.distributions import PlackettLuce, picks_to_scores
from agents.hooks import Hook, as_hooks
from agents.meter import Meter
from agents.policies import TrajectoryPolicy
from agents.rollout import Rollout, Statistics, gae, rows_of
from tats_env.grid import visible_mask
from tats_env.guard import GuardedOptimizer, fused_adamw
from tats_env.mae.checkpoint import read_checkpoint, save_tensors
from tats_env.precision import autocast
from tats_env.processes import average, gathered, process_index

FORMAT = "tats-env ppo 2"
FINAL_LEARNING_RATE = 0.1
"""Of the cosine, as a share of the learning rate."""
REWARD_DECAY = 0.99
"""Of the running mean and variance of the reward, which moves as the MAE learns."""


class PPO(Resumable):
    """Proximal policy optimisation of which tokens stay visible.

    Args:
        env: a ``TATSMasking`` vector environment with ``output="torch"``, an id, or None (to predict only).
        policy: a module (observation [B, T', S, D]) -> (logits [B, N], values [B]); None makes a
            ``TrajectoryPolicy`` from ``policy_kwargs``.
        learning_rate: AdamW's, on a cosine to 10 % over ``learn``.
        n_steps: steps of the environment in a rollout.
        n_epochs: passes over a rollout.
        update_every: rollouts from one update to the next; those between act only, which spares their gradients.
        n_minibatches: parts of a rollout, one update each.
        clip_range: of the probability ratio.
        ent_coef: weight of the Plackett-Luce entropy for each pick.
        entropy_floor: effective number of tokens below which a clip's policy is pushed back up; None for no floor.
        vf_coef: weight of the value loss.
        gamma, gae_lambda: discount (0 fits where actions change no observation, 1 the sequential task) and trace
            decay.
        target_kl: updates of a rollout stop once the approximate KL exceeds 1.5 times this; None never stops.
        max_grad_norm: of the policy's gradient.
        normalize_advantage: standardise ``clip`` credit over a rollout.
        credit: of ``agents.credit.CREDITS``.
        form: of ``agents.credit.FORMS``, for credit by token.
        power: exponent of the proportional form.
        explore: share of uniform draws mixed into the policy, in the draw and in every ratio alike.
        policy_kwargs: of ``TrajectoryPolicy``.
        compile: run policy and loss through ``torch.compile``.
        micro_batch_size: decisions in one forward and backward pass; gradients add up over an update's.
        seed: of the policy's weights, its draws and the environment's clips.

    Where torch.distributed has been started, each process steps its share of the environments, and advantages, KL and
    gradients are those of all of them. With several minibatches each process shuffles its own share.

    Raises:
        ValueError: on settings that can't work.
    """

    observation: ClassVar[str] = "tokens"
    suffix: ClassVar[str] = ".safetensors"

    def __init__(
        self,
        env: str | gym.vector.VectorEnv[Any, Any, Any] | None,
        policy: torch.nn.Module | None = None,
        *,
        learning_rate: float = 2e-3,
        n_steps: int = 1,
        n_epochs: int = 2,
        update_every: int = 1,
        n_minibatches: int = 1,
        clip_range: float = 0.2,
        ent_coef: float = 0.1,
        entropy_floor: float | None = None,
        vf_coef: float = 0.5,
        gamma: float = 0.0,
        gae_lambda: float = 0.95,
        target_kl: float | None = 0.05,
        max_grad_norm: float = 1.0,
        normalize_advantage: bool = True,
        credit: str = "token_motion",
        form: str = "standardised",
        power: float = 1.0,
        explore: float = 0.5,
        policy_kwargs: dict[str, Any] | None = None,
        compile: bool = False,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if credit not in CREDITS:
            raise ValueError(f"credit {credit!r} is unknown; give one of {', '.join(CREDITS)}")
        if form not in FORMS:
            raise ValueError(f"form {form!r} is unknown; give one of {', '.join(FORMS)}")
        if min(n_steps, n_epochs, update_every, n_minibatches) < 1:
            raise ValueError("n_steps, n_epochs, update_every and n_minibatches must each be at least 1")
        self.env: Any = None if env is None else open_env(env)
        self.n_steps, self.n_epochs, self.n_minibatches, self.clip_range = n_steps, n_epochs, n_minibatches, clip_range
        self.update_every, self._due = update_every, True
        self.ent_coef, self.entropy_floor, self.vf_coef = ent_coef, entropy_floor, vf_coef
        self.gamma, self.gae_lambda, self.target_kl = gamma, gae_lambda, target_kl
        self.normalize_advantage, self.credit, self.form, self.power = normalize_advantage, credit, form, power
        self.explore, self.learning_rate, self.seed = explore, learning_rate, seed
        self.device = env_device(self.env)
        if policy is None:
            if self.env is None:
                raise ValueError("give env= or policy=: a policy is built for an observation space")
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                shape: Any = self.env.single_observation_space.shape
                policy = TrajectoryPolicy(shape, **(policy_kwargs or {}))
        if self.env is not None:
            self.env.unwrapped.task.always_probe = credit == "pick_surprise"
        self.policy = policy.to(self.device)
        self.optimizer = fused_adamw(self.policy.parameters(), self.device, lr=learning_rate)
        self.max_grad_norm = max_grad_norm
        self._guard = GuardedOptimizer(self.optimizer, self.policy.parameters(), max_grad_norm)
        self.draws = Draws(seed, self.env)
        self.micro_batch_size = micro_batch_size
        compiled: Any = partial(torch.compile, dynamic=False) if compile else lambda function: function
        self._forward, self._objective = compiled(self._evaluate), compiled(self._clipped_objective)
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._reward_mean, self._reward_variance, self._reward_weight = torch.zeros(3, device=self.device).unbind()
        self.meter = Meter()
        self.num_timesteps = 0
        self.num_updates = 0

    def learn(self, total_timesteps: int, callback: Hook | Sequence[Hook] | None = None) -> PPO:
        """Train for that many clips; the learning rate's cosine spans this call.

        Raises:
            ValueError: without an environment, or if ``n_minibatches`` does not divide a rollout.
            FloatingPointError, gymnasium.error.InvalidAction: if learning broke down, seen at the end or by a hook
                that logs.
        """
        if self.env is None:
            raise ValueError("this agent was made or loaded without an environment: give env= to learn")
        hooks = as_hooks(callback)
        clips_per_rollout = self.env.num_envs * self.n_steps
        if clips_per_rollout % self.n_minibatches:
            raise ValueError(
                f"n_minibatches={self.n_minibatches} does not divide a rollout of {self.env.num_envs} environments x "
                f"{self.n_steps} steps = {clips_per_rollout} decisions"
            )
        if clips_per_rollout // self.n_minibatches % (self.micro_batch_size or 1):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide an update's "
                f"{clips_per_rollout // self.n_minibatches} decisions"
            )
        observation, end = self._begin(total_timesteps)
        schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(2, total_timesteps // clips_per_rollout),
            lr_min=FINAL_LEARNING_RATE * self.learning_rate,
            t_in_epochs=False,
        )
        iteration = (self.num_timesteps - self._began) // clips_per_rollout
        if iteration:
            schedule.step_update(iteration)
        while self.num_timesteps < end:
            self._due = iteration % self.update_every == 0
            rollout, observation = self._collect(observation, hooks)
            for hook in hooks:
                hook.on_rollout_end(self)
            if self._due:
                self._train(rollout)
            del rollout  # not to be kept through the next one's forward and backward passes
            iteration += 1
            schedule.step_update(iteration)
            for hook in hooks:
                hook.on_update_end(self)
        self.check()
        return self

    def check(self) -> dict[str, float]:
        """Numbers of the optimiser for a log line; raises if learning broke down. Waits for the device."""
        self.env.unwrapped.check()
        norm, skipped = self._guard.report(
            "policy", "try a lower agent.learning_rate, a lower agent.logit_cap or a smaller agent.target_kl"
        )
        return {
            "train/grad_norm": norm,
            "train/skipped_updates": skipped,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/clip_range": self.clip_range,
            "train/n_updates": float(self.num_updates),
        }

    def metrics(self) -> dict[str, float]:
        """``check``'s numbers, and means since the last call of what each update measured. Waits for the device."""
        return self.check() | self.meter.means()

    def state(self) -> dict[str, Any]:
        """As of ``Resumable``, with weights, optimiser and the reward's statistics."""
        return super().state() | {
            "weights": self.policy.state_dict(),
            "guard": self._guard.state(),
            "reward": torch.stack([self._reward_mean, self._reward_variance, self._reward_weight]),
            "num_updates": self.num_updates,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """As of ``Resumable``."""
        super().restore(state)
        self.policy.load_state_dict(state["weights"])
        self._guard.restore(state["guard"])
        statistics = self._reward_mean, self._reward_variance, self._reward_weight
        for mine, value in zip(statistics, state["reward"], strict=True):
            mine.copy_(value)
        self.num_updates = state["num_updates"]

    def _evaluate(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N] and values [B], float32, of an observation [B, T', S, D]; in bfloat16 inside on a GPU."""
        with autocast(self.device):
            logits, values = self.policy(observation)
        return logits.float(), values.float()

    @property
    def uses_value(self) -> bool:
        """Whether the policy learns from rewards and values at all, which credit by token has no use for."""
        return self.credit == "clip"

    @property
    def _reuses(self) -> bool:
        """Whether a coming update's first forward pass is, exactly, the one that drew: then it is not made again."""
        return self._due and self.n_steps == self.n_minibatches == 1 and self.micro_batch_size is None

    @torch.no_grad()
    def _collect(self, observation: Tensor, hooks: list[Hook]) -> tuple[Rollout, Tensor]:
        """One rollout of ``n_steps`` steps, and the observation after it."""
        env, n = self.env, self.env.single_action_space.shape[0]
        task = env.unwrapped.task
        k, in_rounds = task.num_picks, task.num_picks < task.num_visible
        steps, rewards, ends, credits, availables = [], [], [], [], []
        available: Tensor | None = None
        for _ in range(self.n_steps):
            with torch.set_grad_enabled(self._reuses):
                self._drawn = self._forward(observation)
            logits, value = (x.detach() for x in self._drawn)
            if in_rounds:
                available = ~visible_mask(task.shown, n)
                availables.append(available)
            picks = PlackettLuce(logits, k, self.explore, available).sample(uniform=self.draws.uniform(*logits.shape))
            steps.append((observation, picks, logits, value))
            observation, reward, terminated, truncated, _ = env.step(picks_to_scores(picks, n))
            rewards.append(reward)
            ends.append(terminated | truncated)
            if self.credit != "clip":
                credits.append(token_credit(self.credit, self.form, self.power, task.decision, picks))
            self.num_timesteps += len(reward)
            for hook in hooks:
                hook.on_step(self)
        observations, picks, logits, values = (
            torch.stack(x) if len(x) > 1 else x[0][None]  # a view, for observations are large
            for x in zip(*steps, strict=True)
        )
        last_value = self._forward(observation)[1] if self.gamma else torch.zeros_like(values[0])
        advantages = gae(
            self._normalise(torch.stack(rewards)), values, torch.stack(ends), last_value, self.gamma, self.gae_lambda
        )
        returns = (advantages + values).flatten()
        if self.credit == "clip":
            flat = advantages.flatten()
            if self.normalize_advantage:
                everyone = gathered(flat)[None]
                first = process_index() * len(flat)
                if everyone.numel() > 1:
                    flat = standardised(everyone, torch.ones_like(everyone) > 0)[0, first : first + len(flat)]
            credit = Credit(flat[:, None], torch.ones_like(flat[:, None]) > 0)
        else:
            credit = Credit(*(torch.cat(x) for x in zip(*credits, strict=True)))
        observations, picks, logits, values = (x.flatten(0, 1) for x in (observations, picks, logits, values))
        rollout = Rollout(observations, picks, logits, values, returns, *credit)
        return (rollout._replace(available=torch.cat(availables)) if in_rounds else rollout), observation

    def _normalise(self, rewards: Tensor) -> Tensor:
        """Rewards [L, B] less their running mean, over their running deviation.

        Episodes have a fixed length, so the mean that is taken off shifts a return by what the steps left fix, and a
        value of the observation can learn that.
        """
        weight_before, variance_before = self._reward_weight.clone(), self._reward_variance.clone()
        self._reward_weight.lerp_(torch.ones_like(self._reward_weight), 1 - REWARD_DECAY)
        # An exponential average from 0, corrected for its start as Adam's moments are.
        average(mean := rewards.mean())
        self._reward_mean.lerp_(mean, 1 - REWARD_DECAY)
        centred = rewards - self._reward_mean / self._reward_weight
        average(mean_square := centred.square().mean())
        self._reward_variance.lerp_(mean_square, 1 - REWARD_DECAY)
        if self.uses_value:
            usual = torch.where(weight_before > 0, variance_before / weight_before, mean_square)
            self.meter.add({"train/reward_scale": (mean_square / (usual + 1e-8)).sqrt()})
        return centred / (self._reward_variance / self._reward_weight + 1e-8).sqrt()

    def _train(self, rollout: Rollout) -> None:
        """Several epochs of clipped updates on one rollout."""
        size = len(rollout.value)
        stopped = torch.zeros((), dtype=torch.bool, device=self.device)
        for epoch in range(self.n_epochs):
            batches = [rollout]
            if self.n_minibatches > 1:
                order = self.draws.uniform(1, size)[0].argsort()
                batches = [rows_of(rollout, part) for part in order.chunk(self.n_minibatches)]
            for batch in batches:
                drawn = self._drawn if epoch == 0 and self._reuses else None
                approx_kl = self._accumulate(batch, drawn)
                if self.target_kl is not None:
                    # As a mask on the device: reading the KL here would stop it in every update.
                    stopped = stopped | (approx_kl > 1.5 * self.target_kl)
                self._guard.step(skip=stopped)
                self.num_updates += 1
        self._drawn = None
        self.meter.add({"train/stopped_by_kl": stopped})
        self._measure_value(rollout)

    def _accumulate(self, batch: Rollout, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Add up the gradient of PPO's loss on a batch; returns the approximate KL from the policy that drew it.

        Args:
            drawn: logits and values of the forward pass that drew, with their graph, where the policy is still that.
        """
        total = batch.counts.sum().float()
        average(total)
        weight = batch.counts / total.clamp_min(1)
        parts = len(batch.value) // (self.micro_batch_size or len(batch.value))
        mean: list[Tensor] = []
        for i, rows in enumerate(torch.arange(len(batch.value), device=self.device).chunk(parts)):
            part, part_weight = (batch, weight) if parts == 1 else (rows_of(batch, rows), parts * weight[rows])
            logits, values = drawn or self._forward(part.observation)
            statistics = self._objective(logits, values, part, part_weight)
            self._guard.accumulate(statistics.loss, 1 / parts)
            mean = [x.detach() / parts + (mean[j] if i else 0) for j, x in enumerate(statistics)]
        found = Statistics(*mean)
        average(found.approx_kl)
        named = {f"train/{name}": x for name, x in found._asdict().items()}
        named["mask/plackett_luce_entropy"] = named.pop("train/entropy")
        named["mask/effective_tokens"] = named.pop("train/effective_tokens")
        self.meter.add(named)
        return found.approx_kl

    def _clipped_objective(self, logits: Tensor, values: Tensor, batch: Rollout, weight: Tensor) -> Statistics:
        """PPO's loss, with a graph, and what is worth knowing of it.

        Args:
            logits, values: [M, N] and [M], of the present policy.
            weight: [M, X], of each advantage.
        """
        k = batch.picks.shape[1]
        new, old = (PlackettLuce(x, k, self.explore, batch.available) for x in (logits, batch.logits))
        ratio_log = log_ratio(self.credit, new, old, batch.picks)

        # Policy gradient loss
        policy_loss = -(clipped_surrogate(ratio_log, batch.advantage, self.clip_range) * weight).sum()
        # Value loss, for a return in units of the reward's deviation
        value_loss = (values - batch.returns).square().mean()
        # Entropy loss: for each pick, so that its weight means the same at every K
        entropy = new.entropy(batch.picks)
        effective = new.effective_tokens()
        entropy_loss = -entropy.mean() / k
        loss = policy_loss + self.vf_coef * value_loss + self.ent_coef * entropy_loss
        if self.entropy_floor is not None:
            # A hinge on the log, steeper than any credit, for clips whose policy has become narrower than allowed
            loss = loss + (torch.log(self.entropy_floor / effective)).clamp_min(0).mean()

        ratio_log = ratio_log.detach()
        ratio = ratio_log.exp()
        # Schulman's estimator, http://joschu.net/blog/kl-approx.html
        approx_kl = (((ratio - 1) - ratio_log) * weight).sum()
        clip_fraction = (((ratio - 1).abs() > self.clip_range) * weight).sum()
        figures = policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction, entropy.mean(), effective.mean()
        return Statistics(loss, *(x.detach() for x in figures))

    @torch.no_grad()
    def _measure_value(self, rollout: Rollout) -> None:
        returns, value = gathered(rollout.returns), gathered(rollout.value)
        explained = 1 - (returns - value).var(correction=0) / returns.var(correction=0).clamp_min(1e-12)
        self.meter.add({"train/explained_variance": explained})

    @torch.no_grad()
    def logits(self, observation: Tensor) -> Tensor:
        """The policy's logits [B, N] for an observation [B, T', S, D] on its device."""
        return self._evaluate(observation)[0]

    @torch.no_grad()
    def predict(self, observation: Any, deterministic: bool = False) -> tuple[Any, None]:
        """Scores whose top K are a draw from the policy, or its most probable tokens.

        Args:
            observation: [T', S, D] or [B, T', S, D], numpy or torch.
            deterministic: take the mode rather than a draw.

        Returns:
            Scores in [-1, 1], [N] or [B, N], of the same kind; and None, for there is no hidden state.
        """
        x, single, as_numpy = to_batch(observation, self.device)
        logits, _ = self._evaluate(x)
        policy = PlackettLuce(logits, logits.shape[1], self.explore)
        order = policy.mode() if deterministic else policy.sample(uniform=self.draws.uniform(*logits.shape))
        return from_batch(picks_to_scores(order, logits.shape[1]), single, as_numpy), None

    def save(self, path: str | Path) -> None:
        """Write the policy and its settings to one safetensors file.

        Raises:
            TypeError: for a policy module of one's own, which only its own code can build.
        """
        if not isinstance(self.policy, TrajectoryPolicy):
            raise TypeError(f"save() knows how to bring back a TrajectoryPolicy, not a {type(self.policy).__name__}")
        settings = {name: getattr(self, name) for name in (*SETTINGS, "seed")}
        metadata = {"format": FORMAT, "settings": json.dumps(settings), "policy": json.dumps(self.policy.options)}
        save_tensors(self.policy.state_dict(), path, metadata)

    @classmethod
    def load(cls, path: str | Path, env: str | gym.vector.VectorEnv[Any, Any, Any] | None = None) -> PPO:
        """Bring back what ``save`` wrote, with a new optimiser; without ``env`` it can predict.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, or it is not such a checkpoint.
        """
        metadata, weights = read_checkpoint(path, FORMAT)
        with damage_told(path):
            policy = TrajectoryPolicy(**json.loads(metadata["policy"]))
            policy.load_state_dict(weights)
            return cls(env, policy, **json.loads(metadata["settings"]))


_OTHERS = ("env", "policy", "policy_kwargs", "compile", "micro_batch_size", "seed")
SETTINGS = tuple(name for name in inspect.signature(PPO).parameters if name not in _OTHERS)
"""Names of PPO's own settings, for configurations and checkpoints."""
