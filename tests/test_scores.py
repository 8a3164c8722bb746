"""What is reported of a classifier: accuracies and confusion, against counting by hand, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.scores import Scores


def drawn(num_videos: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores that know something, and labels, some of them -1; the last class has no videos."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, num_classes - 1, (num_videos,), generator=generator)
    scores = torch.randn(num_videos, num_classes, generator=generator)
    scores[torch.arange(num_videos), labels] += 1
    return scores, labels


def names(num_classes: int) -> list[str]:
    return [f"class {c}" for c in range(num_classes)]


@pytest.mark.parametrize("num_classes", [3, 7, 40])
def test_accuracies_are_those_counted_by_hand(num_classes: int) -> None:
    class_scores, labels = drawn(200, num_classes)
    scores = Scores(class_scores, labels, names(num_classes))

    first, fifth, total = 0, 0, 0
    confusion = [[0] * num_classes for _ in range(num_classes)]
    for row, label in zip(class_scores.tolist(), labels.tolist(), strict=True):
        if label == -1:
            continue
        ranked = sorted(range(num_classes), key=lambda c: -row[c])
        first += ranked[0] == label
        fifth += label in ranked[:5]
        total += 1
        confusion[label][ranked[0]] += 1
    shares = [row[c] / sum(row) if sum(row) else None for c, row in enumerate(confusion)]
    assert scores.num_videos == total < 200
    assert scores.top1 == pytest.approx(first / total) and 0.1 < scores.top1 < 0.9
    assert scores.top5 == pytest.approx(fifth / total)
    assert (scores.top5 == 1) == (num_classes <= 5)
    assert scores.confusion.tolist() == confusion
    assert scores.per_class == shares and shares[-1] is None
    known = [share for share in shares if share is not None]
    assert scores.mean_class == pytest.approx(sum(known) / len(known))


def test_mean_class_accuracy_counts_rare_classes_as_much_as_frequent_ones() -> None:
    labels = torch.tensor([0] * 9 + [1])
    scores = Scores(torch.tensor([[1.0, 0.0]]).expand(10, 2), labels, ["often", "seldom"])
    assert (scores.top1, scores.mean_class) == (0.9, 0.5)


def test_of_equal_scores_the_first_class_counts() -> None:
    scores = Scores(torch.zeros(14, 7), torch.arange(7).repeat(2), names(7))
    assert scores.top1 == pytest.approx(1 / 7) and scores.top5 == pytest.approx(5 / 7)
    assert scores.confusion[:, 0].tolist() == [2] * 7


def test_json_holds_every_figure(tmp_path: Path) -> None:
    class_scores, labels = drawn(60, 5)
    scores = Scores(class_scores, labels, names(5))
    scores.write(tmp_path, "linear")
    record = json.loads((tmp_path / "linear.json").read_text())
    assert {name: record[name] for name in ("top1", "top5", "mean_class")} == scores.row()
    assert record["per_class"] == scores.per_class and record["class_names"] == names(5)
    assert np.array_equal(record["confusion"], scores.confusion) and record["num_videos"] == scores.num_videos


@pytest.mark.parametrize("num_classes", [5, 400])
def test_confusion_plot_shows_the_diagonal_and_names_only_few_classes(tmp_path: Path, num_classes: int) -> None:
    labels = torch.arange(num_classes)
    scores = Scores(torch.eye(num_classes), labels, [f"{c} $\\alpha_ \udcff {'long ' * 9}" for c in labels.tolist()])
    scores.write(tmp_path, "knn")
    pixels = np.asarray(Image.open(tmp_path / "knn.png").convert("RGB")).astype(int)
    assert max(pixels.shape) < 1200
    dark = (pixels[..., 2] - pixels[..., 0] > 40) & (pixels[..., 0] < 120)  # a strong blue
    rows, columns = np.nonzero(dark[:, : pixels.shape[1] * 4 // 5])  # without the colour bar
    assert len(rows) > 500 and np.corrcoef(rows, columns)[0, 1] > 0.9
    axes = scores.plot("knn").axes[0]
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert all(len(text) <= 24 for text in texts)
    assert ("$" in "".join(texts)) == (num_classes == 5)


@pytest.mark.parametrize(
    ("class_scores", "labels", "error", "says"),
    [
        (torch.zeros(3, 4), [0, 1, 2], ValueError, r"\[3, 4\]; 3 labels and 2 class names need \[3, 2\]"),
        (torch.zeros(2, 2), [0, 2], ValueError, "label 2 is out of range: there are 2 classes"),
        (torch.zeros(2, 2), [-1, -1], ValueError, "none of the 2 test videos has a label"),
        (torch.tensor([[0, 1], [0, torch.nan]]), [0, 1], FloatingPointError, "1 of 2 videos are not numbers"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    class_scores: Tensor, labels: list[int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Scores(class_scores, torch.tensor(labels), names(2))


def test_what_is_not_a_number_is_no_matter_where_there_is_no_label() -> None:
    assert Scores(torch.tensor([[0, 1], [0, torch.nan]]), torch.tensor([1, -1]), names(2)).top1 == 1
