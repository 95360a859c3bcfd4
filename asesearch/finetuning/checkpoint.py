"""A run's state on disk: tensors and JSON in one safetensors file, so that nothing in it can run
code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asesearch.config import TrainConfig
from asesearch.errors import CheckpointError
from asesearch.files import check_room, loads, replacing

CHECKPOINT = "training.safetensors"


def check_checkpoint_room(
    run_dir: Path, net: nn.Module, config: TrainConfig, *, result: int = 0
) -> None:
    """Refuse to begin a training in a folder that has no room for its checkpoints: the weights, and
    in those written before the end their moving average and the optimiser's two moments too. Each
    is whole before the one before it goes.

    Args:
        run_dir: folder of the checkpoint, there or not.
        net: whose weights are trained.
        config: of the training.
        result: bytes that its result takes on the same file system, beside the last checkpoint.

    Raises:
        WriteError: as said.
    """
    path = run_dir / CHECKPOINT
    done = _steps_done(path)
    each = sum(4 * p.numel() for p in net.parameters())
    left = (config.num_steps - 1) // config.checkpoint_every - done // config.checkpoint_every
    sizes = [4 * each] * min(left, 2) + [each] * (done < config.num_steps)
    there = held = path.stat().st_size if done else 0
    most = 0
    for size in sizes:
        most = max(most, held + size)
        held = size
    most = max(most, held + result)
    what = "the checkpoint of a training"
    check_room(run_dir, most - there, f"{what}, with its result," if result else what)


def _steps_done(path: Path) -> int:
    """Of a checkpoint's run; 0 where there is none to be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(loads(file.metadata()["progress"])["step"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        return 0


def write_checkpoint(
    path: Path, tensors: dict[str, Tensor], identity: dict[str, Any], progress: dict[str, Any]
) -> None:
    """Write a checkpoint, atomically.

    Args:
        tensors: by name, on any device.
        identity: what must agree for the checkpoint to be continued.
        progress: where the run is.
    """
    metadata = {
        "identity": json.dumps(identity, sort_keys=True),
        "progress": json.dumps(progress),
    }
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata)


def read_checkpoint(
    path: Path, identity: dict[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the progress of a checkpoint of this identity.

    Raises:
        CheckpointError: unreadable, or of another run: the message says what differs.
    """
    here = torch.empty(0, device=device).device  # safetensors takes "cuda" for "cuda:0"
    try:
        with safe_open(path, "pt", device=str(here)) as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        theirs = loads(metadata["identity"])
        progress: dict[str, Any] = loads(metadata["progress"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"can't resume from {path}: {error}; delete it to begin again"
        ) from error
    ours = json.loads(json.dumps(identity))
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{path} belongs to a run that differs in its {name}; train in another folder "
                "(--run-dir of train and finetune), undo the change, or delete it to begin again: "
                f"{_difference(theirs.get(name), ours.get(name))}"
            )
    return tensors, progress


def schedule_in(path: Path) -> Any:
    """The schedule of a checkpoint's run as plain data; None where there is none to be read."""
    try:
        with safe_open(path, "pt") as file:
            return loads(file.metadata()["identity"])["schedule"]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        return None


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, str) and isinstance(new, str):  # hashes
        return "their content is not what it was"
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in new if old.get(k) != new.get(k)
        )
    return f"{old!r} then, {new!r} now"
