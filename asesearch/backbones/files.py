"""Checkpoint files as data: tensors, metadata and config. Nothing is ever unpickled but plain data."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asesearch.errors import CheckpointError, ConfigError

FORMAT = "asesearch.backbone"  # in the metadata of the files we write
SHIPPED = "shipped:"
_WEIGHTS = "diffusion_pytorch_model"


@dataclass
class Contents:
    """A checkpoint as read; `config` is the `config.json` of a diffusers folder."""

    path: Path
    state: dict[str, Tensor]
    source: str = "weights"
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The weights under the names they are stored by, and where they come from: "ema", "model" or "weights".

    Of a training state the EMA is taken where there is one. The tensors are mapped from the file (private, copied on
    write), so reading costs no memory until they are used.

    Raises:
        CheckpointError: no such file, not a checkpoint, truncated, or a pickle that asks for code to be run.
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
    shipped = {p.stem: p for p in files if _read_safetensors(p).metadata.get("format") == FORMAT}
    name = text.removeprefix(SHIPPED)
    if name not in shipped:
        raise ConfigError(f"no shipped network is called {name!r}; choose one of {', '.join(shipped) or '(none)'}")
    return shipped[name]


def read_checkpoint(path: Path) -> Contents:
    """Read a file or folder of any known format, told by its content.

    Raises:
        CheckpointError: as `read_state_dict`.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; check the path, or fetch the checkpoint")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # eight bytes of length, then JSON
        return _read_safetensors(path)
    return _read_torch(path, mmap=head[:4] == b"PK\x03\x04")  # files from before torch 1.6 can't be mapped


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            return Contents(path, state, metadata=dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}; fetch it again") from error


def _read_torch(path: Path, mmap: bool) -> Contents:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in DiT's training state: data only
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of plain tensors, is truncated, or asks for code to be run, which is refused "
            f"({reason}); fetch it again, or save its state dict with safetensors"
        ) from error
    source = "weights"
    if isinstance(data, dict):
        source = next((k for k in ("ema", "model") if isinstance(data.get(k), dict)), source)
        data = data.get(source, data)
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors; got {type(data).__name__}; save net.state_dict()")
    return Contents(path, {str(k): v for k, v in data.items()}, source)


def _read_folder(path: Path) -> Contents:
    """A diffusers model or pipeline, or a checkpoint folder of U-ViT's training."""
    if (path / "nnet_ema.pth").is_file():
        contents = read_checkpoint(path / "nnet_ema.pth")
        contents.source = "ema"
        return contents
    if (path / "transformer" / "config.json").is_file():
        path = path / "transformer"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"a checkpoint folder must hold a diffusers config.json; got none in {path}; give another")
    config, index = _read_json(path / "config.json"), path / f"{_WEIGHTS}.safetensors.index.json"
    names = [n for n in (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.bin") if (path / n).is_file()][:1]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(n).name != n for n in names):
        raise CheckpointError(f"{path} must hold {_WEIGHTS}.safetensors, or an index of files beside it; fetch it again")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_checkpoint(path / name).state
    return Contents(path, state, config=config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(data).__name__}; fetch it again")
    return data
