"""From a study file's data section to a data source."""

from __future__ import annotations

from asesearch.config import KINDS, DataConfig
from asesearch.data.fashion import fashion_mnist
from asesearch.data.images import ImageFolder
from asesearch.data.latents import LatentShards
from asesearch.data.sources import DataSource
from asesearch.errors import ConfigError, DataError


def open_data(config: DataConfig, section: str = "data") -> DataSource:
    """The data set of a study file.

    Args:
        config: the data's section.
        section: its name, for errors.

    Raises:
        ConfigError: a setting that this kind of data needs is missing, or one that it has no use
            for.
        DataError: missing, empty or damaged data.
    """
    try:
        return _opened(config, section)
    except DataError as error:
        if config.path is None:
            raise
        raise DataError(f"{section}.path: {error}") from error


def _opened(config: DataConfig, section: str) -> DataSource:
    for key, kinds in KINDS.items():
        value = getattr(config, key)
        if config.kind not in kinds and value != DataConfig.model_fields[key].default:
            raise ConfigError(
                f"{section}.{key} is for data of kind {' or '.join(map(repr, kinds))}; got "
                f"{value!r} for kind {config.kind!r}; leave it out"
            )
    if config.kind == "fashion-mnist":
        return fashion_mnist(config.split, config.path, download=config.download)
    if config.path is None:
        raise ConfigError(
            f"{section}.path is needed for data of kind {config.kind!r}; got none; give the folder"
        )
    if config.kind == "latents":
        return LatentShards(config.path, config.flip)
    if config.image_size is None:
        raise ConfigError(
            f"{section}.image_size is needed for an image folder; got none; give the side in pixels"
        )
    return ImageFolder(
        config.path,
        config.image_size,
        config.channels,
        config.flip,
        classes=config.classes,
        skip_damaged=config.skip_damaged,
        num_workers=config.num_workers,
    )


def check_readable(source: DataSource) -> None:
    """Find images that can't be read, and latents that changed, before anything is paid for; other
    sources lie in memory.

    Raises:
        DataError: see `ImageFolder.check` and `LatentShards.check`.
    """
    check = getattr(source, "check", None)
    if check is not None:
        check()
