"""A bundle with its block compiled ahead of time by AOTInductor, for this kind of machine.

The folder is a bundle, and `block.pt2` beside: one block as machine code that takes its weights as
arguments, so that it serves every block, every exit depth and every batch. The parts before and
after the blocks run in torch. Loading the package runs machine code: it is done only once the
hashes are those on record, and is for folders whose maker you trust, as any program is.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.exit_weights import weight_sets
from asesearch.deployment.bundle import FILES as BUNDLE_FILES
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.manifest import (
    MANIFEST,
    check_files,
    check_format,
    check_names,
    file_entries,
    read_manifest,
)
from asesearch.deployment.parity import parity_errors, refuse_errors
from asesearch.deployment.parts import Part, cut
from asesearch.deployment.reading import open_bundle
from asesearch.deployment.writing import whole_folder, write_files
from asesearch.errors import CheckpointError, ConfigError, in_one_line

FORMAT = "asesearch.aoti"
VERSION = 1
PACKAGE = "block.pt2"
FILES = (*BUNDLE_FILES, PACKAGE)
MAX_BATCH = 2**16

Code = Callable[..., Tensor]


def write_aoti(bundle: Bundle, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a bundle with its block compiled for this machine's CPU, which takes a minute; the
    folder appears whole or not at all.

    Raises:
        CheckpointError, WriteError: see `asesearch.deployment.writing.check_bundle_dir`.
        ConfigError: a network that is not cut into parts, or no C++ compiler here.
        ScheduleError: the schedule does not fit the network.
    """
    folder = Path(folder)
    bundle = _without_torch_compile(bundle)
    check_schedule(bundle.backbone, bundle.diffusion.num_train_timesteps, bundle.schedule)
    net = bundle.backbone.cpu()
    parts = cut(weight_sets(net)[0])
    with torch.no_grad():
        out = parts.before.compute(*parts.inputs.values())
    tokens = (out if isinstance(out, tuple) else (out,))[: 1 + parts.num_fixed]
    with whole_folder(folder, overwrite=overwrite) as part:
        write_files(bundle, part)
        _compile(parts.blocks[0], tokens, part / PACKAGE)
        data = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
        data |= {"format": FORMAT, "version": VERSION, "built": built()}
        data["files"] = file_entries(part, FILES)
        (part / MANIFEST).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return folder


def built() -> dict[str, str]:
    """What a compiled block depends on."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _compile(block: Part, tokens: tuple[Tensor, ...], path: Path) -> None:
    """Write the block's package."""
    weights = [value.clone() for value in block.weights().values()]
    batch = torch.export.Dim("batch", min=2, max=MAX_BATCH)
    shapes = (*({0: batch} for _ in tokens), [None] * len(weights))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                block.pure(), (*tokens, weights), dynamic_shapes=(shapes,)
            )
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler raises what its parts raise
        reason = in_one_line(error)
        raise ConfigError(
            f"the block can't be compiled here: {reason}; AOTInductor needs a C++ compiler (g++)"
        ) from error


def load_aoti(folder: str | os.PathLike[str], *, check_parity: bool = True) -> Bundle:
    """Read a folder that `asesearch export --format aoti` or `convert` wrote, on the CPU; its
    network runs the compiled block.

    Raises:
        CheckpointError: missing, damaged, compiled for another machine or torch, or computing
            something else here than where it was made.
    """
    folder = Path(folder)
    data = read_manifest(folder)
    check_files_of(folder, data)
    check_files(folder, data)
    bundle, parity = open_aoti(folder, data)
    if check_parity:
        refuse_errors(parity_errors(bundle.backbone, parity), folder)
    return bundle


def check_files_of(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse a manifest of another format, one that names other files, or a block for another
    machine.

    Raises:
        CheckpointError: naming what differs.
    """
    check_format(folder, data, FORMAT, VERSION)
    check_names(folder, data, FILES)
    if data.get("built") != built():
        raise CheckpointError(
            f"the block of {folder} must be compiled for this machine and torch, {built()}; got "
            f"{str(data.get('built'))[:200]}; convert the bundle here: asesearch convert BUNDLE "
            "--format aoti"
        )


def open_aoti(folder: Path, data: Mapping[str, Any]) -> tuple[Bundle, dict[str, Tensor]]:
    """A folder whose files are those on record, and what its parity file holds.

    Raises:
        CheckpointError: parts that do not fit each other.
    """
    rest = {key: value for key, value in data.items() if key != "built"}
    bundle, parity = open_bundle(folder, rest)
    # torch says on each load that it has no CUDA
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        code: Code = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    except Exception as error:  # torch raises what its parts raise
        reason = in_one_line(error)
        raise CheckpointError(
            f"{folder / PACKAGE} is no compiled block that this torch can load: {reason}; export "
            "it again"
        ) from error
    _use(bundle.backbone, code)
    return _without_torch_compile(bundle), parity


def _without_torch_compile(bundle: Bundle) -> Bundle:
    """Whose sampling leaves the blocks as they are, for what `torch.compile` makes of them would
    run in place of the package. Folders of earlier releases may say otherwise."""
    return replace(bundle, sampling=bundle.sampling.model_copy(update={"compile": False}))


def _use(net: Backbone, code: Code) -> None:
    """Let every block of a network run the compiled one with its own weights."""
    for block in (block for own in weight_sets(net) for block in cut(own).blocks):
        module: Any = block.module
        module._compiled_call_impl = _Call(code, list(block.weights().values()))


class _Call:
    """A block's call by the compiled code, in the precision that it was compiled for: under
    autocast some layers give tokens of another.

    Args:
        code: compiled.
        weights: of the block.
    """

    def __init__(self, code: Code, weights: list[Tensor]) -> None:
        self._code = code
        self._weights = weights

    def __call__(self, *tensors: Tensor) -> Tensor:
        dtype = self._weights[0].dtype
        return self._code(*(tensor.to(dtype) for tensor in tensors), self._weights)
