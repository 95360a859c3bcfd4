"""The formats of an exported folder: what a bundle is written as."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from asesearch.backbones.device import plain_torch
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.writing import write_bundle
from asesearch.errors import ConfigError


def _aoti(bundle: Bundle, folder: Path, overwrite: bool, vae: Path | None) -> Path:
    from asesearch.deployment.aoti import write_aoti

    return write_aoti(bundle, folder, overwrite=overwrite)


def _diffusers(bundle: Bundle, folder: Path, overwrite: bool, vae: Path | None) -> Path:
    from asesearch.deployment.diffusers_export import write_diffusers

    return write_diffusers(bundle, folder, vae=vae, overwrite=overwrite)


def _onnx(bundle: Bundle, folder: Path, overwrite: bool, vae: Path | None) -> Path:
    from asesearch.deployment.onnx_export import write_onnx

    return write_onnx(bundle, folder, overwrite=overwrite)


def _plain(bundle: Bundle, folder: Path, overwrite: bool, vae: Path | None) -> Path:
    return write_bundle(bundle, folder, overwrite=overwrite)


#: Name -> what writes it.
FORMATS: dict[str, Callable[[Bundle, Path, bool, Path | None], Path]] = {
    "bundle": _plain,
    "diffusers": _diffusers,
    "onnx": _onnx,
    "aoti": _aoti,
}
#: Packages that a format needs beyond the base, and the extra that has them.
NEEDS = {"onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx")}
#: Kinds of network that a format takes, where not all.
KINDS = {"diffusers": ("dit",), "onnx": ("dit", "uvit"), "aoti": ("dit", "uvit")}


def check_format(name: str, kind: str, vae: Path | None = None, acceleration: str = "") -> None:
    """Refuse a format that a network can't be written in here, before anything is paid for.

    Args:
        name: of the format.
        kind: of the network, as in `BackboneConfig`.
        vae: folder of a VAE to write with it.
        acceleration: of the sampler, see `Sampler`.

    Raises:
        ConfigError: an unknown format, a package that is missing, or a network, acceleration or VAE
            that the format does not take.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    kinds = KINDS.get(name, (kind,))
    if kind not in kinds:
        raise ConfigError(
            f"the format {name} takes networks of the kind {' or '.join(kinds)}; got {kind}; "
            "export it as a bundle"
        )
    if acceleration and name != "bundle":
        raise ConfigError(
            f"an acceleration goes into the format bundle only; got {acceleration} for {name}; "
            "export it as a bundle, or choose a point of a plain sampler"
        )
    if vae is not None and name != "diffusers":
        raise ConfigError(
            f"a VAE goes into the format diffusers only; got {vae} for {name}; leave it out"
        )
    packages, extra = NEEDS.get(name, ((), ""))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"the format {name} needs {' and '.join(packages)}; got no {missing[0]}; "
            f"pip install 'asesearch[{extra}]'"
        )


@plain_torch()
def write(
    bundle: Bundle,
    folder: str | os.PathLike[str],
    name: str = "bundle",
    *,
    vae: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a bundle in a format; the folder appears whole or not at all.

    Args:
        bundle: to write.
        folder: where.
        name: of the format.
        vae: folder of the AutoencoderKL that decodes the latents; for the format diffusers.
        overwrite: replace an exported folder.

    Raises:
        ConfigError: see `check_format`.
        CheckpointError, WriteError: see `asesearch.deployment.writing.check_bundle_dir`.
    """
    check_format(name, bundle.kind, vae, bundle.acceleration_name)
    return FORMATS[name](bundle, Path(folder), overwrite, vae)
