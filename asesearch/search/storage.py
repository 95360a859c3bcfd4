"""The study's database: opening it, its errors in one line, and processes that died."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc

from asesearch.errors import StudyError

HEARTBEAT_S = 60
BUSY_WAIT_S = 120.0  # how long to wait for a SQLite file that another process holds


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StudyError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"can't read {path}: {error}; is this a study directory, and is it whole?") from error


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn a database's errors into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ModuleNotFoundError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise StudyError(
            f"the study's storage {where} can't be used: {reason}; check the path or URL, its permissions, and that no other "
            "program holds it; the trials on record are kept, and the same command resumes"
        ) from error


@contextmanager
def experimental() -> Iterator[None]:
    """Optuna's notes that something is experimental are not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_optuna(url: str, name: str) -> optuna.Study:
    """The two-objective Optuna study of a name, begun or continued; errors are the database's."""
    with experimental():
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        wait = {"connect_args": {"timeout": BUSY_WAIT_S}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=wait, heartbeat_interval=HEARTBEAT_S)
        study = optuna.create_study(study_name=name, storage=storage, directions=["minimize", "minimize"], load_if_exists=True)
        study.set_metric_names(["quality", "cost_frac"])
    return study


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def without_password(url: str) -> str:
    """A storage URL to be shown.

    Raises:
        StudyError: not a URL.
    """
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError as error:
        raise StudyError(f"search.storage must be a database URL such as postgresql://user@host/name; got {url!r}") from error
