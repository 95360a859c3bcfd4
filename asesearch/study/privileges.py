"""What a database lets its user do: asked before a search, and known by the error of one that was
refused."""

from __future__ import annotations

import sqlalchemy as sa
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.exc import DBAPIError

FIX = (
    "let that user create tables in this database and write to them (GRANT), or take a database "
    "that it owns"
)
_DENIED = "42501"  # PostgreSQL's insufficient_privilege
# in the words of PostgreSQL and MySQL; a socket or a file that may not be opened names no object
_SIGNS = ("permission denied for ", "command denied to user")
_VERSIONS = {"alembic_version", "version_info"}  # written when the tables are made

#: Tables that a search writes, with the column that a sequence numbers.
_WRITTEN = {
    table.name: next(iter(table.primary_key.columns)).name
    for table in BaseModel.metadata.sorted_tables
    if table.name not in _VERSIONS
}


def is_denied(error: BaseException, reason: str) -> bool:
    """Whether a database's error is that its user may not do something.

    Args:
        error: SQLAlchemy's, or Optuna's about it.
        reason: its text.
    """
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    state = getattr(getattr(cause, "orig", None), "sqlstate", None)
    return state == _DENIED or any(sign in reason.lower() for sign in _SIGNS)


def why_denied(connection: sa.Connection) -> str | None:
    """Why a search could not write its trials, with the fix; None where it could, or where only
    trying would tell. Nothing is written.

    Args:
        connection: to the database, which is asked only if it is PostgreSQL.
    """
    if connection.dialect.name != "postgresql":
        return None
    if _told(connection, "current_setting('transaction_read_only')") == "on":
        return (
            "its server lets nothing be written (transaction_read_only is on, as on a standby); "
            "give the server that takes writes, or set it off"
        )
    user = _told(connection, "current_user")
    there = set(sa.inspect(connection).get_table_names())
    if not there >= {*_WRITTEN, *_VERSIONS}:
        schema = _told(connection, "current_schema()")
        if not _told(connection, "has_schema_privilege(current_schema(), 'CREATE')"):
            if schema is None:
                return f"its user {user!r} may not create tables in any schema; {FIX}"
            return f"its user {user!r} may not create tables in the schema {schema!r}; {FIX}"
    for table, column in _WRITTEN.items():
        if table in there and not _told(connection, _may_write(table, column)):
            return f"its user {user!r} may not write to the table {table!r}; {FIX}"
    return None


def _may_write(table: str, column: str) -> str:
    """An expression of SQL: whether rows of a table can be read, added and changed."""
    rights = [f"has_table_privilege('{table}', '{r}')" for r in ("SELECT", "INSERT", "UPDATE")]
    numbers = f"pg_get_serial_sequence('{table}', '{column}')"  # NULL without a sequence
    rights.append(f"coalesce(has_sequence_privilege({numbers}, 'USAGE, UPDATE'), true)")
    return " and ".join(rights)


def _told(connection: sa.Connection, expression: str) -> object:
    return connection.execute(sa.select(sa.literal_column(expression))).scalar()
