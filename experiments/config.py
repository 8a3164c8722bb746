"""A run's configuration: from YAML, with options of the command line on top, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from experiments.refusals import ConfigError, explain, items, kind_of
from experiments.schema import AgentConfig, OtherAgentConfig, RunConfig
from experiments.yaml_files import dump_yaml, read_yaml, set_value

_Schema = TypeVar("_Schema", bound=BaseModel)


ABOUT = {
    "run": f"{RunConfig.__doc__} With --dry-run, say what it would take, and make two steps of it in miniature.",
    "probe": "Probe a run's frozen encoder: linear, attentive and k-NN. What counts is probe, evaluate, data and clip.",
    "finetune": "Fine-tune a run's encoder into a classifier. What counts is finetune, evaluate, data and clip.",
}
"""What --help says of the verbs that take a run's configuration."""


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
    for arg in rest:  # tyro knows --compile and --no-compile only
        option = args[-1].replace("_", "-") if args else ""
        if arg.lower() in ("true", "false") and option in flags:
            if arg.lower() == "false":
                args[-1] = re.sub(r"([^.-][^.]*)$", r"no-\1", option)
        else:
            args.append(arg)
    verb = (prog or "tats run").split()[1]
    parsed: Any = tyro.cli(_plain(config), args=args, prog=prog, description=ABOUT[verb])
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
            # A factory, since a dataclass refuses a list as a default
            default = dataclasses.field(default_factory=partial(deepcopy, value))
            fields.append((name, Annotated[kind, argument], default))  # type: ignore[valid-type]
    return dataclasses.make_dataclass(type(section).__name__, fields, namespace={"__doc__": type(section).__doc__})


def to_values(section: BaseModel) -> dict[str, Any]:
    """A section as nested dictionaries, with the keys that YAML has."""
    return section.model_dump(by_alias=True)


def dump_config(config: BaseModel) -> str:
    """The whole configuration, defaults written out, as YAML that loads back to an equal one."""
    return dump_yaml(to_values(config))
