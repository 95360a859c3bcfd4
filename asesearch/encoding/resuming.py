"""An encoding's index: of a new one, and of one to go on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asesearch.data import DataSource
from asesearch.data.latents import FORMAT_VERSION, INDEX, Entry, Index
from asesearch.encoding.networks import Network, TextEncoder, Vae
from asesearch.errors import DataError
from asesearch.files import file_sha256

LOCK = "encoding.lock"  # held by the process that writes into the folder


def is_intact(folder: Path, entry: Entry) -> bool:
    path = folder / entry["file"]
    sha256 = str(entry["sha256"])
    return path.is_file() and file_sha256(path) == sha256


def fresh_index(
    source: DataSource,
    vae: Vae,
    text: TextEncoder | None,
    captions: Sequence[str] | None,
    *,
    flips: bool,
    dtype: str,
    shard_size: int,
) -> Index:
    """The index of an encoding without any shard; see `encode_latents` for the arguments."""
    return Index(
        version=FORMAT_VERSION,
        identity={
            "vae": vae.digest,
            "source": source.digest,
            "flips": flips,
            "dtype": dtype,
            "shard_size": shard_size,
            **_captions_identity(captions, text),
        },
        name=source.name,
        count=len(source),
        shape=[len(vae.scale), source.shape[1] // vae.factor, source.shape[2] // vae.factor],
        num_classes=source.num_classes if captions is None else 0,
        shift=vae.shift,
        scale=vae.scale,
        null_prompt=None,
        shards=[],
        classes=getattr(source, "classes", {}),
        labels_by_order=getattr(source, "labels_by_order", False),
        encoder=vae.probe(),
    )


def _captions_identity(captions: Sequence[str] | None, text: TextEncoder | None) -> dict[str, Any]:
    """What an encoding of captions depends on."""
    joined = None if captions is None else json.dumps(list(captions)).encode()
    return {
        "captions": None if joined is None else hashlib.sha256(joined).hexdigest(),
        "text_encoder": None if text is None else text.digest,
        "max_length": None if text is None else text.max_length,
    }


def resumed(folder: Path, fresh: Index, networks: Mapping[str, Network | None]) -> Index:
    """The index already in `folder`, if it is of the same encoding; `fresh` if the folder is new or
    empty.

    Raises:
        DataError: `folder` holds something else.
    """
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(p.name for p in folder.iterdir() if p.suffix != ".part" and p.name != LOCK)
        if strange:
            raise DataError(
                f"latents go into an empty folder; got {folder} with {strange[0]} in it; give "
                "another folder"
            )
        return fresh
    index = Index.read(folder)
    old = index.identity
    known = {name: net.known_as(old.get(name)) for name, net in networks.items() if net is not None}
    new = fresh.identity | known
    changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
    if changed:
        raise DataError(
            f"{folder} holds another encoding; changed: {'; '.join(changed)}; undo that, or give "
            "an empty folder"
        )
    index.classes = fresh.classes
    index.labels_by_order = fresh.labels_by_order
    index.encoder = index.encoder or fresh.encoder
    return index
