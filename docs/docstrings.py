"""A griffe extension: `a, b: text` in a section of a docstring stands for both names."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes):$")
SEVERAL = re.compile(r"^(\w+(?:, \w+)+): ")


def split_names(text: str) -> str:
    """A docstring in which every name of a section has an entry of its own.

    The entry of several names is repeated for each.
    """
    out: list[str] = []
    entry: list[str] = []
    names: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if entry and not line.startswith("        "):  # what goes on is indented more
            tail = SEVERAL.sub("", entry[0].strip())
            for name in names:
                out += [f"    {name}: {tail}", *entry[1:]]
            entry = []
        inside = bool(SECTION.match(line)) or (inside and line.startswith("    "))
        found = SEVERAL.match(line.strip()) if inside and not line.startswith("     ") else None
        if found:
            names = found[1].split(", ")
            entry = [line]
        elif entry:
            entry.append(line)
        else:
            out.append(line)
    return "\n".join(out[:-1])


class SplitNames(griffe.Extension):
    """Apply `split_names` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)
