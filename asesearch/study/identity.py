"""Which study this is: `study.json`, and whether a storage holds the trials of that study and of no
other.

A study directory has an identity, a random number that its Optuna study carries too.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.engine import URL

from asesearch.config import StudyConfig, changed_fields, parse_study
from asesearch.errors import StudyError
from asesearch.files import check_utf8, write_json
from asesearch.locks import try_lock, waited_lock
from asesearch.study import directory
from asesearch.study.directory import read_json, say_once
from asesearch.study.records import RECORD
from asesearch.study.sqlite import is_relative, resolved
from asesearch.study.storage import (
    DIRECTORIES,
    Held,
    check_writable_file,
    delete,
    look,
    of_another,
    open_optuna,
    open_to_read,
    storage_errors,
)
from asesearch.study.urls import parse_url, raw_url, shown, without_password

FORMAT_VERSION = 2  # 1 knew no identity
_OPENING = "study.lock"
_RESTORE = "restore it from a copy, or search into another directory (--out)"


@dataclass(frozen=True)
class StudyFile:
    """What `study.json` says.

    Attributes:
        config: the study file that the study was begun with, without a storage.
        identity: 32 hexadecimal digits; None in a study of format 1, whose storage carries none.
        storage: URL of the storage without its password, SQLite's path absolute; None for the file
            in the directory.
        given: the same as the user wrote it, without its password.
        settled: whether it is decided which storage is this study's.
        carries: whether that storage was seen to carry the identity.
    """

    config: StudyConfig
    identity: str | None
    storage: str | None = None
    given: str | None = None
    settled: bool = False
    carries: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> StudyFile | None:
        """Of a study directory; None where there is none yet.

        Raises:
            StudyError: it can't be read, or is of a later release.
        """
        check_utf8(run_dir.absolute(), "a study directory", StudyError)
        path = run_dir / directory.STUDY
        if not path.exists():
            return None
        data = read_json(path, _RESTORE)
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise StudyError(f"{path} holds no study; {_RESTORE}")
        version = data.get("version")
        if version not in (1, FORMAT_VERSION):
            raise StudyError(
                f"{path} has version {version!r}; this release reads 1 and {FORMAT_VERSION}; "
                "update asesearch"
            )
        config = parse_study(data["config"], str(path))
        if version == 1:
            given = config.search.storage
            return cls(_without_storage(config), None, given, given, settled=True)
        storage = data.get("storage")
        identity = data.get("id")
        if not isinstance(identity, str) or not isinstance(storage, dict | None):
            raise StudyError(f"{path} has no identity; {_RESTORE}")
        if storage is None:
            return cls(config, identity)
        return cls(
            config,
            identity,
            storage.get("url"),
            storage.get("given"),
            True,
            bool(storage.get("carries")),
        )

    def write(self, run_dir: Path) -> None:
        """Put it on record.

        Raises:
            WriteError: the directory can't be written.
        """
        data: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "id": self.identity,
            "config": self.config.model_dump(mode="json"),
        }
        if self.settled:
            url = self.storage and shown(raw_url(self.storage))
            given = self.given and shown(raw_url(self.given))
            data["storage"] = {"url": url, "given": given, "carries": self.carries}
        path = run_dir / directory.STUDY
        with suppress(StudyError):
            if path.is_file() and read_json(path) == data:
                return
        write_json(path, data)

    def url(self, run_dir: Path) -> URL:
        """The storage on record."""
        return _own(run_dir) if self.storage is None else parse_url(self.storage)


@dataclass(frozen=True)
class Opened:
    """A study's storage, opened.

    Attributes:
        config: the study file, without its storage, whose URL may hold a password.
        where: the storage as it is shown.
        optuna: the Optuna study.
    """

    config: StudyConfig
    where: str
    optuna: optuna.Study


def open_to_search(config: StudyConfig, run_dir: Path) -> Opened:
    """Begin the study or continue it; put on record what is new.

    Raises:
        StudyError: directory or storage hold another study or the same with other settings, or the
            storage can't be used.
        WriteError: the directory can't be written.
    """
    with _alone(run_dir):
        known = StudyFile.read(run_dir)
        file = known or StudyFile(_without_storage(config), None)
        file = replace(file, identity=file.identity or uuid.uuid4().hex)
        url = _chosen(config, run_dir, known)
        where = shown(url)
        name = file.config.name
        with storage_errors(where, url, _advice(url, config)):
            _check(known, look(url, name, read_only=False), url, run_dir, name)
            changed = [] if known is None else changed_fields(known.config, config)
            file.write(run_dir)  # before the storage carries it
            study = open_optuna(url, name, str(file.identity))
            if changed:
                study = _rebased(study, url, run_dir, config, changed, file)
            own = url == _own(run_dir)
            known_at = study.user_attrs.get(DIRECTORIES, [])
            if not own and str(run_dir.resolve()) not in known_at:
                study.set_user_attr(DIRECTORIES, [*known_at, str(run_dir.resolve())])
        file = replace(
            file,
            config=_without_storage(config),
            storage=None if own else where,
            given=None if own else config.search.storage or file.given,
            settled=True,
            carries=True,
        )
        file.write(run_dir)
    return Opened(file.config, where, study)


def check_to_search(config: StudyConfig, run_dir: Path) -> optuna.Study | None:
    """Refuse what `open_to_search` would refuse, before anything is paid for; nothing is written or
    created.

    Returns:
        The study, to be read, if it has begun.

    Raises:
        StudyError: see `open_to_search`.
    """
    known = StudyFile.read(run_dir)
    url = _chosen(config, run_dir, known)
    if run_dir.is_dir() or url != _own(run_dir):  # else the search makes the folder
        check_writable_file(url)
    name = config.name if known is None else known.config.name
    where = shown(url)
    with storage_errors(where, url, _advice(url, config)):
        held = look(url, name, read_only=True)
        _check(known, held, url, run_dir, name)
        if known is None or held.study_id is None:
            return None
        study = open_to_read(url, name)
        _refuse_changes(study, run_dir, changed_fields(known.config, config))
        return study


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


def open_to_report(run_dir: Path, storage: str | None = None) -> Opened:
    """What a study directory and its storage hold; nothing is written.

    Args:
        run_dir: the study directory.
        storage: URL, in place of the one on record, which is without its password.

    Raises:
        StudyError: no study there, or its storage can't be read.
    """
    known = StudyFile.read(run_dir)
    if known is None and _was_study(run_dir):
        raise _lost(run_dir)
    if known is None:
        raise StudyError(
            f"no study in {run_dir}: {directory.STUDY} is missing; run `asesearch search` first, "
            "or check the path"
        )
    url = known.url(run_dir) if storage is None else parse_url(storage)
    where = shown(url)
    name = known.config.name
    with storage_errors(where, url, _advice(url, known.config)):
        held = look(url, name, read_only=True)
        if held.study_id is None:
            raise StudyError(
                f"the storage {where} of the study in {run_dir} holds no study named {name!r}: it "
                "has not begun, or the storage was lost or replaced; run `asesearch search`, or "
                "restore the storage"
            )
        if held.identity != known.identity:
            raise of_another(url, name)
        return Opened(known.config, where, open_to_read(url, name))


# -- which storage -------------------------------------------------------------------------------


def _own(run_dir: Path) -> URL:
    """The storage of a study that names none: a file in its directory."""
    return resolved(URL.create("sqlite", database=str(run_dir / directory.DATABASE)))


def _chosen(config: StudyConfig, run_dir: Path, known: StudyFile | None) -> URL:
    """The storage to use: the one given, else the one on record, else a file in the study
    directory."""
    given = config.search.storage
    on_record = known.url(run_dir) if known is not None and known.settled else None
    if given is None:
        return on_record or _own(run_dir)
    url = parse_url(given)
    if known is None or on_record is None or not known.carries:
        return url
    if known.given != shown(raw_url(given)) or not is_relative(raw_url(given)):
        return url
    # the same relative path as at the beginning, perhaps in another working directory
    here = look(url, known.config.name, read_only=True).identity == known.identity
    return url if here else on_record


def _check(known: StudyFile | None, held: Held, url: URL, run_dir: Path, name: str) -> None:
    """Refuse a storage that does not hold this study, or holds another of its name.

    Raises:
        StudyError: with the way out.
    """
    identity = None if known is None else known.identity
    if identity is not None and held.identity == identity:
        _refuse_copy(run_dir, identity, held, url)
        return
    if held.identity is not None and known is None and _was_study(run_dir):
        raise _lost(run_dir)
    if held.identity is not None:
        raise of_another(url, name)
    on_record = known.url(run_dir) if known is not None and known.settled else None
    if on_record is not None and without_password(on_record) != without_password(url):
        raise StudyError(
            f"the study in {run_dir} has its trials in the storage {shown(on_record)}, and "
            f"{shown(url)} does not hold "
            "them; leave --storage out (and search.storage) to continue there, or copy them first: "
            'python -c "import optuna; '
            f"optuna.copy_study(from_study_name={name!r}, from_storage='{shown(on_record)}', "
            f"to_storage='{shown(url)}')\""
        )
    if held.has_trials and (known is None or known.carries or not known.settled):
        raise of_another(url, name)
    if on_record is not None and held.study_id is None and is_paid_for(run_dir):
        raise StudyError(
            f"the storage {shown(url)} of the study in {run_dir} was lost or replaced: it holds no "
            f"study named {name!r}, while the directory holds what its trials left; restore the "
            "storage, or search into another directory (--out)"
        )


def _refuse_copy(run_dir: Path, identity: str, held: Held, url: URL) -> None:
    """Refuse one of two directories of one study: each would delete and miss the other's weights.

    The other is found where it can be seen from here. A directory that machines have mounted under
    different paths is one, whose inode is the same.

    Raises:
        StudyError: the other directory holds the study too.
    """
    for other in map(Path, held.directories):
        try:
            is_same = other.stat().st_ino == run_dir.stat().st_ino
            if is_same or read_json(other / directory.STUDY).get("id") != identity:
                continue
        except (OSError, StudyError, AttributeError):
            continue  # it is elsewhere, or no study any more
        raise StudyError(
            f"of {run_dir} and {other} one is a copy of the other, and {shown(url)} holds one "
            f"study, whose trials were continued in {other}; search there, or, to go on in "
            f"{run_dir} in its place, rename {other} or remove it"
        )


def _was_study(run_dir: Path) -> bool:
    """Whether a directory without `study.json` once had it."""
    return (run_dir / directory.DATABASE).exists() or is_paid_for(run_dir)


def _lost(run_dir: Path) -> StudyError:
    return StudyError(
        f"{run_dir / directory.STUDY} was lost, which tells what its trials are of; {_RESTORE}"
    )


def _advice(url: URL, config: StudyConfig) -> str:
    """What to do where a storage can't be used."""
    if url.get_backend_name() == "sqlite":
        return ""
    recorded = config.search.storage is None and url.password is None
    libpq = ", or set PGPASSWORD" if url.get_backend_name() == "postgresql" else ""
    again = (
        f"; study.json keeps no password: give --storage again with it{libpq}" if recorded else ""
    )
    return (
        f"check that the server runs, and the URL's host, port, user, password and database{again}"
    )


# -- changed settings ----------------------------------------------------------------------------


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
    for path in (*(run_dir / name for name in names), *run_dir.glob("latency-*.json")):
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir / directory.TRIALS, ignore_errors=True)


def _refuse_changes(study: optuna.Study, run_dir: Path, changed: list[str]) -> None:
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


def _rebased(
    study: optuna.Study,
    url: URL,
    run_dir: Path,
    config: StudyConfig,
    changed: list[str],
    file: StudyFile,
) -> optuna.Study:
    """The study begun again under changed settings, which nothing on record speaks against.

    Raises:
        StudyError: something is on record, or another worker is at it.
    """
    _refuse_changes(study, run_dir, changed)
    if config.name != file.config.name:
        held = look(url, config.name, read_only=False)
        if held.identity is not None or held.has_trials:
            raise of_another(url, config.name)
    start_over(run_dir, f"with other settings ({'; '.join(changed)})")
    delete(study)
    return open_optuna(url, config.name, str(file.identity))


def _without_storage(config: StudyConfig) -> StudyConfig:
    return config.model_copy(update={"search": config.search.model_copy(update={"storage": None})})


# -- other processes -----------------------------------------------------------------------------


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Open a study directory one process at a time."""
    with waited_lock(run_dir / directory.LOCKS / _OPENING, "opens the study"):
        yield


def is_in_use(run_dir: Path) -> bool:
    """Whether a living process holds any lock of the study directory, other than to open it."""
    for folder in (run_dir, run_dir / directory.LOCKS, run_dir / directory.WORKERS):
        for path in folder.glob("*.lock"):
            with try_lock(path) as free:
                if not free and path.name != _OPENING:
                    return True
    return False
