"""YAML files: reading with the place of a mistake, those that come with the package, and values by a dotted path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from experiments.refusals import ConfigError, close, did_you_mean


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


_MARKS = {"compare": "\nagents:", "bench": "\nbatches:"}
"""Keys by which a file for another verb than ``run`` is known."""


def packaged_configs(verb: str = "run") -> list[str]:
    """Names of the configurations that we ship for ``tats run``, or for another verb that takes some."""

    def belongs(text: str) -> bool:
        return _MARKS[verb] in text if verb in _MARKS else not any(mark in text for mark in _MARKS.values())

    found = [item for item in files("experiments").iterdir() if item.name.endswith(".yaml")]
    return sorted(item.name[:-5] for item in found if belongs(item.read_text(encoding="utf-8")))


def _read(path_or_name: str, verb: str) -> str:
    path, packaged = Path(path_or_name), packaged_configs(verb)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        stem = path.name.removesuffix(".yaml")
        if stem in packaged and path.parent.as_posix() in (".", "experiments"):
            return files("experiments").joinpath(f"{stem}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path_or_name}: can't be read: {error}") from None
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{path_or_name}: is a run's folder; give {path_or_name.rstrip('/')}/config.yaml")
    near = did_you_mean(*close(stem, packaged))
    raise ConfigError(
        f"{path_or_name}: no such file, nor a configuration that comes with the package ({', '.join(packaged)}){near}"
    )


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (ValueError, AttributeError, RecursionError) as error:  # of a date in month 99, say, or too many brackets
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path_or_name: str, verb: str) -> Any:
    """What a YAML file holds, or one that comes with the package.

    Raises:
        ConfigError: if there is none, or it is not YAML.
    """
    try:
        return _parse(_read(path_or_name, verb))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path_or_name}: {where}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path_or_name}: is not YAML: {error}") from None


def set_value(values: dict[str, Any], path: str, text: str) -> None:
    """Put a value as YAML reads it at a dotted path, in which ``-`` stands for ``_`` where there is no such key."""
    group = values
    *groups, last = path.split(".")
    for part in groups:
        group = group.setdefault(part if part in group else part.replace("-", "_"), {})
        if not isinstance(group, dict):
            raise ConfigError(f"command line: --{path}: {part} is not a mapping")
    try:
        group[last if last in group else last.replace("-", "_")] = _parse(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"command line: --{path}: {text!r} is not YAML: {problem}") from None


def set_options(values: dict[str, Any], args: Sequence[str]) -> None:
    """Put options of a command line, ``--path.to.key VALUE`` or ``--path.to.key=VALUE``, into nested values.

    Several values after one option are a list.
    """
    rest = list(args)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        given = [value] if equals else list(takewhile(lambda arg: not arg.startswith("--"), rest))
        if not option.startswith("--") or not given:
            raise ConfigError(f"command line: {option}: give options as --KEY VALUE, such as --minutes 9")
        rest = rest if equals else rest[len(given) :]
        set_value(values, option[2:], given[0] if len(given) == 1 else f"[{', '.join(given)}]")


def dump_yaml(values: dict[str, Any]) -> str:
    """Values as YAML that loads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
