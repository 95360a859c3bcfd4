"""What a schedule costs: latency measured once per study, FLOPs, and the bound that block calls
set.

Three numbers, each a fraction of the full network's and none of them the others:
`ExitSchedule.block_frac` counts block calls only; `LatencyTable.bound_frac` adds the part of a call
that no schedule can drop; `LatencyTable.time_frac` sums what was measured.
`clock.compare_sampling_time` then times whole samplings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from asesearch.backbones import conditioning
from asesearch.backbones.acceleration import Acceleration, Mix
from asesearch.backbones.base import Backbone
from asesearch.backbones.compiled import compiled
from asesearch.backbones.conditioning import Conditioning
from asesearch.errors import EvaluationError, ScheduleError
from asesearch.evaluation.clock import Timer, call_timer, half_iqr
from asesearch.schedule import ExitSchedule


def _cost_frac(
    cost: Sequence[float] | npt.NDArray[np.floating],
    schedule: ExitSchedule,
    timesteps: npt.ArrayLike,
) -> float:
    """Cost of network calls at `timesteps` over that at full depth; cost[d - 1] is one call's at
    exit depth d."""
    table = np.asarray(cost, dtype=np.float64)
    if schedule.depth != len(table):
        raise ScheduleError(
            f"the cost table is for a network of {len(table)} blocks; got a schedule for "
            f"{schedule.depth}; use rescaled({len(table)})"
        )
    depths = np.atleast_1d(schedule.exit_depth_at(timesteps))
    if depths.size == 0:
        raise ScheduleError(
            "timesteps must not be empty; got none; give the timesteps the sampler calls at"
        )
    return float(table[depths - 1].sum() / (table[-1] * depths.size))


# -- latency -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyTable:
    """Time of one network call at each exit depth.

    Attributes:
        batch_size: images per call; under guidance twice the sampler's.
        device: name of the device.
        threads: CPU threads of torch.
        dtype: of weights and images.
        median_ms, spread_ms: median and half-IQR, for exit depths
            1…depth (index 0 = depth 1). Depths below the network's least have its time.
        repeats: timed calls a depth.
        precision: of the network's arithmetic, as `SamplingConfig.precision`; empty where it is not
            known.
        guided: whether calls have guidance's double batch; None where it is not known.
        compile: whether the network's blocks ran as compiled code.
    """

    batch_size: int
    device: str
    threads: int
    dtype: str
    median_ms: tuple[float, ...]
    spread_ms: tuple[float, ...]
    repeats: int
    precision: str = ""
    guided: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        ok = 0 < len(self.median_ms) == len(self.spread_ms) and all(
            0 < m < float("inf") for m in self.median_ms
        )
        if not ok:
            raise EvaluationError(
                "a latency table needs one positive median and one spread a depth; got "
                f"{self.median_ms} and {self.spread_ms}; measure it again"
            )

    @property
    def fit(self) -> tuple[float, float]:
        """Least-squares line through the medians: (fixed_ms, per_block_ms), neither below zero."""
        depths = np.arange(1, len(self.median_ms) + 1)
        ms = np.asarray(self.median_ms)
        if len(ms) == 1:
            return 0.0, float(ms[0])
        per_block, fixed = (float(c) for c in np.polyfit(depths, ms, 1))
        if fixed < 0:
            return 0.0, float(depths @ ms / (depths @ depths))
        return (fixed, per_block) if per_block >= 0 else (float(ms.mean()), 0.0)

    def time_frac(self, schedule: ExitSchedule, timesteps: npt.ArrayLike) -> float:
        """Predicted sampling time over the full network's, from the medians.

        Args:
            timesteps: where the sampler calls the network, each call once.

        Raises:
            ScheduleError: a schedule for another depth, or no timesteps.
        """
        return _cost_frac(self.median_ms, schedule, timesteps)

    def bound_frac(self, schedule: ExitSchedule, timesteps: npt.ArrayLike) -> float:
        """As `time_frac`, from the fitted line: the block-call bound with the fixed part of a call
        counted in.

        Raises:
            ScheduleError: a schedule for another depth, or no timesteps.
        """
        fixed, per_block = self.fit
        return _cost_frac(
            fixed + per_block * np.arange(1, len(self.median_ms) + 1), schedule, timesteps
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LatencyTable:
        """Inverse of `to_dict`.

        Raises:
            EvaluationError: a missing or unknown key.
        """
        keys = {f.name for f in fields(cls)}
        # earlier releases did not have these
        if not keys - {"precision", "guided", "compile"} <= set(data) <= keys:
            raise EvaluationError(
                f"a latency table has the keys {sorted(keys)}; got {sorted(data)}; delete it to "
                "measure again"
            )
        return cls(
            **{**data, "median_ms": tuple(data["median_ms"]), "spread_ms": tuple(data["spread_ms"])}
        )


def device_name(device: torch.device) -> str:
    """What a latency table is of: the GPU's name, or the kind of device elsewhere."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _inputs(
    backbone: Backbone,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    y: Conditioning | None,
) -> tuple[Tensor, Tensor, Conditioning | None]:
    x_t = torch.zeros(
        batch_size,
        backbone.in_channels,
        backbone.input_size,
        backbone.input_size,
        device=device,
        dtype=dtype,
    )
    t = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if y is None:
        return x_t, t, t if backbone.num_classes else None
    return x_t, t, conditioning.to(y, device)


def measure_latency(
    backbone: Backbone,
    batch_size: int,
    repeats: int = 15,
    device: str | torch.device = "cpu",
    y: Conditioning | None = None,
    timer: Timer | None = None,
    compile: bool = False,
) -> LatencyTable:
    """Time one network call at every exit depth, the depths in a new random order each round.

    Interleaving spreads a drift of the machine's speed over all depths alike. One round is run
    first and thrown away.

    Args:
        backbone: already on `device`; its training mode is left as it is.
        batch_size: images per call; with classifier-free guidance a sampler's call has twice its
            images.
        repeats: rounds.
        y: conditioning of the batch, where the network takes more than class labels.
        timer: runs a call and gives its milliseconds; by default `call_timer(device)`.
        compile: run the network's blocks as compiled code, see `backbones.compiled`; the round
            thrown away pays for it.

    Raises:
        EvaluationError: no repeats or no images.
        ConfigError: blocks that can't be compiled here.
    """
    device = torch.device(device)
    depths = range(1, backbone.depth + 1)
    timed = _timed(backbone, depths, batch_size, repeats, device, y, timer, compile)
    dtype = next(p.dtype for p in backbone.parameters())
    return LatencyTable(
        batch_size=batch_size,
        device=device_name(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        median_ms=tuple(np.median(timed, axis=1).tolist()),
        spread_ms=tuple(half_iqr(timed, axis=1).tolist()),
        repeats=repeats,
        compile=compile,
    )


def full_call_ms(
    backbone: Backbone,
    batch_size: int,
    repeats: int = 15,
    device: str | torch.device = "cpu",
    y: Conditioning | None = None,
    timer: Timer | None = None,
    compile: bool = False,
) -> float:
    """The last entry of the latency table alone, for a fraction of the table's time; see
    `measure_latency`."""
    device = torch.device(device)
    depths = [backbone.depth]
    timed = _timed(backbone, depths, batch_size, repeats, device, y, timer, compile)
    return float(np.median(timed))


def _timed(
    backbone: Backbone,
    depths: Sequence[int],
    batch_size: int,
    repeats: int,
    device: torch.device,
    y: Conditioning | None,
    timer: Timer | None,
    compile: bool,
) -> npt.NDArray[np.float64]:
    """(depths, repeats) milliseconds of calls at these exit depths; see `measure_latency`."""
    if repeats < 1 or batch_size < 1:
        raise EvaluationError(
            f"repeats and batch_size must be at least 1; got {repeats} and {batch_size}; 15 "
            "repeats do"
        )
    timer = timer or call_timer(device)
    dtype = next(p.dtype for p in backbone.parameters())
    x_t, t, y = _inputs(backbone, batch_size, device, dtype, y)
    times = np.zeros((len(depths), repeats + 1))
    with torch.no_grad(), compiled(backbone, compile):
        for repeat, i in _rounds(len(depths), repeats + 1):
            depth = max(depths[i], backbone.min_exit_depth)
            times[i, repeat] = timer(lambda d=depth: backbone(x_t, t, y, exit_depth=d))  # type: ignore[misc]
    return times[:, 1:]


def _rounds(num_depths: int, count: int) -> Iterator[tuple[int, int]]:
    """(round, index of a depth): each round has all of them in a new random order."""
    order = np.arange(num_depths)
    rng = np.random.default_rng(0)
    for number in range(count):
        rng.shuffle(order)
        yield from ((number, int(i)) for i in order)


def measure_changed(
    backbone: Backbone,
    plain: LatencyTable,
    acceleration: Acceleration,
    repeats: int = 7,
    y: Conditioning | None = None,
    timer: Timer | None = None,
) -> LatencyTable:
    """The latency table of calls that an acceleration changes in full.

    Each is timed right after an unchanged call of its depth, and their ratio taken times the
    unchanged table's: so a machine that was busier at one time than at another lends neither an
    advantage. One round is run first and thrown away.

    Args:
        backbone: in eval mode, where `plain` was measured.
        plain: table of unchanged calls.
        acceleration: what changes them.
        repeats: rounds.
        y: conditioning of the batch, where the network takes more than class labels.
        timer: see `measure_latency`.
    """
    parameter = next(backbone.parameters())
    timer = timer or call_timer(parameter.device)
    x_t, t, y = _inputs(backbone, plain.batch_size, parameter.device, parameter.dtype, y)
    ratios = np.zeros((backbone.depth, repeats + 1))
    with torch.no_grad():
        for repeat, i in _rounds(backbone.depth, repeats + 1):
            depth = max(i + 1, backbone.min_exit_depth)

            def call(depth: int = depth) -> Tensor:
                return backbone(x_t, t, y, exit_depth=depth)  # type: ignore[no-any-return]

            unchanged = timer(call)
            with _changed(backbone, acceleration, call):
                ratios[i, repeat] = timer(call) / unchanged
    timed = ratios[:, 1:] * np.asarray(plain.median_ms)[:, None]
    return replace(
        plain,
        median_ms=tuple(np.median(timed, axis=1).tolist()),
        spread_ms=tuple(half_iqr(timed, axis=1).tolist()),
        repeats=repeats,
    )


# -- FLOPs ---------------------------------------------------------------------------------------


def count_flops(
    backbone: Backbone,
    exit_depth: int,
    batch_size: int = 1,
    y: Conditioning | None = None,
    acceleration: Acceleration | None = None,
) -> float:
    """FLOPs an image of one network call: matrix products, convolutions and attention, a
    multiply-add being two.

    Nothing is computed: torch's counter follows shapes only, so the number is the same on every
    machine.

    Args:
        exit_depth: blocks run.
        batch_size: images per call.
        y: conditioning of the batch, where the network takes more than class labels.
        acceleration: count a call that it changes in full.

    Raises:
        ScheduleError: exit_depth outside the network's.
    """
    meta = torch.device("meta")
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    state = {name: torch.empty_like(value, device=meta) for name, value in tensors.items()}
    dtype = next(p.dtype for p in backbone.parameters())
    inputs = _inputs(backbone, batch_size, meta, dtype, y)

    def call() -> None:
        functional_call(backbone, state, inputs, {"exit_depth": exit_depth})

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _changed(backbone, acceleration, call), counter:
        call()
    return counter.get_total_flops() / batch_size


def flops_table(
    backbone: Backbone, y: Conditioning | None = None, acceleration: Acceleration | None = None
) -> tuple[float, ...]:
    """`count_flops` at exit depths 1…depth (index 0 = depth 1), `y` for one image; depths below the
    least have its number."""
    images = 1 if acceleration is None else 2  # what it changes may be a half of guidance
    y = None if y is None else conditioning.repeat(y, images)
    return tuple(
        count_flops(backbone, max(d, backbone.min_exit_depth), images, y, acceleration)
        for d in range(1, backbone.depth + 1)
    )


def flops_frac(schedule: ExitSchedule, timesteps: npt.ArrayLike, flops: Sequence[float]) -> float:
    """FLOPs of a whole sampling over the full network's, from a `flops_table`.

    Raises:
        ScheduleError: a schedule for another depth, or no timesteps.
    """
    return _cost_frac(flops, schedule, timesteps)


# -- calls that an acceleration changes ------------------------------------------------------------


@contextmanager
def _changed(
    backbone: Backbone, acceleration: Acceleration | None, first: Callable[[], object]
) -> Iterator[None]:
    """Inside, calls are changed in full: what they may reuse is of a first call."""
    if acceleration is None:
        yield
        return
    with acceleration.most(backbone).attached(backbone) as begin:
        begin(0)
        first()
        begin(1)
        yield


def mixed_cost(mixes: Sequence[Mix], plain: Sequence[float], changed: Sequence[float]) -> float:
    """Cost of a sampling's calls, each a mix of unchanged ones and ones changed in full.

    Args:
        mixes: of the calls, see `Acceleration.mix`.
        plain: cost of an unchanged call at exit depths 1…depth.
        changed: of one changed in full.
    """
    return float(sum(w * (changed if on else plain)[d - 1] for mix in mixes for w, d, on in mix))
