"""The folder of latents: its format, and reading it.

Kept are the posterior's mean and standard deviation, so that every epoch draws its own sample, as
the official DiT code does on the fly, and of each image its mirror image too, as the official U-ViT
code does. A folder holds `index.json` (format version, digests of VAE, images and text encoder,
scaling, and shape and SHA-256 of each file) and, for each shard of n images,

    latents-00000.npy   (n, V, 2, C, h, w), V = 2 with mirror images; mean and standard deviation,
    not scaled labels-00000.npy    (n,) int64, where the images have labels and no captions
    tokens-00000.npy    (tokens, D), all captions' embeddings one after the other, without padding
    offsets-00000.npy   (n + 1,) int64, where each caption begins and ends in `tokens`

and with captions `null-prompt.npy` (tokens, D), the empty prompt's embedding.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asesearch.data.checking import find_faults
from asesearch.data.folder import ImageFile
from asesearch.errors import DataError
from asesearch.files import file_sha256, loads, replacing, write_json

INDEX = "index.json"
FORMAT_VERSION = 1
OTHER_FILES = 512  # that a process may hold open besides
AGAIN = "encode into this folder again, which makes only what is missing or damaged"
WITHOUT_IT = "delete it, and encode into this folder again"
Array = npt.NDArray[Any]
Entry = dict[str, Any]  # of an array file: file, sha256, shape, dtype


@dataclass
class Index:
    """What `index.json` holds.

    Attributes:
        version: of the format.
        identity: all that the shards' content depends on.
        name: of the images.
        count: number of images.
        shape: C, h, w.
        num_classes: number of labels, 0 with captions.
        classes: label of each class folder, where the images came from class folders.
        labels_by_order: labels only count the class folders, see `ImageFolder`; releases before
            this was kept did no other.
        shift, scale: of each channel; the network sees (z - shift) · scale.
        encoder: what the VAE's encoder made of a fixed image, `Vae.probe`; None in those of
            releases that did not keep it.
        null_prompt: the empty prompt's embedding, None without captions.
        shards: of those done, in order: part -> its file.
    """

    version: int
    identity: dict[str, Any]
    name: str
    count: int
    shape: list[int]
    num_classes: int
    shift: list[float]
    scale: list[float]
    null_prompt: Entry | None
    shards: list[dict[str, Entry]]
    classes: dict[str, int] = field(default_factory=dict)
    labels_by_order: bool = True
    encoder: list[float] | None = None

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder.

        Raises:
            DataError: missing, damaged, or of another version.
        """
        path = folder / INDEX
        try:
            text = path.read_text(encoding="utf-8-sig")
            if not text.strip("\0"):
                raise DataError(
                    f"{path} is empty, as a power cut may leave it; remove {folder} and encode "
                    "again, or into another folder (asesearch latents: --out)"
                )
            data = loads(text)
            if data["version"] == FORMAT_VERSION:
                return cls(**data)._checked()
        except DataError:  # a ValueError
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"can't read the index of latents {path}: {error}; check the path, or encode again "
                "into another folder"
            ) from error
        raise DataError(
            f"{path} has version {data['version']!r}; this release reads {FORMAT_VERSION}; encode "
            "the images again, into another folder"
        )

    def _checked(self) -> Index:
        """Itself.

        Raises:
            ValueError: naming a field that no release has written so.
        """
        numbers = [*_list(self.shift), *_list(self.scale)]
        channels = self.shape[0] if _list(self.shape) else 0
        entries = [entry for shard in _list(self.shards) for entry in _dict(shard).values()]
        right = {
            "count": _whole(self.count, 1),
            "shape": len(_list(self.shape)) == 3 and all(_whole(n, 1) for n in self.shape),
            "num_classes": _whole(self.num_classes, 0),
            "shift": len(_list(self.shift)) == channels,
            "scale": len(_list(self.scale)) == channels and all(_list(self.scale)),
            "shift or scale": all(type(v) in (int, float) and math.isfinite(v) for v in numbers),
            "identity": _whole(_dict(self.identity).get("shard_size"), 1)
            and {"flips", "max_length"} <= _dict(self.identity).keys(),
            "null_prompt": self.null_prompt is None or _is_entry(self.null_prompt),
            "shards": isinstance(self.shards, list)
            and all(isinstance(shard, dict) and "latents" in shard for shard in self.shards)
            and all(map(_is_entry, entries)),
            "classes": isinstance(self.classes, dict),
            "encoder": self.encoder is None
            or all(type(v) in (int, float) and math.isfinite(v) for v in _list(self.encoder)),
        }
        wrong = [name for name, ok in right.items() if not ok]
        if wrong:
            raise ValueError(f"its {wrong[0]} is not what an encoding writes")
        return self

    def write(self, folder: Path) -> None:
        """Atomically."""
        write_json(folder / INDEX, asdict(self))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**53


def _is_entry(value: object) -> bool:
    entry = _dict(value)
    name = entry.get("file")
    return (
        isinstance(name, str)
        and bool(name)
        and name == Path(name).name
        and all(isinstance(entry.get(key), str) for key in ("sha256", "dtype"))
        and isinstance(entry.get("shape"), list)
    )


def write_array(path: Path, array: Array) -> Entry:
    """Write an array atomically; returns its entry in the index."""
    with replacing(path) as part:
        with part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        sha256 = file_sha256(part)
    return {
        "file": path.name,
        "sha256": sha256,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
    }


#: NumPy parses the header as Python, which before 3.11.8 fails now and then where threads do so
#: together (SystemError, https://github.com/python/cpython/issues/106905).
_opening = threading.Lock()


def open_array(folder: Path, entry: Entry, verify: bool) -> Array:
    """Map an array of the index into memory.

    Raises:
        DataError: missing, truncated, of another shape or type, or, with `verify`, of another
            SHA-256 or with numbers that are not finite.
    """
    path = folder / entry["file"]
    try:
        with _opening:
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        fix = "allow the process more open files (ulimit -n)" if full else AGAIN
        raise DataError(f"can't read {path}: {error}; {fix}") from error
    if list(array.shape) != entry["shape"] or str(array.dtype) != entry["dtype"]:
        raise DataError(
            f"{path} must hold {entry['dtype']} {entry['shape']}; got {array.dtype} "
            f"{list(array.shape)}; {AGAIN}"
        )
    if verify and file_sha256(path) != entry["sha256"]:
        raise DataError(
            f"{path} must have the SHA-256 {entry['sha256']} of {INDEX}; got another, so it is "
            f"damaged; {AGAIN}"
        )
    if verify and array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise _not_finite(path)
    return array


def open_files(wanted: int) -> int:
    """How many files may be mapped at once, of those wanted; each map holds a file open.

    The process's own limit, often 1,024, is raised as far as that needs and the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < limit:
        raised = limit if hard == resource.RLIM_INFINITY else max(soft, min(limit, hard))
        with suppress(OSError, ValueError):  # where a container forbids it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - min(OTHER_FILES, soft // 2)))


def _not_finite(path: Path) -> DataError:
    return DataError(f"{path} must hold finite numbers; got NaN or infinity; {WITHOUT_IT}")


class LatentShards:
    """A folder of latents as a `DataSource`: read by memory map, never decoded.

    `batch` gives x_start (N, C, h, w) float32, scaled: a sample of the posterior, or its mean where
    no generator is passed. y is (N,) int64, None, or for captions `encoder_hidden_states` (N, L, D)
    float32, zero on padding, and `encoder_attention_mask` (N, L) int64, 1 on tokens.

    Args:
        path: a folder made by `encode_latents`.
        flip: take the mirror image's latents half of the time, where a generator is passed.
        verify: read all files now and compare their SHA-256 with the index's; `check` does so
            once for each file.

    Attributes:
        null_condition: the empty prompt's y with N = 1, None without captions.
        classes, labels_by_order: what the labels are, see `ImageFolder`.
        shift, scale: of each channel.
        scaling: the same, (C, 1, 1) float32 each: x_start = (z - shift) · scale.
        vae, encoder: digest of the VAE that made them, and what its encoder is known by, see
            `Index`.

    Raises:
        DataError: not such a folder, not all images encoded, a file missing, truncated or damaged,
            or `flip` without mirror images.
    """

    def __init__(
        self, path: str | os.PathLike[str], flip: bool = False, verify: bool = False
    ) -> None:
        folder = Path(path)
        index = Index.read(folder)
        self.folder = folder
        self._shard_size: int = index.identity["shard_size"]
        done = min(len(index.shards) * self._shard_size, index.count)
        if done < index.count:
            raise DataError(
                f"all images must be encoded; got {done} of {index.count} in {folder}; {AGAIN}"
            )
        if flip and not index.identity["flips"]:
            raise DataError(
                f"flip needs the mirror images' latents; got none in {folder}; encode them, or "
                "leave flip out"
            )
        self.name = f"{index.name}/latents"
        self.flip = flip
        self.num_classes = index.num_classes
        self.classes = index.classes
        self.labels_by_order = index.labels_by_order and index.num_classes > 0
        self.shape = (index.shape[0], index.shape[1], index.shape[2])
        self._count = index.count
        self._max_length = index.identity["max_length"]
        self.shift = index.shift
        self.scale = index.scale
        self.vae = index.identity.get("vae")
        self.encoder = index.encoder
        self.scaling = (
            torch.tensor(index.shift, dtype=torch.float32).view(-1, 1, 1),
            torch.tensor(index.scale, dtype=torch.float32).view(-1, 1, 1),
        )
        self._shards = index.shards
        small: dict[str, list[Array]] = {}  # what is held whole
        for entries in index.shards:
            for key, entry in entries.items():
                array = open_array(folder, entry, verify)
                if key in ("labels", "offsets"):
                    small.setdefault(key, []).append(np.array(array))
        self._offsets = small.get("offsets", [])
        self._labels = None
        if "labels" in small:
            self._labels = torch.from_numpy(np.concatenate(small["labels"]))
            for entries, labels in zip(index.shards, small["labels"], strict=True):
                low, high = int(labels.min()), int(labels.max())
                if not 0 <= low <= high < index.num_classes:
                    raise DataError(
                        f"{folder / entries['labels']['file']} must hold labels in "
                        f"0…{index.num_classes - 1}; got {low} to {high}; {AGAIN}"
                    )
        maps = len(index.shards) * len({"latents", "tokens"} & set(index.shards[0]))
        self._map = lru_cache(maxsize=open_files(maps))(self._open)
        null = index.null_prompt
        self.null_condition = (
            None
            if null is None
            else pad_prompts([open_array(folder, null, verify)], self._max_length)
        )
        self._paths = [folder / shard["latents"]["file"] for shard in index.shards]
        self._entries = [entry for shard in index.shards for entry in shard.values()]
        self._entries += [] if null is None else [null]
        content = [[entry["sha256"] for entry in shard.values()] for shard in index.shards]
        text = json.dumps([index.identity, index.shift, index.scale, content, flip], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def _open(self, shard: int, key: str) -> Array:
        return open_array(self.folder, self._shards[shard][key], verify=False)

    def __len__(self) -> int:
        return self._count

    def check(self) -> None:
        """Find files that changed since they were encoded, before anything is paid for; each is
        read once, see `find_faults`.

        Raises:
            DataError: there are some; how many, and what is wrong with the first.
        """
        entries = {entry["file"]: entry for entry in self._entries}

        def fault(file: ImageFile) -> DataError | None:
            try:
                open_array(self.folder, entries[file.name], verify=True)
            except DataError as error:
                return error
            return None

        files = [self._listed(name, entry["sha256"]) for name, entry in entries.items()]
        faults = list(find_faults(self.folder, files, fault, "latents").values())
        if faults:
            many = f" ({len(faults):,} of {len(files):,} files of these latents are so)"
            raise DataError(f"{faults[0]}{many if len(faults) > 1 else ''}")

    def _listed(self, name: str, sha256: str) -> ImageFile:
        try:
            facts = (self.folder / name).stat()
        except OSError:  # said by `open_array`
            return ImageFile(name, 0, 0, sha256)
        return ImageFile(name, facts.st_size, facts.st_mtime_ns, sha256)

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        where = [divmod(i, self._shard_size) for i in indices]
        mirrored = torch.zeros(len(where), dtype=torch.int64)
        if self.flip and generator is not None:
            mirrored = (
                torch.rand(len(where), generator=generator, dtype=torch.float32) < 0.5
            ).long()
        picked = [
            np.array(self._map(s, "latents")[i, m])  # a view would hold the file open
            for (s, i), m in zip(where, mirrored.tolist(), strict=True)
        ]
        moments = torch.from_numpy(np.stack(picked)).float()  # (N, 2, C, h, w)
        finite = moments.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise _not_finite(self._paths[where[finite.index(False)][0]])
        z, std = moments.unbind(1)  # (N, C, h, w) each
        if generator is not None:
            z = z + std * torch.randn(z.shape, generator=generator, dtype=torch.float32)
        shift, scale = self.scaling
        x_start = (z - shift) * scale
        if self.null_condition is not None:
            return x_start, self.conditions(indices)
        return x_start, None if self._labels is None else self._labels[
            torch.as_tensor(indices, dtype=torch.int64)
        ]

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The captions' y alone, without reading latents.

        Raises:
            DataError: encoded without captions.
        """
        if self.null_condition is None:
            raise DataError(
                f"prompts need captions; got none in {self.name}; encode the images with captions"
            )
        return pad_prompts(
            [self._caption(*divmod(i, self._shard_size)) for i in indices], self._max_length
        )

    def _caption(self, shard: int, i: int) -> Array:
        """The embedding of one caption: (tokens, D)."""
        begin, end = self._offsets[shard][i : i + 2]
        return np.array(self._map(shard, "tokens")[begin:end])


def pad_prompts(prompts: Sequence[Array], max_length: int) -> dict[str, Tensor]:
    """Embeddings (tokens, D) each as a network's y: `encoder_hidden_states`,
    `encoder_attention_mask`; see `LatentShards`."""
    size = (len(prompts), max_length, prompts[0].shape[1])
    hidden = torch.zeros(size, dtype=torch.float32)  # (N, L, D)
    mask = torch.zeros(len(prompts), max_length, dtype=torch.int64)  # (N, L)
    for row, tokens in enumerate(prompts):
        hidden[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
