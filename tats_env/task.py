"""The task behind both faces of the environment, batched and in torch: draw clips, observe, mask, score, reward."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import InvalidAction
from torch import Tensor

from tats_env.data import VideoSet, open_dataset
from tats_env.data.staging import AHEAD
from tats_env.grid import TokenGrid, token_budget, visible_mask
from tats_env.keyed import keyed_bits, keyed_order
from tats_env.mae import SIZES, MAELearner, load_learner
from tats_env.mae.huggingface import PREFIX as HUGGINGFACE
from tats_env.mae.learner import resolve_device
from tats_env.mae.released import PREFIX as RELEASED
from tats_env.rewards import Decision, Reward, resolve_reward

OBSERVATIONS = ("tokens", "pixels", "foreground", "nothing")
_CLIP, _TIES, _UNIFORM, _CROP, _DECODE = 1, 2, 3, 4, 5  # what a random number is for


class TaskOptions(TypedDict, total=False):
    """Keyword arguments of the one-shot task; ``TATSMaskingEnv`` documents them."""

    dataset: str | VideoSet
    split: str
    num_videos: int | None
    mask_ratio: float
    num_frames: int
    frame_stride: int
    size: int
    tubelet_size: int
    patch_size: int
    mae: str | Path | MAELearner
    mae_seed: int
    reward: str | Reward
    observation: str
    horizon: int
    repeats: int
    foreground: bool
    device: str | torch.device


class EnvOptions(TaskOptions, TypedDict, total=False):  # named once more for pdoc, which reads bases
    """With what ``TATSMaskingSequential-v0`` alone takes."""

    rounds: int


def top_tokens(scores: Tensor, k: int, tie_order: Tensor) -> Tensor:
    """Indices [B, K], ascending, of the K highest scores [B, N]; equal scores rank as ``tie_order`` [B, N] has them."""
    ranked = scores.gather(1, tie_order).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return tie_order.gather(1, ranked).sort(dim=1).values


def as_scores(actions: Any) -> np.ndarray:
    """Actions as float32, copied, for torch wants no reversed or read-only memory.

    Raises:
        InvalidAction: if they are not an array of real numbers.
    """
    try:
        scores = np.array(actions.numpy(force=True) if isinstance(actions, Tensor) else actions)
    except (TypeError, ValueError) as error:
        raise InvalidAction(f"the action is not an array of numbers: {error}") from error
    if scores.dtype.kind not in "biuf":
        raise InvalidAction(f"the action holds {scores.dtype}; every score must be a real number")
    with np.errstate(over="ignore"):
        return scores.astype(np.float32, copy=False)


class MaskingTask:
    """B parallel masking tasks on one device; ``TATSMaskingEnv`` documents the keyword arguments.

    Randomness is keyed by (seed of the environment, episode, decision of the episode, purpose) alone.
    """

    observes_actions: ClassVar[bool] = False
    """Whether the observation tells what an action made visible."""

    def __init__(
        self,
        num_envs: int,
        *,
        dataset: str | VideoSet = "motion",
        split: str = "train",
        num_videos: int | None = 60,
        mask_ratio: float = 0.9,
        num_frames: int = 16,
        frame_stride: int = 1,
        size: int = 32,
        tubelet_size: int = 2,
        patch_size: int = 8,
        mae: str | Path | MAELearner = "tiny",
        mae_seed: int = 0,
        reward: str | Reward = "surprise",
        observation: str = "tokens",
        horizon: int = 1,
        repeats: int = 1,
        foreground: bool = False,
        device: str | torch.device = "auto",
    ) -> None:
        if observation not in OBSERVATIONS:
            raise ValueError(f"observation {observation!r} is unknown; give one of {', '.join(OBSERVATIONS)}")
        if horizon < 1:
            raise ValueError(f"horizon={horizon}: an episode has at least one clip")
        if repeats < 1 or num_envs % repeats:
            raise ValueError(f"repeats={repeats}: must divide the number of environments, {num_envs}")
        if multiprocessing.current_process().daemon:
            # A worker forked from a parent that has used torch would wait for ever for the parent's OpenMP threads.
            torch.set_num_threads(1)
        self.num_envs, self.horizon, self.observation = num_envs, horizon, observation
        self.num_clips = horizon  # in an episode, which has `horizon` decisions
        self.repeats = repeats
        self.grid = TokenGrid(num_frames, size, size, tubelet_size, patch_size)
        self.num_visible = token_budget(self.grid.num_tokens, mask_ratio)
        self.num_picks = self.num_visible  # tokens that one action chooses
        self.reward = resolve_reward(reward)
        self.mae = self._resolve_mae(mae, mae_seed, device)
        self.device = self.mae.device
        if isinstance(dataset, str):
            dataset = open_dataset(
                dataset, split=split, num_frames=num_frames, frame_stride=frame_stride, size=(size, size),
                num_videos=num_videos,
            )  # fmt: skip
        if dataset.clip_shape != (num_frames, size, size):
            shapes = " x ".join(map(str, dataset.clip_shape)), f"{num_frames} x {size} x {size}"
            raise ValueError("the given dataset's clips are {}, this environment's are {}".format(*shapes))
        self.videos = dataset
        if (foreground or observation == "foreground") and not self.videos.has_foreground:
            asked = "foreground=True" if foreground else "observation='foreground'"
            raise ValueError(f"{asked}: the truth is known for rendered sets only, not for {dataset.name}")
        self.with_foreground = foreground
        widths = {"tokens": self.mae.embed_dim, "pixels": self.grid.patch_dim, "foreground": 1, "nothing": 1}
        shape = (self.grid.num_steps, self.grid.num_positions, widths[observation])
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.grid.num_tokens,), np.float32)
        self.seeds = torch.zeros(num_envs, dtype=torch.int64)
        self.episode, self.position = -1, 0
        self.decision: Decision | None = None
        # Tokens of the present clips that are visible before the action speaks, indices [B, .]: none
        self.shown = torch.empty(num_envs, 0, dtype=torch.int64, device=self.device)
        self.mask_complete = True  # whether the last decision left all K tokens of its clips visible
        self.always_probe = False  # make the decision's pass under uniform masks in ``step``, before any update
        self._seen_with: dict[str, Tensor] = {}

    def _resolve_mae(self, mae: str | Path | MAELearner, seed: int, device: str | torch.device) -> MAELearner:
        if isinstance(mae, MAELearner):
            learner = mae
            if device != "auto" and resolve_device(device) != learner.device:
                raise ValueError(f"device={str(device)!r}, but the given mae lives on {learner.device}")
        elif str(mae) in SIZES:
            learner = MAELearner(self.grid, str(mae), batch_size=self.num_envs, device=device, seed=seed)
        elif str(mae).startswith((HUGGINGFACE, RELEASED)) or Path(mae).exists():
            learner = load_learner(mae, device=device, batch_size=self.num_envs, seed=seed, grid=self.grid)
        else:
            raise ValueError(
                f"mae={str(mae)!r} is neither a size ({', '.join(SIZES)}) nor a checkpoint: give a file of "
                f"save_learner, {HUGGINGFACE}/folder for a Hugging Face VideoMAE, or {RELEASED}/file.pth as VideoMAE "
                "and AdaMAE were released"
            )
        if learner.grid != self.grid:
            made = learner.grid
            raise ValueError(
                f"the mae was made for {made}, but this environment's clips are {self.grid}: give it num_frames="
                f"{made.num_frames}, size={made.height}, tubelet_size={made.tubelet_size}, patch_size={made.patch_size}"
            )
        return learner

    def seed(self, seeds: Sequence[int]) -> None:
        """Fix everything but the MAE's weights: one seed an environment; the next episode is each one's first."""
        self.seeds = torch.tensor([s % (1 << 63) for s in seeds], dtype=torch.int64)
        self.episode = -1

    def _key(self, episode: int, position: int, purpose: int) -> Tensor:
        return keyed_bits(self.seeds, episode, position, purpose)

    def _order(self, purpose: int, position: int) -> Tensor:
        """A random permutation of the tokens of each of the present clips, on the device: [B, N]."""
        key = self._key(self.episode, position, purpose).to(self.device, non_blocking=True)
        return keyed_order(key, self.grid.num_tokens)

    def _choose(self, episode: int, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(video index, first frame, place along the longer side) of the clips [B]: consecutive ones of one video
        within an episode."""
        key = self._key(episode, 0, _CLIP)[:: self.repeats].repeat_interleave(self.repeats)
        bits = keyed_bits(key[:, None], torch.arange(3)).numpy() & ((1 << 62) - 1)
        video = bits[:, 0] % len(self.videos)
        start = self.videos.starts(video, bits[:, 1], self.num_clips, position)
        return video, start, self.videos.positions(bits[:, 2])

    def _crops(self, episode: int, position: int) -> Tensor | None:
        """Keys of the clips' crops and mirroring [B], where the set was opened to crop and mirror; None elsewhere."""
        return self._key(episode, position, _CROP) if self.videos.augments else None

    def begin_episode(self) -> None:
        """Draw the first clip of every environment's next episode."""
        self.episode, self.position = self.episode + 1, 0
        self._load()

    def advance(self) -> None:
        """Go on to the next decision of the episode, which is about the next clip."""
        self.position += 1
        self._load()

    @property
    def episode_ends(self) -> bool:
        """Whether the present decision is the episode's last."""
        return self.position + 1 == self.horizon

    def _load(self) -> None:
        self.video_index, self.start_frame, place = self._choose(self.episode, self.position)
        self.crops = self._crops(self.episode, self.position)
        self.clips = self.videos.clips(self.video_index, self.start_frame, self.device, self.crops, place)
        for ahead in range(1, AHEAD + 1):
            episodes, position = divmod(self.position + ahead, self.num_clips)
            video, start, place = self._choose(self.episode + episodes, position)
            self.videos.prefetch(video, start, self.device, place)

    @torch.no_grad()
    def observe(self) -> Tensor:
        """float32 [B, T', S, D]: of the present clips the MAE's tokens, normalised patches or the truth; or zeros."""
        if self.observation == "tokens":
            return self.mae.tokens(self.clips)
        if self.observation == "pixels":
            seen = self.mae.normalize(self.grid.patchify(self.clips))
        elif self.observation == "foreground":
            seen = self.foreground()[..., None]
        else:
            seen = torch.zeros(len(self.clips), self.grid.num_tokens, 1, device=self.device)
        return seen.unflatten(1, (self.grid.num_steps, self.grid.num_positions))

    def _sees_with(self) -> dict[str, Tensor]:
        """The MAE's weights that observations depend on."""
        return self.mae.model.patch_embed.state_dict(prefix="patch_embed.") if self.observation == "tokens" else {}

    def remember(self) -> None:
        """Keep the weights that the present observation was made with, should an update come before ``state``."""
        self._seen_with = {name: x.clone() for name, x in self._sees_with().items()}

    def state(self) -> dict[str, Any]:
        """Where the task stands before a decision, which ``restore`` takes; ``remember`` is to follow the last step.

        Raises:
            RuntimeError: if some tokens of the present clips are visible already.
        """
        if self.shown.shape[1]:
            raise RuntimeError("state() can be asked for at the beginning of an episode only")
        videos = self.videos.state()
        return {"episode": self.episode, "position": self.position, "seen_with": self._seen_with, "videos": videos}

    def restore(self, state: dict[str, Any]) -> Tensor:
        """Go back, under the same seeds, to where ``state`` was asked for; returns the observation that was made there.

        Any number of environments can take up their share of what one process left.
        """
        self.videos.restore(state["videos"])
        self.episode, self.position = state["episode"], state["position"]
        model, seen_with = self.mae.model, state["seen_with"]
        present = {name: x.clone() for name, x in model.state_dict().items() if name in seen_with}
        model.load_state_dict(seen_with, strict=False)
        try:
            self._load()
            return self.observe()
        finally:
            model.load_state_dict(present, strict=False)

    def check_shape(self, actions: Tensor | np.ndarray, shape: tuple[int, ...]) -> None:
        """Raise InvalidAction unless ``actions`` has the given shape."""
        if tuple(actions.shape) != shape:
            raise InvalidAction(f"the action has shape {tuple(actions.shape)}; one score a token is {shape}")

    def step(self, scores: Tensor) -> Tensor:
        """Mask the present clips by the K highest scores [B, N], reconstruct, and return the reward, float32 [B].

        ``self.decision`` then holds what came of it. A NaN ranks as a score of 0; the faces report it.
        """
        return self._show(self._pick(scores))

    def _pick(self, scores: Tensor) -> Tensor:
        """Indices [B, num_picks], ascending, of the highest scores [B, N] among the tokens not shown yet."""
        least = torch.finfo(scores.dtype).min if self.shown.shape[1] else -torch.inf  # above those that are shown
        open_scores = scores.nan_to_num(0.0, torch.inf, least).scatter(1, self.shown, -torch.inf)
        return top_tokens(open_scores, self.num_picks, self._order(_TIES, self.position))

    def _show(self, visible: Tensor) -> Tensor:
        """Reconstruct the present clips from the visible tokens, indices [B, .], ascending; returns the reward [B]."""
        hidden = self._decoded(visible) if self.mae.training and self.mae.decode_ratio < 1 else None
        reconstruction = self.mae.reconstruct(self.clips, visible, hidden, self.observes_actions)
        shown = visible_mask(visible, self.grid.num_tokens)
        self.decision = Decision(self.mae, self.clips, shown, reconstruction, self._uniform())
        if self.with_foreground:
            self.decision.foreground = self.foreground()
        if self.always_probe:
            _ = self.decision.uniform_reconstruction
        with torch.no_grad():
            self.decision.rewards = self.reward(self.decision).float()
        return self.decision.rewards

    def _decoded(self, visible: Tensor) -> Tensor:
        """The share of the hidden tokens that the decoder is asked for, drawn at random: indices [B, M], ascending."""
        order = self._order(_DECODE, self.position)
        shown = visible_mask(visible, self.grid.num_tokens).gather(1, order)
        count = max(1, round(self.mae.decode_ratio * (self.grid.num_tokens - visible.shape[1])))
        # The hidden ones first, in their random order
        first = shown.byte().sort(dim=1, stable=True).indices[:, :count]
        return order.gather(1, first).sort(dim=1).values

    def _uniform(self) -> Callable[[], Tensor]:
        """What makes a uniform random mask of the same budget for each of the present clips: [B, K], ascending."""
        # Keyed by the clip: the same for each decision about it, and whenever it is asked for
        key = self._key(self.episode, self.position % self.num_clips, _UNIFORM)

        def visible() -> Tensor:
            order = keyed_order(key.to(self.device, non_blocking=True), self.grid.num_tokens)
            return order[:, : self.num_visible].sort(dim=1).values

        return visible

    def random_mask_error(self) -> Tensor:
        """The yardstick: the MAE's mean error on the present clips under uniform random masks, a scalar."""
        return self.mae.errors(self.clips, self._uniform()()).reconstruction_error.mean()

    def token_info(self) -> dict[str, Tensor]:
        """What came of the last decision, by token and by clip."""
        assert self.decision is not None, "token_info() follows step()"
        found = self.decision.reconstruction
        info = {
            "token_error": found.token_error,
            "motion_error": found.motion_error,
            "visible": self.decision.visible,
            "reconstruction_error": found.reconstruction_error,
        }
        if self.decision.foreground is not None:
            info["foreground"] = self.decision.foreground
        return info

    def foreground(self) -> Tensor:
        """Share of each token's pixels on moving foreground, of the present clips: float32 [B, N]."""
        pixels = self.videos.foreground(self.video_index, self.start_frame, self.device, self.crops)
        return self.grid.token_share(pixels)

    def identity_info(self) -> dict[str, Tensor]:
        """Which clips are present: video, first frame, and class (-1 if unknown), int64 [B] each."""
        label = self.videos.labels[self.video_index]
        host = {"video_index": self.video_index, "start_frame": self.start_frame, "label": label}
        return {name: torch.tensor(x).to(self.device, non_blocking=True) for name, x in host.items()}
