"""From a study file's data section to a data source."""

from __future__ import annotations

from asesearch.config import DataConfig
from asesearch.data.fashion import fashion_mnist
from asesearch.data.images import ImageFolder
from asesearch.data.sources import DataSource
from asesearch.errors import ConfigError


def open_data(config: DataConfig) -> DataSource:
    """The data set of a study file.

    Raises:
        ConfigError: a setting that this kind of data needs is missing, or one that it has no use
            for.
        DataError: missing, empty or damaged data.
    """
    if config.vae is not None and config.kind != "latents":
        raise ConfigError(
            f"vae decodes latents; got it for data of kind {config.kind!r}; leave it out"
        )
    given = {k: getattr(config, k) for k in ("classes", "skip_damaged", "num_workers")}
    for_folders = [k for k, value in given.items() if value not in (None, False, 0)]
    if config.kind != "image-folder" and for_folders:
        raise ConfigError(
            f"{for_folders[0]} is for image folders; got it for data of kind {config.kind!r}; "
            "leave it out"
        )
    if config.kind == "fashion-mnist":
        return fashion_mnist(config.split, config.path, download=config.download)
    if config.path is None:
        raise ConfigError(
            f"data.path is needed for data of kind {config.kind!r}; got none; give the folder"
        )
    if config.kind == "latents":
        from asesearch.data.latents import (
            LatentShards,  # here, because that module imports this one
        )

        return LatentShards(config.path, config.flip)
    if config.image_size is None:
        raise ConfigError(
            "data.image_size is needed for an image folder; got none; give the side in pixels"
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
