"""The study's database: its errors, looking into it, and opening it.

A URL as recorded and shown has no password and, for SQLite, an absolute path.
"""

from __future__ import annotations

import json
import random
import re
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import optuna
import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from asesearch.errors import StudyError, WriteError
from asesearch.files import check_writable
from asesearch.study.interrupts import WholeCalls
from asesearch.study.outages import reason_of
from asesearch.study.privileges import FIX, is_denied, why_denied
from asesearch.study.sqlite import (
    creator,
    location,
    make_file,
    why_not_writable,
    why_unusable,
)
from asesearch.study.urls import DRIVERS, raw_url, shown, with_driver

HEARTBEAT_S = 60
BUSY_WAIT_S = 120.0  # how long to wait for a SQLite file that another process holds
CONNECT_WAIT_S = 20  # how long to wait for a server
CREATION_TRIES = 12
# user attribute of the Optuna study: the identity of its study directory
IDENTITY = "asesearch_study"
# another: the absolute paths under which workers have opened that directory
DIRECTORIES = "asesearch_directories"

_STUDIES = sa.table("studies", sa.column("study_id"), sa.column("study_name"))
_TRIALS = sa.table("trials", sa.column("trial_id"), sa.column("study_id"))
_ATTRIBUTES = sa.table(
    "study_user_attributes", sa.column("study_id"), sa.column("key"), sa.column("value_json")
)
_LIBRARY = sa.table("version_info", sa.column("library_version"))
_SCHEMA = sa.table("alembic_version", sa.column("version_num"))

_OPTUNAS = {"studies", "trials", "alembic_version", "version_info"}
_VERSION = re.compile(r"v[0-9]+\.[0-9]+")  # how Optuna names the versions of its tables

_RACES = (SQLAlchemyError, optuna.exceptions.StorageInternalError, AssertionError)
_RACE_SIGNS = (
    "already exists",
    "duplicate",
    "unique",
    "concurrently",
    "locked",
    "deadlock",
    "no such table",
    "does not exist",
    # the classes of psycopg, for servers that speak another language
    "undefinedtable",
    "internalerror_",
)


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def storage_errors(
    where: str, url: URL | None = None, advice: Callable[[str], str] | None = None
) -> Iterator[None]:
    """Turn a database's errors into one line.

    Args:
        where: the storage as it is shown.
        url: of the storage, with the secrets that the line must not hold.
        advice: what to do, by the reason, in place of the usual.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        known = url or raw_url(where)
        reason = reason_of(error, known)
        closer = why_unusable(known, reason)
        fix = "check that the server runs, takes more connections, and may be written"
        if is_denied(error, reason):
            fix = FIX
        elif advice is not None:
            fix = advice(reason)
        elif known.get_backend_name() == "sqlite":
            fix = "check the path or URL, its permissions, and that no other program holds it"
        if url is None:  # it was open already
            fix += "; the trials on record are kept, and the same command resumes"
        raise StudyError(
            f"the study's storage {where} can't be used: {closer or f'{reason}; {fix}'}"
        ) from error
    except json.JSONDecodeError as error:
        if not _is_of_tables(error):
            raise
        raise StudyError(
            f"the study's storage {where} is damaged: its tables must hold JSON; got "
            f"{error.doc[:40]!r}; restore it from a copy, or search into another directory (--out)"
        ) from error


def _is_of_tables(error: json.JSONDecodeError) -> bool:
    """Whether what is no JSON came from a database, and not from a file read meanwhile."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        frame.f_code is _look.__code__
        or str(frame.f_globals.get("__name__")).startswith("optuna.storages.")
        for frame in frames
    )


@contextmanager
def experimental() -> Iterator[None]:
    """Optuna's notes that something is experimental are not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def delete(study: optuna.Study) -> None:
    """Remove an Optuna study and its trials from its storage."""
    optuna.delete_study(study_name=study.study_name, storage=study._storage)


def of_another(url: URL, name: str) -> StudyError:
    """The storage holds another study of the same name."""
    return StudyError(
        f"the storage {shown(url)} holds another study named {name!r}, begun from another study "
        "directory; give this one another name in its study file, or, to work on that one, give "
        "its directory (--out)"
    )


def check_writable_file(url: URL) -> None:
    """Refuse a SQLite file that a search could not write or make; nothing is left behind.

    Raises:
        StudyError: with what stands in the way.
    """
    why = why_not_writable(url)
    path = location(url)
    if why is None and path is not None and not path.exists():
        try:
            check_writable(path.with_name("new.db"))  # how long its own name may be is known
        except WriteError as error:
            reason = getattr(error.__cause__, "strerror", None) or error.__cause__
            why = f"no file can be made in {path.parent} ({reason}); name another place"
    if why is not None:
        raise StudyError(f"the study's storage {shown(url)} can't be used: {why}")


def check_rights(url: URL) -> None:
    """Refuse a PostgreSQL database whose user may not write a search's trials; nothing is created.

    Raises:
        StudyError: with what the user lacks.
    """
    if url.get_backend_name() != "postgresql":
        return
    with _connected(url, read_only=True) as connection:
        why = why_denied(connection)
    if why is not None:
        raise StudyError(f"the study's storage {shown(url)} can't be used: {why}")


# -- looking into it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a storage holds of a study's name.

    Attributes:
        ready: whether the database has Optuna's tables.
        study_id: of the Optuna study of that name; None where there is none.
        identity: of the study directory it belongs to; None where it carries none.
        has_trials: whether there is any trial.
        directories: paths under which workers have opened that directory, on whatever machine.
    """

    ready: bool = False
    study_id: int | None = None
    identity: str | None = None
    has_trials: bool = False
    directories: tuple[str, ...] = ()


def look(url: URL, name: str, *, read_only: bool) -> Held:
    """What a storage holds of a study's name; nothing is changed or created.

    Raises:
        StudyError: it is of another release of Optuna, or another program's.
    """
    path = location(url)
    if path is not None and not path.exists():
        return Held()
    with _connected(url, read_only) as connection:
        return _look(url, connection, name)


@contextmanager
def _connected(url: URL, read_only: bool) -> Iterator[sa.Connection]:
    """A connection for a few questions."""
    engine = _engine(url, read_only)
    try:
        with engine.connect() as connection:
            yield connection
    except TypeError as error:  # a driver's answer to a parameter that it does not know
        raise ArgumentError(str(error)) from error
    finally:
        engine.dispose()


def _look(url: URL, connection: sa.Connection, name: str) -> Held:
    tables = set(sa.inspect(connection).get_table_names())
    _check_owner(url, connection, tables)
    if not tables >= _OPTUNAS:
        return Held()
    schema = connection.execute(sa.select(_SCHEMA.c.version_num)).scalar()
    library = connection.execute(sa.select(_LIBRARY.c.library_version)).scalar()
    if schema is None or library is None:
        return Held()  # another process is about to make it
    _check_schema(url, schema, library)
    chosen = sa.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)
    study_id = connection.execute(chosen).scalar()
    if study_id is None:
        return Held(ready=True)
    return Held(
        True,
        study_id,
        _identity(connection, study_id),
        _has_trials(connection, study_id),
        tuple(json.loads(_attribute(connection, study_id, DIRECTORIES) or "[]")),
    )


def _check_owner(url: URL, connection: sa.Connection, tables: set[str]) -> None:
    """Refuse a database with tables of another program under the names that Optuna's have.

    Optuna writes the version of its tables when all of them are there. Until then another process
    may be about to make them, so tables that look like Optuna's are let be.

    Raises:
        StudyError: the tables are another program's.
    """
    whole = tables >= _OPTUNAS
    versions: list[str] = []
    if "alembic_version" in tables:
        versions = [str(v) for v in connection.execute(sa.select(_SCHEMA.c.version_num)).scalars()]
    listed = ", ".join(map(repr, sorted(versions)))
    if whole and len(versions) > 1:
        raise StudyError(
            f"the study's storage {shown(url)} can't be used: its table alembic_version must hold "
            f"one row, which Optuna wrote; got {listed}; give asesearch a database of its own, or "
            "remove the rows that Optuna did not write"
        )
    if whole:
        another = [v for v in versions if not _VERSION.match(v)]
    else:
        another = [v for v in versions if v not in _schemas()[1]]
    found = ["alembic_version"] if another else []
    if not whole:
        for table in _STUDIES, _TRIALS:
            if table.name in tables and not _has_columns(connection, table):
                found.append(table.name)
    if found:
        of = f" (alembic_version holds {listed})" if another else ""
        raise StudyError(
            f"the study's storage {shown(url)} can't be used: of its tables {' and '.join(found)} "
            f"{'is' if len(found) == 1 else 'are'} another program's{of}; give asesearch a "
            "database of its own"
        )


def _has_columns(connection: sa.Connection, table: sa.TableClause) -> bool:
    found = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    return {column.name for column in table.columns} <= found


def _identity(connection: sa.Connection, study_id: int) -> str | None:
    value = _attribute(connection, study_id, IDENTITY)
    return None if value is None else value.strip('"')


def _attribute(connection: sa.Connection, study_id: int, key: str) -> str | None:
    """A user attribute of an Optuna study, as it is stored."""
    value = connection.execute(
        sa.select(_ATTRIBUTES.c.value_json)
        .where(_ATTRIBUTES.c.study_id == study_id)
        .where(_ATTRIBUTES.c.key == key)
    ).scalar()
    return None if value is None else str(value)


def _has_trials(connection: sa.Connection, study_id: int) -> bool:
    chosen = sa.select(_TRIALS.c.trial_id).where(_TRIALS.c.study_id == study_id).limit(1)
    return connection.execute(chosen).scalar() is not None


def _check_schema(url: URL, schema: str, library: str) -> None:
    """Refuse tables that another release of Optuna made and this one can't use.

    Raises:
        StudyError: naming both releases and what to do.
    """
    head, known = _schemas()
    if schema == head:
        return
    here = f"this is Optuna {optuna.__version__} with tables of version {head}"
    if schema in known:
        fix = (
            f"copy the database, then `optuna storage upgrade --storage {shown(with_driver(url))}`"
        )
    else:
        fix = "`pip install -U optuna` here, or search into another storage"
    raise StudyError(
        f"the study's storage {shown(url)} was made by Optuna {library} with tables of version "
        f"{schema}; {here}; nothing was changed: {fix}"
    )


@cache
def _schemas() -> tuple[str, tuple[str, ...]]:
    """Version of the tables that this release of Optuna uses, and all that it knows."""
    own = optuna.storages.RDBStorage("sqlite://")
    try:
        return own.get_head_version(), tuple(own.get_all_versions())
    finally:
        own.remove_session()
        own.engine.dispose()


# -- opening it ----------------------------------------------------------------------------------


def _engine_kwargs(url: URL, read_only: bool) -> dict[str, object]:
    path = location(url)
    backend = url.get_backend_name()
    if path is not None and read_only:
        return {"creator": creator(path, BUSY_WAIT_S), "poolclass": sa.pool.QueuePool}
    if backend == "sqlite":
        return {"connect_args": {"timeout": BUSY_WAIT_S}}
    options: dict[str, object] = {}
    if backend in DRIVERS:
        options["connect_timeout"] = CONNECT_WAIT_S
    if backend == "postgresql":  # else psycopg gives bytes for the texts of a SQL_ASCII database
        options["client_encoding"] = "utf8"
        # one that vanished without a word would be waited for as long as the kernel resends
        options |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        options["tcp_user_timeout"] = 60_000  # ms
    connect_args = {key: value for key, value in options.items() if key not in url.query}
    return {"pool_pre_ping": True, "connect_args": connect_args}


def _engine(url: URL, read_only: bool) -> Engine:
    return sa.create_engine(with_driver(url), **_engine_kwargs(url, read_only))


def ask(study: optuna.Study) -> optuna.Trial:
    """The next trial, which is to run inside `beating`; Optuna expects heartbeats from `optimize`
    alone and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        return study.ask()


def _connect(url: URL, *, read_only: bool, create: bool = False) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    text = with_driver(url).render_as_string(hide_password=False)
    with experimental():
        storage = WholeCalls(
            text.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
            engine_kwargs=_engine_kwargs(url, read_only),
            heartbeat_interval=None if read_only else HEARTBEAT_S,
            skip_table_creation=not create,
        )
    weakref.finalize(storage, storage.engine.dispose)  # a server is told goodbye
    return storage


def _create(url: URL) -> optuna.storages.RDBStorage:
    """The database with Optuna's tables, made where they are missing, by any number of processes at
    once."""
    make_file(url)
    for attempt in range(CREATION_TRIES):
        ready = look(url, "", read_only=False).ready
        try:
            return _connect(url, read_only=False, create=not ready)
        except _RACES as error:
            if attempt == CREATION_TRIES - 1 or not _is_race(error):
                raise
            time.sleep(random.uniform(0.05, 0.1) * 2 ** min(attempt, 4))
    raise AssertionError("not reached")


def _is_race(error: BaseException) -> bool:
    """Whether an error may come of another process that makes the same tables at this moment."""
    text = f"{error} {error.__cause__ or ''}".lower()
    return isinstance(error, AssertionError) or any(sign in text for sign in _RACE_SIGNS)


def _claim(storage: optuna.storages.RDBStorage, name: str, identity: str) -> str:
    """The identity that the Optuna study carries, which is ours if it had none; decided by the
    database."""
    study_id = storage.get_study_id_from_name(name)
    with storage.engine.connect() as connection:
        if (carried := _identity(connection, study_id)) is not None:
            return carried
        row = {"study_id": study_id, "key": IDENTITY, "value_json": json.dumps(identity)}
        try:
            connection.execute(sa.insert(_ATTRIBUTES).values(row))
            connection.commit()
        except IntegrityError:  # another process was faster
            connection.rollback()
        return _identity(connection, study_id) or ""


def open_to_read(url: URL, name: str) -> optuna.Study:
    """The Optuna study of a name, which `look` has found; nothing is written."""
    return optuna.load_study(study_name=name, storage=_connect(url, read_only=True))


def open_optuna(url: URL, name: str, identity: str) -> optuna.Study:
    """The two-objective Optuna study of a name, begun or continued, as that of this identity.

    Any number of processes may do so at once on an empty database; the first gives its identity.

    Raises:
        StudyError: the study is another's.
    """
    storage = _create(url)
    with experimental():
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        if len(study.directions) != 2:
            raise StudyError(
                f"the storage {shown(url)} holds an Optuna study named {name!r} that is not "
                "asesearch's; give this study another name"
            )
        if _claim(storage, name, identity) != identity:
            raise of_another(url, name)
        if study.metric_names is None:
            with suppress(optuna.exceptions.StorageInternalError):  # another process was faster
                study.set_metric_names(["score", "relative cost"])
    return study
