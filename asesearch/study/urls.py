"""Storage URLs: read, given a driver, and shown without their secrets."""

from __future__ import annotations

import re
import warnings

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SAWarning

from asesearch.errors import StudyError
from asesearch.study.sqlite import is_in_memory, resolved

#: By backend: drivers in the order of preference, and how to get one.
DRIVERS = {
    "postgresql": (("psycopg", "psycopg2"), "pip install 'asesearch[postgresql]'"),
    "mysql": (("mysqldb", "pymysql"), "pip install pymysql cryptography"),
    "mariadb": (("mysqldb", "pymysql"), "pip install pymysql cryptography"),
}
#: By driver: how to get one that a URL names.
_NAMED = {
    "psycopg": "pip install 'asesearch[postgresql]'",
    "psycopg2": "pip install psycopg2-binary",
    "mysqldb": "pip install mysqlclient",
    "pymysql": "pip install pymysql cryptography",
}
_SECRET = re.compile(r"pass(?!file)|pwd|secret|token|^key$|odbc_connect", re.IGNORECASE)

# a secret in libpq's form, as in "host=localhost password='a b'"
_SETTING = re.compile(
    r"(\w*(?:pass|pwd|secret|token)\w*\s*=\s*)(?:'(?:[^'\\]|\\.)*(?:'|$)|(?:\\.|\S)+)",
    re.IGNORECASE | re.DOTALL,
)


def parse_url(text: str) -> URL:
    """A storage URL, checked as far as it can be without a connection.

    Returns:
        The URL with its password, without a driver where none was given, SQLite's path absolute.

    Raises:
        StudyError: not a URL, a database in memory, or one without a driver here.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):  # `check_utf8` would show a password
        raise StudyError(f"a storage URL must be UTF-8; got {masked(text)!r}; correct it")
    url = raw_url(text)
    if "@" in (url.host or ""):
        raise StudyError(
            f"an @ in the password of a storage URL is written %40; got {masked(text)!r}; correct "
            "it"
        )
    if "\0" in (url.database or ""):
        raise StudyError(
            f"the name of a storage has no NUL characters; got {masked(text)!r}; correct it"
        )
    if url.get_backend_name() == "sqlite":
        if url.host:
            raise StudyError(
                "a SQLite URL has three slashes before a relative path and four before an "
                f"absolute one; got {masked(text)!r}; write sqlite:///PATH"
            )
        if is_in_memory(url):
            raise StudyError(
                f"a study's storage must outlive the process; got {masked(text)!r}, which is kept "
                "in memory and lost at the end; name a file (sqlite:///PATH), or leave --storage "
                "out for one in the study directory"
            )
        url = resolved(url)
    driven = with_driver(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SAWarning)  # of a parameter that would be ignored
            driven.get_dialect()().create_connect_args(driven)
    # TypeError: of a parameter that is given twice
    except (ArgumentError, SAWarning, ValueError, TypeError) as error:
        raise StudyError(
            f"the parameters of a storage URL must be what its driver takes; got {masked(text)!r} "
            f"({str(error).partition(' (Background')[0].rstrip('.')}); correct them"
        ) from error
    return url


def raw_url(text: str) -> URL:
    """A storage URL as it was written.

    Raises:
        StudyError: not a URL.
    """
    try:
        return make_url(re.sub(r"^postgres(?=[:+])", "postgresql", text.strip()))
    except (ArgumentError, ValueError):  # whose text may hold a part of the password
        raise StudyError(
            "search.storage must be a database URL such as postgresql://user@host/name, special "
            f"characters written as %XX; got {masked(text)!r}; correct it"
        ) from None


def with_driver(url: URL) -> URL:
    """The URL with a driver that is installed here.

    Raises:
        StudyError: there is none.
    """
    backend = url.get_backend_name()
    names, fix = DRIVERS.get(backend, ((), f"install a Python driver for {backend}"))
    given = url.drivername
    choices = [f"{backend}+{name}" for name in names] if given == backend and names else [given]
    reasons: dict[str, str] = {}  # by how to get the driver that is missing
    for choice in choices:
        try:
            dialect = url.set(drivername=choice).get_dialect()
            dialect.import_dbapi()
        except NoSuchModuleError:
            raise StudyError(
                f"the study's storage {shown(url)} can't be used: no such database or driver as "
                f"{given}; write sqlite:///PATH, postgresql://… or mysql://…"
            ) from None
        except ImportError as error:
            reasons[_NAMED.get(choice.partition("+")[2], fix)] = str(error).partition("\n")[0]
            continue
        if dialect.is_async:
            raise StudyError(
                f"the study's storage {shown(url)} can't be used: {given} is an asynchronous "
                f"driver; write {backend}://…"
            )
        return url.set(drivername=choice)
    other = ""
    if given != backend:
        driver = given.partition("+")[2]
        fix = _NAMED.get(driver, f"install the Python driver {driver}")
        if any(_is_here(f"{backend}+{name}") for name in names):
            other = f", or write {backend}://… for the driver that is here"
    missing = reasons.get(fix) or next(iter(reasons.values()))
    raise StudyError(
        f"the study's storage {shown(url)} can't be used: its driver is not installed ({missing}); "
        f"{fix}{other}"
    )


def _is_here(driver: str) -> bool:
    """Whether a driver, named as in a URL, can be imported."""
    try:
        URL.create(driver).get_dialect().import_dbapi()
    except ImportError:
        return False
    return True


def without_password(url: URL) -> URL:
    """The URL without anything secret, as it is recorded."""
    plain = URL.create(url.drivername, url.username, None, url.host, url.port, url.database)
    return plain.set(query={k: v for k, v in url.query.items() if not _SECRET.search(k)})


def shown(url: URL) -> str:
    """A URL in messages and records: without anything secret."""
    return without_password(url).render_as_string(hide_password=False)


def secrets(url: URL) -> list[str]:
    """What a URL holds that must not be shown."""
    found = [url.password or ""]
    for key, value in url.query.items():
        if _SECRET.search(key):
            found += [value] if isinstance(value, str) else value
    return [text for text in found if text]


def masked(text: str) -> str:
    """A text that was to be a URL, as far as it can be shown."""
    text = re.sub(r"^(.*?//)?.*@", r"\1***@", text.strip(), flags=re.DOTALL)
    text = re.sub(r"([?&][^=&]*=)[^&]*", r"\1***", text)
    return _SETTING.sub(r"\1***", text)
