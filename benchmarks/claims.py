"""The claims of `reports/claims.toml`, each number read from the committed file that it was
measured into: none is typed, so none can drift.

A number is a placeholder, `{time:.2f}`. A claim whose source is missing, ambiguous or no number is
refused, and so is a measurement that was typed. `benchmarks/README.md` tells the form of a claim.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import json
import math
import operator
import re
import statistics
import string
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asesearch.errors import ConfigError
from asesearch.report.grids import Grid
from asesearch.score import student_factor

CLAIMS = Path("reports/claims.toml")
#: Kinds of a claim in the order of the page, and the headings of their sections.
KINDS = {
    "reproduced": "Reproduced of the paper",
    "not-reproduced": "Not reproduced",
    "new": "New here",
    "open": "Open",
}
MEASURED = (
    "kind title result sentence command machine images seeds resampling retraining date numbers"
)
FIELDS = {kind: frozenset(MEASURED.split()) for kind in KINDS if kind != "open"}
FIELDS["open"] = frozenset({"kind", "title", "sentence", "command", "machine"})
OPTIONAL = frozenset({"goal", "report", "numbers", "table"})
GOAL = frozenset({"text", "number"})
NO_BAR = ("none", "not measured")  # how a claim without an error bar begins to tell so
NONE_YET = "not written yet"  # command of what nothing can measure
#: Texts that hold measurements.
GUARDED = ("result", "sentence", "resampling", "retraining")
#: A measurement that was typed in place of a placeholder.
TYPED = re.compile(r"\d+[.,]\d+|\d+\s*(?:%|×|seconds|minutes)|±\s*\d+")


@dataclass(frozen=True)
class Claim:
    """A claim with its numbers filled in.

    Attributes:
        kind: a key of `KINDS`.
        title, result, sentence: what was found, ever longer.
        command: that measured it, or would.
        machine: it ran on, or would need.
        images, seeds: how many; N and what the seeds are of.
        resampling, retraining: what the error bars say, or that there are none.
        date: of the measurement.
        goal: in words; empty without one.
        met: whether it is reached; None without one.
        sources: files that the numbers come from.
        report: page to read on; empty without one.
        table: what a sentence would have too many numbers for; None without one.
    """

    kind: str
    title: str
    sentence: str
    command: str
    machine: str
    result: str = ""
    images: str = ""
    seeds: str = ""
    resampling: str = ""
    retraining: str = ""
    date: str = ""
    goal: str = ""
    met: bool | None = None
    sources: tuple[str, ...] = ()
    report: str = ""
    table: Grid | None = None

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def error_bars(self) -> str:
        """What its error bars are over: the same measured again, trained again, both or neither."""
        told = {"measured again": self.resampling, "trained again": self.retraining}
        bars = [what for what, text in told.items() if not text.startswith(NO_BAR)]
        return "both" if len(bars) == 2 else "".join(bars) or "–"

    @property
    def outcome(self) -> str:
        """Its kind, and whether its goal is reached."""
        kind = self.kind.replace("-", " ")
        return kind if self.met is None else f"{kind}, goal {'met' if self.met else 'missed'}"


def read_claims(root: Path) -> list[Claim]:
    """The claims of a checkout, in the order of the file.

    Raises:
        ConfigError: a claim lacks a field or has one too many, a source has not what is asked of
            it, or a measurement was typed.
    """
    path = root / CLAIMS
    with path.open("rb") as file:
        entries = tomllib.load(file)["claim"]
    claims = []
    for entry in entries:
        try:
            claims.append(_claim(entry, root))
        except ConfigError as error:
            title = entry.get("title", "without a title")
            raise ConfigError(f"{CLAIMS}, claim {title!r}: {error}") from error
    twice = [a for a, count in Counter(c.anchor for c in claims).items() if count > 1]
    if twice:
        raise ConfigError(f"claims have titles of their own; got {twice} twice; change one")
    return claims


def _claim(entry: dict[str, Any], root: Path) -> Claim:
    kind = entry.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"kind is one of {', '.join(KINDS)}; got {kind!r}; choose one")
    missing = FIELDS[kind] - set(entry)
    unknown = set(entry) - FIELDS[kind] - OPTIONAL
    if missing or unknown:
        raise ConfigError(
            f"{kind} claims have the fields {', '.join(sorted(FIELDS[kind]))}; missing "
            f"{sorted(missing)}, unknown {sorted(unknown)}; correct them"
        )
    asked = entry.get("numbers", {})
    numbers, sources = _numbers(asked, root)
    used: set[str] = set()
    filled = {
        key: _filled(str(text), numbers, used, guarded=key in GUARDED)
        for key, text in entry.items()
        if key not in ("numbers", "goal", "table")
    }
    table = _table(entry.get("table"), numbers, used)
    goal, met = _goal(entry.get("goal"), numbers, used)
    used |= {name for text in asked.values() if isinstance(text, str) for name in _names(text)}
    if set(numbers) - used:
        raise ConfigError(
            f"every number is used; got {sorted(set(numbers) - used)} in no text; remove them"
        )
    return Claim(**filled, goal=goal, met=met, sources=sources, table=table)


def _table(table: dict[str, Any] | None, numbers: dict[str, Any], used: set[str]) -> Grid | None:
    """A table with its numbers filled in."""
    if table is None:
        return None
    if set(table) != {"head", "rows"} or {len(r) for r in table["rows"]} != {len(table["head"])}:
        raise ConfigError(
            "a table has a head, and rows of as many texts; got "
            f"{', '.join(sorted(table))} of {[len(texts) for texts in table.values()]}; correct it"
        )
    rows = [tuple(_filled(t, numbers, used, guarded=True) for t in row) for row in table["rows"]]
    return Grid(tuple(table["head"]), rows)


def _goal(
    goal: dict[str, Any] | None, numbers: dict[str, Any], used: set[str]
) -> tuple[str, bool | None]:
    """A goal in words, and whether its number is within its limit."""
    if goal is None:
        return "", None
    limits = set(goal) - GOAL
    if not set(goal) >= GOAL or len(limits) != 1 or not limits <= {"at_most", "at_least"}:
        raise ConfigError(
            "a goal has text, number, and at_most or at_least; got " + ", ".join(sorted(goal))
        )
    name = goal["number"].partition(".")[0]
    if name not in numbers:
        raise ConfigError(f"a goal's number is one of numbers; got {goal['number']!r}; name one")
    used.add(name)
    value = float(_of_row(goal["number"], numbers))
    met = value <= goal["at_most"] if "at_most" in goal else value >= goal["at_least"]
    return str(goal["text"]), bool(met)


# -- numbers ---------------------------------------------------------------------------------------


def _numbers(asked: dict[str, Any], root: Path) -> tuple[dict[str, float | str], tuple[str, ...]]:
    """What a claim's `numbers` come to, and the files that they come from.

    Each is a list, a file and the steps into it, or an expression over those above it. One whose
    last step picks an element is all of it, whose fields are named after a point: `full.score`.
    """
    found: dict[str, Any] = {}
    sources = []
    for name, source in asked.items():
        if isinstance(source, str):
            found[name] = _evaluated(ast.parse(source, mode="eval").body, found)
            continue
        file, *steps = source
        found[name] = looked_up(root, file, steps)
        sources.append(str(file))
    return found, tuple(dict.fromkeys(sources))


def looked_up(root: Path, file: str, steps: Sequence[Any]) -> Any:
    """What a committed file holds at a place.

    Args:
        root: of the checkout.
        file: JSON, JSON lines or CSV (a list of rows), TOML or Python (constants of the module; of
            a function `floats`, the numbers with a point or an exponent in it) below it.
        steps: keys and indices; a table picks the one element whose fields, by dotted names, are
            as said; "*" goes on with every element.

    Raises:
        ConfigError: the file is missing, or has not exactly what is asked.
    """
    path = root / file
    if not path.is_file():
        raise ConfigError(f"a source is a committed file; there is no {file}; correct its path")
    try:
        content = _content(path.suffix, path.read_text(encoding="utf-8"))
        found = _walk(content, list(steps))
        is_row = isinstance(found, dict) and isinstance(steps[-1], dict)
        return found if is_row else _number(found)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} has to hold what a number is read from; {list(steps)} finds nothing there "
            f"({error!r}); correct the steps"
        ) from error


@functools.cache
def _content(suffix: str, text: str) -> Any:
    if suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if suffix == ".py":
        return _constants(ast.parse(text))
    return json.loads(text)


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Numbers that a module assigns to a name, and those in each of its functions."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Constant):
                found[node.targets[0].id] = node.value.value
        elif isinstance(node, ast.FunctionDef):
            inside = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            found[node.name] = {"floats": [v for v in inside if isinstance(v, float)]}
    return found


def _walk(data: Any, steps: list[Any]) -> Any:
    if not steps:
        return data
    step, *rest = steps
    if step == "*":
        return [_walk(element, rest) for element in data]
    if isinstance(step, dict):
        same = [e for e in data if all(_field(e, k) == str(v) for k, v in step.items())]
        if len(same) != 1:
            raise ValueError(f"{len(same)} elements with {step}")
        return _walk(same[0], rest)
    return _walk(data[step], rest)


def _field(element: Any, name: str) -> str:
    for part in name.split("."):
        element = element[part]
    return str(element)


def _number(value: Any) -> Any:
    """A text as a number where it is one; lists element by element."""
    if isinstance(value, list):
        return [_number(v) for v in value]
    if isinstance(value, dict) or value in ("", None):
        raise ValueError(f"no number: {value!r}")
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _of_row(name: str, known: dict[str, Any]) -> Any:
    """A number, or a field of an element by its dotted name.

    Raises:
        ConfigError: there is no such field, or it is no number.
    """
    first, *fields = name.split(".")
    value = known[first]
    try:
        for field in fields:
            value = value[int(field) if field.isdigit() else field]
        return _number(value)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"a number is a field of what was picked; {name} is none; correct it"
        ) from error


def _minus(a: Any, b: Any) -> Any:
    """A difference, of two lists element by element."""
    if not (isinstance(a, list) and isinstance(b, list)):
        return a - b
    if len(a) != len(b):
        raise ConfigError(f"pairs are of lists as long; got {len(a)} and {len(b)}; pick alike")
    return [x - y for x, y in zip(a, b, strict=True)]


def _margin(values: Sequence[float]) -> float:
    """Half the interval of a mean at 95 % confidence."""
    return student_factor(len(values)) * _std_error(values)


def _first(values: Sequence[float], count: int) -> Sequence[float]:
    """The first of a list: those that another has a pair for."""
    return values[:count]


def _half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def _std_error(*given: Any) -> float:
    """Of a list, or of several numbers."""
    values = given[0] if len(given) == 1 else given
    return statistics.stdev(values) / math.sqrt(len(values))


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: _minus,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "first": _first,
    "len": len,
    "max": max,
    "min": min,
    "mean": statistics.fmean,
    "std_error": _std_error,
    "half_range": _half_range,
    "margin": _margin,
}


def _evaluated(node: ast.expr, known: dict[str, Any]) -> Any:
    """An expression of numbers that are known, + - * / and a few functions."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Attribute() if (name := ast.unparse(node)).partition(".")[0] in known:
            return _of_row(name, known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluated(left, known), _evaluated(right, known))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluated(a, known) for a in args))
    raise ConfigError(
        f"a derived number is + - * / and {', '.join(_FUNCTIONS)} of numbers above it; got "
        f"{ast.unparse(node)!r}; correct it"
    )


def _names(expression: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name)}


class _Filler(string.Formatter):
    """Numbers as the reports write them: a true minus, and a space before the per cent sign."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return _of_row(field_name, kwargs), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if not isinstance(value, (int, float, str)):
            raise ConfigError(f"a placeholder is one number; got {value!r}; use a function of it")
        text = str(super().format_field(value, format_spec))
        if isinstance(value, str):
            return text
        return text.replace("-", "−").replace("%", "\N{NO-BREAK SPACE}%")


def _filled(template: str, numbers: dict[str, Any], used: set[str], *, guarded: bool) -> str:
    """A text with its numbers; what it uses is added to `used`."""
    parts = list(string.Formatter().parse(template))
    typed = TYPED.search("\0".join(literal for literal, *_ in parts))
    if typed and guarded:
        raise ConfigError(
            f"measurements are placeholders, read from their source; got {typed[0]!r} typed in "
            f"{template!r}; give it a number"
        )
    names = {name.partition(".")[0] for _, name, *_ in parts if name}
    if names - set(numbers):
        raise ConfigError(
            f"placeholders are names of numbers; got {sorted(names - set(numbers))}; add them"
        )
    used |= names
    return _Filler().format(template, **numbers)
