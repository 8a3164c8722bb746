"""What every section of a configuration is made of: strictness, texts that are checked, and parts that must divide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from experiments.refusals import close, did_you_mean

REWARDS = ("surprise", "motion_surprise", "reconstruction_error", "negative_reconstruction_error")
"""Names in ``tats_env.rewards``, which is too heavy to import for a look at a configuration."""
RENDERED_SETS = ("motion", "scenes")
ROOTED_SETS = ("folder", "list", "ssv2", "kinetics400", "ucf101", "hmdb51", "shards")
"""Kinds of ``tats_env.data.listing``, likewise."""
# Settings that are text: what fits, how to say so, and names that may have been meant
_TEXTS: dict[str, tuple[str, str, Sequence[str]]] = {
    "name": (r"\w[\w.-]*", "a folder's name, of letters, digits, '_', '-' and '.'", ()),
    "device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N, such as cuda:0", ()),
    "data": (
        rf"{'|'.join(RENDERED_SETS)}|({'|'.join(ROOTED_SETS)}):.+",
        f"{', '.join(RENDERED_SETS)} or {', '.join(f'{kind}:/path' for kind in ROOTED_SETS)}",
        (*RENDERED_SETS, *ROOTED_SETS),
    ),
    "reward": (
        "|".join(REWARDS) + r"|\w+(\.\w+)*:\w+", f"one of {', '.join(REWARDS)} or package.module:function", REWARDS
    ),
}  # fmt: skip


_NEAR = 10_000
"""How far to look for a number that divides another."""
_WHOLES = {"tubelet_size": "num_frames", "patch_size": "size", "num_heads": "width"}


def check_text(field: str, value: str) -> str:
    """``value``, if it is what the text setting of that name can be."""
    pattern, right, names = _TEXTS[field]
    if not re.fullmatch(pattern, value):
        kind, _, root = value.partition(":")
        near = close(kind, names)
        if near and near[0] in ROOTED_SETS:
            near = [f"{near[0]}:{root or '/path'}"]
        elif field == "data" and not near and "/" in value:
            near = ["folder:" + value.rpartition(":")[2]]
        raise ValueError(f"{value!r} is unknown; give {right}{did_you_mean(*near)}")
    return value


def data_text(value: Any) -> Any:
    """A data set's name from a mapping such as ``{ucf101: /root, split: 1}``; anything else as it is."""
    if not isinstance(value, dict) or not value:
        return value
    (kind, root), *options = value.items()
    return f"{kind}:{root}" + "?" * bool(options) + "&".join(f"{name}={option}" for name, option in options)


def data_texts(value: Any) -> Any:
    """Names of data sets, each as ``data_text`` has it and understood; anything but a list as it is."""
    if not isinstance(value, list):
        return value
    return [check_text("data", x) if isinstance(x, str) else x for x in map(data_text, value)]


def check_divides(whole: int, part: int, what: str) -> None:
    """Raise ValueError, which names the nearest that do, unless ``part`` divides ``whole``, called ``what``."""
    if whole % part:
        # Not further, for numbers may be long
        below = next((d for d in range(min(part, whole), max(1, part - _NEAR), -1) if whole % d == 0), 1)
        above = [d for d in range(part, min(whole, part + _NEAR) + 1) if whole % d == 0][:1]
        raise ValueError(f"{part} does not divide {what} = {whole}; give {' or '.join(map(str, [below, *above]))}")


class Section(BaseModel):
    """A part of a configuration."""

    # Strict, for "32", true and 1.5 are mistakes where a whole number belongs; defaults take part in the cross-checks.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _parts_fit(cls, value: Any, info: ValidationInfo) -> Any:
        whole = _WHOLES.get(info.field_name or "")
        if whole in info.data:  # else it was itself refused
            check_divides(info.data[whole], value, whole)
        return value
