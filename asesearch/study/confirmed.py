"""Confirmations on record: a file for each point, beside the one file of earlier releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asesearch.study import directory
from asesearch.study.records import Confirmation


def confirmation_files(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Files with confirmations and what they hold, {"settings": ..., "confirmations": [...]}, and
    under "failed" why a trial can't be confirmed, by its number.

    A damaged one is left out, so that its points are confirmed again.

    Raises:
        StudyError: a file, or the folder of them, can't be read.
    """

    def parse(data: dict[str, Any]) -> dict[str, Any]:
        many = [Confirmation.from_dict(c) for c in data["confirmations"]]
        failed = {int(number): str(why) for number, why in data.get("failed", {}).items()}
        return {"settings": data["settings"], "confirmations": many, "failed": failed}

    found = []
    single = directory.listed(run_dir / directory.CONFIRMATIONS, "*.json")
    for path in (run_dir / directory.OLD_CONFIRMATIONS, *single):
        stored = directory.read_state(path, parse, "its points count as unconfirmed")
        if stored is not None:
            found.append((path, stored))
    return found


def confirmations_on_record(
    run_dir: Path, settings: dict[str, Any] | None = None
) -> list[Confirmation]:
    """Confirmations on record, by trial number.

    Args:
        run_dir: the study directory.
        settings: only those under these; None for all.
    """
    found: dict[int, Confirmation] = {}
    for _, stored in confirmation_files(run_dir):
        if settings is None or stored["settings"] == settings:
            found |= {c.number: c for c in stored["confirmations"]}
    return [found[number] for number in sorted(found)]
