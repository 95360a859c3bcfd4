"""Checkpoint files as data: tensors, metadata and config. Nothing is ever unpickled but plain
data."""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asesearch.backbones.folders import (
    CONFIG,
    INDEX,
    find_folder,
    find_index,
    has_config,
    read_config,
    refuse_quantised_config,
    refuse_shard,
    shards_of,
    weight_files,
)
from asesearch.backbones.intact import refuse_changed
from asesearch.backbones.wrappers import NoWeightsError, find_weights, training_options
from asesearch.errors import CheckpointError, ConfigError
from asesearch.files import check_utf8, whence
from asesearch.foreign import foreign

FORMAT = "asesearch.backbone"  # in the metadata of the files we write
SHIPPED = "shipped:"


@dataclass
class Contents:
    """A checkpoint as read.

    Attributes:
        path: of the file or folder.
        state: the weights, under the network's own names as far as they can be told.
        source: where in the file they were, see `Weights`.
        metadata: of a safetensors file.
        config: the `config.json` of a diffusers folder.
        notes: what was decided that the user may want to know, a sentence each.
        options: what the training's options beside the weights tell of the network.
    """

    path: Path
    state: dict[str, Tensor]
    source: str = "weights"
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The weights, and where in the file they were: such as "ema" or "state_dict.model"; "weights"
    for the top.

    Of a training state the averaged weights (EMA) are taken where they are whole. What training
    programs put in front of names (`module.`, `_orig_mod.`, `model.` …) is left out. The tensors
    are mapped from the file (private, copied on write), so reading costs no memory until they are
    used.

    Raises:
        CheckpointError: no such file, not a checkpoint, truncated, or a pickle that asks for code
            to be run.
    """
    contents = read_checkpoint(resolve(path))
    return contents.state, contents.source


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint's path; `shipped:NAME` is a network that travels in the package.

    Raises:
        ConfigError: no such shipped network.
    """
    text = os.fspath(path)
    if not text.startswith(SHIPPED):
        return Path(text)
    assets = Path(str(resources.files("asesearch"))) / "assets"
    files = sorted(assets.glob("*.safetensors"))
    shipped = {p.stem: p for p in files if _load_safetensors(p)[1].get("format") == FORMAT}
    name = text.removeprefix(SHIPPED)
    if name not in shipped:
        raise ConfigError(
            f"no shipped network is called {name!r}; choose one of {', '.join(shipped) or '(none)'}"
        )
    return shipped[name]


def read_checkpoint(path: Path) -> Contents:
    """Read a file or folder of any known format, told by its content.

    Raises:
        CheckpointError: as `read_state_dict`.
    """
    check_utf8(path, "weights", CheckpointError)
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(INDEX) and path.is_file() and not has_config(path.parent):
        return _read_shards(path)
    refuse_shard(path)
    return _unwrapped(path, *_load(path))


def _load(path: Path) -> tuple[object, dict[str, str]]:
    """What a file holds as it is, and its metadata."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}{whence(path)}; check the path, or fetch the "
            "checkpoint"
        )
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # eight bytes of length, then JSON
            return _load_safetensors(path)
        return _load_torch(path, head), {}
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror or error}; check its permissions"
        ) from error


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            return state, dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(_damaged(path, "a damaged safetensors file", str(error))) from error


def _load_torch(path: Path, head: bytes) -> object:
    if (what := foreign(path)) is not None:
        raise CheckpointError(f"{path} {what}")
    # the options in a training state: data only
    options = torch.serialization.safe_globals([argparse.Namespace])
    try:
        mmap = _is_mappable(path, head)
        with path.open("rb") as file, options, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = path if mmap else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise CheckpointError(_refused(path, head, error)) from error


def _is_mappable(path: Path, head: bytes) -> bool:
    """Whether torch can map the weights from a file: from a zip archive, as it writes since 1.6, in
    which nothing is compressed. It maps by path alone, and takes paths that end so for
    safetensors."""
    if path.name.endswith(".safetensors") or not head.startswith(b"PK\x03\x04"):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _refused(path: Path, head: bytes, error: Exception) -> str:
    """Why torch could not read a file, without its advice to trust the file."""
    told = re.search(r"(?:GLOBAL|class|function|instance of) ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError):
        code = told[1] if told else _first_global(path)
        if code is not None:
            return (
                f"{path} is not a checkpoint of plain tensors: it asks for code to be run, which "
                f"is refused (it needs {code}); where it was made, save the state dict alone, best "
                "with safetensors"
            )
    if head.startswith(b"\x80") and _is_whole_pickle(path):
        return (
            f"{path} is a pickle that torch.save did not write; save net.state_dict() with "
            "torch.save or safetensors"
        )
    if not head.startswith((b"PK", b"\x80")):
        begin = head[:8].hex(" ")
        return (
            f"{path} is no checkpoint: it begins with the bytes {begin}; give a .pt, .pth or "
            ".safetensors file"
        )
    return _damaged(path, "a damaged or truncated checkpoint", str(error) or type(error).__name__)


def _first_global(path: Path) -> str | None:
    """The first thing that a bare pickle would import; nothing is run."""
    texts: list[str] = []
    with path.open("rb") as file, suppress(ValueError, EOFError, UnicodeDecodeError):
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if "UNICODE" in opcode.name:
                texts.append(str(value))
    return None


def _is_whole_pickle(path: Path) -> bool:
    """Whether a file is one pickle to its end; those of torch before 1.6 are several."""
    with path.open("rb") as file, suppress(ValueError, EOFError, UnicodeDecodeError):
        for _ in pickletools.genops(file):
            pass
        return file.tell() == os.fstat(file.fileno()).st_size
    return False


def _damaged(path: Path, what: str, reason: str) -> str:
    if (other := foreign(path)) is not None:
        return f"{path} {other}"
    size = path.stat().st_size
    first = reason.strip().splitlines()[0].split(". ")[0]
    return (
        f"{path} is {what} of {size:,} bytes ({first}), as an unfinished download leaves it; "
        "download it again"
    )


def _unwrapped(
    path: Path, data: object, metadata: dict[str, str], file: Path | None = None
) -> Contents:
    """The weights in what was loaded; our own files hold nothing else. `file` is the first of those
    in a folder, which is the only one where it is a PyTorch file."""
    if metadata.get("format") == FORMAT:
        return Contents(path, dict(cast("Mapping[str, Tensor]", data)), metadata=metadata)
    try:
        found = find_weights(data)
    except NoWeightsError as error:
        raise CheckpointError(f"{path} {error}") from error
    for name, value in found.state.items():
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else "sparse"
            raise CheckpointError(
                f"{path} must hold plain tensors; got a {kind} one, {name}; save the weights "
                "themselves, dense and in float32 or half precision"
            )
    shapes = {k: v.shape for k, v in found.state.items() if k != "pos_embed"}
    if shapes and all(shape.numel() == 0 for shape in shapes.values()):
        raise CheckpointError(
            f"{path} must hold the weights; got {len(shapes)} tensors of size 0, as DeepSpeed's "
            "ZeRO-3 and FSDP leave them with each process; gather them where they were trained "
            "(zero_to_fp32.py, or a full state dict), and give that file"
        )
    refuse_changed(path if file is None else file, found.state)
    options = training_options(data)
    return Contents(path, found.state, found.source, metadata, notes=found.notes, options=options)


def _read_folder(path: Path) -> Contents:
    """A diffusers model or pipeline, shards with their index, or a checkpoint folder of U-ViT's
    training."""
    if (path / "nnet_ema.pth").is_file():
        contents = read_checkpoint(path / "nnet_ema.pth")
        contents.source = "ema"
        return contents
    if (index := find_index(path)) is not None:
        return _read_shards(index)
    path = find_folder(path, "transformer")
    config = read_config(path)
    refuse_quantised_config(path / CONFIG, config)
    found = _joined(path, weight_files(path))
    found.config = config
    return found


def _read_shards(index: Path) -> Contents:
    """A network under official names, whose weights lie in several files."""
    return _joined(index.parent, shards_of(index))


def _joined(path: Path, names: Sequence[str]) -> Contents:
    """The weights in files of a folder together."""
    data: object = _load(path / names[0])[0]
    for name in names[1:]:
        shard = _load(path / name)[0]
        if isinstance(data, dict) and isinstance(shard, dict):
            data |= shard
    return _unwrapped(path, data, {}, path / names[0])
