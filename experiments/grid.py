"""The grid of a comparison: its schema, its runs, and options on top."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from experiments.config import parse, parse_config
from experiments.refusals import ConfigError
from experiments.schema import RunConfig
from experiments.section import RENDERED_SETS, Section, check_text, data_texts
from experiments.yaml_files import packaged_configs, read_yaml, set_options


class Cell(NamedTuple):
    """One run of a grid."""

    agent: str
    data: str
    mask_ratio: float
    seed: int


class CompareConfig(Section):
    """A grid of runs, agents x data sets x mask ratios x seeds; those of a set see the same clips in the same order."""

    name: str = "compare"
    """What the comparison's folder is called."""
    out: str = "runs"
    """Folder in which the comparison's own folder is made, or found again."""
    processes: PositiveInt = 1
    """Runs at a time, each a process."""
    seeds: list[NonNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    """Of clips, masks and initial weights; the same for every agent."""
    mask_ratios: list[float] = Field(default=[0.9], min_length=1)
    """Shares of tokens that are hidden."""
    data: list[str] = Field(default=[])
    """Data sets to pre-train on; none is the one that ``run`` names."""
    run: dict[str, Any] = Field(default={})
    """What all runs share, as in a run's own configuration."""
    agents: dict[str, dict[str, Any]] = Field(default={"random": {"class": "random"}}, min_length=1)
    """Each agent's section under a name of its own; ``run`` inside holds what is different about its runs."""

    @field_validator("name", "agents")
    @classmethod
    def _are_folders(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value:
            check_text("name", name)
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _are_understood(cls, value: Any) -> Any:
        return data_texts(value)

    def runs(self, source: str) -> dict[Cell, RunConfig]:
        """The grid's runs, in the order in which they are started.

        Raises:
            ConfigError: one line for each problem found, with the agent that has it.
        """
        runs, problems = {}, []
        sets: list[str | None] = [*self.data] or [None]
        for seed, ratio, data, name in product(self.seeds, self.mask_ratios, sets, self.agents):
            agent = dict(self.agents[name])
            own = agent.pop("run", {})
            values = deepcopy(self.run)
            where = f"{source}: agents.{name}"
            if not isinstance(own, dict):
                problems.append(f"{where}: run: {own!r} is not a mapping of a run's keys to values")
                continue
            for key, value in own.items():
                shared = values.get(key)
                values[key] = {**shared, **value} if isinstance(shared, dict) and isinstance(value, dict) else value
            said = ("name", "out", "seed", "mask_ratio", "agent", *["data"] * bool(self.data))
            given = [key for key in said if key in values]
            if given:
                problems.append(f"{where}: run.{given[0]}: the grid itself says this; leave it out")
                continue
            fixed = {"name": f"{name}-{ratio:g}-{seed}", "seed": seed, "mask_ratio": ratio, "agent": agent}
            if data is not None:
                number = f"{self.data.index(data)}-" if data not in RENDERED_SETS else ""
                fixed |= {"data": data, "name": f"{number}{data.partition(':')[0]}-{fixed['name']}"}
            fixed["out"] = (Path(self.out) / self.name / "cells").as_posix()
            if isinstance(evaluate := values.get("evaluate", {}), dict):
                fixed["evaluate"] = {**evaluate, "baseline": False}
            try:
                run = parse_config(values | fixed, where)
                runs[Cell(name, run.data, ratio, seed)] = run
            except ConfigError as error:
                problems += str(error).splitlines()
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        return runs


def load_grid(path_or_name: str, overrides: Sequence[str] = ()) -> tuple[CompareConfig, float | None]:
    """A comparison's grid from YAML with options on top, such as ``--run.steps 100``; and what ``--minutes`` says.

    Raises:
        ConfigError: one line for each problem found, in the grid or in any of its runs.
    """
    values = read_yaml(path_or_name, "compare")
    parse(CompareConfig, values, path_or_name)
    set_options(values, overrides)
    minutes = values.pop("minutes", None)  # of the command line: no key of a file
    if minutes is not None and not isinstance(minutes, (int, float)):
        raise ConfigError(f"command line: minutes: {minutes!r} is not a number of minutes")
    grid = parse(CompareConfig, values, path_or_name)
    grid.runs(path_or_name)
    return grid, minutes


def compare_usage() -> str:
    """What ``tats compare --help`` prints."""
    lines = [
        "usage: tats compare GRID [--minutes M] [--KEY VALUE ...]",
        f"\n{CompareConfig.__doc__}\n",
        f"GRID is a YAML file or one that comes with the package: {', '.join(packaged_configs('compare'))}.",
        "Runs that are finished are not done again, so the same command goes on where the last one stopped.\n",
        "  --minutes M      stop after that long; the same command goes on with what was stopped",
    ]
    for name, field in CompareConfig.model_fields.items():
        lines.append(f"  --{name.replace('_', '-') + ' ...':14} {field.description}")
    lines.append("\nValues are YAML, and paths go deeper: --seeds 0 1 --run.steps 100 --agents.ppo.width 64")
    return "\n".join(lines)
