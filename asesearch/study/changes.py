"""What may still change of a begun study: all, until something is on record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import optuna

from asesearch.errors import StudyError
from asesearch.locks import try_lock
from asesearch.study import directory
from asesearch.study.directory import read_json, say_once
from asesearch.study.records import RECORD


def is_paid_for(run_dir: Path) -> bool:
    """Whether a study directory holds what took time: elastic weights or their checkpoint, the map,
    trials' weights."""
    names = (
        directory.ELASTIC_WEIGHTS,
        directory.ELASTIC,
        directory.MAP,
        directory.CONFIRMATIONS,
        directory.TRIALS,
    )
    return any((run_dir / name).exists() for name in names)


def is_on_record(study: optuna.Study, run_dir: Path) -> bool:
    """Whether a change of what all trials share comes too late: a trial has ended, or the warm-up
    has begun."""
    names = (directory.ELASTIC_WEIGHTS, directory.ELASTIC, directory.MAP)
    if any((run_dir / name).exists() for name in names):
        return True
    return any(RECORD in t.user_attrs for t in study.get_trials(deepcopy=False))


def start_over(run_dir: Path, why: str) -> None:
    """Remove what a study left before anything was on record: files that hold for its former inputs
    only.

    Raises:
        StudyError: another worker is at it.
    """
    if is_in_use(run_dir):
        raise StudyError(
            f"another worker is at the study in {run_dir}, {why}; give all workers the same"
        )
    say_once(f"{run_dir}: nothing was on record yet, so the study begins again {why}")
    names = (directory.INPUTS, directory.LATENCY, directory.WARM_UP)
    further = directory.listed(run_dir, "latency-*.json")
    for path in (*(run_dir / name for name in names), *further):
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir / directory.TRIALS, ignore_errors=True)


def refuse_changes(study: optuna.Study, run_dir: Path, changed: list[str]) -> None:
    """Refuse changed settings where something is on record.

    Raises:
        StudyError: naming them.
    """
    if changed and is_on_record(study, run_dir):
        raise StudyError(
            f"the study in {run_dir} was begun with other settings, so its trials could not be "
            f"compared with new ones ({'; '.join(changed)}); undo the change, or choose another "
            "name or directory"
        )


def other_inputs(study: optuna.Study, run_dir: Path, identity: dict[str, Any]) -> list[str]:
    """What a study was begun with whose content is another now: weights, data, decoder.

    Args:
        study: with its trials.
        run_dir: its directory.
        identity: fingerprints of what the scores depend on and the study file only names.

    Raises:
        StudyError: any, where something is on record.
    """
    path = run_dir / directory.INPUTS
    if not path.exists():
        return []
    fix = (
        "it tells whether network and data are still those of the trials on record; if they are, "
        "remove it"
    )
    stored = read_json(path, fix)
    if not isinstance(stored, dict):
        raise StudyError(f"can't read {path}: it holds no object; {fix}")
    differ = [k for k in identity if stored.get(k) != identity[k]]
    if differ and is_on_record(study, run_dir):
        raise StudyError(
            f"the study in {run_dir} was begun with other {', '.join(differ)} (their content "
            "differs), so its trials could not be compared with new ones; restore them, or search "
            "in another directory"
        )
    return differ


def is_in_use(run_dir: Path) -> bool:
    """Whether a living process holds any lock of the study directory, other than to open it."""
    for folder in (run_dir, run_dir / directory.LOCKS, run_dir / directory.WORKERS):
        for path in directory.listed(folder, "*.lock"):
            with try_lock(path) as free:
                if not free and path.name != directory.OPENING_LOCK:
                    return True
    return False
