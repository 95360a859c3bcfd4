"""What a parity file must hold, whatever reads it: names, types, shapes and ranges. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from asesearch.errors import CheckpointError
from asesearch.schedule import ExitSchedule

IMAGES = 2  # or one a prompt
PROMPT = "y."  # begins the names of the prompts' tensors
OUTPUT = "out."  # begins those of the outputs, the exit depth behind it
Value = TypeVar("Value")


class Recorded(Protocol):
    """What must be known of a network whose outputs are on record; see `Backbone`."""

    in_channels: int
    input_size: int
    num_classes: int
    learn_sigma: bool

    @property
    def takes_prompt(self) -> bool:
        """Whether it takes prompts."""


def parity_count(prompts: Mapping[str, Any] | None) -> int:
    """Images in the file."""
    return len(next(iter(prompts.values()))) if prompts else IMAGES


def prompts_of(parity: Mapping[str, Value]) -> dict[str, Value] | None:
    """The prompts among the tensors of the file."""
    return {k.removeprefix(PROMPT): v for k, v in parity.items() if k.startswith(PROMPT)} or None


def check_tensors(
    path: Path,
    parity: Mapping[str, Any],
    net: Recorded,
    schedule: ExitSchedule,
    num_train_timesteps: int,
) -> None:
    """Refuse a file at `path` whose tensors are not those of the network and its schedule.

    Raises:
        CheckpointError: names, shapes or types that do not fit, or values out of range.
    """
    prompts = prompts_of(parity) if net.takes_prompt else None
    inputs = {"x_t", "t", *(("y",) if net.num_classes else ())}
    inputs |= {f"{PROMPT}{k}" for k in prompts or {}}
    wanted = inputs | {f"{OUTPUT}{d}" for d in schedule.exit_depths}
    if wanted != parity.keys() or (net.takes_prompt and prompts is None):
        odd = sorted(wanted ^ parity.keys())
        raise CheckpointError(
            f"{path} must hold inputs, and outputs at the exit depths of the schedule, "
            f"{', '.join(sorted(wanted))}; missing or unknown: {', '.join(odd)[:80]}; export it "
            "again"
        )
    count = parity_count(prompts)
    image = (count, net.in_channels, net.input_size, net.input_size)
    out = (count, net.in_channels * (2 if net.learn_sigma else 1), *image[2:])
    shapes = {"x_t": image, "t": (count,), "y": (count,)}
    for name, value in parity.items():
        whole = name in ("t", "y")
        shape = shapes.get(name, (count, *value.shape[1:]) if name in inputs else out)
        kind = "int64" if whole else "float32"
        if value.shape != shape or (_type(value) != kind and not name.startswith(PROMPT)):
            raise CheckpointError(
                f"{name} in {path} must be {kind} {tuple(shape)}; got "
                f"{_type(value)} {tuple(value.shape)}; export it again"
            )
        top = {"t": num_train_timesteps, "y": net.num_classes}.get(name)
        if top is not None and not 0 <= int(value.min()) <= int(value.max()) < top:
            raise CheckpointError(
                f"{name} in {path} must lie in 0…{top - 1}; got {value.tolist()}; export it again"
            )


def _type(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
