"""Agents from their files: which class wrote one is read from it, and nothing in it is run."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from agents import AGENTS, adamae, ppo
from agents.base import Agent, open_env, resolve_agent

_NAMES = {path.partition(":")[2]: name for name, path in AGENTS.items()}
_FORMATS = {ppo.FORMAT: "ppo", adamae.FORMAT: "adamae"}
_OWN_CLASS = "a class of your own brings back what it saved by its own load(path)"


def load_agent(path: str | Path, env: Any = None) -> Agent:
    """What ``agents.load`` is; arguments and errors as there."""
    file = policy_file(path)
    env = None if env is None else open_env(env)
    kind = resolve_agent(_written_by(file))
    try:
        agent: Agent = kind.load(file, env)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {error}") from error
    return agent


def policy_file(path: str | Path) -> Path:
    """The file of an agent: ``path`` itself or, of a run's or an export's folder, the one in it.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = [path / f"policy{suffix}" for suffix in (".safetensors", ".json", ".zip", "")]
    found += sorted(path.glob("policy.*"))
    for file in found:
        if file.is_file():
            return file
    wrong = "holds no policy.safetensors, policy.json or policy.zip" if path.is_dir() else "is not there"
    raise FileNotFoundError(f"{path} {wrong}: give what an agent's save wrote, or the folder of a run")


def _written_by(file: Path) -> str:
    """The name in ``AGENTS`` of the class that wrote a file.

    Raises:
        ValueError: if none of them did.
    """
    if zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is a zip, as stable-baselines3 writes: its loader unpickles, and so can run any code, which "
            "agents.load never does. One that you trust comes back by its algorithm's name, such as PPO: "
            f"agents.base.resolve_agent('sb3:PPO').load({str(file)!r}); {_OWN_CLASS}"
        )
    with file.open("rb") as opened:
        start = opened.read(9)
    # A safetensors file begins with the length of its JSON header, eight bytes; a text is never that long
    if start[8:] == b"{" and start[6:8] == b"\0\0":
        try:
            with safe_open(str(file), framework="pt") as tensors:
                written = (tensors.metadata() or {}).get("format")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
        if written in _FORMATS:
            return _FORMATS[written]
        raise ValueError(
            f"{file} is of format {written!r}, not one of {', '.join(_FORMATS)}: it holds something other than an "
            f"agent of tats-env, or one of another version; {_OWN_CLASS}"
        )
    written = None
    if start.lstrip()[:1] == b"{":
        try:
            written = json.loads(file.read_text("utf-8")).get("agent")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(written, str):
        raise ValueError(f"{file} was written by no agent of tats-env, and was not read any further; {_OWN_CLASS}")
    if written not in _NAMES:
        raise ValueError(
            f"{file} was written by {written}, which is none of tats-env's own agents, and agents.load runs no other "
            f"code; bring it back by that class's own load: {written}.load({str(file)!r})"
        )
    return _NAMES[written]
