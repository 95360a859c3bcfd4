"""A bundle as a folder that `DiffusionPipeline.from_pretrained` loads as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from asesearch.backbones.conversion import dit_to_diffusers
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.exit_weights import ExitWeights, weight_sets
from asesearch.deployment import parity
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.diffusers_exits import EXITS_FILE, exits_of, recorded_exits
from asesearch.deployment.diffusers_pipeline import (
    FORMAT,
    POSITIONS,
    VERSION,
    as_exported,
    make_scheduler,
    rounded,
)
from asesearch.deployment.images import decoder_of
from asesearch.deployment.manifest import MANIFEST, check_format
from asesearch.deployment.recorded import check_tensors
from asesearch.deployment.writing import whole_folder, write_manifest
from asesearch.errors import CheckpointError, ConfigError, in_one_line
from asesearch.schedule import ExitSchedule

PARITY = "parity.safetensors"
INDEX = "model_index.json"
NEEDED = (INDEX, PARITY, "scheduler/scheduler_config.json", "transformer/config.json")
TOLERANCE = 1e-3  # of the largest output


def write_diffusers(
    bundle: Bundle, folder: Path, *, vae: Path | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle's DiT as a diffusers pipeline with its schedule beside, and the weights that
    early exits have of their own; the folder appears whole or not at all.

    Args:
        bundle: of a DiT in discrete time.
        folder: to write.
        vae: folder of the AutoencoderKL that decodes its latents. Without one the pipeline makes
            latents, or the images of a network that makes some; it is then loaded with
            `from_pretrained(folder, vae=None)`, for diffusers' class has no other way.
        overwrite: replace an exported folder.

    Raises:
        ConfigError: a network or process that diffusers' DiT pipeline does not have, or a VAE for
            a network that makes images.
        CheckpointError, WriteError: see `asesearch.deployment.writing.check_bundle_dir`.
        DataError: a VAE that scales latents otherwise.
    """
    folder = Path(folder)
    net = weight_sets(bundle.backbone)[0]
    if not isinstance(net, DiT) or bundle.diffusion.process != "discrete":
        raise ConfigError(
            "diffusers' DiT pipeline is for a DiT in discrete time; got a "
            f"{type(net).__name__}, {bundle.diffusion.process}; export it as a bundle, whose "
            "schedule apply_exit_schedule takes too"
        )
    if vae is not None:
        decoder_of(bundle, vae)  # refuses one of other latents
    scheduler = make_scheduler(bundle.sampling, bundle.diffusion, net.learn_sigma)
    parts = {"transformer": _transformer(net), "scheduler": scheduler}
    if vae is not None:
        parts["vae"] = _vae(vae)
    with whole_folder(folder, overwrite=overwrite) as part:
        _save(parts, part)
        exits = exits_of(bundle.backbone, bundle.schedule)
        if exits:
            save_file(exits, part / EXITS_FILE)
        tensors = parity.make_parity(
            bundle.backbone.cpu(),
            bundle.schedule,
            bundle.diffusion.num_train_timesteps,
            bundle.prompts,
        )
        save_file(tensors, part / PARITY)
        names = sorted(p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file())
        own = {
            "format": FORMAT,
            "version": VERSION,
            "frequency_shift": net.t_embedder.frequency_shift,
            "guided_channels": net.guided_channels,
            "positions": _precision(net, parts["transformer"]),
        }
        write_manifest(part, own, bundle, names)
    return folder


def _save(parts: Mapping[str, Any], folder: Path) -> None:
    """The parts and the index of a pipeline, as `DiTPipeline.save_pretrained` writes them."""
    index: dict[str, Any] = {
        "_class_name": DiTPipeline.__name__,
        "_diffusers_version": diffusers.__version__,
        "vae": [None, None],
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _transformer(net: DiT) -> Any:
    state, config = dit_to_diffusers(net.state_dict(), net.config)
    cls: Any = DiTTransformer2DModel
    transformer = cls(**config)
    transformer.load_state_dict(state, strict=False)  # but the fixed positions, which it makes
    return transformer.eval()


def _precision(net: DiT, transformer: Any) -> str:
    """What the network's positions, which diffusers makes anew, were rounded to."""
    exact = transformer.pos_embed.pos_embed
    own = net.pos_embed.cpu()
    return min(POSITIONS, key=lambda name: float((rounded(exact, name) - own).abs().max()))


def _vae(path: Path) -> Any:
    where = path / "vae" if (path / "vae").is_dir() else path
    cls: Any = AutoencoderKL
    return cls.from_pretrained(where, local_files_only=True, use_safetensors=True)


def open_diffusers(folder: Path, data: Mapping[str, Any]) -> Any:
    """The pipeline of an exported folder whose files are those on record.

    Raises:
        CheckpointError: another format, or files that make no pipeline.
    """
    check_format(folder, data, FORMAT, VERSION)
    missing = [name for name in NEEDED if name not in data["files"]]
    code = [name for name in data["files"] if not name.endswith((".json", ".safetensors"))]
    if missing or code:
        what = f"lacks the file {missing[0]!r}" if missing else f"names the file {code[0][:80]!r}"
        raise CheckpointError(
            f"{folder / MANIFEST} {what}, and a diffusers folder has JSON and safetensors files "
            f"{', '.join(NEEDED)} and the weights; export it again"
        )
    try:
        has_vae = "vae/config.json" in data["files"]
        parts = {} if has_vae else {"vae": None}
        cls: Any = DiTPipeline
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts)
    except Exception as error:  # diffusers raises what its parts raise
        reason = in_one_line(error)
        raise CheckpointError(
            f"{folder} holds a pipeline that does not load: {reason}; export it again"
        ) from error


def parity_errors(
    pipeline: Any, folder: Path, data: Mapping[str, Any], schedule: ExitSchedule
) -> dict[int, float]:
    """Exit depth -> the largest difference from the outputs on record over the largest of them.

    Raises:
        CheckpointError: no parity file that can be read, or one of another network or schedule.
    """
    try:
        recorded = load_file(folder / PARITY)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"can't read {folder / PARITY}: {error}; export it again") from error
    restore = as_exported(pipeline.transformer, data)
    own = recorded_exits(folder, data)
    second = copy.deepcopy(pipeline.transformer)
    second.load_state_dict(own, strict=False)
    net = DiffusersBackbone(pipeline.transformer)
    try:
        check_tensors(folder / PARITY, recorded, net, schedule, schedule.num_train_timesteps)
        both = ExitWeights(net, DiffusersBackbone(second)) if own else net
        return parity.parity_errors(both, recorded)
    finally:
        net.detach()
        if restore is not None:
            restore()
