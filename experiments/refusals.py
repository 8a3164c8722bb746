"""What to say of a configuration that can't be run: where, what is wrong, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any


class ConfigError(ValueError):
    """A configuration that can't be run; one line a problem: where, what is wrong, what would be right."""


def close(word: str, names: Sequence[str]) -> list[str]:
    """The name nearest to ``word``, if one is near."""
    return get_close_matches(word, names, n=1)


def did_you_mean(*names: str) -> str:
    """A question to end a message with; nothing without names."""
    return f"; did you mean {' or '.join(names)}?" if any(names) else ""


def items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every key, groups included."""
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from items(value, f"{prefix}{key}.")


def _unknown_key(path: str, defaults: dict[str, Any]) -> str:
    """What to say of a key that the schema does not have, the nearest anywhere in the schema included."""
    group, _, key = path.rpartition(".")
    valid = [name for name, _ in items(defaults)]
    if path in valid:
        return f"unknown key; write it as a mapping, {group}: {{{key}: ...}}"
    likeness = {name: SequenceMatcher(None, key, name.rpartition(".")[2]).ratio() for name in valid}
    best = max(likeness.values())
    if best < 0.6:
        there = dict(items(defaults)).get(group)  # a key may hold dots of its own
        return f"unknown key; there are {', '.join(there if isinstance(there, dict) else defaults)}"
    nearest = [name for name in valid if likeness[name] == best]
    return "unknown key" + did_you_mean(*([name for name in nearest if name.rpartition(".")[0] == group] or nearest))


_KINDS = {"bool": "a truth value", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping of keys to values",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": "not above {gt:g}",
    "greater_than_equal": "below {ge:g}",
    "less_than": "not below {lt:g}",
    "less_than_equal": "above {le:g}",
    "finite_number": "not finite",
}


def kind_of(value: Any) -> str:
    """What a value read from YAML is, in words."""
    name = type(value).__name__
    return _KINDS.get(name, f"a {name}")


def explain(kind: str, path: str, value: Any, context: dict[str, Any], message: str, defaults: dict[str, Any]) -> str:
    """One of pydantic's errors in our words: what was given, what is expected, what would be right.

    Args:
        kind, context, message: pydantic's ``type``, ``ctx`` and ``msg``.
        path: dotted, of the key.
        value: what was given.
        defaults: the whole schema's, nested.
    """
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown_key(path, defaults)
    if kind == "value_error":
        return str(context["error"])
    default = dict(items(defaults)).get(path)
    if kind == "literal_error":
        near = did_you_mean(*close(str(value), re.findall(r"'(.*?)'", context["expected"])))
        return f"{value!r} is unknown; give {context['expected']}{near}"
    if kind in _BOUNDS:
        right = "null" if default is None else default
        return f"{value} is {_BOUNDS[kind].format(**context)}; the default is {right}"
    if kind not in _EXPECTED:
        return f"{value!r}: {message}"
    given = "nothing is given" if value is None else f"{value!r} is {kind_of(value)}"
    expected = _EXPECTED[kind]
    if kind == "model_type":
        expected += f": {', '.join(default or ())}"
    elif kind != "bool_type" and default is not None:
        expected += f", such as {default}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]*\d", value):
        expected += f" (write {value} without quotes)"
    elif kind == "string_type" and not isinstance(value, (list, dict, type(None))):
        expected += " (put it in quotes)"
    elif kind == "list_type" and isinstance(value, (str, int, float)):
        expected += f" (write [{value}])"
    return f"{given}; expected {expected}"
