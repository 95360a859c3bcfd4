"""Opening a study to search or to report, if a storage holds the trials of that study and of no
other."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from sqlalchemy.engine import URL

from asesearch.config import StudyConfig, changed_fields
from asesearch.errors import StudyError
from asesearch.files import real_path
from asesearch.locks import waited_lock
from asesearch.study import directory
from asesearch.study.changes import is_paid_for, refuse_changes, start_over
from asesearch.study.directory import read_json
from asesearch.study.identity import RESTORE, StudyFile, own_storage, without_storage
from asesearch.study.sqlite import is_relative
from asesearch.study.storage import (
    DIRECTORIES,
    Held,
    check_rights,
    check_writable_file,
    delete,
    look,
    of_another,
    open_optuna,
    open_to_read,
    storage_errors,
)
from asesearch.study.urls import parse_url, raw_url, shown, with_driver, without_password


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
        file = known or StudyFile(without_storage(config), None)
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
            own = url == own_storage(run_dir)
            if not own:
                _put_last(study, run_dir)
        file = replace(
            file,
            config=without_storage(config),
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
    if run_dir.is_dir() or url != own_storage(run_dir):  # else the search makes the folder
        check_writable_file(url)
    name = config.name if known is None else known.config.name
    where = shown(url)
    with storage_errors(where, url, _advice(url, config)):
        held = look(url, name, read_only=True)
        _check(known, held, url, run_dir, name)
        check_rights(url)
        if known is None or held.study_id is None:
            return None
        study = open_to_read(url, name)
        refuse_changes(study, run_dir, changed_fields(known.config, config))
        return study


def open_to_report(
    run_dir: Path, storage: str | None = None, *, takes_storage: bool = True
) -> Opened:
    """What a study directory and its storage hold; nothing is written.

    Args:
        run_dir: the study directory.
        storage: URL, in place of the one on record, which is without its password.
        takes_storage: whether the command takes a storage, so that giving one can be advised.

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
    with storage_errors(where, url, _advice(url, known.config, takes_storage)):
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


def _chosen(config: StudyConfig, run_dir: Path, known: StudyFile | None) -> URL:
    """The storage to use: the one given, else the one on record, else a file in the study
    directory."""
    given = config.search.storage
    on_record = known.url(run_dir) if known is not None and known.settled else None
    if given is None:
        return on_record or own_storage(run_dir)
    url = parse_url(given)
    if known is None or on_record is None or not known.carries:
        return url
    if known.given != shown(raw_url(given)) or not is_relative(raw_url(given)):
        return url
    # the same relative path as at the beginning, perhaps in another working directory
    here = look(url, known.config.name, read_only=True).identity == known.identity
    return url if here else on_record


def storage_of(config: StudyConfig, run_dir: Path) -> str | None:
    """URL of the storage that a search of a study file uses, with its password; None for the one on
    record. A relative path that leads nowhere from here is the one on record."""
    if config.search.storage is None:
        return None
    url = _chosen(config, run_dir, StudyFile.read(run_dir))
    return url.render_as_string(hide_password=False)


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
            f"optuna.copy_study(from_study_name={name!r}, "
            f"from_storage='{shown(with_driver(on_record))}', "
            f"to_storage='{shown(with_driver(url))}')\""
        )
    if held.has_trials and (known is None or known.carries or not known.settled):
        raise of_another(url, name)
    if on_record is not None and held.study_id is None and is_paid_for(run_dir):
        raise StudyError(
            f"the storage {shown(url)} of the study in {run_dir} was lost or replaced: it holds no "
            f"study named {name!r}, while the directory holds what its trials left; restore the "
            "storage, or search into another directory (--out)"
        )


def _put_last(study: optuna.Study, run_dir: Path) -> None:
    """Put on record that this directory is the last that a search of the study opened."""
    here = str(real_path(run_dir))
    known_at = study.user_attrs.get(DIRECTORIES, [])
    if known_at[-1:] != [here]:
        others = [path for path in known_at if path != here]
        study.set_user_attr(DIRECTORIES, [*others, here])


def _refuse_copy(run_dir: Path, identity: str, held: Held, url: URL) -> None:
    """Refuse one of two directories of one study: each would delete and miss the other's weights.

    The one to go on with is the last that a search opened, of those that can be seen from here.

    Raises:
        StudyError: this directory is another one.
    """
    for other in map(Path, reversed(held.directories)):
        try:
            if read_json(other / directory.STUDY).get("id") != identity:
                continue
            if _is_same(run_dir, other):
                return
        except (OSError, StudyError, AttributeError):
            continue  # it is elsewhere, or no study any more
        raise StudyError(
            f"of {run_dir} and {other} one is a copy of the other, and {shown(url)} holds one "
            f"study, whose trials were continued in {other}; search there, or, to go on in "
            f"{run_dir} in its place, rename {other} or remove it"
        )


def _is_same(run_dir: Path, other: Path) -> bool:
    """Whether a directory is another one, perhaps mounted a second time: what is written in the
    one is seen in the other. Inodes don't tell: the roots of two volumes have the same."""
    if run_dir.samefile(other):
        return True
    folder = run_dir / directory.LOCKS if (run_dir / directory.LOCKS).is_dir() else run_dir
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".same-") as mark:
        return (other / folder.relative_to(run_dir) / Path(mark.name).name).exists()


def _was_study(run_dir: Path) -> bool:
    """Whether a directory without `study.json` once had it."""
    return (run_dir / directory.DATABASE).exists() or is_paid_for(run_dir)


def _lost(run_dir: Path) -> StudyError:
    return StudyError(
        f"{run_dir / directory.STUDY} was lost, which tells what its trials are of; {RESTORE}"
    )


def _advice(
    url: URL, config: StudyConfig, takes_storage: bool = True
) -> Callable[[str], str] | None:
    """What to do where a storage can't be used, by the reason; None for the usual."""
    backend = url.get_backend_name()
    if backend == "sqlite":
        return None
    password = ""
    if url.password is None and "password" not in url.query:
        on_record = config.search.storage is None
        ways = ["give --storage again with it"] if on_record and takes_storage else []
        ways += ["set PGPASSWORD or ~/.pgpass"] if backend == "postgresql" else []
        held = ["study.json keeps no password"] if on_record else []
        password = ": ".join([*held, *filter(None, [", or ".join(ways)])])

    def advice(reason: str) -> str:
        if password and "no password supplied" in reason:
            return password
        usual = "check that the server runs and takes more connections, and the URL's host, port, "
        usual += "user, password and database"
        return f"{usual}; {password}" if password else usual

    return advice


# -- changed settings ----------------------------------------------------------------------------


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
    refuse_changes(study, run_dir, changed)
    if config.name != file.config.name:
        held = look(url, config.name, read_only=False)
        if held.identity is not None or held.has_trials:
            raise of_another(url, config.name)
    start_over(run_dir, f"with other settings ({'; '.join(changed)})")
    delete(study)
    return open_optuna(url, config.name, str(file.identity))


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Open a study directory one process at a time."""
    with waited_lock(run_dir / directory.LOCKS / directory.OPENING_LOCK, "opens the study"):
        yield
