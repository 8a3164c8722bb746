"""The one schema of an experiment: defaults, YAML, options on the command line, and what to say when one is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from math import ceil, floor
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agents import AGENTS
from experiments.refusals import ConfigError, close, did_you_mean, explain, items, kind_of
from experiments.yaml_files import dump_yaml, read_yaml, set_value

REWARDS = ("surprise", "motion_surprise", "reconstruction_error", "negative_reconstruction_error")
"""Names in ``tats_env.rewards``, which is too heavy to import for a look at a configuration."""
# Settings that are text: what fits, how to say so, and names that may have been meant
_TEXTS: dict[str, tuple[str, str, Sequence[str]]] = {
    "name": (r"\w[\w.-]*", "a folder's name, of letters, digits, '_', '-' and '.'", ()),
    "device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N, such as cuda:0", ()),
    "data": (r"motion|folder:.+", "motion or folder:/path/to/videos", ("motion",)),
    "reward": (
        "|".join(REWARDS) + r"|\w+(\.\w+)*:\w+", f"one of {', '.join(REWARDS)} or package.module:function", REWARDS
    ),
}  # fmt: skip


_WHOLES = {"tubelet_size": "num_frames", "patch_size": "size", "num_heads": "width"}


def check_text(field: str, value: str) -> str:
    """``value``, if it is what the text setting of that name can be."""
    pattern, right, names = _TEXTS[field]
    if not re.fullmatch(pattern, value):
        near = close(value, names)
        if field == "data" and "/" in value:
            near = ["folder:" + value.rpartition(":")[2]]
        raise ValueError(f"{value!r} is unknown; give {right}{did_you_mean(*near)}")
    return value


def _check_divides(whole: int, part: int, what: str) -> None:
    if whole % part:
        below = max(d for d in range(1, min(part, whole) + 1) if whole % d == 0)
        above = [d for d in range(part, whole + 1) if whole % d == 0][:1]
        raise ValueError(f"{part} does not divide {what} = {whole}; give {' or '.join(map(str, [below, *above]))}")


class Section(BaseModel):
    """A part of a configuration."""

    # Strict, for "32", true and 1.5 are mistakes where a whole number belongs; defaults take part in the cross-checks.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _parts_fit(cls, value: Any, info: ValidationInfo) -> Any:
        whole = _WHOLES.get(info.field_name or "")
        if whole in info.data:  # else it was itself refused
            _check_divides(info.data[whole], value, whole)
        return value


class ClipConfig(Section):
    """What a clip is, and how it is cut into tokens."""

    num_frames: PositiveInt = 16
    """Frames in a clip."""
    frame_stride: PositiveInt = 1
    """Frames of the video from one frame of the clip to the next."""
    size: PositiveInt = 32
    """Height and width of a clip, in pixels."""
    tubelet_size: PositiveInt = 2
    """Frames in a token."""
    patch_size: PositiveInt = 8
    """Height and width of a token, in pixels."""

    @property
    def num_tokens(self) -> int:
        """N, the tokens of a clip."""
        return self.num_frames // self.tubelet_size * (self.size // self.patch_size) ** 2


class MAEConfig(Section):
    """The masked autoencoder and its training."""

    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Network size: tiny is for CPUs, base is VideoMAE's ViT-B."""
    checkpoint: str | None = None
    """Start from a run's mae.safetensors, which has a size of its own; None starts from scratch."""
    frozen: bool = False
    """Leave the MAE as it is, which makes the environment a stationary one."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate as it is; without this and base_learning_rate, the size's own."""
    base_learning_rate: PositiveFloat | None = None
    """Peak learning rate for 256 clips, scaled by the global batch; give this or learning_rate."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay, on matrices only."""
    warmup_steps: NonNegativeInt = 40
    """Updates over which the learning rate rises to its peak."""
    update_every: PositiveInt = 1
    """Environment steps from one update of the MAE to the next; those between are skipped, not accumulated."""
    compile: bool = False
    """Run the network through torch.compile."""

    @field_validator("base_learning_rate")
    @classmethod
    def _one_learning_rate(cls, value: float | None, info: ValidationInfo) -> float | None:
        absolute = info.data.get("learning_rate")
        if value is not None and absolute is not None:
            raise ValueError(f"{value} is given beside mae.learning_rate = {absolute}; give one, set the other to null")
        return value


class AgentConfig(Section):
    """Our PPO and its token sampler; another class has settings of its own (OtherAgentConfig)."""

    class_: Literal["ppo"] = Field(default="ppo", alias="class")
    """ppo, adamae, random, tube, frame, block, motion, oracle, greedy, sb3:ALGORITHM or package.module:Class."""
    credit: Literal["clip", "pick_surprise", "token_error", "token_motion"] = "token_motion"
    """Which outcome speaks for which token; the token credits raise what was hidden and hard to predict."""
    form: Literal["standardised", "proportional"] = "standardised"
    """How a token's outcome becomes its advantage; clip credit knows no forms."""
    power: PositiveFloat = 1.0
    """Exponent of the proportional form: probabilities settle in proportion to outcome^power."""
    learning_rate: PositiveFloat = 2e-3
    """Learning rate of the sampler."""
    n_steps: PositiveInt = 1
    """Environment steps in a rollout."""
    n_epochs: PositiveInt = 2
    """Passes over a rollout in an update."""
    n_minibatches: PositiveInt = 1
    """Equal parts into which a rollout of n_steps * batch_size clips is cut."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO's bound on how far a probability ratio counts, either side of 1."""
    ent_coef: NonNegativeFloat = 0.1
    """Weight of the entropy bonus."""
    entropy_floor: Annotated[float, Field(ge=1)] | None = None
    """Effective number of tokens, exp(entropy), below which a clip's policy is pushed back up; None for no floor."""
    vf_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Discount; 0, since a mask never changes the next clip."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Trace decay of generalised advantage estimation."""
    target_kl: PositiveFloat | None = 0.05
    """An update stops once the KL divergence exceeds 1.5 times this; None never stops."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which the sampler's gradient is clipped."""
    normalize_advantage: bool = True
    """Standardise clip advantages over each rollout."""
    explore: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of uniform draws mixed into the policy."""
    width: PositiveInt = 64
    """Channels of the sampler."""
    num_heads: PositiveInt = 4
    """Attention heads of the sampler."""
    depth: PositiveInt = 1
    """Trajectory attention blocks of the sampler."""
    logit_cap: PositiveFloat = 8.0
    """c of c * tanh((logit - mean) / c), which bounds how far apart two tokens can be."""


class OtherAgentConfig(Section):
    """An agent other than our PPO: what else is given goes to its constructor, which is asked before a run starts."""

    model_config = ConfigDict(extra="allow")

    class_: str = Field(alias="class")
    """Its name in ``agents.AGENTS``, sb3:ALGORITHM, or package.module:Class."""

    @field_validator("class_")
    @classmethod
    def _is_understood(cls, value: str) -> str:
        if value not in AGENTS and not re.fullmatch(r"sb3:\w+|\w+(\.\w+)*:\w+", value):
            raise ValueError(
                f"{value!r} is unknown; give one of {', '.join(AGENTS)}, sb3:ALGORITHM of stable-baselines3 or "
                f"package.module:Class{did_you_mean(*close(value, list(AGENTS)))}"
            )
        return value


def _agent_kind(value: Any) -> str:
    """Which of the two an ``agent`` section is; in angle brackets, so that no key of a path can be taken for it."""
    name = value.get("class", "ppo") if isinstance(value, dict) else getattr(value, "class_", "ppo")
    return "<ppo>" if name == "ppo" else "<other>"


class EvaluateConfig(Section):
    """What is measured after training."""

    num_videos: PositiveInt | None = 240
    """Validation videos, rendered or at most read; None is all of a folder, or 60 rendered."""
    clips: PositiveInt = 512
    """Validation clips on which samplers are compared."""
    probe: bool = True
    """Probe the frozen features."""
    baseline: bool = True
    """Also train under uniform random masks for as long, and compare."""
    pictures: bool = True
    """Draw masks.png and masks.gif of a few validation clips."""


class RunConfig(Section):
    """One run: train the MAE and the token sampler together, then evaluate both."""

    name: str = "run"
    """What the run's folder is called."""
    seed: NonNegativeInt = 0
    """Fixes clips, masks and initial weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is CUDA where there is one."""
    data: str = "motion"
    """motion (rendered here, with ground truth) or folder:/path/to/videos."""
    num_videos: PositiveInt | None = 480
    """Training videos, rendered or at most read; None is all of a folder, or 60 rendered."""
    mask_ratio: float = 0.9
    """Share of tokens that is hidden, between 0 and 1."""
    batch_size: PositiveInt = 32
    """Clips in a step, one an environment."""
    steps: PositiveInt = 600
    """Batches of clips to train for: steps of the environment times rounds."""
    reward: str = "reconstruction_error"
    """surprise, motion_surprise, reconstruction_error, negative_reconstruction_error or package.module:function."""
    rounds: PositiveInt = 1
    """Above 1, tokens are revealed in that many rounds, each rewarded by the fall of the error (reward is unused)."""
    horizon: PositiveInt = 1
    """Consecutive clips of one video in an episode."""
    log_interval: PositiveInt = 10
    """Steps between two lines of metrics."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    clip: ClipConfig = ClipConfig()
    mae: MAEConfig = MAEConfig()
    agent: Annotated[
        Annotated[AgentConfig, Tag("<ppo>")] | Annotated[OtherAgentConfig, Tag("<other>")], Discriminator(_agent_kind)
    ] = AgentConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("name", "device", "data", "reward")
    @classmethod
    def _is_understood(cls, value: str, info: ValidationInfo) -> str:
        return check_text(info.field_name or "", value)

    @field_validator("mask_ratio")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 < value < 1:
            side = "above 0" if value <= 0 else "below 1"
            raise ValueError(f"{value} is not {side}; a ratio such as 0.9 keeps a tenth of the tokens visible")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        n = self.clip.num_tokens
        k = int(n * (1 - self.mask_ratio) + 1e-9)
        if n == 1:
            raise ValueError("clip: one token is the whole clip, which can't be masked; give a smaller patch_size")
        if not 1 <= k < n:
            least, most = ceil(1e4 / n) / 1e4, floor(1e4 * (1 - 1 / n)) / 1e4
            raise ValueError(
                f"mask_ratio: {self.mask_ratio} keeps K = {k} of the N = {n} tokens of a clip visible, "
                f"and K must be from 1 to {n - 1}; give a ratio from {least} to {most}"
            )
        if self.rounds > 1 and self.horizon > 1:
            raise ValueError(f"horizon: {self.horizon} is given beside rounds = {self.rounds}; set one of them to 1")
        checks: list[tuple[str, int, int, str]] = [("rounds", k, self.rounds, "the number of visible tokens K")]
        if isinstance(self.agent, AgentConfig):
            floor_, n_steps = self.agent.entropy_floor, self.agent.n_steps
            if floor_ is not None and floor_ > n:
                raise ValueError(
                    f"agent.entropy_floor: {floor_} is above the N = {n} tokens of a clip; give {n} or less"
                )
            rollout = "agent.n_steps * batch_size"
            checks += [
                ("agent.n_steps", self.steps * self.rounds, n_steps, "steps * rounds"),
                ("agent.n_minibatches", n_steps * self.batch_size, self.agent.n_minibatches, rollout),
            ]
        for key, whole, part, what in checks:
            try:
                _check_divides(whole, part, what)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return self


_Schema = TypeVar("_Schema", bound=BaseModel)


def parse_config(values: Any, source: str) -> RunConfig:
    """A run's configuration from nested dictionaries; what is left out takes its default.

    Args:
        values: as YAML gives them.
        source: what to name as their origin in an error.

    Raises:
        ConfigError: one line for each problem found.
    """
    return parse(RunConfig, values, source)


def parse(schema: type[_Schema], values: Any, source: str) -> _Schema:
    """``values`` as that schema has them; arguments and errors as for ``parse_config``."""
    if not isinstance(values, dict):
        held = "nothing" if values is None else kind_of(values)
        raise ConfigError(
            f"{source}: holds {held}; a configuration is a mapping of keys to values, such as 'steps: 600'"
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in problem["loc"] if part not in ("<ppo>", "<other>"))
            text = explain(
                problem["type"],
                path,
                problem["input"],
                problem.get("ctx", {}),
                problem["msg"],
                to_values(schema()),
            )
            lines.append(": ".join(part for part in (source, path, text) if part))
        raise ConfigError("\n".join(lines)) from None


def load_config(path_or_name: str, overrides: Sequence[str] = (), prog: str | None = None) -> RunConfig:
    """A configuration from YAML, with options of the command line on top.

    Args:
        path_or_name: a YAML file, or the name of one that comes with the package, such as ``quickstart``.
        overrides: such as ``["--agent.clip-range", "0.1"]``.
        prog: the command that the usage line of ``--help`` names.

    Raises:
        ConfigError: one line for each problem found.
        SystemExit: by tyro, which has told the user: after ``--help``, or an option that is unknown or can't be read.
    """
    config = parse_config(read_yaml(path_or_name, "run"), path_or_name)
    return override_config(config, overrides, prog) if overrides else config


def override_config(config: RunConfig, overrides: Sequence[str], prog: str | None = None) -> RunConfig:
    """``config`` with options of the command line on top; arguments and errors as for ``load_config``.

    ``--agent.class`` swaps the agent: settings of the one before are dropped.
    """
    agent, rest = _override_agent(config.agent, overrides)
    if agent is not config.agent:
        config = config.model_copy(update={"agent": agent})
    flags = {f"--{path}".replace("_", "-") for path, value in items(to_values(config)) if isinstance(value, bool)}
    args: list[str] = []
    for arg in rest:  # tyro knows --mae.compile and --mae.no-compile only
        option = args[-1].replace("_", "-") if args else ""
        if arg.lower() in ("true", "false") and option in flags:
            if arg.lower() == "false":
                args[-1] = re.sub(r"([^.-][^.]*)$", r"no-\1", option)
        else:
            args.append(arg)
    parsed: Any = tyro.cli(_plain(config), args=args, prog=prog, description=RunConfig.__doc__)
    values = dataclasses.asdict(parsed)
    values["agent"] = values["agent"] | to_values(agent) if agent.class_ != "ppo" else values["agent"]
    values["agent"]["class"] = values["agent"].pop("class_", agent.class_)
    return parse_config(values, "command line")


def _override_agent(
    agent: AgentConfig | OtherAgentConfig, overrides: Sequence[str]
) -> tuple[AgentConfig | OtherAgentConfig, list[str]]:
    """The agent's section with its options on top, and the options left for tyro, which reads those of PPO."""
    settings: list[tuple[str, str]] = []
    rest: list[str] = []
    args = list(overrides)
    while args:
        option, equals, value = (arg := args.pop(0)).partition("=")
        key = option.removeprefix("--agent.")
        is_class = option == "--agent.class"
        if not is_class and (not option.startswith("--agent.") or _agent_class(agent, overrides) == "ppo"):
            rest.append(arg)
            continue
        if not equals:
            value = args.pop(0) if args and not args[0].startswith("--") else "true"
        settings.append((key, value))
    name = _agent_class(agent, overrides)
    if name == "ppo":
        return (agent if isinstance(agent, AgentConfig) else AgentConfig()), rest
    values: dict[str, Any] = to_values(agent) if name == agent.class_ else {"class": name}
    for key, value in settings:
        set_value({"agent": values}, f"agent.{key}", value)
    return parse_config({"agent": values}, "command line").agent, rest


def _agent_class(agent: AgentConfig | OtherAgentConfig, overrides: Sequence[str]) -> str:
    """The agent's class once the options have spoken."""
    name = agent.class_
    for arg, following in zip(overrides, [*overrides[1:], ""], strict=True):
        if arg == "--agent.class":
            name = following
        elif arg.startswith("--agent.class="):
            name = arg.partition("=")[2]
    return name


def _plain(section: BaseModel) -> type:
    """The section as a dataclass that checks nothing, so that tyro reads types and our own words refuse values."""
    fields: list[tuple[str, Any, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            plain = _plain(value)
            fields.append((name, plain, dataclasses.field(default_factory=plain)))
        else:
            kind = str if name == "class_" else field.annotation
            argument = tyro.conf.arg(help=field.description, name=field.alias)
            fields.append((name, Annotated[kind, argument], dataclasses.field(default=value)))  # type: ignore[valid-type]
    return dataclasses.make_dataclass(type(section).__name__, fields, namespace={"__doc__": type(section).__doc__})


def to_values(section: BaseModel) -> dict[str, Any]:
    """A section as nested dictionaries, with the keys that YAML has."""
    return section.model_dump(by_alias=True)


def dump_config(config: BaseModel) -> str:
    """The whole configuration, defaults written out, as YAML that loads back to an equal one."""
    return dump_yaml(to_values(config))
