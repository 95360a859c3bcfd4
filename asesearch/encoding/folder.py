"""An image folder encoded as a whole, with its captions where it has any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from asesearch.config import DataConfig
from asesearch.data import ImageFolder
from asesearch.data.folder import matched
from asesearch.data.latents import LatentShards
from asesearch.encoding.encoding import EncodingPlan, encode_latents
from asesearch.encoding.networks import MAX_LENGTH, PathLike
from asesearch.errors import ConfigError, DataError
from asesearch.files import loads, once, read_text


def read_captions(path: PathLike, images: ImageFolder) -> list[str]:
    """The captions of a folder's images, in its order.

    The file is JSON Lines with `file_name`, relative to the folder, and `text`: Hugging Face's
    `metadata.jsonl`.

    Raises:
        DataError: unreadable, a line of another form, two lines for an image, an image without
            caption or the reverse.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    text = read_text(path, DataError, "surrogateescape")  # a file name may be any bytes
    lines = text.split("\n")  # not splitlines(), which also splits at U+2028 inside a caption
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, text = _caption(f"{path}:{number}", line)
        if name in texts:
            raise DataError(
                f"{path}:{number} must give each image one text; got {text!r} for {name}; correct "
                "or remove it"
            )
        texts[name] = text
    names = [file.relative_to(images.root).as_posix() for file in images.files]
    meant = matched(texts, {*names, *images.skipped})
    texts = {meant[n]: text for n, text in texts.items()}
    bare = [n for n in names if n not in texts]
    lost = sorted(texts.keys() - set(names) - images.skipped.keys())
    if bare or lost:
        raise DataError(
            f"images in {images.root} and captions in {path} must pair up; got {len(bare)} images "
            f"without caption {bare[:3]} and {len(lost)} captions without image {lost[:3]}; add or "
            "remove them"
        )
    return [texts[n] for n in names]


def _caption(where: str, line: str) -> tuple[str, str]:
    """The file name and the caption in a line; `where` begins the error message.

    Raises:
        DataError: another form, or a caption that is no text.
    """
    try:
        row = loads(line, object_pairs_hook=once)
        name = PurePosixPath(row["file_name"]).as_posix()
        text = row["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where} must read {{"file_name": …, "text": …}}, each key once; got {line[:60]!r}; '
            "fix it"
        ) from error
    if not isinstance(text, str):
        raise DataError(
            f"{where} must give each image one text; got {text!r} for {name}; correct or remove it"
        )
    odd = next((c for c in text if "\ud800" <= c <= "\udfff"), "")
    if odd and odd in line:  # a byte that is not UTF-8, as `read_text` gives it
        raise DataError(
            f"{where} must hold a caption in UTF-8; got {text[:60]!r}; save the file as UTF-8"
        )
    if odd:
        raise DataError(
            f"{where} must hold a caption of whole characters; got {text[:60]!r}, where {odd!r} is "
            "half of one; write both halves, or the character itself"
        )
    return name, text


def encode_folder(
    data: DataConfig,
    vae: PathLike,
    out: PathLike,
    *,
    captions: PathLike | None = None,
    text_encoder: PathLike | None = None,
    batch_size: int = 32,
    flips: bool = True,
    shard_size: int = 1024,
    device: str | torch.device = "cpu",
    max_length: int = MAX_LENGTH,
    dtype: str = "float16",
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
) -> EncodingPlan | None:
    """Encode a study file's image folder; `captions` is a file for `read_captions`, the rest is as
    in `encode_latents`.

    Raises:
        ConfigError: `data` is not an image folder, or lacks path or image_size.
        ConfigError, CheckpointError, DataError: as `encode_latents` and `read_captions`.
    """
    if data.kind != "image-folder" or data.path is None or data.image_size is None:
        raise ConfigError(
            "encoding takes data of kind 'image-folder' with path and image_size; got "
            f"{data.kind!r}, path {data.path!r}, image_size {data.image_size!r}; complete the data "
            "section"
        )
    images = ImageFolder(
        data.path,
        data.image_size,
        data.channels,
        classes=data.classes,
        skip_damaged=data.skip_damaged,
    )
    return encode_latents(
        images,
        vae,
        out,
        batch_size=batch_size,
        flips=flips,
        shard_size=shard_size,
        device=device,
        captions=None if captions is None else read_captions(captions, images),
        text_encoder_path=text_encoder,
        max_length=max_length,
        dtype=dtype,
        progress=progress,
        dry_run=dry_run,
    )


def encoded_facts(folder: PathLike, flips: bool, verify: bool) -> dict[str, Any]:
    """What latents in a folder hold, as plain data; with `verify` all files are read again.

    Raises:
        DataError: see `LatentShards`.
    """
    shards = LatentShards(folder, flip=flips, verify=verify)
    return {
        "latents": str(folder),
        "images": len(shards),
        "shape": shards.shape,
        "classes": shards.num_classes,
        "prompts": shards.null_condition is not None,
        "verified": verify,
    }
