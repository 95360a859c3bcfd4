"""What a point costs: always the bound (block calls, FLOPs) and the measured latency."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from asesearch.config import TrainConfig
from asesearch.evaluation.cost import (
    LatencyTable,
    device_name,
    flops_frac,
    flops_table,
    measure_latency,
)
from asesearch.finetuning import Depths
from asesearch.point import Point
from asesearch.sampling import arithmetic
from asesearch.schedule import ElasticDepths
from asesearch.score import Protocol
from asesearch.search.latency import Conditions, shared_table
from asesearch.search.opening import conditioning_for
from asesearch.search.parts import Parts

LATENCY_REPEATS = 15


class Costs:
    """Time and arithmetic of a study's network.

    Args:
        parts: of the study.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._latency: LatencyTable | None = None

    @property
    def latency(self) -> LatencyTable:
        """Time of one network call at each exit depth; measured on first use, once per study and
        device.

        Raises:
            StudyError: the study is of time, and its table of another device, batch or arithmetic.
        """
        how = self.parts.config.sampling
        guided = how.cfg_scale != 1
        size = self.parts.batch_size * (2 if guided else 1)

        def measure() -> LatencyTable:
            y = conditioning_for(self.parts.backbone, self.parts.data, range(size))
            with arithmetic(how.precision, self.parts.device):
                table = measure_latency(
                    self.parts.backbone,
                    size,
                    LATENCY_REPEATS,
                    self.parts.device,
                    y,
                    compile=how.compile,
                )
            return replace(table, precision=how.precision, guided=guided)

        if self._latency is None and self.parts.run_dir is None:
            self._latency = measure()
        elif self._latency is None:
            assert self.parts.run_dir is not None
            name = device_name(self.parts.device)
            now = Conditions(name, size, how.precision, guided, how.compile)
            self._latency = shared_table(
                self.parts.run_dir, now, measure, one_only=self.parts.config.search.cost == "time"
            )
        return self._latency

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """FLOPs of one network call for one image at exit depths 1…depth."""
        return flops_table(
            self.parts.backbone, conditioning_for(self.parts.backbone, self.parts.data, range(1))
        )

    def fracs(self, point: Point) -> tuple[float, float, float]:
        """Predicted time, FLOPs and block calls of a whole sampling over the full network's under
        the study's own sampler."""
        own = next(iter(self.parts.samplers.values()))
        steps = self.parts.samplers[point.sampler]
        schedule = point.schedule
        share = len(steps) / len(own)
        fracs = (
            self.latency.time_frac(schedule, steps),
            flops_frac(schedule, steps, self.flops),
            schedule.block_frac(steps),
        )
        return fracs[0] * share, fracs[1] * share, fracs[2] * share

    @property
    def of_call(self) -> tuple[float, ...]:
        """Cost of one network call at exit depths 1…depth in the units of the second objective."""
        return self.latency.median_ms if self.parts.config.search.cost == "time" else self.flops

    def sampling_gflops(self, point: Point, protocol: Protocol) -> float:
        """Arithmetic of sampling a protocol's images."""
        steps = self.parts.samplers[point.sampler]
        calls = [self.flops[d - 1] for d in point.schedule.exit_depth_at(steps)]
        passes = 1 if self.parts.config.sampling.cfg_scale == 1 else 2
        return float(passes * sum(calls)) * protocol.num_samples * len(protocol.seeds) / 1e9

    def training_gflops(self, depths: Depths, config: TrainConfig) -> float:
        """Arithmetic of a training run, in expectation: a step counts three calls per sample, and
        one of a teacher."""
        num_timesteps = depths.num_train_timesteps
        t = np.arange(num_timesteps)
        if isinstance(depths, ElasticDepths):
            u = (np.arange(64) + 0.5) / 64
            drawn = depths.draw(np.repeat(t, 64), np.tile(u, num_timesteps))
        else:
            drawn = depths.exit_depth_at(t)
        call = float(np.asarray(self.flops)[drawn - 1].mean())
        teacher = self.flops[-1] if config.distill_frac > 0 else 0.0
        return float(config.num_steps * config.batch_size * (3 * call + teacher) / 1e9)
