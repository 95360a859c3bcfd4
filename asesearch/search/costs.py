"""What a point costs: always the bound (block calls, FLOPs) and the measured latency."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asesearch.backbones.acceleration import Acceleration, Mix
from asesearch.backbones.guidance import GuidanceInterval
from asesearch.config import TrainConfig
from asesearch.evaluation.cost import (
    LatencyTable,
    device_name,
    flops_frac,
    flops_table,
    full_call_ms,
    measure_changed,
    measure_latency,
    mixed_cost,
)
from asesearch.finetuning import Depths
from asesearch.point import Point
from asesearch.sampler import Sampler, passes_per_call
from asesearch.sampling import arithmetic
from asesearch.schedule import ElasticDepths
from asesearch.score import Protocol
from asesearch.search.latency import Conditions, changed_table, check_table, shared_table
from asesearch.search.opening import conditioning_for
from asesearch.search.parts import Parts

LATENCY_REPEATS = 15
CHANGED_REPEATS = 7  # of three calls each


def elastic_depths(parts: Parts) -> ElasticDepths:
    """The exit-depth distribution of the study's elastic warm-up.

    Raises:
        ScheduleError: nothing may be dropped.
    """
    config = parts.config.elastic
    low = parts.min_exit_depth
    assert config is not None
    num_timesteps = parts.full.num_train_timesteps
    depth = parts.backbone.depth
    shape = config.depth_distribution
    top = depth - 1 if parts.config.search.own_exits else None
    return ElasticDepths(depth, num_timesteps, low, shape, config.full_frac, top)


class Costs:
    """Time and arithmetic of a study's network.

    Args:
        parts: of the study.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._latency: LatencyTable | None = None
        # by `_kind`
        self._changed: dict[str, LatencyTable] = {}
        self._fewer: dict[str, tuple[float, ...]] = {}

    @property
    def latency(self) -> LatencyTable:
        """Time of one network call at each exit depth; measured on first use, once per study and
        device.

        Raises:
            StudyError: the study is of time, and its table of another device, batch or arithmetic.
        """
        if self._latency is None and self.parts.run_dir is None:
            self._latency = self._measure()
        elif self._latency is None:
            assert self.parts.run_dir is not None
            self._latency = shared_table(
                self.parts.run_dir,
                self._conditions,
                self._measure,
                one_only=self.parts.config.search.cost == "time",
            )
        return self._latency

    def check_on_record(self, run_dir: Path) -> None:
        """Refuse a study's table that `latency` would refuse; nothing is measured or written.

        Args:
            run_dir: the study directory, which is that of the parts or of a dry run without one.

        Raises:
            StudyError: see `latency`.
        """
        if self.parts.config.search.cost == "time":
            check_table(run_dir, self._conditions)

    @cached_property
    def full_call_ms(self) -> float:
        """Time of one network call at full depth: the latency table's, or, where a study keeps none
        (a dry run), measured alone.

        Raises:
            StudyError: see `latency`.
        """
        if self._latency is not None or self.parts.run_dir is not None:
            return self.latency.median_ms[-1]
        now = self._conditions
        net = self.parts.backbone
        y = conditioning_for(net, self.parts.data, range(now.batch_size))
        with arithmetic(now.precision, self.parts.device):
            return full_call_ms(
                net, now.batch_size, LATENCY_REPEATS, self.parts.device, y, compile=now.compile
            )

    @property
    def _conditions(self) -> Conditions:
        how = self.parts.config.sampling
        guided = how.cfg_scale != 1
        size = self.parts.batch_size * (2 if guided else 1)
        name = device_name(self.parts.device)
        return Conditions(name, size, how.precision, guided, how.compile)

    def _measure(self, acceleration: Acceleration | None = None) -> LatencyTable:
        """A latency table; of calls that an acceleration changes, where one is given."""
        now = self._conditions
        net = self.parts.backbone
        plain = None if acceleration is None else self.latency
        y = conditioning_for(net, self.parts.data, range(now.batch_size))
        with arithmetic(now.precision, self.parts.device):
            if plain is not None and acceleration is not None:
                return measure_changed(net, plain, acceleration, CHANGED_REPEATS, y)
            table = measure_latency(
                net, now.batch_size, LATENCY_REPEATS, self.parts.device, y, compile=now.compile
            )
        return replace(table, precision=now.precision, guided=now.guided)

    def _acceleration(self, sampler: Sampler) -> Acceleration:
        """Of a sampler that has one."""
        found = self.parts.acceleration(sampler)
        assert found is not None
        return found

    def _kind(self, acceleration: Acceleration) -> str:
        """Equal for accelerations that cost the same at their most, as caches of one part do."""
        return json.dumps(acceleration.most(self.parts.backbone).to_dict(), sort_keys=True)

    def _changed_ms(self, sampler: Sampler) -> tuple[float, ...]:
        """Latency of calls changed in full by a sampler's acceleration, at exit depths 1…depth."""
        acceleration = self._acceleration(sampler)
        name = self._kind(acceleration)
        if name not in self._changed:
            run_dir = self.parts.run_dir
            _ = self.latency  # before the lock that it takes too

            def measure() -> LatencyTable:
                return self._measure(acceleration)

            self._changed[name] = (
                measure()
                if run_dir is None
                else changed_table(run_dir, self._conditions, name, measure)
            )
        return self._changed[name].median_ms

    def _changed_flops(self, sampler: Sampler) -> tuple[float, ...]:
        """As `flops`, of calls changed in full by a sampler's acceleration."""
        acceleration = self._acceleration(sampler)
        name = self._kind(acceleration)
        if name not in self._fewer:
            y = conditioning_for(self.parts.backbone, self.parts.data, range(1))
            self._fewer[name] = flops_table(self.parts.backbone, y, acceleration)
        return self._fewer[name]

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """FLOPs of one network call for one image at exit depths 1…depth."""
        return flops_table(
            self.parts.backbone, conditioning_for(self.parts.backbone, self.parts.data, range(1))
        )

    def fracs(self, point: Point) -> tuple[float, float, float]:
        """Predicted time, FLOPs and block calls of a whole sampling over the full network's under
        the study's own sampler."""
        own = self.parts.samplers[self.parts.own_sampler]
        steps = self.parts.samplers[point.sampler]
        schedule = point.schedule
        if point.sampler.acceleration:
            return self._changed_fracs(point, len(own))
        share = len(steps) / len(own)
        fracs = (
            self.latency.time_frac(schedule, steps),
            flops_frac(schedule, steps, self.flops),
            schedule.block_frac(steps, self.parts.backbone.fixed_blocks),
        )
        return fracs[0] * share, fracs[1] * share, fracs[2] * share

    def _changed_fracs(self, point: Point, own_calls: int) -> tuple[float, float, float]:
        """`fracs` where a sampler has an acceleration.

        What it saves of a block's FLOPs counts as that part of a block call saved. A guidance
        interval saves whole calls, and so all their blocks.
        """
        sampler = point.sampler
        mixes = self._mixes(point)
        fewer = self._changed_flops(sampler)
        blocks = self.parts.backbone.fixed_blocks + np.arange(1.0, point.schedule.depth + 1)
        # of one block; those that always run save as much
        added, fewer_added = (
            table[-1] - (table[0] if len(table) > 1 else 0.0) for table in (self.flops, fewer)
        )
        fewer_blocks = blocks * fewer_added / added
        if isinstance(self._acceleration(sampler), GuidanceInterval):
            fewer_blocks = blocks / 2  # and what is beside the blocks halves too
        tables = (
            (self.latency.median_ms, self._changed_ms(sampler)),
            (self.flops, fewer),
            (blocks.tolist(), fewer_blocks.tolist()),
        )
        time, flops, calls = (
            mixed_cost(mixes, plain, changed) / (own_calls * plain[-1]) for plain, changed in tables
        )
        return time, flops, calls

    def _mixes(self, point: Point) -> list[Mix]:
        """What each network call of a point is made of, cost by cost."""
        depths = point.schedule.exit_depth_at(self.parts.samplers[point.sampler]).tolist()
        own_exits = self.parts.config.search.own_exits
        return self._acceleration(point.sampler).mix(self.parts.backbone, depths, own_exits)

    def of_calls(self, sampler: Sampler) -> npt.NDArray[np.float64]:
        """(calls, depth) cost of each network call of a sampler at exit depths 1…depth, in the
        units of the second objective.

        Where an acceleration reuses what an earlier call gave, that call is taken to have had the
        same exit depth.
        """
        timed = self.parts.config.search.cost == "time"
        plain = self.latency.median_ms if timed else self.flops
        count = len(self.parts.samplers[sampler])
        if not sampler.acceleration:
            return np.tile(np.asarray(plain), (count, 1))
        changed = self._changed_ms(sampler) if timed else self._changed_flops(sampler)
        net = self.parts.backbone
        acceleration = self._acceleration(sampler)
        columns = [
            [mixed_cost([mix], plain, changed) for mix in acceleration.mix(net, [d] * count)]
            for d in range(1, net.depth + 1)
        ]
        return np.asarray(columns).T

    def sampling_gflops(self, point: Point, protocol: Protocol) -> float:
        """Arithmetic of sampling a protocol's images."""
        if point.sampler.acceleration:
            fewer = self._changed_flops(point.sampler)
            calls = mixed_cost(self._mixes(point), self.flops, fewer)
        else:
            steps = self.parts.samplers[point.sampler]
            calls = sum(self.flops[d - 1] for d in point.schedule.exit_depth_at(steps))
        passes = passes_per_call(self.parts.config.sampling.cfg_scale)
        return float(passes * calls) * protocol.num_samples * len(protocol.seeds) / 1e9

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
            if self.parts.config.search.own_exits and not depths.is_full:
                drawn = drawn[drawn < depths.depth]  # see `finetuning.finetune`
        call = float(np.asarray(self.flops)[drawn - 1].mean())
        teacher = self.flops[-1] if config.distill_frac > 0 else 0.0
        return float(config.num_steps * config.batch_size * (3 * call + teacher) / 1e9)

    def equal_compute_steps(self) -> int:
        """Steps of the full network alone, on noise targets, that take the arithmetic of the
        elastic warm-up and of a brief fine-tuning together.

        The brief fine-tuning is counted with all blocks, the most that any schedule's can take.
        """
        train = self.parts.config.train
        elastic = self.parts.config.elastic
        full = self.parts.full
        once = train.model_copy(update={"num_steps": 1, "distill_frac": 0.0})
        spent = self.training_gflops(full, train)
        if elastic is not None:
            spent += self.training_gflops(elastic_depths(self.parts), elastic)
        steps = spent / self.training_gflops(full, once)
        return math.ceil(steps * (1 - 1e-9))  # what rounding adds is no further step
