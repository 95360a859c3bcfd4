"""Searches of tests need not survive a power cut: without this they spend their time waiting for
the disk."""

import pytest
import sqlalchemy


@pytest.fixture(autouse=True, scope="session")
def _no_sync():
    def relax(connection, _record):
        if "sqlite3" in type(connection).__module__:
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", relax)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", relax)
