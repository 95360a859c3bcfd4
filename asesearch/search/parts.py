"""What every trial of a study shares, made once and checked first: network, data, samplers,
reference, protocols.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asesearch.backbones.acceleration import Acceleration
from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_trained
from asesearch.backbones.device import default_device
from asesearch.backbones.digests import weights_fingerprint
from asesearch.backbones.guidance import check_guided
from asesearch.calibration import SEEDS, calibrated
from asesearch.config import StudyConfig
from asesearch.data import open_data
from asesearch.diffusion import make_diffusion
from asesearch.errors import ConfigError, EvaluationError
from asesearch.evaluation.clock import TimeRatio, compare_sampling_time
from asesearch.evaluation.distances import NEIGHBOURS, precision_recall
from asesearch.evaluation.extractors import KNOWN_DIMS, make_extractor
from asesearch.evaluation.features import Floats, to_uint8
from asesearch.evaluation.fidelity import (
    Space,
    build_protocol,
    check_sample_counts,
    evaluate_in,
)
from asesearch.finetuning import check_fit, train_alone
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.sampling import SampleResult, check_eager, check_sampling, sample
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult, PrecisionRecall, Protocol
from asesearch.search.accelerating import kept_acceleration
from asesearch.search.opening import (
    check_evaluation,
    conditioning_for,
    known_digest,
    open_decoder,
    open_reference,
    reference_data,
)
from asesearch.search.protocols import confirming, known_channels, make_protocols

SHOWN_IMAGES = 40  # images kept of each trial for the report
TRIED_STEPS = 3  # solver steps of the one image that goes through everything first


class Parts:
    """What every trial of a study shares.

    Args:
        config: the study file.
        run_dir: the study directory; the latency table is kept there, so that all trials share one.
            None keeps nothing.
        reading: nothing is written to the study directory; what is missing there is made for this
            process alone.

    Raises:
        ConfigError, DataError, ScheduleError, CheckpointError, EvaluationError: parts that are
            missing, unreadable or do not fit each other, before anything expensive.
    """

    def __init__(
        self, config: StudyConfig, run_dir: Path | None = None, *, reading: bool = False
    ) -> None:
        if config.backbone.checkpoint is None:
            raise ConfigError(
                "a search needs pretrained weights; got no backbone.checkpoint; give a path or "
                "`shipped:NAME`"
            )
        train_alone()
        check_evaluation(config)
        self.config = config
        self.run_dir = run_dir
        self.reading = reading
        self.device = default_device()
        self.data = open_data(config.data)
        null = getattr(self.data, "null_condition", None)
        net = load_trained(config.backbone, config.diffusion, null_condition=null)
        self.backbone = net.to(self.device).eval()
        self.diffusion = make_diffusion(config.diffusion)
        self.full = ExitSchedule.full(self.backbone.depth, config.diffusion.num_train_timesteps)
        check_fit(self.backbone, self.data, self.diffusion, self.full)
        evaluation = config.evaluation
        how = config.sampling
        check_sampling(self.backbone, how.solver, self.diffusion, how.num_steps, how.cfg_scale)
        self.decoder = open_decoder(config, self.backbone, self.data, self.device)
        _check_known_counts(config)
        self.extractor = make_extractor(
            evaluation.extractor, evaluation.extractor_weights, self.device
        )
        check_sample_counts(config, self.extractor.dim)
        self.batch_size = min(config.sampling.batch_size, evaluation.num_samples)
        self.min_exit_depth = max(
            1, self.backbone.min_exit_depth, config.search.min_exit_depth or 1
        )
        self.samplers = self._samplers()
        self._accelerations: dict[Sampler, Acceleration] = {}
        self._try_parts()
        # once for all feature spaces: listing ImageNet takes a while
        self._reference_data = cache(lambda: reference_data(config, self.data))
        # may take long: after all that may be refused
        self.reference = open_reference(config, self._reference_data, self.extractor)
        channels = known_channels(config, self.backbone.guided_channels, run_dir)
        self.protocols = make_protocols(config, self.extractor, self.reference, channels)
        self.also = tuple(map(self._space, config.confirm.also))  # names, of a table too

    def _samplers(self) -> dict[Sampler, tuple[float, ...]]:
        """Timesteps at which each sampler calls the network, the study's own first."""
        net = self.backbone
        found = {}
        for sampler in self.config.samplers:
            how = self.config.sampling.under(sampler)
            if sampler.acceleration:  # before anything is compiled or calibrated
                check_eager(how.compile)
            if sampler.acceleration.startswith("guide-"):
                check_guided(how.cfg_scale)
            _, found[sampler] = check_sampling(
                net, how.solver, self.diffusion, how.num_steps, how.cfg_scale
            )
        return found

    def acceleration(self, sampler: Sampler) -> Acceleration | None:
        """That of a sampler, if it has one: calibrated by the pretrained network at full depth on
        first use, once a study."""
        if sampler.acceleration and sampler not in self._accelerations:
            self._accelerations[sampler] = kept_acceleration(
                self.run_dir,
                sampler,
                self._calibrated_for(sampler),
                lambda: self._calibrated(sampler, SEEDS),
                reading=self.reading,
            )
        return self._accelerations.get(sampler)

    def calibrate(self) -> None:
        """Calibrate the samplers that need it, before anything depends on them."""
        for sampler in self.samplers:
            self.acceleration(sampler)

    def _calibrated(
        self, sampler: Sampler, seeds: Sequence[int], num_steps: int | None = None
    ) -> Acceleration:
        """A sampler's acceleration, calibrated on images of these seeds, for another number of
        steps where one is given."""
        steps = sampler.num_steps if num_steps is None else num_steps
        how = self.config.sampling.under(sampler)
        _, calls = check_sampling(self.backbone, how.solver, self.diffusion, steps, how.cfg_scale)
        point = Point(self.full, sampler.plain)

        def look(recorder: Acceleration) -> object:
            return self.sample(self.backbone, point, seeds, num_steps, recorder)

        return calibrated(sampler.acceleration, calls, look)

    def _calibrated_for(self, sampler: Sampler) -> dict[str, Any]:
        """What a calibration follows from."""
        how = self.config.sampling
        return {
            "sampler": str(sampler),
            "weights": weights_fingerprint(self.backbone),
            "diffusion": self.config.diffusion.model_dump(mode="json"),
            "cfg_scale": how.cfg_scale,
            "precision": how.precision,
        }

    def _space(self, name: str) -> Space:
        """A further feature space of the confirmation.

        Raises:
            ConfigError: the study's own, or one named twice.
            EvaluationError: an extractor that can't be loaded or does not take the images, or too
                few images for it.
        """
        config = self.config
        if [config.evaluation.extractor, *config.confirm.also].count(name) > 1:
            raise ConfigError(
                "confirm.also names feature extractors beside evaluation.extractor, each once; got "
                f"{name!r} twice; leave one out"
            )
        given = config.confirm.also
        weights = given[name] if isinstance(given, dict) else None
        extractor = make_extractor(name, weights, self.device)
        extractor.check_shape(self.backbone.in_channels if self.decoder is None else 3, "samples")
        reference = open_reference(config, self._reference_data, extractor)
        confirmation = self.protocols.confirmation
        built = build_protocol(confirming(config), config.sampling, extractor, reference)
        same = ("solver", "num_steps", "guided_channels")
        own = {field: getattr(confirmation, field) for field in same}
        return Space(replace(built, **own), extractor, reference)

    @property
    def own_sampler(self) -> Sampler:
        """The study's own, over whose time all times are counted."""
        return next(iter(self.samplers))

    def _try_parts(self) -> None:
        """One image through every sampler (a few of its steps, its acceleration calibrated on that
        image), the decoder and the extractor.

        Raises:
            ConfigError: an acceleration that the network does not take.
            EvaluationError: images that are not finite, or that the extractor does not take.
        """
        how = self.config.sampling
        for sampler in self.samplers:
            few = min(sampler.num_steps, TRIED_STEPS)
            tried = self._calibrated(sampler, [0], few) if sampler.acceleration else None
            point = Point(self.full, sampler)
            made = self.sample(self.backbone, point, [0], few, tried).images
            if not bool(torch.isfinite(made).all()):
                raise EvaluationError(
                    f"the pretrained network gives images that are not finite under {sampler} with "
                    f"cfg_scale {how.cfg_scale:g} and precision {how.precision!r}; check that the "
                    "checkpoint fits [backbone] and [diffusion], or sample with precision = "
                    "'float32'"
                )
            self.extractor(to_uint8(made if self.decoder is None else self.decoder.decode(made)))

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of what the scores depend on and the study file only names."""
        weights = weights_fingerprint(self.backbone)
        if offset := self.backbone.config.get("time_offset"):
            weights += f", timesteps from {offset:g}"  # studies begun before counted them from 0
        out = {
            "weights": weights,
            "data": self.data.digest,
            "protocol": self.protocols.search.to_dict(),
        }
        if (vae := self.decoder) is not None:
            digest = known_digest(vae, self.run_dir)
            out["decoder"] = {"digest": digest, "shift": vae.shift, "scale": vae.scale}
        return out

    def sample(
        self,
        backbone: Backbone,
        point: Point,
        seeds: Sequence[int],
        num_steps: int | None = None,
        acceleration: Acceleration | None = None,
    ) -> SampleResult:
        """Images (or latents) of a point for these seeds, made of what `conditioning_for` gives.

        `num_steps` takes the place of the sampler's own, then without the sampler's acceleration;
        `acceleration` that of the sampler's.
        """
        how = self.config.sampling.under(point.sampler)
        if acceleration is None and num_steps is None:
            acceleration = self.acceleration(point.sampler)
        return sample(
            backbone,
            how.solver,
            point.schedule,
            diffusion=self.diffusion,
            num_steps=how.num_steps if num_steps is None else num_steps,
            seeds=seeds,
            y=conditioning_for(backbone, self.data, seeds),
            cfg_scale=how.cfg_scale,
            batch_size=how.batch_size,
            precision=how.precision,
            compile=how.compile,
            acceleration=acceleration,
            device=self.device,
        )

    def evaluate(
        self,
        backbone: Backbone,
        point: Point,
        protocol: Protocol,
        shown: list[Tensor] | None = None,
    ) -> tuple[EvaluationResult, dict[str, float]]:
        """Score under a protocol, and seconds of it by part: "sample", "decode" (of latents),
        "evaluate".

        `shown`, if given, receives the first images made, (N, C, H, W) uint8, in parts of at least
        SHOWN_IMAGES together.
        """
        own = Space(protocol, self.extractor, self.reference)
        (quality,), seconds = self._scores(backbone, point, [own], shown)
        return quality, seconds

    def confirmed(
        self, backbone: Backbone, point: Point
    ) -> tuple[EvaluationResult, tuple[EvaluationResult, ...], PrecisionRecall | None]:
        """Score under the confirmation protocol, in the further feature spaces of `confirm.also`,
        and precision and recall (None of too few images), all of the same images."""
        own = Space(self.protocols.confirmation, self.extractor, self.reference)
        reference = self.reference.features
        pairs: list[tuple[float, float]] = []
        enough = min(own.protocol.num_samples, len(reference)) > NEIGHBOURS
        (quality, *others), _ = self._scores(
            backbone,
            point,
            [own, *self.also],
            on_features=lambda found: (
                pairs.append(precision_recall(found, reference)) if enough else None
            ),
        )
        both = PrecisionRecall(*zip(*pairs, strict=True)) if pairs else None
        return quality, tuple(others), both

    def _scores(
        self,
        backbone: Backbone,
        point: Point,
        spaces: Sequence[Space],
        shown: list[Tensor] | None = None,
        on_features: Callable[[Floats], None] | None = None,
    ) -> tuple[tuple[EvaluationResult, ...], dict[str, float]]:
        """Scores in these spaces, and what `evaluate` tells of time."""
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
        found = evaluate_in(make_images, spaces, chunk, on_features)
        seconds["evaluate"] = time.perf_counter() - begun - sum(seconds.values())
        return found, seconds

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


def _check_known_counts(config: StudyConfig) -> None:
    """Refuse too few images before weights of an extractor are fetched for them.

    Raises:
        EvaluationError: see `check_sample_counts`.
    """
    if (name := config.evaluation.extractor) in KNOWN_DIMS:
        check_sample_counts(config, KNOWN_DIMS[name])
    for name in config.confirm.also:
        if name in KNOWN_DIMS:
            check_sample_counts(config, KNOWN_DIMS[name], name)
