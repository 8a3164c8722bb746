"""The single-clip face of the masking task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import InvalidAction
from typing_extensions import Unpack

from tats_env.mae import MAELearner
from tats_env.rendering import render_task
from tats_env.task import EnvOptions, MaskingTask, as_scores


class TATSMaskingEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    ## Description
    A video masked autoencoder (MAE) learns by reconstructing the hidden space-time tokens of a clip. Here the agent
    decides which few tokens stay visible, and the MAE, which may be trained at the same time, says how that went.
    One step is one decision about one clip: a contextual bandit by default, a walk through consecutive clips of one
    video with `horizon > 1`. Actions never change observations, so the discount that fits is 0. In
    `TATSMaskingSequential-v0` they do: there the mask is chosen in rounds.

    Sources: Rai et al., "Reinforcement Learning meets Masked Video Modeling", ICCVW 2025; Tong et al., "VideoMAE",
    NeurIPS 2022.

    ## Action Space
    `Box(-1, 1, (N,), float32)`: a priority for each token, in time-major order `(t h w)`. The
    K = floor(N * (1 - mask_ratio) + 1e-9) highest stay visible; only their order matters. Ties are broken by a
    seeded uniform draw, so that an agent whose scores all sit at a bound gets a uniform mask. A wrong shape or a NaN
    raises `gymnasium.error.InvalidAction`.

    ## Observation Space
    `Box(-inf, inf, (T', S, D), float32)`; `observation[:, s]` is the trajectory of position s through time.

    | Axis | Meaning | By default |
    |------|---------|------------|
    | T' | tubelets along time, `num_frames / tubelet_size` | 8 |
    | S  | spatial positions, row by row, `(size / patch_size)^2` | 16 |
    | D  | features: the MAE's own token embedding plus position (`observation="tokens"`), or the normalised pixels of the patch, `tubelet_size * patch_size^2 * 3` of them (`observation="pixels"`), or the share of them on the true moving foreground (`observation="foreground"`, for oracles), or a zero that costs nothing to make (`observation="nothing"`, for masks that don't look) | 96 |

    ## Rewards
    | Name | What it makes an agent prefer |
    |------|-------------------------------|
    | `surprise` (default) | hard tokens *visible*: mean over the visible tokens of the error that each would have had if hidden, over the clip's mean; 1 is chance. Costs one extra pass without gradient |
    | `motion_surprise` | tokens visible whose change is hard to predict; the same with the motion error |
    | `reconstruction_error` | hard tokens *hidden*: mean error of the hidden tokens |
    | `negative_reconstruction_error` | masks that are easy to explain |

    `reward="package.module:function"` brings one of your own (see `tats_env.rewards`).

    ## Starting State
    A clip drawn uniformly from the videos of the split: a video, then a first frame. `reset(seed=s)` fixes the
    clips, the ties and everything else but the MAE's weights (`mae_seed`).

    ## Episode End
    Terminates after `horizon` clips. Never truncates.

    ## Information
    `reset` and `step` tell of the clip observed: `video_index`, `start_frame`, `label` (-1 if unknown). `step` also
    tells of the decision just made: `token_error` and `motion_error` (N values, 0 where visible, or not
    decoded by an MAE in training whose `decode_ratio` is below 1), `visible` (N booleans), `reconstruction_error`, and
    with `foreground=True` the share of each token's pixels on the moving foreground (N values).

    ## Arguments
    ```python
    >>> import gymnasium as gym
    >>> import tats_env
    >>> env = gym.make("TATSMasking-v0", mask_ratio=0.9, reward="surprise")
    >>> env.observation_space.shape, env.action_space.shape
    ((8, 16, 96), (128,))

    ```

    | Parameter | Default | Meaning |
    |-----------|---------|---------|
    | `dataset` | `"motion"` | `motion` or `scenes` (rendered on first use), `folder:/path` or another name that `tats_env.data.open_dataset` knows, or the open `VideoSet` that it gives, with sampling, crops and decoding as you like |
    | `split` | `"train"` | or `validation` |
    | `num_videos` | `60` | videos used of that split; `None` for all of a folder |
    | `mask_ratio` | `0.9` | share of hidden tokens |
    | `num_frames`, `frame_stride`, `size` | `16`, `1`, `32` | frames of a clip, video frames from one to the next, pixels a side |
    | `tubelet_size`, `patch_size` | `2`, `8` | frames and pixels of a token |
    | `mae` | `"tiny"` | a size (`tiny`, `mini`, `small`, `base`, `large`), a checkpoint's path, `hf:/folder` for a Hugging Face VideoMAE on disk, `pth:/file.pth` for one as VideoMAE or AdaMAE were released, or a live `MAELearner` |
    | `mae_seed` | `0` | of the MAE's initial weights |
    | `reward` | `"surprise"` | see above |
    | `observation` | `"tokens"` | or `pixels`, `foreground` (rendered sets, for oracles only) or `nothing` |
    | `horizon` | `1` | clips in an episode |
    | `repeats` | `1` | environments in a row that share one decoded clip, each under its own crop and mask; divides `num_envs` |
    | `foreground` | `False` | put the true moving foreground into the info (rendered sets, for evaluation only) |
    | `device` | `"auto"` | CUDA where there is one |
    | `render_mode` | `None` | or `rgb_array`: clip, visible tokens, reconstruction and error, frames side by side; `gymnasium.wrappers.RecordVideo` then shows the clip alone after a reset, and after each step what came of it |

    `env.unwrapped.mae` is the MAE's learner. It learns only when told: wrap the environment in
    `tats_env.wrappers.CoTrainMAE` to train it as the agent acts.

    ## Vectorized environment
    `gym.make_vec("TATSMasking-v0", num_envs=32, vectorization_mode="vector_entry_point")` gives
    `TATSMaskingVectorEnv`, the same task batched on one device.

    ## Version History
    * v0: Initial version
    """  # noqa: E501

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 (Gymnasium's own form)
    task_class: ClassVar[Callable[..., MaskingTask]] = MaskingTask

    def __init__(self, render_mode: str | None = None, **options: Unpack[EnvOptions]) -> None:
        self.render_mode = render_mode
        self.task = self.task_class(1, **options)
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space
        self._seeded = False

    @property
    def mae(self) -> MAELearner:
        """The learner whose errors are the reward."""
        return self.task.mae

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the next episode's first clip; a seed starts its sequence of episodes anew."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self.task.seed([seed if seed is not None else int(self.np_random.integers(1 << 62))])
            self._seeded = True
        self.task.begin_episode()
        self.task.decision = None
        self._observation = self.task.observe()[0].cpu().numpy()
        return self._observation.copy(), self._identity()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Keep the K highest of the N scores visible, reconstruct the rest, and go on to the next decision."""
        action = as_scores(action)
        self.task.check_shape(action, (self.task.grid.num_tokens,))
        if np.isnan(action).any():
            raise InvalidAction(f"the action holds {int(np.isnan(action).sum())} NaN; every score must be a number")
        reward = self.task.step(torch.from_numpy(action)[None].to(self.task.device))
        info: dict[str, Any] = {name: x[0].cpu().numpy() for name, x in self.task.token_info().items()}
        info["reconstruction_error"] = float(info["reconstruction_error"])
        terminated = self.task.episode_ends
        if not terminated:
            self.task.advance()
        if not terminated or self.task.observes_actions:
            self._observation = self.task.observe()[0].cpu().numpy()
        return self._observation.copy(), float(reward), terminated, False, {**info, **self._identity()}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """uint8 [height, width, 3]: the last decision's clip, visible tokens, reconstruction and error."""
        return render_task(self.task, 0) if self.render_mode == "rgb_array" else None

    def _identity(self) -> dict[str, int]:
        return {name: int(x[0]) for name, x in self.task.identity_info().items()}
