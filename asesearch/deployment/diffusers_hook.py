"""Run an unchanged diffusers pipeline under an exit schedule."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from asesearch.backbones.block_exits import BlockExits, argument_names
from asesearch.errors import ConfigError, ScheduleError
from asesearch.schedule import ExitSchedule


class ScheduleHandle:
    """A schedule attached to a diffusers transformer until `detach()`, or to the end of a `with`
    block.

    Attributes:
        nfe: calls of the transformer so far.
        block_calls: blocks really run in these calls, whatever the size of the batch.
    """

    def __init__(self, transformer: nn.Module, schedule: ExitSchedule) -> None:
        self.schedule = schedule
        self.nfe = 0
        self.block_calls = 0
        self._exits = BlockExits(transformer)
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

    def detach(self) -> None:
        """Make the transformer what it was; does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        self._exits.detach()

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = {**dict(zip(self._names, args, strict=False)), **kwargs}
        acting = [name for name in self._exits.spec.refused if values.get(name) is not None]
        if acting:
            raise ConfigError(
                f"early exit can't be combined with {', '.join(self._exits.spec.refused)}, which "
                f"act between the blocks; got {', '.join(acting)}; detach the schedule for this "
                "call"
            )
        depths = self._depths(values.get("timestep"))
        batch = values["hidden_states"].shape[0]
        if len(set(depths)) > 1 and len(depths) != batch:
            raise ConfigError(
                f"timestep must be one number or one per sample ({batch}); got {len(depths)}; "
                f"expand it to ({batch},)"
            )
        self._exits.begin(depths if len(set(depths)) > 1 else depths[0])
        self.nfe += 1

    def _depths(self, timestep: object) -> list[int]:
        """Scheduled depth of each entry of the transformer's timestep argument; waits for the
        device it lies on."""
        if timestep is None:
            raise ConfigError(
                "an exit schedule needs the timestep; got none; pass timestep to the transformer"
            )
        t: npt.NDArray[np.float64] = np.atleast_1d(
            torch.as_tensor(timestep).detach().cpu().double().numpy()
        )
        end = self.schedule.num_train_timesteps
        # rectified flow begins at t = num_train_timesteps itself: that is the noisiest interval
        depths: list[int] = self.schedule.exit_depth_at(
            np.where(t == end, np.nextafter(end, 0.0), t)
        ).tolist()
        return depths

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.block_calls += self._exits.end()


def attach_exit_schedule(pipeline_or_transformer: Any, schedule: ExitSchedule) -> ScheduleHandle:
    """Make every call of a pipeline's transformer run only the blocks its timestep is scheduled
    for.

    The timestep is read from the call itself, so the pipeline, its scheduler and its number of
    steps stay as they are.

    Args:
        pipeline_or_transformer: a diffusers pipeline with a `transformer`, or the transformer.
        schedule: for the transformer's depth and, where a pipeline is given, its scheduler's
            timesteps.

    Returns:
        A handle that counts, and detaches; also a context manager.

    Raises:
        ScheduleError: a schedule for another depth or number of timesteps.
        ConfigError: no transformer, an unsupported one, one compiled as a whole, or one attached
            already.
    """
    transformer = getattr(pipeline_or_transformer, "transformer", pipeline_or_transformer)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            "a schedule attaches to a transformer, or a pipeline that has one; got "
            f"{type(pipeline_or_transformer).__name__}; pass pipeline.transformer"
        )
    scheduler = getattr(pipeline_or_transformer, "scheduler", None)
    num_timesteps = (
        schedule.num_train_timesteps if scheduler is None else scheduler.config.num_train_timesteps
    )
    if num_timesteps != schedule.num_train_timesteps:
        raise ScheduleError(
            f"the schedule is for {schedule.num_train_timesteps} timesteps; got a "
            f"scheduler of {num_timesteps}; make the schedule with "
            f"num_train_timesteps={num_timesteps}"
        )
    return ScheduleHandle(transformer, schedule)
