"""Which study this is: `study.json`.

A study directory has an identity, a random number that its Optuna study carries too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from asesearch.config import StudyConfig, parse_study
from asesearch.errors import StudyError
from asesearch.files import check_utf8, write_json
from asesearch.study import directory
from asesearch.study.directory import read_json
from asesearch.study.sqlite import resolved
from asesearch.study.urls import parse_url, raw_url, shown

FORMAT_VERSION = 2  # 1 knew no identity
RESTORE = "restore it from a copy, or search into another directory (--out)"


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
        data = read_json(path, RESTORE)
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise StudyError(f"{path} holds no study; {RESTORE}")
        version = data.get("version")
        if version not in (1, FORMAT_VERSION):
            raise StudyError(
                f"{path} has version {version!r}; this release reads 1 and {FORMAT_VERSION}; "
                "update asesearch"
            )
        config = parse_study(data["config"], str(path))
        if version == 1:
            given = config.search.storage
            return cls(without_storage(config), None, given, given, settled=True)
        storage = data.get("storage")
        identity = data.get("id")
        if not isinstance(identity, str) or not isinstance(storage, dict | None):
            raise StudyError(f"{path} has no identity; {RESTORE}")
        if storage is None:
            return cls(config, identity)
        if not all(isinstance(storage.get(key), str | None) for key in ("url", "given")):
            raise StudyError(f"{path} has a storage whose URL is no text; {RESTORE}")
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
        return own_storage(run_dir) if self.storage is None else parse_url(self.storage)


def own_storage(run_dir: Path) -> URL:
    """The storage of a study that names none: a file in its directory."""
    return resolved(URL.create("sqlite", database=str(run_dir / directory.DATABASE)))


def without_storage(config: StudyConfig) -> StudyConfig:
    """The study file without its storage, whose URL may hold a password."""
    return config.model_copy(update={"search": config.search.model_copy(update={"storage": None})})
