"""Where outputs may go: not among the data, and not into a folder that is something else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from asesearch.config import DataConfig, StudyConfig
from asesearch.errors import ConfigError
from asesearch.files import real_path

#: What a folder is that holds a file of this name.
KNOWN = {
    "study.json": "a study directory",
    "bundle.json": "a bundle",
    "model_index.json": "a diffusers pipeline",
    "index.json": "a folder of latents",
}


def check_output(config: StudyConfig, out: Path, option: str, may_be: Iterable[str] = ()) -> None:
    """Refuse a folder to write into that lies among a study's data or is something else.

    Args:
        config: the study.
        out: the folder, there or not.
        option: that gave it, for the message.
        may_be: names in `KNOWN` of what it may be already.

    Raises:
        ConfigError: naming the folder.
    """
    mapped = None if config.map is None else config.map.data
    refuse_among_data((config.data, config.evaluation.reference, mapped), out, option)
    for name in KNOWN.keys() - set(may_be):
        if (out / name).is_file():
            raise ConfigError(
                f"outputs go into a folder of their own; got {out}, which is {KNOWN[name]} "
                f"({name}); change {option}"
            )


def check_not_read(config: StudyConfig, out: Path, option: str) -> None:
    """Refuse weights to write that would take the place of some that a study reads.

    Args:
        config: the study.
        out: the file to write.
        option: that gave it, for the message.

    Raises:
        ConfigError: naming the key that gives those weights.
    """
    also = config.confirm.also if isinstance(config.confirm.also, dict) else {}
    read = {
        "backbone.checkpoint": config.backbone.checkpoint,
        "data.vae": config.data.vae,
        "evaluation.extractor_weights": config.evaluation.extractor_weights,
        **{f"confirm.also.{name}": path for name, path in also.items()},
    }
    there = real_path(out)
    for key, path in read.items():
        if path is not None and real_path(path) in (there, *there.parents):
            raise ConfigError(
                f"weights are written beside those that a study reads, not over them; got {out}, "
                f"where {key} = {str(path)!r} is read; change {option}"
            )


def refuse_among_data(sets: Iterable[DataConfig | None], out: Path, option: str) -> None:
    """Refuse an output in a folder of images, whose class folders and files it would be, or of
    latents.

    Raises:
        ConfigError: naming that folder.
    """
    for data in sets:
        if data is None or data.kind == "fashion-mnist" or data.path is None:
            continue
        folder = real_path(data.path)
        if folder in (real_path(out), *real_path(out).parents):
            what = "latents" if data.kind == "latents" else "images"
            raise ConfigError(
                f"outputs go beside the {what} of a study, not among them; got {out} in "
                f"{data.path}; change {option}"
            )
