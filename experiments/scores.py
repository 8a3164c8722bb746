"""How well class scores tell classes apart: top-1, top-5, accuracy by class and the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

LABELLED = 30
"""Classes up to which a confusion plot names each of them."""


def _drawable(name: str) -> str:
    """A class's name, shortened, and without what a font can't draw: folders may be called anything."""
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= 24 else name[:23] + "…"


class Scores:
    """Accuracies of one classifier on one test set, shares in [0, 1].

    Args:
        class_scores: [V, C] logits, probabilities or votes: the higher, the likelier; of equal ones the first counts.
        labels: int [V]; videos of label -1 are left out.
        class_names: the C names.
        losses: the classifier's training losses, to be written beside its scores.
        starts: ``top1`` of each start that this one was chosen from, likewise.

    Attributes:
        num_videos: how many have a label.
        top1, top5: share of videos whose class is the highest, or among the min(5, C) highest.
        per_class: top-1 of each class's videos; None for a class without any.
        mean_class: mean of ``per_class`` over the classes that have videos.
        confusion: videos of each class (row) that were taken for each (column), int64 [C, C].

    Raises:
        ValueError: if shapes, names and labels don't fit, or no video has a label.
        FloatingPointError: if a labelled video's score is not a number.
    """

    def __init__(
        self,
        class_scores: Tensor,
        labels: Tensor | np.ndarray,
        class_names: Sequence[str],
        losses: Sequence[float] = (),
        starts: Sequence[float] = (),
    ) -> None:
        self.class_names, self.losses, self.starts = list(class_names), list(losses), list(starts)
        num_classes = len(self.class_names)
        truth = torch.as_tensor(labels).cpu().long()
        if class_scores.shape != (len(truth), num_classes):
            raise ValueError(
                f"class scores are {list(class_scores.shape)}; {len(truth)} labels and {num_classes} class names "
                f"need [{len(truth)}, {num_classes}]"
            )
        known = truth >= 0
        truth, found = truth[known], class_scores.detach().float().cpu()[known]
        self.num_videos = len(truth)
        if not self.num_videos:
            raise ValueError(f"none of the {len(known)} test videos has a label")
        if int(truth.max()) >= num_classes:
            raise ValueError(f"label {int(truth.max())} is out of range: there are {num_classes} classes, from 0")
        if found.isnan().any():
            wrong = int(found.isnan().any(1).sum())
            raise FloatingPointError(
                f"class scores of {wrong} of {self.num_videos} videos are not numbers: "
                "the classifier diverged, or the features it was given are not finite"
            )
        best = found.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = best == truth[:, None]
        self.top1, self.top5 = float(hits[:, 0].double().mean()), float(hits.any(1).double().mean())
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(self.confusion, (truth.numpy(), best[:, 0].numpy()), 1)
        right, total = self.confusion.diagonal(), self.confusion.sum(1)
        self.per_class = [float(r / n) if n else None for r, n in zip(right, total, strict=True)]
        self.mean_class = float(np.mean([share for share in self.per_class if share is not None]))

    def row(self) -> dict[str, float]:
        """The three figures of a table's row."""
        return {"top1": self.top1, "top5": self.top5, "mean_class": self.mean_class}

    def write(self, folder: Path, name: str) -> None:
        """Write ``folder/name.json``, and the confusion matrix as ``folder/name.png``."""
        record = {
            **self.row(),
            "num_videos": self.num_videos,
            **({"losses": self.losses} if self.losses else {}),
            **({"starts": self.starts} if self.starts else {}),
            "class_names": self.class_names,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
        }
        # A line a key: indented, 400 classes would make 160,000 lines
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (folder / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
        self.plot(name).savefig(folder / f"{name}.png", dpi=110)

    def plot(self, title: str) -> Figure:
        """The confusion matrix as shares of each class's videos, grey where a class has none."""
        num_classes, total = len(self.class_names), self.confusion.sum(1, keepdims=True)
        named = num_classes <= LABELLED
        side = max(5.0, 2.5 + 0.3 * num_classes) if named else 8.0
        figure = Figure((side + 1, side), layout="constrained")
        axes = figure.subplots()
        shares = np.ma.masked_invalid(self.confusion / np.where(total, total, np.nan))
        # The square root, so that what few videos are taken for can be seen as well
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        axes.set_facecolor("0.85")
        axes.set(xlabel="taken for", ylabel="class", title=f"{title}: top-1 {self.top1:.3f}, {self.num_videos} videos")
        if named:
            names = [_drawable(name) for name in self.class_names]
            axes.set_xticks(range(num_classes), names, rotation=90, parse_math=False)
            axes.set_yticks(range(num_classes), names, parse_math=False)
        figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class's videos")
        return figure
