"""STUDY.md's table of the field against the results of the runs that it was made from."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

HOME = Path(__file__).parents[1] / "experiments"
COLUMNS = {
    "motion lift": "motion_lift",
    "error, random masks": "random_mask_error",
    "error, own masks": "reconstruction_error",
}
PROBES = {"linear": "linear_top1", "attentive": "attentive_top1"}


def rows(name: str) -> list[dict[str, str]]:
    with (HOME / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def said(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def test_the_table_of_the_field_is_what_the_runs_gave() -> None:
    cells, points = rows("study_cells.csv"), rows("study_points.csv")
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(cells, key=lambda row: int(row["seed"])):
        own = figures[row["data"], row["agent"]]
        for heading, key in (COLUMNS | PROBES).items():
            own[heading].append(float(row[key]))
    last = max(float(row["clips"]) for row in points)
    for row in points:
        if float(row["clips"]) < last:
            for heading, key in PROBES.items():
                figures[row["data"], row["agent"]][f"{heading}, half way"].append(float(row[key]))

    lines = (
        (HOME / "STUDY.md").read_text(encoding="utf-8").partition("## The field")[2].partition("\n## ")[0].splitlines()
    )
    head = next(line for line in lines if line.startswith("| set"))
    headings = [cell.strip() for cell in head.strip("|").split("|")]
    found = set()
    for line in lines:
        row = dict(zip(headings, (cell.strip() for cell in line.strip("|").split("|")), strict=False))
        key = row.get("set", ""), re.sub("`", "", row.get("agent", ""))
        if not line.startswith("|") or key not in figures:
            continue
        found.add(key)
        own = figures[key]
        assert int(row["seeds"]) == len(own["linear"]), line
        for heading in headings[2:-1]:
            expected = said(own[heading], 2 if heading == "motion lift" else 3) if own[heading] else ""
            assert row[heading] == expected, (key, heading, row[heading], expected)
    assert found == set(figures)
