"""The tables of `commands.md` and `study-file.md`, made from the program itself.

`python docs/tables.py` writes them; `tests/test_docs.py` fails where they are out of date. The last
column of the study file's tables is written by hand in the page, and is kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from asesearch import config
from asesearch.cli import app

FOLDER = Path(__file__).parent
MARK = re.compile(r"(<!-- (keys|options): ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
INFINITE = 2**53  # what `PositiveInt` has in place of no limit
#: The sections of a study file and the model that each is read by.
SECTIONS = {
    "study": config.StudyConfig,
    "backbone": config.BackboneConfig,
    "data": config.DataConfig,
    "diffusion": config.DiffusionConfig,
    "train": config.TrainConfig,
    "loss_weight": config.LossWeight,
    "elastic": config.ElasticConfig,
    "map": config.MapConfig,
    "sampling": config.SamplingConfig,
    "evaluation": config.EvaluationConfig,
    "search": config.SearchConfig,
    "promotion": config.PromotionConfig,
    "confirm": config.ConfirmConfig,
}


def _literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return json.dumps(value, ensure_ascii=False)


def _limits(schema: dict[str, Any]) -> str:
    """The range of a number, with a space before it; empty without one."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    given = {sign: schema[key] for key, sign in signs.items() if key in schema}
    given = {sign: v for sign, v in given.items() if (sign, v) != ("<", INFINITE)}
    # a float's limit of 1 is 1.0 in the schema
    parts = [f"{sign} {int(v) if v == int(v) else v}" for sign, v in given.items()]
    return f" {', '.join(parts)}" if parts else ""


def _type(schema: dict[str, Any], models: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        section = next(key for key, model in SECTIONS.items() if model.__name__ == name)
        return f"table, see [{section}](#{section})"
    if "anyOf" in schema:
        kinds = [s for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(_type(s, models) for s in kinds)
    if "enum" in schema:
        return " · ".join(f"`{_literal(v)}`" for v in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return f"array of {_type(items, models)}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"table of {_type(inner, models)}" if isinstance(inner, dict) else "table"
    kind = {"string": "text", "boolean": "true or false"}.get(schema["type"], schema["type"])
    return kind + _limits(schema)


def study_rows(section: str) -> dict[str, tuple[str, str]]:
    """Type and default of every key of a section, as the page writes them."""
    schema = SECTIONS[section].model_json_schema()
    required = schema.get("required", [])
    rows = {}
    for key, field in schema["properties"].items():
        entries = field.get("allOf", [field])
        kind = _type(entries[0] if "$ref" in entries[0] else field, schema.get("$defs", {}))
        default = field.get("default")
        if key in required:
            shown = "**required**"
        elif default is None:
            shown = "–"
        elif isinstance(default, dict):
            shown = "its defaults" if default else "`{}`"
        else:
            shown = f"`{_literal(default)}`"
        rows[key] = (kind, shown)
    return rows


def study_table(section: str, before: str) -> str:
    """The table of a section; meanings are those in the table `before`."""
    meanings = {
        cells[1].strip(" `"): cells[4].strip()
        for line in before.splitlines()
        if len(cells := re.split(r"(?<!\\)\|", line)) > 5
    }
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, (kind, default) in study_rows(section).items():
        lines.append(f"| `{key}` | {kind} | {default} | {meanings.get(key, '')} |")
    return "\n".join(lines) + "\n"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    if parameter.default is None or parameter.default is False:
        return "–"
    return f"`{str(parameter.default).lower()}`"


def _values(name: str) -> dict[str, str]:
    """What each parameter of a command takes: FILE, TEXT, INTEGER or NUMBER."""
    words = {Path: "PATH", int: "INTEGER", float: "NUMBER"}
    found = next(
        c.callback
        for c in app.registered_commands
        if c.callback is not None and name == (c.name or c.callback.__name__)
    )
    hints = get_type_hints(found).items()
    kinds = {key: get_args(hint) or (hint,) for key, hint in hints}
    return {key: next((words[t] for t in k if t in words), "TEXT") for key, k in kinds.items()}


def command_table(name: str) -> str:
    """Arguments and options of a command, from its help."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    values = _values(name)
    lines = ["| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            shown = f"`{parameter.name.upper()}`"
        else:
            names = [*parameter.opts, *parameter.secondary_opts]
            value = "" if parameter.is_flag else f" {values[parameter.name]}"
            shown = ", ".join(f"`{option}{value}`" for option in names)
        meaning = (parameter.help or "").replace("|", "\\|")
        lines.append(f"| {shown} | {_default(parameter)} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """A page with its tables made again."""

    def table(match: re.Match[str]) -> str:
        begin, kind, name, before, end = match.groups()
        made = study_table(name, before) if kind == "keys" else command_table(name)
        return begin + made + end

    return MARK.sub(table, text)


def main() -> None:
    """Write the tables into their pages."""
    for path in sorted(FOLDER.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.name}: tables written")


if __name__ == "__main__":
    main()
