"""Turns one schedule into one figure: fine-tune briefly, sample with the study's seeds, evaluate, cost.

Everything that all schedules share (network, data, reference, latency table) is made once and checked first.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from asesearch.backbones.base import Backbone, Conditioning, check_schedule
from asesearch.backbones.checkpoints import load_backbone, save_backbone
from asesearch.config import StudyConfig
from asesearch.data import DataSource, open_data, save_images
from asesearch.diffusion import make_diffusion
from asesearch.errors import ConfigError, EvaluationError
from asesearch.evaluation.cost import LatencyTable, TimeRatio, compare_sampling_time, flops_frac, flops_table, measure_latency
from asesearch.evaluation.extractors import Extractor, make_extractor
from asesearch.evaluation.fidelity import (
    SHIPPED,
    ReferenceStats,
    build_protocol,
    evaluate,
    reference_statistics,
    to_uint8,
)
from asesearch.evaluation.results import EvaluationResult, Protocol
from asesearch.files import replacing, write_json
from asesearch.finetuning import check_fit, finetune, weights_fingerprint
from asesearch.latents import LatentDecoder, LatentShards
from asesearch.sampling import SampleResult, arithmetic, check_sampling, sample
from asesearch.schedule import ExitSchedule

SHOWN_IMAGES = 40  # images kept of each trial for the report
PROMPTS_FILE, NUM_PROMPTS = "prompts.safetensors", 4  # kept beside a trial's weights, for its bundle
LATENCY_REPEATS = 15
FRESH_SEEDS = 1_000_000_000  # confirmation seeds begin here, out of reach of the search's


@dataclass
class Outcome:
    """What one schedule gave; see `TrialRecord` for the fields."""

    quality: EvaluationResult
    time_frac: float
    flops_frac: float
    block_frac: float
    losses: list[float]
    seconds: dict[str, float]


def conditioning_for(backbone: Backbone, data: DataSource, seeds: Sequence[int]) -> Conditioning | None:
    """What images are made of: class = seed modulo the number of classes, so that every class occurs equally often; for a
    network that takes prompts, that of the data's image seed modulo their number; None for an unconditional network.
    """
    if backbone.num_classes:
        return torch.tensor([s % backbone.num_classes for s in seeds])
    if not backbone.takes_prompt:
        return None
    assert isinstance(data, LatentShards)  # nothing else has prompts, see `check_fit`
    return data.conditions([s % len(data) for s in seeds])


def default_device() -> torch.device:
    """The first visible GPU, or the CPU. Choose another GPU with CUDA_VISIBLE_DEVICES."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_reference(config: StudyConfig, data: DataSource, extractor: Extractor) -> ReferenceStats:
    """Statistics of the study's reference data, from the package where it ships them, so the data need not be here.

    Raises:
        DataError: the reference data are needed and not here.
    """
    wanted = config.evaluation.reference
    if wanted is not None and wanted.path is None and (name := f"{wanted.kind}/{wanted.split}") in SHIPPED:
        try:
            return reference_statistics(name, extractor)
        except EvaluationError:
            pass  # none for this extractor: made from the data
    if wanted is None and config.data.flip:
        wanted = config.data.model_copy(update={"flip": False})  # the reference is the data as they are
    return reference_statistics(data if wanted is None else open_data(wanted), extractor)


def check_evaluation(config: StudyConfig) -> None:
    """Refuse a study whose samples can't be compared with its reference.

    Raises:
        ConfigError: latents as the reference, or a study of latents without VAE or images to compare with.
    """
    reference = config.evaluation.reference
    kind = None if reference is None else reference.kind
    if kind == "latents" or (config.data.kind == "latents" and kind != "image-folder"):
        raise ConfigError(
            "samples are compared as images, decoded where the network makes latents; got a reference of kind "
            f"{kind or config.data.kind!r}; set evaluation.reference to the image folder: kind 'image-folder', path, image_size"
        )
    if config.data.kind == "latents" and config.data.vae is None:
        raise ConfigError("generated latents are decoded for evaluation; got no data.vae; give the folder of the AutoencoderKL")


def open_decoder(config: StudyConfig, backbone: Backbone, data: DataSource, device: torch.device) -> LatentDecoder | None:
    """What turns a study's samples into images; None where they are images.

    Raises:
        CheckpointError: no AutoencoderKL at data.vae.
        DataError: one that scales latents otherwise.
        ConfigError: reference images of another size than the decoded ones.
    """
    reference = config.evaluation.reference
    if not isinstance(data, LatentShards):
        return None
    assert config.data.vae is not None and reference is not None  # see `check_evaluation`
    decoder = LatentDecoder(config.data.vae, device)
    decoder.check_scaling(data.shift, data.scale)
    decoded, wanted = (decoder.channels, decoder.factor * backbone.input_size), (reference.channels, reference.image_size)
    if decoded != wanted:
        raise ConfigError(
            f"the reference must have the decoded images' channels and size, {decoded[0]} and {decoded[1]}; got {wanted[0]} "
            f"and {wanted[1]}; change channels and image_size in evaluation.reference"
        )
    return decoder


class Workbench:
    """What every trial of a study shares.

    Args:
        config: the study file.
        run_dir: the study directory; the latency table is kept there, so that all trials share one. None keeps nothing.

    Raises:
        ConfigError, DataError, ScheduleError, CheckpointError, EvaluationError: parts that are missing, unreadable or do
            not fit each other, before anything expensive.
    """

    def __init__(self, config: StudyConfig, run_dir: Path | None = None) -> None:
        if config.backbone.checkpoint is None:
            raise ConfigError("a search needs pretrained weights; got no backbone.checkpoint; give a path or `shipped:NAME`")
        check_evaluation(config)
        self.config, self.run_dir, self.device = config, run_dir, default_device()
        self.data = open_data(config.data)
        null = getattr(self.data, "null_condition", None)
        self.backbone = load_backbone(config.backbone, null_condition=null).to(self.device).eval()
        self.diffusion = make_diffusion(config.diffusion)
        self.full = ExitSchedule.full(self.backbone.depth, config.diffusion.num_train_timesteps)
        check_fit(self.backbone, self.data, self.diffusion, self.full)
        evaluation, how = config.evaluation, config.sampling
        check_sampling(self.backbone, how.solver, self.diffusion, how.num_steps, how.cfg_scale)
        self.decoder = open_decoder(config, self.backbone, self.data, self.device)
        self.extractor = make_extractor(evaluation.extractor, evaluation.extractor_weights, self.device)
        self.reference = open_reference(config, self.data, self.extractor)
        self.protocol = build_protocol(evaluation, config.sampling, self.extractor, self.reference)
        self.batch_size = min(config.sampling.batch_size, evaluation.num_samples)
        self.on_step: Callable[[int, float], None] | None = None  # sees (steps done, loss) of each fine-tuning
        self._latency: LatencyTable | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of what the figures depend on and the study file only names."""
        out = {
            "weights": weights_fingerprint(self.backbone),
            "data": self.data.digest,
            "protocol": json.loads(json.dumps(asdict(self.protocol))),
        }
        if (vae := self.decoder) is not None:
            out["decoder"] = {"digest": vae.digest, "shift": vae.shift, "scale": vae.scale}
        return out

    # -- cost ------------------------------------------------------------------------------------

    @property
    def latency(self) -> LatencyTable:
        """Time of one network call at each exit depth; measured on first use, once a study."""
        path = None if self.run_dir is None else self.run_dir / "latency.json"
        if self._latency is None and path is not None and path.is_file():
            self._latency = LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if self._latency is None:
            guided = self.config.sampling.cfg_scale != 1
            size = self.batch_size * (2 if guided else 1)
            y = conditioning_for(self.backbone, self.data, range(size))
            with arithmetic(self.config.sampling.precision, self.device):
                self._latency = measure_latency(self.backbone, size, LATENCY_REPEATS, self.device, y)
            if path is not None:
                write_json(path, self._latency.to_dict())
        return self._latency

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """FLOPs of one network call for one image at exit depths 1…depth."""
        return flops_table(self.backbone, conditioning_for(self.backbone, self.data, range(1)))

    # -- one schedule ----------------------------------------------------------------------------

    def sample(self, backbone: Backbone, schedule: ExitSchedule, seeds: Sequence[int]) -> SampleResult:
        """Images (or latents) of the study's solver for these seeds, made of what `conditioning_for` gives."""
        how = self.config.sampling
        return sample(
            backbone,
            how.solver,
            schedule,
            diffusion=self.diffusion,
            num_steps=how.num_steps,
            seeds=seeds,
            y=conditioning_for(backbone, self.data, seeds),
            cfg_scale=how.cfg_scale,
            batch_size=how.batch_size,
            precision=how.precision,
            device=self.device,
        )

    def evaluate(
        self, backbone: Backbone, schedule: ExitSchedule, protocol: Protocol, shown: list[Tensor] | None = None
    ) -> tuple[EvaluationResult, dict[str, float], tuple[float, ...]]:
        """Figure under a protocol, seconds of it by part ("sample", and "decode" of latents), and the solver's timesteps.

        `shown`, if given, receives the first images made, (N, C, H, W) uint8, in parts of at least SHOWN_IMAGES together.
        """
        seconds = {"sample": 0.0}
        steps: tuple[float, ...] = ()

        def make_images(seeds: Sequence[int]) -> Tensor:
            nonlocal steps
            result = self.sample(backbone, schedule, seeds)
            seconds["sample"] += result.seconds
            images, steps = result.images, result.timesteps
            if not bool(torch.isfinite(images).all()):
                raise EvaluationError(f"the network gave images that are not finite under {schedule}; fine-tune it longer")
            if self.decoder is not None:
                start = time.perf_counter()
                images = self.decoder.decode(images)
                seconds["decode"] = seconds.get("decode", 0.0) + time.perf_counter() - start
            pixels = to_uint8(images)
            if shown is not None and sum(map(len, shown)) < SHOWN_IMAGES:
                shown.append(pixels[:SHOWN_IMAGES])
            return pixels

        chunk = self.batch_size if self.decoder is not None else 1000  # decoded images and prompts take much memory
        quality = evaluate(make_images, protocol, self.extractor, self.reference, chunk)
        return quality, seconds, steps

    def try_schedule(self, schedule: ExitSchedule, folder: Path) -> Outcome:
        """Fine-tune, sample, evaluate; weights and samples are left in `folder`.

        Raises:
            TrainingDiverged, EvaluationError: the schedule's own failure.
        """
        check_schedule(self.backbone, self.diffusion.num_train_timesteps, schedule)
        latency = self.latency  # before any trial, not in one
        tuned = finetune(self.backbone, self.data, self.diffusion, schedule, self.config.train, folder, on_step=self.on_step)
        net = tuned.backbone
        shown: list[Tensor] = []
        start = time.perf_counter()
        quality, seconds, timesteps = self.evaluate(net, schedule, self.protocol, shown)
        evaluation_s = time.perf_counter() - start - sum(seconds.values())
        save_backbone(net, folder / "weights.safetensors", {"exit_schedule": schedule.to_json()})
        save_images(torch.cat(shown)[:SHOWN_IMAGES].numpy(), folder / "samples.npz")
        if isinstance(prompts := conditioning_for(net, self.data, range(NUM_PROMPTS)), dict):
            with replacing(folder / PROMPTS_FILE) as part:
                save_file(prompts, part)
        (folder / "training.safetensors").unlink(missing_ok=True)
        return Outcome(
            quality,
            latency.time_frac(schedule, timesteps),
            flops_frac(schedule, timesteps, self.flops),
            schedule.block_frac(timesteps),
            tuned.losses,
            {"finetune": tuned.seconds, **seconds, "evaluate": evaluation_s},
        )

    # -- confirmation ----------------------------------------------------------------------------

    def confirmation_protocol(self) -> Protocol:
        """The confirmation's protocol: fresh seeds, its own number of images and repeats."""
        confirm = self.config.confirm
        changed = self.config.evaluation.model_copy(
            update={"num_samples": confirm.num_samples, "repeats": confirm.repeats, "seed": FRESH_SEEDS}
        )
        return build_protocol(changed, self.config.sampling, self.extractor, self.reference)

    def measured_time(self, net: Backbone, schedule: ExitSchedule, full_net: Backbone) -> TimeRatio:
        """Whole-sampling time under the schedule over the full network's, interleaved."""
        confirm = self.config.confirm
        seeds = range(confirm.time_images)
        return compare_sampling_time(
            lambda: self.sample(net, schedule, seeds), lambda: self.sample(full_net, self.full, seeds), confirm.time_repeats
        )


def environment() -> dict[str, Any]:
    """Machine and versions, for records."""
    names = ("asesearch", "torch", "torchvision", "torch-fidelity", "diffusers", "accelerate", "optuna", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
    }
