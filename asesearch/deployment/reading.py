"""Reading a bundle: everything is checked before any of it is used, and nothing is unpickled.

`bundle.json` holds format version, schedule, network, solver, evaluation, provenance and the
SHA-256 of each file; `model.safetensors` the weights; `parity.safetensors` what `parity` tells of.
For a network that takes prompts, the empty one is among the weights, and the parity inputs are a
few real ones, which `Bundle.sample` takes by default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asesearch.backbones.acceleration import Acceleration
from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.checkpoints import VERSION as WEIGHTS_VERSION
from asesearch.backbones.checkpoints import load_saved
from asesearch.backbones.device import device_of, plain_torch
from asesearch.backbones.exit_weights import attached
from asesearch.backbones.files import FORMAT as WEIGHTS
from asesearch.calibration import check_named, read_acceleration
from asesearch.config import BackboneConfig, DiffusionConfig, SamplingConfig, parse_section
from asesearch.deployment.bundle import FILES, FORMAT, VERSION, Bundle
from asesearch.deployment.manifest import (
    MANIFEST,
    check_files,
    check_format,
    check_names,
    has_scaling,
    read_manifest,
)
from asesearch.deployment.parity import parity_errors, refuse_errors
from asesearch.deployment.recorded import check_tensors, prompts_of
from asesearch.diffusion import make_diffusion
from asesearch.errors import CheckpointError, ConfigError, ScheduleError, first_line, in_one_line
from asesearch.files import loads
from asesearch.sampler import acceleration_of
from asesearch.sampling import check_acceleration, check_sampling
from asesearch.schedule import ExitSchedule

_SECTIONS = ("schedule", "backbone", "diffusion", "sampling", "evaluation", "provenance")
_OTHERS = ("format", "version", "files", "latents", "acceleration")
_EXPORT = "export it again"


@plain_torch()
def load_bundle(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    check_parity: bool = True,
) -> Bundle:
    """Read a bundle: hashes are verified before any weight is read, and the network's outputs are
    compared with its own.

    Raises:
        CheckpointError: missing, of another version, damaged, or computing something else here than
            where it was made.
    """
    folder = Path(folder)
    data = read_manifest(folder)
    check_format(folder, data, FORMAT, VERSION)
    check_names(folder, data, FILES)
    check_files(folder, data)
    bundle, parity = open_bundle(folder, data, device)
    if check_parity:
        refuse_errors(parity_errors(bundle.backbone, parity), folder)
    return bundle


def open_bundle(
    folder: Path, data: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[Bundle, dict[str, Tensor]]:
    """A bundle whose files are those on record, and what its parity file holds.

    Raises:
        CheckpointError: parts that do not fit each other.
    """
    told = _read_sections(folder, data)
    _check_weights(folder / FILES[0], told)
    parity = _read_tensors(folder / FILES[1])
    try:
        net = load_saved((folder / FILES[0]).absolute(), told.kind)
    except CheckpointError as error:  # which ends with what to do about a checkpoint
        raise CheckpointError(f"{str(error).rpartition('; ')[0]}; {_EXPORT}") from error
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        raise _unfit(folder, error) from error
    _check_together(folder, net, told)
    steps = told.diffusion.num_train_timesteps
    check_tensors(folder / FILES[1], parity, net, told.schedule, steps)
    bundle = Bundle(
        backbone=net.to(device_of(device)),
        schedule=told.schedule,
        kind=told.kind,
        diffusion=told.diffusion,
        sampling=told.sampling,
        evaluation=data["evaluation"],
        provenance=data["provenance"],
        prompts=prompts_of(parity),
        latents=told.latents,
        acceleration=told.acceleration,
        acceleration_name=told.acceleration_name,
    )
    return bundle, parity


def _unfit(folder: Path, error: Exception) -> CheckpointError:
    reason = in_one_line(error)
    return CheckpointError(
        f"{folder} holds a bundle that does not fit together: {reason}; {_EXPORT}"
    )


# -- what the manifest says --------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """The sections of a manifest, each checked by itself."""

    schedule: ExitSchedule
    kind: Any
    config: dict[str, Any]
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    latents: dict[str, Any] | None
    acceleration: Acceleration | None
    acceleration_name: str


def _read_sections(folder: Path, data: Mapping[str, Any]) -> _Told:
    path = folder / MANIFEST
    odd = sorted(set(_SECTIONS) - data.keys()) + sorted(data.keys() - {*_SECTIONS, *_OTHERS})
    if odd:
        what = "lacks" if odd[0] in _SECTIONS else "has the unknown key"
        raise CheckpointError(f"{path} {what} {odd[0][:40]!r}; {_EXPORT}")
    for name in _SECTIONS:
        if not isinstance(data[name], dict):
            raise CheckpointError(
                f"{path}: {name} must be a table; got {str(data[name])[:40]!r}; {_EXPORT}"
            )
    network = data["backbone"]
    if network.keys() != {"kind", "config"} or not isinstance(network["config"], dict):
        raise CheckpointError(f"{path}: backbone must have a kind and a config; {_EXPORT}")
    try:
        return _Told(
            ExitSchedule.from_dict(data["schedule"]),
            parse_section(BackboneConfig, {"kind": network["kind"]}, "backbone").kind,
            network["config"],
            parse_section(DiffusionConfig, data["diffusion"], "diffusion"),
            parse_section(SamplingConfig, data["sampling"], "sampling"),
            _latents(path, data.get("latents")),
            *_acceleration(path, data.get("acceleration")),
        )
    except (ConfigError, ScheduleError) as error:
        raise _unfit(folder, error) from error


def _latents(path: Path, data: object) -> dict[str, Any] | None:
    """`latents`, see `has_scaling`."""
    if not has_scaling(data):
        raise CheckpointError(
            f"{path}: latents must give shift and scale of each channel, or be null; got "
            f"{str(data)[:80]}; {_EXPORT}"
        )
    assert data is None or isinstance(data, dict)
    return data


def _acceleration(path: Path, data: object) -> tuple[Acceleration | None, str]:
    """`acceleration`, whose name is one of a sampler's.

    Raises:
        CheckpointError: no table of a name and a calibration.
        ConfigError: a name or calibration that is none.
    """
    if data is None:
        return None, ""
    given = data if isinstance(data, dict) else {}
    name = given.get("name")
    calibration = given.get("calibration")
    wanted = isinstance(name, str) and isinstance(calibration, dict) and len(given) == 2
    if not wanted:
        raise CheckpointError(
            f"{path}: acceleration must have a name and a calibration, or be left out; got "
            f"{str(data)[:80]}; {_EXPORT}"
        )
    assert isinstance(name, str) and isinstance(calibration, dict)
    acceleration_of(name)
    found = read_acceleration(calibration)
    check_named(found, name)
    return found, name


# -- its files ---------------------------------------------------------------------------------


def _check_weights(path: Path, told: _Told) -> None:
    """Refuse, before any weight is read, a file that is no safetensors file of ours, or another
    network than the manifest's.

    Raises:
        CheckpointError: naming what differs.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            types = {k: file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(_no_safetensors(path, error)) from error
    head = (about.get("format"), about.get("version"))
    if head != (WEIGHTS, WEIGHTS_VERSION):
        raise CheckpointError(
            f"{path} must be weights of {WEIGHTS}, version {WEIGHTS_VERSION}; got "
            f"{str(head[0])[:40]}, version {str(head[1])[:40]}; {_EXPORT}, or update asesearch"
        )
    try:
        config = loads(about.get("config", ""))
    except ValueError:
        config = None
    own = {"kind": about.get("kind"), **(config if isinstance(config, dict) else {})}
    theirs = {"kind": told.kind, **told.config}
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{path} holds another network than {MANIFEST} tells of: {name[:40]} is "
                f"{str(own.get(name))[:80]}, and not {str(theirs.get(name))[:80]}; {_EXPORT}"
            )
    other = {k: kind for k, kind in types.items() if kind != "F32"}
    if other and told.kind != "diffusers":
        name, kind = next(iter(other.items()))
        raise CheckpointError(
            f"{path} must hold float32 weights; got {kind} in {name[:80]}; {_EXPORT}"
        )


def _no_safetensors(path: Path, error: Exception) -> str:
    reason = first_line(error, 200)
    with path.open("rb") as file:
        head = file.read(4)
    what = "is a pickle, which is never opened" if head[:2] in (b"\x80\x02", b"PK") else ""
    what = what or f"is no whole safetensors file ({reason})"
    return f"{path} {what}; {_EXPORT}"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(_no_safetensors(path, error)) from error


def _check_together(folder: Path, net: Backbone, told: _Told) -> None:
    """Refuse a schedule, solver or scaling that the network can't be sampled with."""
    how = told.sampling
    try:
        check_schedule(net, told.diffusion.num_train_timesteps, told.schedule)
        diffusion = make_diffusion(told.diffusion)
        _, steps = check_sampling(
            net, how.solver, diffusion, how.num_steps, how.cfg_scale, how.precision
        )
        check_acceleration(told.acceleration, len(steps), how.compile, how.cfg_scale)
        if told.acceleration is not None:
            with attached(told.acceleration, net):
                pass  # it fits the blocks
    except (ConfigError, ScheduleError) as error:
        raise _unfit(folder, error) from error
    if not has_scaling(told.latents, net.in_channels):
        assert told.latents is not None
        raise CheckpointError(
            f"{folder / MANIFEST}: the latents' scale must have one number for each of "
            f"{net.in_channels} channels; got {len(told.latents['scale'])}; {_EXPORT}"
        )
