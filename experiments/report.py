"""``tats report``: a run, or several side by side, as one HTML file that holds all it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import tyro
from jinja2 import Environment, StrictUndefined

from experiments.refusals import ConfigError
from experiments.report_curves import CURVES, HEIGHT, WIDTH
from experiments.report_folder import Run
from experiments.report_sections import (
    ACCENT,
    differences,
    facts,
    favoured,
    gallery,
    moments,
    other_curves,
    panels,
    results,
    share,
    tasks,
)


@dataclass
class Options:
    """Write a run's report.html: settings, curves, pictures and evaluation in one file; several runs are compared."""

    runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, such as runs/quickstart or, of its baseline, runs/quickstart/random."""
    out: Path | None = None
    """File to write; by default report.html in the run's folder or, of several runs, comparison.html here."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or a comparison of several; returns the file.

    It says what lies in the folders, and nothing else: in the midst of a run, after an interruption or elsewhere.

    Args:
        folders: of runs, or of the baselines within them.
        out: file to write; None is ``report.html`` in the folder of one, ``comparison.html`` here of several.

    Raises:
        ConfigError: if there is no folder, one is no run's, or ``out`` is a folder.
        OSError: if the file can't be written.
    """
    if not folders:
        raise ConfigError("tats report: the folder of a run comes first, such as runs/quickstart")
    runs = [Run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    path = out or (folders[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; give a file, such as {path / 'report.html'}")
    partial = path.with_name(path.name + ".partial")
    try:
        # Names of files that are no text come with lone surrogates
        partial.write_text(_page(runs), encoding="utf-8", errors="replace", newline="\n")
        partial.replace(path)
    except FileNotFoundError:
        raise ConfigError(f"--out {path}: there is no folder {path.parent}") from None
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    return path


def report(args: Sequence[str]) -> int:
    """What ``tats report`` does with its arguments; returns the exit code.

    Raises:
        ConfigError: as of ``write_report``.
        SystemExit: by tyro, after ``--help`` or an option that is unknown or can't be read.
    """
    options = tyro.cli(Options, args=args, prog="tats report")
    print(f"Written: {write_report(options.runs, options.out)}")
    return 0


def _labels(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: their folders' names, with as many of those above as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def _page(runs: Sequence[Run]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"] = share
    template = environment.from_string(files("experiments").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    several = len(runs) > 1
    context = {
        "title": " · ".join(run.label for run in runs) if several else str(runs[0].setting("name") or runs[0].label),
        "runs": runs,
        "several": several,
        "facts": facts(runs),
        "results": results(runs),
        "panels": panels(runs, CURVES),
        "more_panels": panels(runs, other_curves(runs)),
        "size": (WIDTH, HEIGHT),
        "galleries": [(run, gallery(run)) for run in runs],
        "moments": [(run, moments(run)) for run in runs],
        "favoured": [(run, favoured(run)) for run in runs],
        "tasks": [(run, tasks(run)) for run in runs],
        "differences": differences(runs) if several else [],
        "accent": ACCENT,
    }
    return template.render(context)
