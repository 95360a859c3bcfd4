"""The accelerations of a study's samplers: calibrated once a study, under a lock, and kept in its
directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asesearch.backbones.acceleration import Acceleration
from asesearch.calibration import read_acceleration
from asesearch.errors import ConfigError, StudyError
from asesearch.files import write_json
from asesearch.locks import waited_lock
from asesearch.sampler import Sampler
from asesearch.study import directory


def kept_acceleration(
    run_dir: Path | None,
    sampler: Sampler,
    made_for: dict[str, Any],
    make: Callable[[], Acceleration],
    *,
    reading: bool = False,
) -> Acceleration:
    """The acceleration of a sampler: read where it is on record, else calibrated, by one worker
    while the others wait.

    Args:
        run_dir: the study directory; None for none.
        sampler: with the acceleration.
        made_for: what the calibration follows from, as plain data; one that was made for something
            else is made again.
        make: calibrates it.
        reading: nothing is written.
    """
    if run_dir is None:
        return make()
    path = run_dir / directory.acceleration_file(sampler)
    found = _on_record(path, made_for)
    if found is not None or reading:
        return found or make()
    with waited_lock(run_dir / directory.LOCKS / "acceleration.lock", "calibrates a sampler"):
        found = _on_record(path, made_for)
        if found is None:
            begun = time.perf_counter()
            found = make()
            seconds = time.perf_counter() - begun
            told = {"made_for": made_for, "acceleration": found.to_dict(), "seconds": seconds}
            write_json(path, told)
    return found


def recorded_acceleration(run_dir: Path, sampler: Sampler) -> Acceleration:
    """The acceleration of a sampler that was calibrated.

    Raises:
        StudyError: its file is missing or damaged.
    """
    path = run_dir / directory.acceleration_file(sampler)
    fix = "search once more, which calibrates it again"
    data = directory.read_json(path, fix)
    try:
        return read_acceleration(data.get("acceleration", data))  # alone, as it was written first
    except (ConfigError, AttributeError, TypeError) as error:
        raise StudyError(f"{path} holds no calibration; {fix}") from error


def _on_record(path: Path, made_for: dict[str, Any]) -> Acceleration | None:
    """What a file holds; None where it is missing, damaged or made for something else."""
    again = "it is calibrated again"

    def parse(data: dict[str, Any]) -> tuple[Any, Acceleration]:
        return data["made_for"], read_acceleration(data["acceleration"])

    stored = directory.read_state(path, parse, again)
    if stored is None:
        return None
    if stored[0] != made_for:
        directory.say_once(f"{path} was made for another network or sampling: {again}")
        return None
    return stored[1]
