"""The bundle: one folder with everything that sampling needs, checked when it is read, and no
pickle in it.

`bundle.json` holds format version, schedule, network, solver, evaluation, provenance and the
SHA-256 of each file; `model.safetensors` the weights; `parity.safetensors` inputs and outputs of
the network at every exit depth that the schedule uses, so that whoever loads the bundle knows that
it computes the same there. For a network that takes prompts, the empty one is among the weights,
and the inputs are a few real ones, which `sample` takes by default.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.checkpoints import load_backbone, save_backbone
from asesearch.backbones.conditioning import Conditioning, labels_of, take
from asesearch.config import BackboneConfig, DiffusionConfig, SamplingConfig
from asesearch.diffusion import make_diffusion
from asesearch.encoding import LatentDecoder, encode_prompts
from asesearch.encoding.networks import PathLike
from asesearch.errors import CheckpointError, ConfigError
from asesearch.files import check_writable, file_sha256
from asesearch.sampling import SampleResult, check_images, check_sampling, sample
from asesearch.schedule import ExitSchedule

FORMAT = "asesearch.bundle"
VERSION = 1
FILES = ("model.safetensors", "parity.safetensors")
PARITY_IMAGES = 2  # or one a prompt
PROMPT = "y."  # begins the names of the prompts' tensors in the parity file
PARITY_TOLERANCE = 2e-3  # of the largest output; float32 on another processor stays far below


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        backbone: the fine-tuned network, in eval mode.
        schedule: its exit schedule.
        kind: of the network, as in `BackboneConfig`.
        diffusion, sampling: the process, and the solver the schedule was evaluated with.
        evaluation: the recorded scores, as plain data.
        provenance: where it came from, as plain data.
        prompts: a few examples of what a network that takes prompts is given, N first; None for
            other networks.
        latents: how the latents that it makes were scaled, `shift` and `scale` of each channel, and
            the `digest` of the VAE that decoded them; None where it makes images.
    """

    backbone: Backbone
    schedule: ExitSchedule
    kind: str
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    evaluation: dict[str, Any]
    provenance: dict[str, Any]
    prompts: dict[str, Tensor] | None = None
    latents: dict[str, Any] | None = None

    def sample(
        self, seeds: Sequence[int], y: Conditioning | None = None, num_steps: int | None = None
    ) -> SampleResult:
        """Images (or latents) for these seeds, (N, C, H, W) float32, by the bundle's solver,
        guidance and (unless given) steps.

        `y` is (N,) class labels or a prompt's tensors; by default seed modulo the number of
        classes, or of `prompts`.

        Raises:
            ConfigError: labels that are no classes of the network (the null label is none), or as
                `sampling.sample`.
        """
        return sample(
            self.backbone,
            self.sampling.solver,
            self.schedule,
            diffusion=make_diffusion(self.diffusion),
            num_steps=num_steps or self.sampling.num_steps,
            seeds=seeds,
            y=self._conditioning(seeds, y),
            cfg_scale=self.sampling.cfg_scale,
            batch_size=self.sampling.batch_size,
            precision=self.sampling.precision,
        )

    def _conditioning(self, seeds: Sequence[int], y: Conditioning | None) -> Conditioning | None:
        """`y` of `sample`, its default filled in; labels are classes.

        Raises:
            ConfigError: labels that are no classes.
        """
        labels = labels_of(y)
        if labels is not None and labels.dtype in (torch.int32, torch.int64) and labels.numel():
            self._check_classes(labels.flatten().tolist())
        if y is None and self.backbone.num_classes:
            return torch.tensor([s % self.backbone.num_classes for s in seeds])
        if y is None and self.prompts is not None:
            count = len(next(iter(self.prompts.values())))
            return take(self.prompts, [s % count for s in seeds])
        return y

    def plan(
        self, seeds: Sequence[int], y: Conditioning | None = None, num_steps: int | None = None
    ) -> tuple[SamplingConfig, tuple[float, ...]]:
        """How `sample` would sample with these arguments, and the timesteps of its network calls.

        Raises:
            ConfigError: what `sample` would refuse.
        """
        how = self.sampling.model_copy(update={"num_steps": num_steps or self.sampling.num_steps})
        check_images(self.backbone, seeds, self._conditioning(seeds, y), how.batch_size)
        diffusion = make_diffusion(self.diffusion)
        _, timesteps = check_sampling(
            self.backbone, how.solver, diffusion, how.num_steps, how.cfg_scale
        )
        return how, timesteps

    def labels(self, label: int, count: int) -> Tensor:
        """(count,) times one class, as `y` of `sample`.

        Raises:
            ConfigError: not a class of the network.
        """
        self._check_classes([label])
        return torch.full((count,), label)

    def _check_classes(self, labels: Sequence[int]) -> None:
        """Refuse what is no class; `sampling.sample` takes the null label too, which makes
        unconditional images."""
        net = self.backbone
        last = self.backbone.num_classes - 1
        if net.num_classes == 0:
            what = (
                "takes prompts, not labels"
                if net.takes_prompt
                else "is unconditional and takes no labels"
            )
            raise ConfigError(
                f"the bundle's network {what}; got the label {labels[0]}; leave it out"
            )
        wrong = [label for label in labels if not 0 <= label <= last]
        if wrong:
            null = ", the null label, which stands for no class" * (
                net.has_null_label and wrong[0] == net.num_classes
            )
            fix = f"choose from 0…{last}" if last else "choose 0, its only class"
            raise ConfigError(
                f"labels must be classes of the bundle's network, 0…{last}; got {wrong[0]}{null}; "
                f"{fix}"
            )

    def decoder(self, vae: PathLike) -> LatentDecoder:
        """What turns the latents of `sample` into images, from the folder of their AutoencoderKL,
        on the network's device.

        Raises:
            ConfigError: this bundle makes images.
            CheckpointError, DataError: no AutoencoderKL there, or one that scales latents
                otherwise.
        """
        if self.latents is None:
            raise ConfigError(
                f"a VAE is for bundles that make latents; got {vae} for one that makes images; "
                "leave it out"
            )
        decoder = LatentDecoder(vae, next(self.backbone.parameters()).device)
        decoder.check_scaling(self.latents["shift"], self.latents["scale"])
        return decoder

    def encode_prompts(self, texts: Sequence[str], text_encoder: PathLike) -> dict[str, Tensor]:
        """Texts as `y` of `sample`, by the folder of the text encoder that the network was trained
        with.

        Raises:
            ConfigError: this bundle takes no prompts, or those of another text encoder.
            CheckpointError: no text encoder there.
        """
        if self.prompts is None:
            raise ConfigError(
                f"prompts are for networks that take them; got {texts[0]!r} for another; leave "
                "them out"
            )
        length = self.prompts["encoder_hidden_states"].shape[1]
        return encode_prompts(texts, text_encoder, length, next(self.backbone.parameters()).device)


def _prompts(parity: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The prompts among the tensors of the parity file."""
    return {k.removeprefix(PROMPT): v for k, v in parity.items() if k.startswith(PROMPT)} or None


@torch.no_grad()
def _parity_outputs(
    backbone: Backbone, tensors: dict[str, Tensor], depths: Sequence[int]
) -> dict[str, Tensor]:
    device = next(backbone.parameters()).device
    given = {k: v.to(device) for k, v in tensors.items() if not k.startswith("out.")}
    y = given.get("y") if "y" in given else _prompts(given)
    outputs = {f"out.{d}": backbone(given["x_t"], given["t"], y, exit_depth=d) for d in depths}
    return {k: v.float().cpu().contiguous() for k, v in outputs.items()}


def write_bundle(bundle: Bundle, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Raises:
        CheckpointError, WriteError: see `check_bundle_dir`.
        ConfigError: no prompts for a network that takes them, or prompts that it does not take.
        ScheduleError: the schedule does not fit the network.
    """
    folder = Path(folder)
    check_schedule(bundle.backbone, bundle.diffusion.num_train_timesteps, bundle.schedule)
    if bundle.backbone.takes_prompt:
        bundle.backbone.check_conditioning(bundle.prompts, _parity_count(bundle))
    check_bundle_dir(folder, overwrite=overwrite)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _write_files(bundle, part)
        if folder.exists():
            old = folder.with_name(f"{folder.name}.{os.getpid()}.old")
            os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old)
        else:
            os.replace(part, folder)
    except OSError as error:
        raise CheckpointError(
            f"can't write the bundle {folder}: {error}; choose a folder you may write to"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def check_bundle_dir(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that no bundle can be written to; nothing is left behind.

    Raises:
        CheckpointError: it exists (and `overwrite` is not set), or holds something else.
        WriteError: it can't be written.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink() or os.path.ismount(folder):
            raise CheckpointError(
                f"a bundle is a folder of its own, replaced as a whole; got {folder}, which is a "
                "file, a link or a mount point; choose another, or a folder in it"
            )
        if not overwrite:
            raise CheckpointError(
                f"{folder} exists already; choose another folder, or overwrite it (--overwrite)"
            )
        if any(folder.iterdir()) and not (folder / "bundle.json").is_file():
            raise CheckpointError(
                f"{folder} is not a bundle, so it is not overwritten; choose another folder"
            )
    check_writable(folder.with_name(f"{folder.name}.{2**22}.part"), FILES[1], named=folder)


def _parity_count(bundle: Bundle) -> int:
    return len(next(iter(bundle.prompts.values()))) if bundle.prompts else PARITY_IMAGES


def _write_files(bundle: Bundle, folder: Path) -> None:
    net = bundle.backbone
    count = _parity_count(bundle)
    save_backbone(net, folder / FILES[0], {})
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, net.in_channels, net.input_size, net.input_size, generator=generator)
    t = torch.randint(bundle.diffusion.num_train_timesteps, (count,), generator=generator)
    tensors = {"x_t": x_t, "t": t} | {f"{PROMPT}{k}": v for k, v in (bundle.prompts or {}).items()}
    if net.num_classes:
        tensors["y"] = torch.arange(count) % net.num_classes
    save_file(
        tensors | _parity_outputs(net, tensors, sorted(set(bundle.schedule.exit_depths))),
        folder / FILES[1],
    )
    data = {
        "format": FORMAT,
        "version": VERSION,
        "schedule": bundle.schedule.to_dict(),
        "backbone": {"kind": bundle.kind, "config": net.config},
        "diffusion": bundle.diffusion.model_dump(mode="json"),
        "sampling": bundle.sampling.model_dump(mode="json"),
        "evaluation": bundle.evaluation,
        "provenance": bundle.provenance,
        "latents": bundle.latents,
        "files": {
            name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in FILES
        },
    }
    (folder / "bundle.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def load_bundle(
    folder: Path, device: torch.device | str = "cpu", *, check_parity: bool = True
) -> Bundle:
    """Read a bundle: hashes are verified before any weight is read, and the network's outputs are
    compared with its own.

    Raises:
        CheckpointError: missing, of another version, damaged, or computing something else here than
            where it was made.
    """
    folder = Path(folder)
    data = _read_manifest(folder)
    for name in FILES:
        entry = data["files"].get(name, {})
        if not (folder / name).is_file() or file_sha256(folder / name) != entry.get("sha256"):
            raise CheckpointError(
                f"{folder / name} is missing or damaged (its SHA-256 is not the recorded one); "
                "copy the bundle again"
            )
    try:
        kind = data["backbone"]["kind"]
        schedule = ExitSchedule.from_dict(data["schedule"])
        diffusion = DiffusionConfig(**data["diffusion"])
        sampling = SamplingConfig(**data["sampling"])
        net = (
            load_backbone(BackboneConfig(kind=kind, checkpoint=str(folder / FILES[0])))
            .to(device)
            .eval()
        )
        check_schedule(net, diffusion.num_train_timesteps, schedule)
        parity = load_file(folder / FILES[1])
        facts = (data["evaluation"], data["provenance"], _prompts(parity), data.get("latents"))
        bundle = Bundle(net, schedule, kind, diffusion, sampling, *facts)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds a bundle that does not fit together: {error}; export it again"
        ) from error
    if check_parity:
        _check_parity(net, parity, folder)
    return bundle


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "bundle.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"can't read {path}: {error}; is {folder} a bundle written by `asesearch export`?"
        ) from error
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not isinstance(data.get("files"), dict)
    ):
        raise CheckpointError(f"{path} is not the manifest of an asesearch bundle; export it again")
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has bundle version {data.get('version')!r}; this release reads {VERSION}; "
            "update asesearch"
        )
    return data


def _check_parity(net: Backbone, parity: dict[str, Tensor], folder: Path) -> None:
    expected = {k: v for k, v in parity.items() if k.startswith("out.")}
    outputs = _parity_outputs(net, parity, [int(k[4:]) for k in expected])
    for name, want in expected.items():
        error = float((outputs[name] - want).abs().max() / want.abs().max().clamp(min=1e-6))
        if not error <= PARITY_TOLERANCE:
            raise CheckpointError(
                f"the network of {folder} computes something else here than where it was exported: "
                f"at exit depth {name[4:]} it is off by {error:.2g} of the largest output "
                f"(tolerance {PARITY_TOLERANCE:g}); check versions and device"
            )
