"""The rows that `paper.py` has measured: one JSON object a line, and never two protocols in one
file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from paper_rows import PRETRAINED, Row

from asesearch.config.changes import flat
from asesearch.errors import StudyError
from asesearch.files import replacing
from asesearch.score import EvaluationResult

Line = dict[str, Any]
#: What tells one measurement from another; method and label are names only.
SAME = ("schedule", "sampler", "against", "recipe", "stage")


def key_of(row: dict[str, str], training_seed: int | None) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return (*(row[name] for name in SAME), training_seed)


def read_lines(path: Path) -> list[Line]:
    """All whole lines of a file; the last may be torn, where a process was killed.

    Raises:
        StudyError: a line before the last that is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, text in enumerate(lines, 1):
        try:
            found.append(json.loads(text))
        except ValueError as error:
            if number < len(lines):
                raise StudyError(
                    f"a file of rows has one JSON object a line; got {text[:60]!r} in line "
                    f"{number} of {path}; remove that line"
                ) from error
    return found


def score_of(line: Line) -> EvaluationResult:
    """The line's score with its protocol."""
    data = {"protocol": line["settings"]["protocol"], "values": line["values"]}
    return EvaluationResult.from_dict(data)


def sheet_of(row: dict[str, str]) -> str:
    """Where a row's images lie in the folder of rows."""
    words = f"{row['label']} {row['sampler']} {row['recipe']}".lower()
    return f"sheets/{re.sub('[^a-z0-9]+', '-', words)}.png"


def kind_of(stage: str, recipe: str) -> str:
    """Rows of one kind depend on the same settings; those of the network as it is on none of its
    fine-tuning."""
    return f"{stage}, untrained" if recipe == PRETRAINED else stage


class Record:
    """An experiment's rows.

    Args:
        path: the file, there or not; other experiments' are beside it.
        settings: what a row depends on besides itself, by `kind_of`.

    Raises:
        StudyError: the file has rows under other settings, or can't be read.
    """

    def __init__(self, path: Path, settings: dict[str, Line]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.lines: dict[tuple[Any, ...], Line] = {}
        for line in read_lines(path):
            self._require_same(line)
            self.lines[key_of(line["row"], line["training_seed"])] = line

    def find(self, row: Row, training_seed: int | None) -> Line | None:
        """The measured row; one that another experiment has under the same settings is taken over,
        under this row's name."""
        key = key_of(row.to_dict(), training_seed)
        if key in self.lines:
            return self.lines[key]
        for path in sorted(self.path.parent.glob("*.jsonl")):
            for line in read_lines(path) if path != self.path else ():
                same = line["settings"] == self.settings[kind_of(row.stage, row.recipe)]
                if same and key_of(line["row"], line["training_seed"]) == key:
                    taken = line.get("taken_from", path.stem)
                    self.add({**line, "row": row.to_dict(), "taken_from": taken})
                    return self.lines[key]
        return None

    def add(self, line: Line) -> None:
        """Put a row on record: on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # of a process that was killed
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[key_of(line["row"], line["training_seed"])] = line

    def replace(self, line: Line) -> None:
        """Put a row in the place of what is on record of it."""
        self.lines[key_of(line["row"], line["training_seed"])] = line
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in self.lines.values())
        with replacing(self.path) as part:
            part.write_text(text, encoding="utf-8")

    def _require_same(self, line: Line) -> None:
        kind = kind_of(line["row"]["stage"], line["row"]["recipe"])
        now = flat(self.settings.get(kind, {}))
        then = flat(line["settings"])
        differ = [
            f"{name}: {then.get(name)!r} there and {now.get(name)!r} now"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if differ:
            raise StudyError(
                f"the rows of one file are measured alike; {self.path} has rows with "
                f"{'; '.join(differ)}; give the same options, or another --out"
            )
