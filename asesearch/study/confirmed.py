"""Confirmations on record: a file for each point, beside the one file of earlier releases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asesearch.point import Point
from asesearch.study import directory
from asesearch.study.records import Confirmation, TrialRecord

Files = list[tuple[Path, dict[str, Any]]]


def confirmation_files(run_dir: Path) -> Files:
    """Files with confirmations and what they hold, {"settings": ..., "confirmations": [...]}, under
    "failed" why a trial can't be confirmed, by its number, and under "point" what was confirmed,
    None in a file of an earlier release.

    A damaged one is left out, so that its points are confirmed again.

    Raises:
        StudyError: a file, or the folder of them, can't be read.
    """

    def parse(data: dict[str, Any]) -> dict[str, Any]:
        many = [Confirmation.from_dict(c) for c in data["confirmations"]]
        failed = {int(number): str(why) for number, why in data.get("failed", {}).items()}
        point = None if data.get("point") is None else Point.from_dict(data["point"])
        return {
            "settings": data["settings"],
            "confirmations": many,
            "failed": failed,
            "point": point,
        }

    found = []
    single = directory.listed(run_dir / directory.CONFIRMATIONS, "*.json")
    for path in (run_dir / directory.OLD_CONFIRMATIONS, *single):
        stored = directory.read_state(path, parse, "its points count as unconfirmed")
        if stored is not None:
            found.append((path, stored))
    return found


def of_records(files: Files, records: Sequence[TrialRecord]) -> Files:
    """Those of `confirmation_files` whose point is that of the trial of their number; the others
    are named. They are left over where an older storage took the place of the study's.

    Args:
        files: what `confirmation_files` gave.
        records: of the study, read after that.
    """
    points = {r.number: r.point for r in records}
    kept = []
    for path, stored in files:
        numbers = {c.number for c in stored["confirmations"]} | set(stored["failed"])
        other = [n for n in sorted(numbers) if points.get(n) != stored["point"]]
        if stored["point"] is None or not other:
            kept.append((path, stored))
            continue
        now = points.get(other[0], "not on record")
        directory.say_once(
            f"{path} is of {stored['point']}, but trial {other[0]} is {now}, as after an older "
            "storage was restored: left out"
        )
    return kept


def confirmations_of(files: Files) -> tuple[Confirmation, ...]:
    """Confirmations in these files, by trial number."""
    found = {c.number: c for _, stored in files for c in stored["confirmations"]}
    return tuple(found[number] for number in sorted(found))
