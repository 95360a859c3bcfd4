"""Run an unchanged diffusers pipeline under an exit schedule."""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiTTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from asesearch.backbones.block_exits import PIPELINE_SPECS, BlockExits, argument_names
from asesearch.backbones.checkpoints import inspect_checkpoint
from asesearch.backbones.dit import DiT
from asesearch.backbones.exit_weights import EXITS, weight_sets
from asesearch.deployment import bundle, diffusers_pipeline
from asesearch.deployment.diffusers_exits import (
    ExitsInPlace,
    exits_of,
    other_weights,
    recorded_exits,
)
from asesearch.deployment.diffusers_pipeline import Restored, as_exported, with_settings
from asesearch.deployment.manifest import MANIFEST, check_format, read_manifest
from asesearch.deployment.reading import load_bundle
from asesearch.errors import CheckpointError, ConfigError, ScheduleError, in_one_line
from asesearch.schedule import ExitSchedule

#: The formats that have a schedule, and the version of each that is read.
FORMATS = {bundle.FORMAT: bundle.VERSION, diffusers_pipeline.FORMAT: diffusers_pipeline.VERSION}
#: Hooks of diffusers' caches that take what all blocks added from a call of the last block.
GROUP_CACHES = (
    "fbc_leader_block_hook",
    "fbc_block_hook",
    "mag_cache_leader_block_hook",
    "mag_cache_block_hook",
    "sea_cache_leader_block",
    "sea_cache_block",
)


_log = logging.getLogger(__name__)


class Scheduled(Protocol):
    """What has an exit schedule, such as a bundle."""

    @property
    def schedule(self) -> ExitSchedule:
        """The schedule."""


class ScheduleHandle:
    """A schedule applied to a diffusers transformer until `remove()`, or to the end of a `with`
    block.

    Attributes:
        nfe: calls of the transformer so far.
        block_calls: blocks really run in these calls, whatever the size of the batch.
    """

    def __init__(self, transformer: nn.Module, schedule: ExitSchedule) -> None:
        self.schedule = schedule
        self.nfe = 0
        self.block_calls = 0
        self._exits = BlockExits(transformer, PIPELINE_SPECS)
        self._own: ExitsInPlace | None = None
        self._pipeline: Callable[[], object] = lambda: None
        self._restored: Restored | None = None
        if schedule.depth != len(self._exits.blocks):
            raise ScheduleError(
                f"the schedule must be for a network of {len(self._exits.blocks)} blocks; got one "
                f"for {schedule.depth}; use rescaled({len(self._exits.blocks)})"
            )
        self._exits.attach()
        self._names = argument_names(type(transformer))
        self._hooks = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Make the pipeline what it was; does nothing the second time."""
        if self._own is not None:
            self._own.close()
        for hook in self._hooks:
            hook.remove()
        self._exits.detach()
        if self._restored is not None:
            self._restored()
            self._restored = None

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = {**dict(zip(self._names, args, strict=False)), **kwargs}
        acting = [name for name in self._exits.spec.refused if values.get(name) is not None]
        if acting:
            raise ConfigError(
                f"early exit can't be combined with {', '.join(self._exits.spec.refused)}, which "
                f"act between the blocks; got {', '.join(acting)}; remove the schedule for this "
                "call"
            )
        self._refuse_group_caches()
        _check_timesteps(getattr(self._pipeline(), "scheduler", None), self.schedule)
        depths = self._depths(values.get("timestep"))
        batch = values["hidden_states"].shape[0]
        if len(set(depths)) > 1 and len(depths) != batch:
            raise ConfigError(
                f"timestep must be one number or one per sample ({batch}); got {len(depths)}; "
                f"expand it to ({batch},)"
            )
        if self._own is not None:
            self._begin(self._own, depths)
        self._exits.begin(depths if len(set(depths)) > 1 else depths[0])
        self.nfe += 1

    def _begin(self, own: ExitsInPlace, depths: list[int]) -> None:
        early = [depth < self.schedule.depth for depth in depths]
        if any(early) and not all(early):
            raise ConfigError(
                "early exits have weights of their own, so one call is at full depth or leaves "
                f"blocks out for all its samples; got blocks {min(depths)} to {max(depths)} in one "
                "call; call the transformer once for each"
            )
        own.begin(early[0])

    def _refuse_group_caches(self) -> None:
        """Refuse a cache that was enabled before or after the schedule."""
        for block in self._exits.blocks:
            registry = getattr(block, "_diffusers_hook", None)
            found = set(getattr(registry, "hooks", ())) & set(GROUP_CACHES)
            if found:
                raise ConfigError(
                    "an exit schedule can't be combined with a cache that learns from a call of "
                    "the last block what all blocks added, for the schedule drops that call; got "
                    f"{', '.join(sorted(found))}; call transformer.disable_cache(), or use "
                    "PyramidAttentionBroadcastConfig, which acts inside the blocks that run"
                )

    def _depths(self, timestep: object) -> list[int]:
        """Scheduled depth of each entry of the transformer's timestep argument; waits for the
        device it lies on."""
        if timestep is None:
            raise ConfigError(
                "an exit schedule needs the timestep; got none; pass timestep to the transformer"
            )
        given = torch.as_tensor(timestep).detach()
        t: npt.NDArray[np.float64] = np.atleast_1d(given.cpu().double().numpy())
        scale = self._exits.time_scale
        if scale != 1:
            eps = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
            now = _current_timestep(getattr(self._pipeline(), "scheduler", None), t * scale)
            handed = np.abs(t * scale - now) <= 2 * eps * now  # rounded, divided, rounded; not NaN
            t = np.where(handed, now, _snapped(t * scale, self.schedule.boundaries, eps))
        end = self.schedule.num_train_timesteps
        # rectified flow begins at t = num_train_timesteps itself, SanaSprint 4e-6 of it above: that
        # is the noisiest interval
        begins = (t >= end) & (t <= end * (1 + 1e-5))
        depths: list[int] = self.schedule.exit_depth_at(
            np.where(begins, np.nextafter(end, 0.0), t)
        ).tolist()
        return depths

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.block_calls += self._exits.end()
        if self._own is not None:
            self._own.end()


def apply_exit_schedule(
    pipeline_or_transformer: Any,
    schedule: ExitSchedule | Scheduled | str | os.PathLike[str],
) -> ScheduleHandle:
    """Make every call of a pipeline's transformer run only the blocks its timestep is scheduled
    for.

    The timestep is read from the call itself, so the pipeline, its scheduler and its number of
    steps stay as they are. From a folder of the format `diffusers`, its DiT also samples as the
    exported network did, see `asesearch.deployment.diffusers_pipeline`; from a bundle of a DiT of
    ours it computes as that, with its spacing of the timestep frequencies and its norms. Where
    early exits have weights of their own (`search.full_depth = "pretrained"`), calls that leave
    blocks out run with those, and the transformer's own weights make the calls at full depth.

    Args:
        pipeline_or_transformer: a diffusers pipeline with a `transformer`, or the transformer.
        schedule: for the transformer's depth and, where a pipeline is given, its scheduler's
            timesteps; or what has one: a bundle, or an exported folder, of which only the manifest
            is read, and of the weights those that early exits have of their own and, of a DiT, what
            its network computes otherwise than diffusers'.

    Returns:
        A handle that counts, and removes it; also a context manager.

    Raises:
        ScheduleError: a schedule for another depth or number of timesteps.
        ConfigError: no transformer, an unsupported one, one compiled as a whole, one under a
            schedule already, or one that the weights of early exits do not fit.
        CheckpointError: no exported folder, or one that is damaged.
    """
    transformer = getattr(pipeline_or_transformer, "transformer", pipeline_or_transformer)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            "a schedule applies to a transformer, or a pipeline that has one; got "
            f"{type(pipeline_or_transformer).__name__}; pass pipeline.transformer"
        )
    data: dict[str, Any] = {}
    source = schedule
    if isinstance(schedule, (str, os.PathLike)):
        data = read_manifest(Path(schedule))
        own = data["format"] if data["format"] in FORMATS else bundle.FORMAT
        check_format(Path(schedule), data, own, FORMATS[own])
        _refuse_acceleration(data.get("acceleration"), schedule)
        schedule = _schedule_in(Path(schedule), data)
    elif not isinstance(schedule, ExitSchedule):
        _refuse_acceleration(getattr(schedule, "acceleration_name", ""), "the bundle")
        schedule = schedule.schedule
    _check_timesteps(getattr(pipeline_or_transformer, "scheduler", None), schedule)
    handle = ScheduleHandle(transformer, schedule)
    try:
        # weak: a pipeline holds its transformer, whose hooks hold the handle
        handle._pipeline = weakref.ref(pipeline_or_transformer)
        handle._own = _own_exits(source, data, transformer)
        handle._restored = as_exported(pipeline_or_transformer, data) or _as_bundled(
            source, data, transformer
        )
    except BaseException:
        handle.remove()
        raise
    return handle


def _own_exits(
    source: object, data: Mapping[str, Any], transformer: nn.Module
) -> ExitsInPlace | None:
    """What puts in place the weights that early exits have of their own; says where the
    transformer's are not the bundle's."""
    if data.get("format") == diffusers_pipeline.FORMAT:
        values = recorded_exits(Path(str(source)), data)
        return ExitsInPlace(transformer, values) if values else None
    if data and _has_own_exits(Path(str(source))):
        source = load_bundle(Path(str(source)), check_parity=False)
    if not isinstance(source, bundle.Bundle):
        return None
    values = exits_of(source.backbone, source.schedule)
    own = ExitsInPlace(transformer, values) if values else None
    odd = other_weights(transformer, source.backbone)
    if odd:
        _log.warning(
            "the transformer has other weights than the bundle's network (%d of its parameters, %s "
            "for example), which the schedule was fine-tuned for; load the bundle's",
            len(odd),
            odd[0],
        )
    return own


def _as_bundled(source: object, data: Mapping[str, Any], transformer: nn.Module) -> Restored | None:
    """Let a DiT of diffusers compute as the DiT of ours in a bundle; what undoes it."""
    own_class: Any = DiTTransformer2DModel
    settings: Mapping[str, Any] | None = None
    if isinstance(source, bundle.Bundle):
        net = weight_sets(source.backbone)[0]
        settings = net.config if isinstance(net, DiT) else None
    elif data:
        with suppress(CheckpointError):  # damage is told by who reads the weights
            info = inspect_checkpoint(Path(str(source)) / bundle.FILES[0])
            settings = info.args if info.kind == "dit" else None
    if settings is None or not isinstance(transformer, own_class):
        return None
    defaults = inspect.signature(DiT).parameters
    return with_settings(
        transformer,
        *(settings.get(name, defaults[name].default) for name in ("frequency_shift", "norm_eps")),
    )


def _has_own_exits(folder: Path) -> bool:
    """Whether a bundle's weights are two sets; damage is told by who reads them."""
    try:
        with safe_open(folder / bundle.FILES[0], "pt") as file:
            return any(name.startswith(EXITS) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _refuse_acceleration(found: object, what: object) -> None:
    """Refuse to leave out half of what a bundle was evaluated with.

    Raises:
        ConfigError: it has an acceleration.
    """
    if found:
        raise ConfigError(
            f"a pipeline takes a schedule, not the acceleration that {what} has beside it; got "
            f"{str(found)[:60]}; sample it with asesearch, or pass its `schedule` alone"
        )


def _schedule_in(folder: Path, data: dict[str, Any]) -> ExitSchedule:
    """The schedule in an exported folder's manifest."""
    try:
        return ExitSchedule.from_dict(data["schedule"])
    except (KeyError, TypeError, ValueError, ScheduleError) as error:
        reason = in_one_line(error, 200)
        raise CheckpointError(
            f"{folder / MANIFEST} must hold an exit schedule; got none that can be read "
            f"({reason}); export it again"
        ) from error


def _current_timestep(scheduler: Any, t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The timestep that a scheduler's next step begins at, for each entry of t; the nearest of its
    timesteps before the first step, where nobody told it which of them that is; NaN where no
    sampling is under way.

    bfloat16 has a number of every four near 900, so what is handed over in it tells neither which
    of the scheduler's timesteps it was nor on which side of a boundary.
    """
    none = np.full_like(t, np.nan)
    if getattr(scheduler, "num_inference_steps", None) is None:
        return none
    timesteps = scheduler.timesteps.detach().cpu().double().numpy()
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        return timesteps[np.abs(timesteps - t[:, None]).argmin(1)] if len(timesteps) else none
    return np.full_like(t, timesteps[index]) if index < len(timesteps) else none


def _snapped(
    t: npt.NDArray[np.float64], boundaries: Sequence[int], eps: float
) -> npt.NDArray[np.float64]:
    """Timesteps that were a boundary but for rounding, put back there: 900 / 1000 is 0.89999998 in
    float32, and 0.898 in bfloat16.

    Args:
        t: any shape.
        boundaries: ascending.
        eps: of the precision they were divided in.
    """
    above = np.asarray(boundaries)[
        np.searchsorted(boundaries, t).clip(max=len(boundaries) - 1)  # the nearest from t on
    ]
    return np.where((t < above) & (above - t <= eps * above), above, t)


def _check_timesteps(scheduler: Any, schedule: ExitSchedule) -> None:
    if scheduler is None:
        return
    num_timesteps = scheduler.config.num_train_timesteps
    if num_timesteps != schedule.num_train_timesteps:
        raise ScheduleError(
            f"the schedule is for {schedule.num_train_timesteps} timesteps; got a "
            f"scheduler of {num_timesteps}; make the schedule with "
            f"num_train_timesteps={num_timesteps}"
        )
