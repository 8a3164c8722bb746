"""The figures by which runs are compared, in the order of every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

METRICS = {
    "reconstruction_error": "error, own masks",
    "random_mask_error": "error, random masks",
    "motion_lift": "motion lift",
    "linear_top1": "linear probe",
    "attentive_top1": "attentive probe",
    "knn_top1": "k-NN",
    "finetune_top1": "fine-tuned",
    "seconds_per_step": "s/step",
}
"""Headings; a metric on a data set other than the run's has ``@`` and the set's name behind its own."""
_DIGITS = {"motion_lift": 2, "seconds_per_step": 4}


def shown(results: Iterable[Mapping[str, float | None]]) -> list[str]:
    """The metrics that there are, in the tables' order: of one kind side by side, whatever data set they are on."""
    found = dict.fromkeys(key for figures in results for key, value in figures.items() if value is not None)
    return [key for metric in METRICS for key in found if key.partition("@")[0] == metric]


def heading(metric: str) -> str:
    """What stands above a metric's column."""
    name, _, data = metric.partition("@")
    return METRICS[name] + (f" on {data}" if data else "")


def in_digits(figures: Mapping[str, float | None], metric: str) -> str:
    """A figure as text, a dash where there is none."""
    value = figures.get(metric)
    return "-" if value is None else f"{value:.{_DIGITS.get(metric, 3)}f}"
