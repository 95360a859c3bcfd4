"""What is wrong with a study file, in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

#: How pydantic writes the kind of a value that may be of several: "tuple[str, ...]".
_KIND = re.compile(r"(tuple|dict)\[")

#: What a study may be called, and how long a search may take.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
BUDGET = r"^[0-9]+(\.[0-9]+)?[smhd]$"
_WORDS = {
    NAME: "should be letters A to Z and a to z, digits, points, hyphens and underscores, a letter "
    "or digit first",
    BUDGET: 'should be a number and one of s, m, h, d, as in "90m" or "1.5h"',
}


def explain(error: ValidationError, where: str) -> str:
    """One line for a pydantic error: each field, the rule it breaks and the value got."""
    parts = []
    for loc, item in _told(error.errors()):
        field = ".".join(loc)[:80] or "file"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {field}")
        elif item["type"] == "missing":
            parts.append(f"{field} is missing")
        else:
            rule = _rule(item)
            parts.append(
                f"{field}: {rule} (got {_shown(item['input'])}{_fix(item['input'], rule)})"
            )
    more = [f"and {len(parts) - 8} more"] if len(parts) > 8 else []
    return f"{where}: {'; '.join(parts[:8] + more)}"


def _rule(item: Any) -> str:
    """The rule that a value breaks."""
    if item["type"] == "string_pattern_mismatch":
        return _WORDS[item["ctx"]["pattern"]]
    if item["type"] == "model_type":
        return "should be one table, its header in single brackets"
    rule: str = item["msg"]
    return rule.removeprefix("Value error, ").replace("valid tuple", "valid array")


def _told(errors: Sequence[Any]) -> Iterator[tuple[list[str], Any]]:
    """Each field by its names, and what is wrong with it.

    Of a value that may be of several kinds each kind complains, under its own name; told is what
    the kind says that got furthest into it.
    """
    best: dict[tuple[str, ...], tuple[int, str]] = {}
    found = []
    for item in errors:
        names = [str(part) for part in item["loc"]]
        at = next((i for i, name in enumerate(names) if _KIND.match(name)), None)
        field = tuple(names[:at])
        kind = "" if at is None else names.pop(at)
        if kind and len(names) > best.get(field, (-1, ""))[0]:
            best[field] = len(names), kind
        found.append((field, kind, names, item))
    for field, kind, names, item in found:
        if not kind or best[field][1] == kind:
            yield names, item


def _shown(value: object) -> str:
    """A value as a study file has it, at most 80 characters of it."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an integer too long for Python to write
        return "a very long integer"
    return text if len(text) <= 80 else f"{text[:50]}… ({len(text)} characters)"


def _fix(value: object, rule: str) -> str:
    """What to write instead of a value of the wrong type, where it is plain."""
    number = "valid integer" in rule or "valid number" in rule
    if number and isinstance(value, str):
        return ": write the number without quotes"
    if number and isinstance(value, bool):
        return ": write a number"
    if "valid integer" in rule and isinstance(value, float):
        if not math.isfinite(value):
            return ": write a whole number"
        return f": write {int(value)}" if value.is_integer() else ": write it without a point"
    if "valid boolean" in rule:
        return ": write true or false, without quotes"
    if "valid array" in rule:
        return ": write an array in square brackets"
    return ""
