"""From a configuration to the things it describes: environment, MAE and agent."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from agents.base import resolve_agent
from agents.ppo import PPO, SETTINGS
from experiments.refusals import ConfigError, close, did_you_mean
from experiments.schema import AgentConfig, OtherAgentConfig, RunConfig
from tats_env.data import VideoSet
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner, load_learner
from tats_env.sequential import TATSMaskingSequentialVectorEnv
from tats_env.vector_env import TATSMaskingVectorEnv


def masking_env(
    config: RunConfig,
    videos: VideoSet,
    mae: MAELearner,
    num_envs: int,
    observation: str,
    repeats: int = 1,
    first_env: int = 0,
) -> TATSMaskingVectorEnv:
    """The environment that a configuration describes, on the device."""
    clip = config.clip
    options: dict[str, Any] = {
        "dataset": videos,
        "mask_ratio": config.mask_ratio,
        "num_frames": clip.num_frames,
        "frame_stride": clip.frame_stride,
        "size": clip.size,
        "tubelet_size": clip.tubelet_size,
        "patch_size": clip.patch_size,
        "mae": mae,
        "observation": observation,
        "repeats": repeats,
        "foreground": videos.has_foreground,
        "first_env": first_env,
    }
    if config.rounds > 1:
        return TATSMaskingSequentialVectorEnv(num_envs, output="torch", rounds=config.rounds, **options)
    return TATSMaskingVectorEnv(num_envs, output="torch", reward=config.reward, horizon=config.horizon, **options)


def new_learner(config: RunConfig) -> MAELearner:
    """The MAE that a configuration asks for, from scratch or from ``mae.init``.

    Raises:
        ConfigError: if ``mae.init`` cannot be loaded, or is not for clips such as these.
    """
    mae = config.mae
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "learning_rate": mae.learning_rate,
        "base_learning_rate": mae.base_learning_rate,
        "weight_decay": mae.weight_decay,
        "warmup_steps": mae.warmup_steps,
        "total_steps": config.steps // mae.update_every,
        "device": config.device,
        "seed": config.seed,
        "compile": config.compile,
        "micro_batch_size": config.micro_batch_size,
        "decode_ratio": mae.decode_ratio,
        "checkpointing": mae.checkpointing,
    }
    if mae.init is None:
        return MAELearner(token_grid(config), mae.size, **options).train(not mae.frozen)
    return load_mae(mae.init, config, "mae.init", **options).train(not mae.frozen)


def load_mae(path: str | Path, config: RunConfig, what: str, **options: Any) -> MAELearner:
    """A trained MAE, for clips such as the configuration's.

    Args:
        path: of ``load_learner``, and so are the options.
        what: names it in an error.

    Raises:
        ConfigError: if it cannot be loaded, or was made for other clips.
    """
    try:
        learner = load_learner(path, grid=token_grid(config), **options)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
    if learner.grid != token_grid(config):
        raise ConfigError(f"{what}: {path} was made for {learner.grid}, but clip says {token_grid(config)}")
    return learner


def token_grid(config: RunConfig) -> TokenGrid:
    """How the configuration's clips are cut into tokens."""
    clip = config.clip
    return TokenGrid(clip.num_frames, clip.size, clip.size, clip.tubelet_size, clip.patch_size)


def agent_maker(section: AgentConfig | OtherAgentConfig, config: RunConfig) -> tuple[Any, dict[str, Any]]:
    """The class of an agent of a run, and the settings that its constructor takes besides environment and seed.

    Raises:
        ConfigError: if there is no such class, or it takes no such setting.
    """
    if isinstance(section, AgentConfig):
        policy = {name: getattr(section, name) for name in ("width", "num_heads", "depth", "logit_cap")}
        settings = {"policy_kwargs": policy, **{name: getattr(section, name) for name in SETTINGS}}
        return PPO, settings | {"compile": config.compile, "micro_batch_size": config.micro_batch_size}
    try:
        found = resolve_agent(section.class_)
    except ValueError as error:
        raise ConfigError(f"agent.class: {error}") from error
    settings = dict(section.model_extra or {})
    taken = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        names = [name for name in taken if name not in ("env", "seed")]
        for name in settings:
            if name not in names:
                known = f"{section.class_} takes {', '.join(names) or 'no settings'}"
                raise ConfigError(f"agent.{name}: unknown key; {known}{did_you_mean(*close(name, names))}")
    return found, settings
