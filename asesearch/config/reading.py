"""Study files read and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from asesearch.config.explaining import explain
from asesearch.config.sections import Section, StudyConfig
from asesearch.errors import ConfigError
from asesearch.files import read_text


def load_study(path: str | Path) -> StudyConfig:
    """Read and check a study file.

    Raises:
        ConfigError: unreadable, not TOML, an unknown key or a value out of range: all of them, in
            one line.
    """
    return parse_study(read_toml(path), str(path))


def parse_study(data: dict[str, Any], where: str) -> StudyConfig:
    """Check a study that is already parsed; `where` begins the error message.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    return parse_section(StudyConfig, data, where)


def parse_section(model: type[Section], data: Mapping[str, Any], where: str) -> Section:
    """Check one section that is already parsed; `where` begins the error message.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, where)) from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        ConfigError: unreadable or not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deep") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise ConfigError(f"{path} is not valid TOML: an integer is too long") from error
