"""The one schema of an experiment: defaults, YAML, options on the command line, and what to say when one is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from importlib.resources import files
from math import ceil, floor
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

REWARDS = ("surprise", "motion_surprise", "reconstruction_error", "negative_reconstruction_error")
"""Names in ``tats_env.rewards``, which is too heavy to import for a look at a configuration."""


class ConfigError(ValueError):
    """A configuration that can't be run; one line a problem: where, what is wrong, what would be right."""


class _Section(BaseModel):
    # Strict, for "32", true and 1.5 are mistakes where a whole number belongs; defaults take part in the cross-checks.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _check_divides(whole: int | None, part: int, what: str) -> int:
    """``part``, if it divides ``whole``; ``whole`` is None where it was itself refused."""
    if whole is not None and whole % part:
        below = max(d for d in range(1, min(part, whole) + 1) if whole % d == 0)
        above = next((d for d in range(part, whole + 1) if whole % d == 0), below)
        near = f"{below} or {above}" if above > below else f"{below}"
        raise ValueError(f"{part} does not divide {what} = {whole}; give {near}")
    return part


class ClipConfig(_Section):
    """What a clip is, and how it is cut into tokens."""

    num_frames: int = Field(16, ge=1)
    """Frames in a clip."""
    frame_stride: int = Field(1, ge=1)
    """Frames of the video from one frame of the clip to the next."""
    size: int = Field(32, ge=1)
    """Height and width of a clip, in pixels."""
    tubelet_size: int = Field(2, ge=1)
    """Frames in a token."""
    patch_size: int = Field(8, ge=1)
    """Height and width of a token, in pixels."""

    @field_validator("tubelet_size")
    @classmethod
    def _tubelets_fit(cls, value: int, info: ValidationInfo) -> int:
        return _check_divides(info.data.get("num_frames"), value, "clip.num_frames")

    @field_validator("patch_size")
    @classmethod
    def _patches_fit(cls, value: int, info: ValidationInfo) -> int:
        return _check_divides(info.data.get("size"), value, "clip.size")

    @property
    def num_tokens(self) -> int:
        """N, the tokens of a clip."""
        return self.num_frames // self.tubelet_size * (self.size // self.patch_size) ** 2


class MAEConfig(_Section):
    """The masked autoencoder and its training."""

    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Network size: tiny is for CPUs, base is VideoMAE's ViT-B."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate as it is; without this and base_learning_rate, the size's own."""
    base_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate for 256 clips, scaled by the global batch; give this or learning_rate."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's weight decay, on matrices only."""
    warmup_steps: int = Field(40, ge=0)
    """Updates over which the learning rate rises to its peak."""
    update_every: int = Field(1, ge=1)
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


class AgentConfig(_Section):
    """The token sampler and PPO."""

    credit: Literal["clip", "pick_surprise", "token_error", "token_motion"] = "token_motion"
    """Which outcome speaks for which token; the token credits raise what was hidden and hard to predict."""
    form: Literal["standardised", "proportional"] = "standardised"
    """How a token's outcome becomes its advantage; clip credit knows no forms."""
    power: float = Field(1.0, gt=0)
    """Exponent of the proportional form: probabilities settle in proportion to outcome^power."""
    learning_rate: float = Field(2e-3, gt=0)
    """Learning rate of the sampler."""
    n_steps: int = Field(1, ge=1)
    """Environment steps in a rollout."""
    n_epochs: int = Field(2, ge=1)
    """Passes over a rollout in an update."""
    n_minibatches: int = Field(1, ge=1)
    """Equal parts into which a rollout of n_steps * batch_size clips is cut."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """PPO's bound on how far a probability ratio counts, either side of 1."""
    ent_coef: float = Field(0.1, ge=0)
    """Weight of the entropy bonus."""
    entropy_floor: float | None = Field(None, ge=1)
    """Effective number of tokens, exp(entropy), below which the bonus grows; None leaves it constant."""
    vf_coef: float = Field(0.5, ge=0)
    """Weight of the value loss."""
    gamma: float = Field(0.0, ge=0, le=1)
    """Discount; 0, since a mask never changes the next clip."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Trace decay of generalised advantage estimation."""
    target_kl: float | None = Field(0.05, gt=0)
    """Mean KL divergence at which an update stops early; None never stops."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the sampler's gradient is clipped."""
    normalize_advantage: bool = True
    """Standardise clip advantages over each minibatch."""
    explore: float = Field(0.5, ge=0, lt=1)
    """Share of uniform in the distribution that tokens are drawn from."""
    width: int = Field(64, ge=1)
    """Channels of the sampler."""
    num_heads: int = Field(4, ge=1)
    """Attention heads of the sampler."""
    depth: int = Field(1, ge=1)
    """Trajectory attention blocks of the sampler."""
    logit_cap: float = Field(8.0, gt=0)
    """c of c * tanh(logit / c), which bounds how far apart two tokens can be."""

    @field_validator("num_heads")
    @classmethod
    def _heads_fit(cls, value: int, info: ValidationInfo) -> int:
        return _check_divides(info.data.get("width"), value, "agent.width")


class EvaluateConfig(_Section):
    """What is measured after training."""

    num_videos: int | None = Field(240, ge=1)
    """Validation videos, rendered or at most read; None reads all of a folder."""
    clips: int = Field(512, ge=1)
    """Validation clips on which samplers are compared."""
    probe: bool = True
    """Probe the frozen features."""
    baseline: bool = True
    """Also train under uniform random masks for as long, and compare."""


class RunConfig(_Section):
    """One run: train the MAE and the token sampler together, then evaluate both."""

    name: str = "run"
    """What the run's folder is called."""
    seed: int = Field(0, ge=0)
    """Fixes clips, masks and initial weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is CUDA where there is one."""
    data: str = "motion"
    """motion (rendered here, with ground truth) or folder:/path/to/videos."""
    num_videos: int | None = Field(480, ge=1)
    """Training videos, rendered or at most read; None reads all of a folder."""
    mask_ratio: float = 0.9
    """Share of tokens that is hidden, between 0 and 1."""
    batch_size: int = Field(32, ge=1)
    """Clips in a step, one an environment."""
    steps: int = Field(600, ge=1)
    """Steps of the environment to train for."""
    reward: str = "reconstruction_error"
    """surprise, motion_surprise, reconstruction_error, negative_reconstruction_error or package.module:function."""
    horizon: int = Field(1, ge=1)
    """Consecutive clips of one video in an episode."""
    log_interval: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    clip: ClipConfig = ClipConfig()
    mae: MAEConfig = MAEConfig()
    agent: AgentConfig = AgentConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", value):
            raise ValueError(f"{value!r} can't name a folder here; use letters, digits, '_', '-' and '.', as in run-1")
        return value

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"{value!r} is unknown; give auto, cpu, cuda or cuda:N, such as cuda:0")
        return value

    @field_validator("data")
    @classmethod
    def _is_a_data_set(cls, value: str) -> str:
        kind, colon, rest = value.partition(":")
        if value == "motion" or (kind == "folder" and rest):
            return value
        if kind == "folder":
            raise ValueError(f"{value!r} lacks its path; give folder:/path/to/videos")
        guess = f"folder:{rest if colon else value}" if "/" in value else "".join(_close(kind, ["motion", "folder"]))
        raise ValueError(f"{value!r} is unknown; give motion or folder:/path/to/videos{_did_you_mean(guess)}")

    @field_validator("mask_ratio")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 < value < 1:
            side = "above 0" if value <= 0 else "below 1"
            raise ValueError(f"{value} is not {side}; a ratio such as 0.9 keeps a tenth of the tokens visible")
        return value

    @field_validator("reward")
    @classmethod
    def _is_a_reward(cls, value: str) -> str:
        if value not in REWARDS and not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
            near = _did_you_mean(*_close(value, REWARDS))
            raise ValueError(f"{value!r} is unknown; give one of {', '.join(REWARDS)} or package.module:function{near}")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        n, floor_ = self.clip.num_tokens, self.agent.entropy_floor
        k = int(n * (1 - self.mask_ratio) + 1e-9)
        if n == 1:
            raise ValueError("clip: one token is the whole clip, which can't be masked; give a smaller patch_size")
        if not 1 <= k < n:
            least, most = ceil(1e4 / n) / 1e4, floor(1e4 * (1 - 1 / n)) / 1e4
            raise ValueError(
                f"mask_ratio: {self.mask_ratio} keeps K = {k} of the N = {n} tokens of a clip visible, "
                f"and K must be from 1 to {n - 1}; give a ratio from {least} to {most}"
            )
        if floor_ is not None and floor_ > n:
            raise ValueError(f"agent.entropy_floor: {floor_} is above the N = {n} tokens of a clip; give {n} or less")
        try:
            _check_divides(self.agent.n_steps * self.batch_size, self.agent.n_minibatches, "agent.n_steps * batch_size")
        except ValueError as error:
            raise ValueError(f"agent.n_minibatches: {error}") from None
        return self


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value} is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML as ``_Loader`` reads it."""


for _yaml in (_Loader, _Dumper):  # YAML 1.1, which PyYAML speaks, reads 1e-3 as text
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _close(word: str, names: Sequence[str]) -> list[str]:
    return get_close_matches(word, names, n=1)


def _did_you_mean(*names: str) -> str:
    return f"; did you mean {' or '.join(names)}?" if any(names) else ""


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _unknown_key(path: str) -> str:
    """What to say of a key that the schema does not have, the nearest anywhere in the schema included."""
    group, _, key = path.rpartition(".")
    defaults = RunConfig().model_dump()
    valid = list(_paths(defaults))
    if path in valid:
        return f"unknown key; write it as a mapping, {group}: {{{key}: ...}}"
    likeness = {name: SequenceMatcher(None, key, name.rpartition(".")[2]).ratio() for name in valid}
    best = max(likeness.values())
    if best < 0.6:
        return f"unknown key; there are {', '.join(defaults[group] if group else defaults)}"
    nearest = [name for name in valid if likeness[name] == best]
    return "unknown key" + _did_you_mean(*([name for name in nearest if name.rpartition(".")[0] == group] or nearest))


_KINDS = {
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": "not above {gt}",
    "greater_than_equal": "below {ge}",
    "less_than": "not below {lt}",
    "less_than_equal": "above {le}",
    "finite_number": "not finite",
}


def _explain(kind: str, path: str, value: Any, context: dict[str, Any], message: str) -> str:
    """One of pydantic's errors in our words: what was given, what is expected, what would be right."""
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "value_error":
        return str(context["error"])
    default: Any = RunConfig()
    for key in path.split("."):
        default = getattr(default, key, None)
    if kind == "literal_error":
        near = _did_you_mean(*_close(str(value), re.findall(r"'(.*?)'", context["expected"])))
        return f"{value!r} is unknown; give {context['expected']}{near}"
    if kind in _BOUNDS:
        right = "null" if default is None else default
        return f"{value} is {_BOUNDS[kind].format(**context)}; the default is {right}"
    if kind not in _EXPECTED:
        return f"{value!r}: {message}"
    given = "nothing is given" if value is None else f"{value!r} is {_KINDS.get(type(value), type(value).__name__)}"
    expected = _EXPECTED[kind]
    if kind == "model_type":
        expected += f": {', '.join(default.model_dump())}"
    elif kind != "bool_type" and default is not None:
        expected += f", such as {default}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]*\d", value):
        expected += f" (write {value} without quotes)"
    elif kind == "string_type" and not isinstance(value, (list, dict, type(None))):
        expected += " (put it in quotes)"
    return f"{given}; expected {expected}"


def parse_config(values: Any, source: str) -> RunConfig:
    """A configuration from nested dictionaries; what is left out takes its default.

    Args:
        values: as YAML gives them.
        source: what to name as their origin in an error.

    Raises:
        ConfigError: one line for each problem found.
    """
    if not isinstance(values, dict):
        held = "nothing" if values is None else _KINDS.get(type(values), type(values).__name__)
        raise ConfigError(
            f"{source}: holds {held}; a configuration is a mapping of keys to values, such as 'steps: 600'"
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in problem["loc"])
            text = _explain(problem["type"], path, problem["input"], problem.get("ctx", {}), problem["msg"])
            lines.append(": ".join(part for part in (source, path, text) if part))
        raise ConfigError("\n".join(lines)) from None


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(item.name[:-5] for item in files("experiments").iterdir() if item.name.endswith(".yaml"))


def _read(path_or_name: str) -> str:
    path = Path(path_or_name)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        stem = path.name.removesuffix(".yaml")
        if stem in packaged_configs() and path.parent.as_posix() in (".", "experiments"):
            return files("experiments").joinpath(f"{stem}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path_or_name}: can't be read: {error}") from None
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{path_or_name}: is a run's folder; give {path_or_name.rstrip('/')}/config.yaml")
    near = _did_you_mean(*_close(stem, packaged_configs()))
    raise ConfigError(
        f"{path_or_name}: no such file, nor a configuration that comes with the package "
        f"({', '.join(packaged_configs())}){near}"
    )


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
    try:
        values = yaml.load(_read(path_or_name), Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path_or_name}: {where}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path_or_name}: is not YAML: {error}") from None
    config = parse_config(values, path_or_name)
    return override_config(config, overrides, prog) if overrides else config


def override_config(config: RunConfig, overrides: Sequence[str], prog: str | None = None) -> RunConfig:
    """``config`` with options of the command line on top; arguments and errors as for ``load_config``."""
    flags = {f"--{path}" for path in _paths(config.model_dump()) if isinstance(_at(config, path), bool)}
    args: list[str] = []
    for arg in overrides:  # tyro knows --mae.compile and --mae.no-compile only
        option = args[-1].replace("_", "-") if args else ""
        if arg.lower() in ("true", "false") and option in flags:
            if arg.lower() == "false":
                args[-1] = "{}.no-{}".format(*option.rsplit(".", 1))
        else:
            args.append(arg)
    parsed: Any = tyro.cli(_plain(config), args=args, prog=prog, description=RunConfig.__doc__)
    return parse_config(dataclasses.asdict(parsed), "command line")


def _at(config: BaseModel, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _plain(section: BaseModel) -> type:
    """The section as a dataclass that checks nothing, so that tyro reads types and our own words refuse values."""
    fields: list[tuple[str, Any, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            plain = _plain(value)
            fields.append((name, plain, dataclasses.field(default_factory=plain)))
        else:
            annotation = Annotated[field.annotation, tyro.conf.arg(help=field.description)]  # type: ignore[name-defined]
            fields.append((name, annotation, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(type(section).__name__, fields, namespace={"__doc__": type(section).__doc__})


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults written out, as YAML that loads back to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
