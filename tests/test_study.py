"""STUDY.md's tables against the results of the runs that they were made from."""

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


def table(heading: str, of: str = "") -> list[dict[str, str]]:
    """The rows of the first table under a heading of STUDY.md, or of that one whose first column is called so."""
    part = (HOME / "STUDY.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    part = f"| {of}" + part.partition(f"\n| {of}")[2].partition("\n\n")[0]
    head, _, *body = [
        [re.sub("`", "", cell.strip()) for cell in line.strip("|").split("|")]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in body]


def by_agent() -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """What the runs gave, seeds in order: by set, share hidden and agent, then by column."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows("study_cells.csv"), key=lambda row: int(row["seed"])):
        own = found[row["data"], row["mask_ratio"], row["agent"]]
        for heading, key in (COLUMNS | PROBES).items():
            own[heading].append(float(row[key]))
    points = rows("study_points.csv")
    last = max(float(row["clips"]) for row in points)
    for row in points:
        if float(row["clips"]) < last:
            for heading, key in PROBES.items():
                found[row["data"], row["mask_ratio"], row["agent"]][f"{heading}, half way"].append(float(row[key]))
    return found


def hold(row: dict[str, str], own: dict[str, list[float]]) -> None:
    """A table's row against the figures."""
    assert int(row.pop("seeds")) == len(own["linear"]), row
    for heading, value in row.items():
        expected = said(own[heading], 2 if heading == "motion lift" else 3) if own[heading] else ""
        assert value == expected, (heading, row, expected)


def test_the_table_of_the_field_is_what_the_runs_gave() -> None:
    found = {(data, agent): own for (data, hidden, agent), own in by_agent().items() if hidden == "0.95"}
    lines = table("The field") + table("Screened with one seed")
    assert {(row["set"], row["agent"]) for row in lines} == set(found)
    for row in lines:
        hold(row, found[row.pop("set"), row.pop("agent")])


def test_the_table_of_differences_is_what_the_runs_gave() -> None:
    found = by_agent()
    lines = table("The field", of="less")
    assert {"random", *(row["less random"] for row in lines)} == {row["agent"] for row in table("The field")}
    for row in lines:
        own, random = found["motion", "0.95", row.pop("less random")], found["motion", "0.95", "random"]
        for heading, value in row.items():
            each = np.subtract(own[heading], random[heading][: len(own[heading])])
            listed = f"{each.mean():.3f} ({', '.join(f'{x:.3f}' for x in each)})" if len(each) else ""
            assert value == listed.replace("-0.000", "0.000"), (heading, row)


def test_the_table_of_half_as_many_clips_is_what_the_runs_gave() -> None:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in rows("study_short.csv"):
        for heading, key in (COLUMNS | PROBES).items():
            found[result["agent"]][heading].append(float(result.get(key, "nan")))
    lines = table("Half the clips")
    assert [row["agent"] for row in lines] == list(found)
    for row in lines:
        own = found[row.pop("agent")]
        assert row.pop("each seed") == ", ".join(f"{top1:.3f}" for top1 in own["attentive"])
        hold(row, own)


def test_the_table_of_mask_ratios_is_what_the_runs_gave() -> None:
    found, lines = by_agent(), table("How much is hidden")
    others = {key for key in found if key[1] != "0.95"}
    assert others <= {("motion", row["hidden"], row["agent"]) for row in lines}
    for row in lines:
        hold(row, found["motion", row.pop("hidden"), row.pop("agent")])


def test_the_table_of_transfer_is_what_the_runs_gave() -> None:
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in rows("study_transfer.csv"):
        own = found[result["trained_on"], result["probed_on"], result["agent"]]
        for heading, key in PROBES.items():
            own[heading].append(float(result[key]))
    lines = table("From one set to the other")
    assert {(row["trained on"], row["probed on"], row["agent"]) for row in lines} == set(found)
    for row in lines:
        hold(row, found[row.pop("trained on"), row.pop("probed on"), row.pop("agent")])


def test_the_table_of_starts_is_what_the_probes_gave() -> None:
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for result in rows("study_starts.csv"):
        clips, of = (f"{int(result[key]):,}" for key in ("clips", "of"))
        found[result["agent"], clips, of, result["seed"]].append(f"{float(result['top1']):.3f}")
    lines = table("What the probes read", of="agent")
    assert [(row["agent"], row["clips"], row["of"], row["seed"]) for row in lines] == list(found)
    assert [row["three starts"].split(", ") for row in lines] == list(found.values())


def test_the_table_by_class_is_what_the_runs_gave() -> None:
    found: dict[tuple[str, str, str], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for result in rows("study_classes.csv"):
        own = found[result["mask_ratio"], result["agent"], result["probe"]]
        own[result["kind"]][result["seed"]].append(float(result["top1"]))
    lines = table("What the probes read", of="hidden")
    assert {(row["hidden"], row["agent"], row["probe"]) for row in lines} == set(found)
    for row in lines:
        kinds = found[row.pop("hidden"), row.pop("agent"), row.pop("probe")]
        assert {int(row.pop("seeds"))} == {len(seeds) for seeds in kinds.values()}
        assert row == {
            kind: said([float(np.mean(top1)) for top1 in seeds.values()], 3) for kind, seeds in kinds.items()
        }


def test_the_accuracies_by_class_add_up_to_those_of_the_runs() -> None:
    top1: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for result in rows("study_classes.csv"):
        top1[result["agent"], result["mask_ratio"], result["seed"], result["probe"]].append(float(result["top1"]))
    cells: dict[tuple[str, ...], dict[str, str]] = {
        (r["agent"], r["mask_ratio"], r["seed"]): r for r in rows("study_cells.csv") if r["data"] == "motion"
    }
    for (*cell, probe), by_class in top1.items():
        assert len(by_class) == 15
        assert np.isclose(np.mean(by_class), float(cells[tuple(cell)][PROBES[probe]])), (cell, probe)


def test_the_table_of_fine_tuning_is_what_the_runs_gave() -> None:
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows("study_finetune.csv"):
        own = figures[row["agent"]]
        if int(row["epoch"]) == 1:
            own["off"].append(0)
        if not own["off"][-1] and float(row["loss"]) < 2.6:
            own["off"][-1] = int(row["epoch"])
        if row["top1"]:
            own["top1"].append(float(row["top1"]))
            own["loss"].append(float(row["loss"]))
    lines = table("Fine-tuning")
    assert [row["agent"] for row in lines] == list(figures)
    for row in lines:
        own = figures[row["agent"]]
        assert int(row["seeds"]) == len(own["top1"])
        assert row["fine-tuned"] == said(own["top1"], 3)
        assert row["each seed"] == ", ".join(f"{value:.3f}" for value in own["top1"])
        assert row["training loss at the end"] == said(own["loss"], 2)
        assert row["off the plateau in epoch"] == ", ".join(str(epoch) for epoch in own["off"])


def test_the_table_near_the_prototypes_size_is_what_the_runs_gave() -> None:
    lines, results = table("Near the prototype's size"), rows("study_prototype.csv")
    assert len(lines) == len(results)
    for row, result in zip(lines, results, strict=True):
        assert row["agent"] == result["agent"] and int(row["clips"].replace(",", "")) == int(result["clips"])
        for heading, key in (COLUMNS | PROBES).items():
            if heading in row:
                value, digits = result[key], 2 if heading == "motion lift" else 3
                assert row[heading] == (said([float(value)], digits) if value else ""), (heading, row, value)
