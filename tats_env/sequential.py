"""The masking task in rounds: a few tokens at a time, with the reconstruction so far in view."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor
from typing_extensions import Unpack

from tats_env.env import TATSMaskingEnv
from tats_env.grid import hidden_tokens, visible_mask
from tats_env.mae import Reconstruction
from tats_env.rewards import Decision
from tats_env.task import MaskingTask, TaskOptions
from tats_env.vector_env import TATSMaskingVectorEnv


class SequentialTask(MaskingTask):
    """B parallel episodes of ``rounds`` decisions on one clip each; ``TATSMaskingSequentialEnv`` documents them.

    With the same seeds it draws the clips of ``MaskingTask`` with ``horizon=1``.

    Raises:
        ValueError: if ``rounds`` does not divide K, the MAE decodes a share of the tokens, or an argument of the
            one-shot task alone is given.
    """

    observes_actions: ClassVar[bool] = True

    def __init__(self, num_envs: int, *, rounds: int = 4, **options: Unpack[TaskOptions]) -> None:
        for name, instead in (
            ("reward", "its reward is the fall of the reconstruction error"),
            ("horizon", "give rounds= for the steps of an episode"),
        ):
            if name in options:
                raise ValueError(f"{name} is no argument of the sequential task: {instead}")
        super().__init__(num_envs, **options)
        if self.mae.decode_ratio < 1:
            raise ValueError(
                f"the mae has decode_ratio={self.mae.decode_ratio}: the reward in rounds is the fall of the error of "
                "all hidden tokens, so give one that decodes them all"
            )
        k = self.num_visible
        if rounds < 1 or k % rounds:
            fitting = ", ".join(str(d) for d in range(1, k + 1) if k % d == 0)
            raise ValueError(f"rounds={rounds} does not divide K={k} visible tokens: give one of {fitting}")
        self.horizon, self.num_picks = rounds, k // rounds
        self.reward = self._fall
        steps, positions, width = self.observation_space.shape
        shape = (steps, positions, width + 1 + self.grid.patch_dim)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def _load(self) -> None:
        super()._load()
        # Of a new clip nothing is visible yet
        self._reveal(self.shown[:, :0], self.mae.errors(self.clips, self.shown[:, :0], keep_prediction=True))

    def advance(self) -> None:
        """Go on to the next round on the same clip."""
        self.position += 1

    def step(self, scores: Tensor) -> Tensor:
        """Reveal the K / rounds tokens with the highest scores [B, N] of those still hidden; the reward, float32 [B].

        Raises:
            gymnasium.error.ResetNeeded: if all K are visible already.
        """
        if self.shown.shape[1] == self.num_visible:
            raise ResetNeeded(f"the episode ended with its {self.horizon} rounds: call reset() before the next step()")
        visible = torch.cat([self.shown, self._pick(scores)], 1).sort(dim=1).values
        rewards = self._show(visible)
        assert self.decision is not None
        self._reveal(visible, self.decision.reconstruction)
        self.mask_complete = self.episode_ends
        return rewards

    def _sees_with(self) -> dict[str, Tensor]:
        return self.mae.model.state_dict()

    def _reveal(self, visible: Tensor, found: Reconstruction) -> None:
        # Kept rather than found again in the next round, when an update may have changed the MAE: so returns telescope.
        self.shown, self._found = visible, found

    def _fall(self, decision: Decision) -> Tensor:
        """Fall of the summed error since the round before, over N: [B]."""
        before, after = self._found.token_error, decision.reconstruction.token_error
        return (before.sum(1) - after.sum(1)) / self.grid.num_tokens

    @torch.no_grad()
    def observe(self) -> Tensor:
        """float32 [B, T', S, D + 1 + P]: the clips as in ``MaskingTask``, what is visible, and the prediction."""
        n, prediction = self.grid.num_tokens, self._found.prediction
        hidden = hidden_tokens(self.shown, n)[..., None].expand_as(prediction)
        guess = prediction.new_zeros(self.num_envs, n, self.grid.patch_dim).scatter_(1, hidden, prediction)
        progress = torch.cat([visible_mask(self.shown, n)[..., None].float(), guess], 2)
        clips = super().observe()
        return torch.cat([clips, progress.unflatten(1, clips.shape[1:3])], 3)


class TATSMaskingSequentialEnv(TATSMaskingEnv):
    """
    ## Description
    `TATSMasking-v0` with the mask chosen in rounds. Each reveals a few more tokens of the same clip to the masked
    autoencoder (MAE), and the agent sees what it makes of them before it chooses the next. So an action changes what
    is observed and what there is left to gain: a sequential decision problem, whose natural discount is 1.

    ## Action Space
    `Box(-1, 1, (N,), float32)`: a priority for each token, as in `TATSMasking-v0`. The K / rounds highest of the
    tokens not visible yet become visible; scores of visible ones are ignored.

    ## Observation Space
    `Box(-inf, inf, (T', S, D + 1 + P), float32)`, P = `tubelet_size * patch_size^2 * 3`; along the last axis:

    | Channels | Meaning | By default |
    |----------|---------|------------|
    | D | the clip, as in `TATSMasking-v0` (`observation`) | 96 |
    | 1 | 1 where the token is visible by now, else 0 | |
    | P | the MAE's prediction of each hidden token's pixels, normalised by the patch's mean and deviation, 0 where visible. It follows from the visible pixels alone | 384 |

    ## Rewards
    How far a round lowered the reconstruction error, summed over all N tokens (0 for visible ones) and divided by N.
    The return is therefore the total fall, E_0 with nothing visible less E_K under the complete mask, each summed and
    divided alike. That holds under co-training too, for each error is measured once. E_0 may lie above the 1 of a
    constant prediction, for the MAE never learns with nothing visible.

    ## Starting State
    A clip drawn as in `TATSMasking-v0`, the same one with the same seed, with nothing visible.

    ## Episode End
    Terminates after `rounds` steps, when K tokens are visible. Never truncates.

    ## Information
    As in `TATSMasking-v0`; `visible` and the errors are of all the tokens shown so far.

    ## Arguments
    ```python
    >>> import gymnasium as gym
    >>> import tats_env
    >>> env = gym.make("TATSMaskingSequential-v0", mask_ratio=0.9, rounds=4)
    >>> env.observation_space.shape, env.action_space.shape
    ((8, 16, 481), (128,))

    ```

    | Parameter | Default | Meaning |
    |-----------|---------|---------|
    | `rounds` | `4` | steps of an episode; must divide K, the number of tokens that `mask_ratio` leaves visible |

    The others are those of `TATSMasking-v0`, without `reward` and `horizon`.

    `tats_env.wrappers.CoTrainMAE(env, every=rounds)` trains the MAE on complete masks only, as long as every episode
    is played to its end; with `every=1` it learns from the partial masks as well.

    ## Vectorized environment
    `gym.make_vec("TATSMaskingSequential-v0", num_envs=32, vectorization_mode="vector_entry_point")` gives
    `TATSMaskingSequentialVectorEnv`, the same task batched on one device.

    ## Version History
    * v0: Initial version
    """  # noqa: E501

    task_class: ClassVar[Callable[..., MaskingTask]] = SequentialTask


class TATSMaskingSequentialVectorEnv(TATSMaskingVectorEnv):
    """B sequential masking tasks on one device: ``TATSMaskingVectorEnv``'s form, ``TATSMaskingSequentialEnv``'s task.

    ``final_obs`` shows the complete mask. Under ``CoTrainMAE`` a new episode's first error, like its observation, comes
    from the MAE before that step's update.
    """

    task_class: ClassVar[Callable[..., MaskingTask]] = SequentialTask
