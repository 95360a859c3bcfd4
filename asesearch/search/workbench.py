"""Turns one schedule into one figure: fine-tune briefly, sample with the study's seeds, evaluate,
cost.

Everything that all schedules share (network, data, reference, latency table) is made once and
checked first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from asesearch.backbones.base import Backbone, Conditioning, check_schedule
from asesearch.backbones.checkpoints import inspect_checkpoint, load_backbone, save_backbone
from asesearch.config import (
    BackboneConfig,
    EvaluationConfig,
    StudyConfig,
    TrainConfig,
)
from asesearch.data import DataSource, open_data, save_images
from asesearch.data.latents import LatentShards
from asesearch.diffusion import make_diffusion
from asesearch.encoding import LatentDecoder
from asesearch.errors import ConfigError, EvaluationError
from asesearch.evaluation.cost import (
    LatencyTable,
    TimeRatio,
    compare_sampling_time,
    device_name,
    flops_frac,
    flops_table,
    measure_latency,
)
from asesearch.evaluation.extractors import Extractor, make_extractor
from asesearch.evaluation.fidelity import (
    SHIPPED,
    ReferenceStats,
    build_protocol,
    check_sample_counts,
    evaluate,
    low_fidelity_metric,
    reference_statistics,
    to_uint8,
)
from asesearch.files import replacing
from asesearch.finetuning import (
    CHECKPOINT,
    Depths,
    TrainResult,
    check_fit,
    finetune,
    weights_fingerprint,
)
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.sampling import SampleResult, arithmetic, check_sampling, sample
from asesearch.schedule import ElasticDepths, ExitSchedule
from asesearch.score import EvaluationResult, Protocol
from asesearch.search.latency import Conditions, shared_table
from asesearch.study import directory
from asesearch.study.records import shortened

SHOWN_IMAGES = 40  # images kept of each trial for the report
NUM_PROMPTS = 4  # kept beside a trial's weights, for its bundle
# in the metadata of the weights: seconds and losses of the fine-tuning that made them
TOOK = "fine_tuning"
LATENCY_REPEATS = 15
FRESH_SEEDS = 1_000_000_000  # confirmation seeds begin here, out of reach of the search's
TRIED_STEPS = 3  # solver steps of the one image that goes through everything first


@dataclass
class Outcome:
    """What one schedule gave; see `TrialRecord` for the fields."""

    quality: EvaluationResult
    time_frac: float
    flops_frac: float
    block_frac: float
    losses: list[float]
    seconds: dict[str, float]
    gflops: dict[str, float]


def conditioning_for(
    backbone: Backbone, data: DataSource, seeds: Sequence[int]
) -> Conditioning | None:
    """What images are made of: class = seed modulo the number of classes, so that every class
    occurs equally often; for a network that takes prompts, that of the data's image seed modulo
    their number; None for an unconditional network.
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
    """Statistics of the study's reference data, from the package where it ships them, so the data
    need not be here.

    Raises:
        DataError: the reference data are needed and not here.
    """
    wanted = config.evaluation.reference
    if (
        wanted is not None
        and wanted.path is None
        and (name := f"{wanted.kind}/{wanted.split}") in SHIPPED
    ):
        try:
            return reference_statistics(name, extractor)
        except EvaluationError:
            pass  # none for this extractor: made from the data
    if wanted is None and config.data.flip:
        # the reference is the data as they are
        wanted = config.data.model_copy(update={"flip": False})
    source = data if wanted is None else open_data(wanted)
    # known before features of all are made
    if config.evaluation.metric == "frechet" and len(source) <= extractor.dim:
        raise EvaluationError(
            f"the reference must have more images than the {extractor.dim} features of "
            f"{extractor.name} for the Fréchet distance (their covariance is singular otherwise); "
            f"got {len(source)} in {source.name}; give more, or use evaluation.metric = 'kid'"
        )
    return reference_statistics(source, extractor)


def check_evaluation(config: StudyConfig) -> None:
    """Refuse a study whose samples can't be compared with its reference.

    Raises:
        ConfigError: latents as the reference, or a study of latents without VAE or images to
            compare with.
    """
    reference = config.evaluation.reference
    kind = None if reference is None else reference.kind
    if kind == "latents" or (config.data.kind == "latents" and kind != "image-folder"):
        raise ConfigError(
            "samples are compared as images, decoded where the network makes latents; got a "
            f"reference of kind {kind or config.data.kind!r}; set evaluation.reference to the "
            "image folder: kind 'image-folder', path, image_size"
        )
    if config.data.kind == "latents" and config.data.vae is None:
        raise ConfigError(
            "generated latents are decoded for evaluation; got no data.vae; give the folder of the "
            "AutoencoderKL"
        )


def open_decoder(
    config: StudyConfig, backbone: Backbone, data: DataSource, device: torch.device
) -> LatentDecoder | None:
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
    decoded = (decoder.channels, decoder.factor * backbone.input_size)
    wanted = (reference.channels, reference.image_size)
    if decoded != wanted:
        raise ConfigError(
            f"the reference must have the decoded images' channels and size, {decoded[0]} and "
            f"{decoded[1]}; got {wanted[0]} and {wanted[1]}; change channels and image_size in "
            "evaluation.reference"
        )
    return decoder


class Workbench:
    """What every trial of a study shares.

    Args:
        config: the study file.
        run_dir: the study directory; the latency table is kept there, so that all trials share one.
            None keeps nothing.

    Raises:
        ConfigError, DataError, ScheduleError, CheckpointError, EvaluationError: parts that are
            missing, unreadable or do not fit each other, before anything expensive.
    """

    def __init__(self, config: StudyConfig, run_dir: Path | None = None) -> None:
        if config.backbone.checkpoint is None:
            raise ConfigError(
                "a search needs pretrained weights; got no backbone.checkpoint; give a path or "
                "`shipped:NAME`"
            )
        check_evaluation(config)
        self.config = config
        self.run_dir = run_dir
        self.device = default_device()
        self.data = open_data(config.data)
        null = getattr(self.data, "null_condition", None)
        self.backbone = load_backbone(config.backbone, null_condition=null).to(self.device).eval()
        self.diffusion = make_diffusion(config.diffusion)
        self.full = ExitSchedule.full(self.backbone.depth, config.diffusion.num_train_timesteps)
        check_fit(self.backbone, self.data, self.diffusion, self.full)
        evaluation = config.evaluation
        how = config.sampling
        check_sampling(self.backbone, how.solver, self.diffusion, how.num_steps, how.cfg_scale)
        self.decoder = open_decoder(config, self.backbone, self.data, self.device)
        self.extractor = make_extractor(
            evaluation.extractor, evaluation.extractor_weights, self.device
        )
        check_sample_counts(config, self.extractor.dim)
        self.batch_size = min(config.sampling.batch_size, evaluation.num_samples)
        self.min_exit_depth = max(
            1, self.backbone.min_exit_depth, config.search.min_exit_depth or 1
        )
        # what trials are fine-tuned from; `warm_up` puts the elastic weights here
        self.start = self.backbone
        self.samplers = self._samplers()
        self._try_parts()
        # may take long: after all that may be refused
        self.reference = open_reference(config, self.data, self.extractor)
        self.protocol = self._protocol(evaluation)
        check_fresh_seeds(self.protocols)
        # sees (steps done, loss) of each fine-tuning
        self.on_step: Callable[[int, float], None] | None = None
        self._latency: LatencyTable | None = None

    def _samplers(self) -> dict[Sampler, tuple[float, ...]]:
        """Timesteps at which each sampler calls the network, the study's own first."""
        net = self.backbone
        found = {}
        for sampler in self.config.samplers:
            how = self.config.sampling.under(sampler)
            _, found[sampler] = check_sampling(
                net, how.solver, self.diffusion, how.num_steps, how.cfg_scale
            )
        return found

    @property
    def own_sampler(self) -> Sampler:
        """The study's own, over whose time all times are counted."""
        return next(iter(self.samplers))

    def _try_parts(self) -> None:
        """One image through every sampler (a few of its steps), the decoder and the extractor.

        Raises:
            EvaluationError: images that are not finite, or that the extractor does not take.
        """
        how = self.config.sampling
        for sampler in self.samplers:
            few = min(sampler.num_steps, TRIED_STEPS)
            made = self.sample(self.backbone, Point(self.full, sampler), [0], few).images
            if not bool(torch.isfinite(made).all()):
                raise EvaluationError(
                    f"the pretrained network gives images that are not finite under {sampler} with "
                    f"cfg_scale {how.cfg_scale:g} and precision {how.precision!r}; check that the "
                    "checkpoint fits [backbone] and [diffusion], or sample with precision = "
                    "'float32'"
                )
            self.extractor(to_uint8(made if self.decoder is None else self.decoder.decode(made)))

    @property
    def protocols(self) -> dict[str, Protocol]:
        """Every protocol of the study: "low-fidelity" (where it has promotion), "search" and
        "confirmation"."""
        low = {} if self.config.promotion is None else {"low-fidelity": self.cheap_protocol}
        return {**low, "search": self.protocol, "confirmation": self.confirmation_protocol()}

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of what the figures depend on and the study file only names."""
        out = {
            "weights": weights_fingerprint(self.backbone),
            "data": self.data.digest,
            "protocol": self.protocol.to_dict(),
        }
        if (vae := self.decoder) is not None:
            out["decoder"] = {"digest": vae.digest, "shift": vae.shift, "scale": vae.scale}
        return out

    # -- cost ------------------------------------------------------------------------------------

    @property
    def latency(self) -> LatencyTable:
        """Time of one network call at each exit depth; measured on first use, once a study and
        device.

        Raises:
            StudyError: the study is of time, and its table of another device, batch or precision.
        """
        how = self.config.sampling
        guided = how.cfg_scale != 1
        size = self.batch_size * (2 if guided else 1)

        def measure() -> LatencyTable:
            y = conditioning_for(self.backbone, self.data, range(size))
            with arithmetic(how.precision, self.device):
                table = measure_latency(self.backbone, size, LATENCY_REPEATS, self.device, y)
            return replace(table, precision=how.precision, guided=guided)

        if self._latency is None and self.run_dir is None:
            self._latency = measure()
        elif self._latency is None:
            assert self.run_dir is not None
            now = Conditions(device_name(self.device), size, how.precision, guided)
            self._latency = shared_table(
                self.run_dir, now, measure, one_only=self.config.search.cost == "time"
            )
        return self._latency

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """FLOPs of one network call for one image at exit depths 1…depth."""
        return flops_table(self.backbone, conditioning_for(self.backbone, self.data, range(1)))

    def cost_fracs(self, point: Point) -> tuple[float, float, float]:
        """Predicted time, FLOPs and block calls of a whole sampling over the full network's under
        the study's own sampler."""
        own = next(iter(self.samplers.values()))
        steps = self.samplers[point.sampler]
        schedule = point.schedule
        share = len(steps) / len(own)
        fracs = (
            self.latency.time_frac(schedule, steps),
            flops_frac(schedule, steps, self.flops),
            schedule.block_frac(steps),
        )
        return fracs[0] * share, fracs[1] * share, fracs[2] * share

    @property
    def call_cost(self) -> tuple[float, ...]:
        """Cost of one network call at exit depths 1…depth in the units of the second objective."""
        return self.latency.median_ms if self.config.search.cost == "time" else self.flops

    def sampling_gflops(self, point: Point, protocol: Protocol) -> float:
        """Arithmetic of sampling a protocol's images."""
        steps = self.samplers[point.sampler]
        calls = [self.flops[d - 1] for d in point.schedule.exit_depth_at(steps)]
        passes = 1 if self.config.sampling.cfg_scale == 1 else 2
        return float(passes * sum(calls)) * protocol.num_samples * len(protocol.seeds) / 1e9

    def training_gflops(self, depths: Depths, config: TrainConfig) -> float:
        """Arithmetic of a training run, in expectation: a step counts three calls a sample, and one
        of a teacher."""
        chain = depths.num_train_timesteps
        t = np.arange(chain)
        if isinstance(depths, ElasticDepths):
            u = (np.arange(64) + 0.5) / 64
            drawn = depths.draw(np.repeat(t, 64), np.tile(u, chain))
        else:
            drawn = depths.exit_depth_at(t)
        call = float(np.asarray(self.flops)[drawn - 1].mean())
        teacher = self.flops[-1] if config.distill_frac > 0 else 0.0
        return float(config.num_steps * config.batch_size * (3 * call + teacher) / 1e9)

    # -- one schedule ----------------------------------------------------------------------------

    def sample(
        self,
        backbone: Backbone,
        point: Point,
        seeds: Sequence[int],
        num_steps: int | None = None,
    ) -> SampleResult:
        """Images (or latents) of a point for these seeds, made of what `conditioning_for` gives.

        `num_steps` takes the place of the sampler's own.
        """
        how = self.config.sampling.under(point.sampler)
        return sample(
            backbone,
            how.solver,
            point.schedule,
            diffusion=self.diffusion,
            num_steps=num_steps or how.num_steps,
            seeds=seeds,
            y=conditioning_for(backbone, self.data, seeds),
            cfg_scale=how.cfg_scale,
            batch_size=how.batch_size,
            precision=how.precision,
            device=self.device,
        )

    def evaluate(
        self,
        backbone: Backbone,
        point: Point,
        protocol: Protocol,
        shown: list[Tensor] | None = None,
    ) -> tuple[EvaluationResult, dict[str, float]]:
        """Figure under a protocol, and seconds of it by part: "sample", "decode" (of latents),
        "evaluate".

        `shown`, if given, receives the first images made, (N, C, H, W) uint8, in parts of at least
        SHOWN_IMAGES together.
        """
        seconds = {"sample": 0.0}
        begun = time.perf_counter()

        def make_images(seeds: Sequence[int]) -> Tensor:
            result = self.sample(backbone, point, seeds)
            seconds["sample"] += result.seconds
            images = result.images
            if not bool(torch.isfinite(images).all()):
                raise EvaluationError(
                    f"the network gave images that are not finite under {point}; fine-tune it "
                    "longer"
                )
            if self.decoder is not None:
                start = time.perf_counter()
                images = self.decoder.decode(images)
                seconds["decode"] = seconds.get("decode", 0.0) + time.perf_counter() - start
            pixels = to_uint8(images)
            if shown is not None and sum(map(len, shown)) < SHOWN_IMAGES:
                shown.append(pixels[:SHOWN_IMAGES])
            return pixels

        # decoded images and prompts take much memory
        chunk = self.batch_size if self.decoder is not None else 1000
        quality = evaluate(make_images, protocol, self.extractor, self.reference, chunk)
        seconds["evaluate"] = time.perf_counter() - begun - sum(seconds.values())
        return quality, seconds

    def tuning(self, schedule: ExitSchedule) -> tuple[Backbone, TrainConfig]:
        """What a schedule's brief fine-tuning starts from, and its settings.

        The full network, which all others are compared with, is tuned for as long as they were in
        all: from its pretrained weights, for the steps of the elastic warm-up and of the brief
        fine-tuning together. It learns noise targets: from a teacher that it equals it would learn
        nothing.
        """
        config = self.config.train
        elastic = self.config.elastic
        if not schedule.is_full:
            return self.start, config
        steps = config.num_steps + (0 if elastic is None else elastic.num_steps)
        return self.backbone, config.model_copy(update={"num_steps": steps, "distill_frac": 0.0})

    def tuned(self, schedule: ExitSchedule, folder: Path) -> TrainResult:
        """The schedule's fine-tuned network, and what it took.

        From its file where another sampler's trial left it, or one that was killed before it was on
        record: the file keeps what the fine-tuning took.
        """
        path = folder / directory.WEIGHTS
        if directory.is_whole(path, "the schedule is fine-tuned again"):
            own = BackboneConfig(kind=self.config.backbone.kind, checkpoint=str(path))
            net = load_backbone(own).to(self.device).eval()
            took = json.loads(inspect_checkpoint(path).metadata.get(TOOK, "null")) or {
                "seconds": 0.0,
                "losses": [],
            }
            return TrainResult(net, took["losses"], None, took["seconds"])
        start, config = self.tuning(schedule)
        teacher = self.backbone if config.distill_frac > 0 else None
        tuned = finetune(
            start, self.data, self.diffusion, schedule, config, folder, teacher, self.on_step
        )
        took = {"seconds": tuned.seconds, "losses": shortened(tuned.losses)}
        save_backbone(
            tuned.backbone, path, {"exit_schedule": schedule.to_json(), TOOK: json.dumps(took)}
        )
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return tuned

    def try_point(self, point: Point, folder: Path) -> Outcome:
        """Fine-tune, sample, evaluate; weights and samples are left in `folder`.

        Raises:
            TrainingDiverged, EvaluationError: the schedule's own failure.
        """
        schedule = point.schedule
        check_schedule(self.backbone, self.diffusion.num_train_timesteps, schedule)
        _ = self.latency  # before any trial, not in one
        tuned = self.tuned(schedule, folder)
        shown: list[Tensor] = []
        quality, seconds = self.evaluate(tuned.backbone, point, self.protocol, shown)
        file = folder / directory.samples_file(point.sampler, self.own_sampler)
        save_images(torch.cat(shown)[:SHOWN_IMAGES].numpy(), file)
        if isinstance(
            prompts := conditioning_for(tuned.backbone, self.data, range(NUM_PROMPTS)), dict
        ):
            with replacing(folder / directory.PROMPTS) as part:
                save_file(prompts, part)
        gflops = {"sample": self.sampling_gflops(point, self.protocol)}
        if tuned.seconds:
            gflops["finetune"] = self.training_gflops(schedule, self.tuning(schedule)[1])
        costs = self.cost_fracs(point)
        return Outcome(
            quality, *costs, tuned.losses, {"finetune": tuned.seconds, **seconds}, gflops
        )

    def try_low_fidelity(self, point: Point) -> tuple[EvaluationResult, float, float]:
        """The first rung: score of the point under the elastic weights as they are, and the seconds
        and GFLOPs it took.

        Raises:
            EvaluationError: images that are not finite.
        """
        protocol = self.cheap_protocol
        quality, seconds = self.evaluate(self.start, point, protocol)
        return quality, sum(seconds.values()), self.sampling_gflops(point, protocol)

    @cached_property
    def cheap_protocol(self) -> Protocol:
        """The low-fidelity protocol: the search's with fewer images, and a metric that exists for
        so few."""
        cheap = self.config.promotion
        assert cheap is not None
        changes = {"num_samples": cheap.num_samples, "repeats": cheap.repeats}
        evaluation = self.config.evaluation.model_copy(update=changes)
        return self._protocol(
            evaluation, low_fidelity_metric(cheap, evaluation, self.extractor.dim)
        )

    def _protocol(self, evaluation: EvaluationConfig, metric: str | None = None) -> Protocol:
        """An evaluation's protocol; where samplers compete, they are no part of it but of what
        is measured."""
        how = self.config.sampling
        parts = (self.extractor, self.reference)
        built = build_protocol(
            evaluation, how, *parts, metric=metric, guided_channels=self._guided_channels
        )
        return replace(built, solver=None, num_steps=None) if len(self.samplers) > 1 else built

    @cached_property
    def _guided_channels(self) -> int | None:
        """Channels that guidance acts on; None in a study whose protocol was recorded without them.

        That study goes on without: its network is on record, and with it the channels.
        """
        path = None if self.run_dir is None else self.run_dir / directory.INPUTS
        lost = "its protocol is taken to be of this release"
        known = (
            None
            if path is None
            else directory.read_state(path, lambda data: dict(data["protocol"]), lost)
        )
        if (
            known is not None
            and known.get("cfg_scale") == self.config.sampling.cfg_scale
            and "guided_channels" not in known
        ):
            return None
        return self.backbone.guided_channels

    # -- confirmation ----------------------------------------------------------------------------

    def confirmation_protocol(self) -> Protocol:
        """The confirmation's protocol: fresh seeds, its own number of images and repeats."""
        confirm = self.config.confirm
        changed = self.config.evaluation.model_copy(
            update={
                "num_samples": confirm.num_samples,
                "repeats": confirm.repeats,
                "seed": FRESH_SEEDS,
            }
        )
        return self._protocol(changed)

    def measured_time(self, net: Backbone, point: Point, full_net: Backbone) -> TimeRatio:
        """Whole-sampling time of a point over the full network's under the study's own sampler,
        interleaved."""
        confirm = self.config.confirm
        seeds = range(confirm.time_images)
        full = Point(self.full, self.own_sampler)
        return compare_sampling_time(
            lambda: self.sample(net, point, seeds),
            lambda: self.sample(full_net, full, seeds),
            confirm.time_repeats,
        )


def check_fresh_seeds(protocols: dict[str, Protocol]) -> None:
    """Refuse a study that would confirm on images that decided what is confirmed.

    Raises:
        EvaluationError: image seeds of the confirmation that another protocol uses.
    """
    fresh = _image_seeds(protocols["confirmation"])
    for name, protocol in protocols.items():
        for ours in _image_seeds(protocol) if name != "confirmation" else ():
            for theirs in fresh:
                if ours.start < theirs.stop and theirs.start < ours.stop:
                    raise EvaluationError(
                        f"the confirmation has image seeds of its own, from {theirs.start} on; got "
                        f"the {name} protocol's {ours.start} to {ours.stop - 1}; lower "
                        f"evaluation.seed below {FRESH_SEEDS - ours.stop + ours.start}"
                    )


def _image_seeds(protocol: Protocol) -> list[range]:
    """Of each repeat."""
    return [range(first, first + protocol.num_samples) for first in protocol.seeds]
