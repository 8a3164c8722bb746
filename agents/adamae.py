"""AdaMAE's sampler and its loss, vectorised.

Source: Bandara et al., "AdaMAE: Adaptive Masking for Efficient Spatiotemporal Learning with Masked Autoencoders",
CVPR 2023, sections 3.2 and 3.3. Its released code loops over the batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from typing_extensions import Self

from agents.base import Stepwise, damage_told
from agents.distributions import PlackettLuce, picks_to_scores
from agents.meter import Meter
from tats_env.guard import GuardedOptimizer, fused_adamw
from tats_env.mae.checkpoint import read_checkpoint, save_tensors

FORMAT = "tats-env adamae 1"


class AdaMAESampler(nn.Module):
    """One self-attention block over all tokens, with learned positions of its own -> one logit a token.

    Args:
        observation_shape: (T', S, D). A head is 64 wide, as published, or the next wider that divides D.
    """

    def __init__(self, observation_shape: tuple[int, ...]) -> None:
        super().__init__()
        steps, positions, dim = observation_shape
        self.pos_embed = nn.Parameter(torch.empty(1, steps * positions, dim))
        heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.block = Block(dim, heads, qkv_bias=True)
        self.head = nn.Linear(dim, 1)
        for weight in (self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, observation: Tensor) -> Tensor:
        """Observation [B, T', S, D] -> logits [B, N], float32."""
        return self.head(self.block(observation.flatten(1, 2) + self.pos_embed)).squeeze(-1).float()


def sampling_loss(log_p: Tensor, token_error: Tensor, hidden: Tensor, coefficient: float) -> Tensor:
    """-c * mean over the hidden tokens of log p_i * error_i (eq. 7), a scalar: hard tokens are shown more next time.

    Args:
        log_p: [B, N], the sampler's log-probabilities of one draw.
        token_error: [B, N], taken as constants.
        hidden: bool [B, N], the same number in each row.
        coefficient: c.
    """
    return -coefficient * (log_p * token_error.detach() * hidden).sum() / hidden.sum()


class AdaMAE(Stepwise):
    """AdaMAE: draws without replacement from a categorical distribution, which follows the reconstruction error.

    As in the released code, where the sampler is a part of the MAE, it has the MAE's optimiser: AdamW with its betas,
    weight decay and, at each step, its learning rate.

    Args:
        env: a ``TATSMasking`` vector environment with ``output="torch"``, an id, or None (to predict only).
        coefficient: c of the loss; the paper's is 1e-4. Adam all but cancels it.
        observation_shape: (T', S, D); with an environment, its own.
        seed: of the sampler's weights, its draws and the environment's clips.

    Raises:
        ValueError: with neither an environment nor a shape.
    """

    suffix: ClassVar[str] = ".safetensors"

    def __init__(
        self,
        env: Any = None,
        *,
        coefficient: float = 1e-4,
        observation_shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(env, seed=seed)
        if self.env is not None:
            observation_shape = self.env.single_observation_space.shape
        if observation_shape is None:
            raise ValueError("give env= or observation_shape=, which say how many tokens there are and how wide")
        self.coefficient, self.observation_shape = coefficient, tuple(observation_shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.sampler = AdaMAESampler(self.observation_shape).to(self.device)
        groups = param_groups_weight_decay(self.sampler, 0.05, no_weight_decay_list=["pos_embed"])
        self.optimizer = fused_adamw(groups, self.device, betas=(0.9, 0.95))
        self._guard = GuardedOptimizer(self.optimizer, self.sampler.parameters())
        self.meter = Meter()

    def logits(self, observation: Tensor) -> Tensor:
        """[B, N] for an observation [B, T', S, D]."""
        return self.sampler(observation)

    def scores(self, observation: Tensor, deterministic: bool) -> Tensor:
        """The ranks of a draw, or of the highest logits."""
        logits = self.logits(observation)
        self._policy = PlackettLuce(logits, logits.shape[1])
        picks = self._policy.mode() if deterministic else self._policy.sample(uniform=self.draws.uniform(*logits.shape))
        return picks_to_scores(picks, logits.shape[1])

    def after_step(self, observation: Tensor) -> None:
        """One update on what was just found; the graph is that of the forward pass that drew."""
        decision = self.env.unwrapped.task.decision
        found = decision.reconstruction
        loss = sampling_loss(self._policy.log_p, found.token_error, found.scored, self.coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = self.env.unwrapped.mae.optimizer.param_groups[0]["lr"]
        self._guard.accumulate(loss)
        self._guard.step()
        self.meter.add({"train/loss": loss, "mask/effective_tokens": self._policy.effective_tokens().mean()})

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call; raises if the sampler's updates are all skipped. Waits for the device."""
        norm, skipped = self._guard.report("sampler", "try a lower mae.learning_rate")
        rate = self.optimizer.param_groups[0]["lr"]
        counts = {"train/grad_norm": norm, "train/skipped_updates": skipped, "train/learning_rate": rate}
        return counts | self.meter.means()

    def state(self) -> dict[str, Any]:
        """As of ``Resumable``, with weights and optimiser."""
        return super().state() | {"weights": self.sampler.state_dict(), "guard": self._guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """As of ``Resumable``."""
        super().restore(state)
        self.sampler.load_state_dict(state["weights"])
        self._guard.restore(state["guard"])

    def save(self, path: str | Path) -> None:
        """Write the sampler and its settings to one safetensors file."""
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings())}
        save_tensors(self.sampler.state_dict(), path, metadata)

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Self:
        """Bring back what ``save`` wrote, with a new optimiser.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, or it is not such a checkpoint.
        """
        metadata, weights = read_checkpoint(path, FORMAT)
        with damage_told(path):
            agent = cls(env, **json.loads(metadata["settings"]))
            agent.sampler.load_state_dict(weights)
            return agent
