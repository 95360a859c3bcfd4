"""`verify`: an exported folder looked at as its user would meet it: files, network, outputs, speed.

Each format opens its folder in its own way (`FORMATS`); what is checked of it is the same for all.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from asesearch.backbones.compiled import compiled
from asesearch.backbones.device import default_device, plain_torch
from asesearch.backbones.exit_weights import weight_sets
from asesearch.config import SamplingConfig, parse_section
from asesearch.deployment import bundle, onnx_runtime, parity
from asesearch.deployment.manifest import check_files, check_format, check_names, read_manifest
from asesearch.deployment.reading import open_bundle
from asesearch.deployment.recorded import IMAGES
from asesearch.errors import AseSearchError, CheckpointError, ConfigError, is_out_of_memory
from asesearch.evaluation.clock import compare_sampling_time
from asesearch.sampling import check_eager
from asesearch.schedule import ExitSchedule

SPEED_S = 20.0  # that timing takes, about
PAIRS = 5  # timed samplings under the schedule and by the full network, at most
FEWEST_STEPS = 2  # of a sampling that is timed
KEPT = 0.5  # share of the promised saving of time that must be there
NOISE = 2.0  # spreads that a busy machine may add to the measured time


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: "files", "network", "parity", "images" or "speed".
        passed: whether it is as it should be.
        found: what was found, in words.
        numbers: the same as plain data.
    """

    name: str
    passed: bool
    found: str
    numbers: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


Run = Callable[[ExitSchedule | None, int, int], Sequence[float]]


@dataclass(frozen=True)
class Opened:
    """An exported folder that is loaded; all that a format must give.

    Attributes:
        what: its network, in words.
        schedule: its exit schedule.
        num_steps: of its sampler.
        batch_size: images that it samples together, at most.
        errors: runs the network on the inputs on record; exit depth -> the largest difference from
            the outputs on record over the largest of them.
        tolerance: the largest such error that is right.
        run: samples so many images in so many steps as exported, or under another schedule of this
            network (and then without acceleration); gives the timesteps of its network calls, and
            refuses images that are not finite. None where the folder can't run at full depth.
        compiled: the first run compiles, which takes longer than what is timed.
        acceleration: of its sampler, which runs in all its steps or not at all; empty for none.
        fixed_blocks: see `Backbone`.
    """

    what: str
    schedule: ExitSchedule
    num_steps: int
    batch_size: int
    errors: Callable[[], Mapping[int, float]]
    tolerance: float
    run: Run | None = None
    compiled: bool = False
    acceleration: str = ""
    fixed_blocks: int = 0


def _bundle(folder: Path, data: Mapping[str, Any], compile: bool | None = None) -> Opened:
    check_format(folder, data, bundle.FORMAT, bundle.VERSION)
    check_names(folder, data, bundle.FILES)
    made, recorded = open_bundle(folder, data, default_device())
    if compile is not None:
        if made.acceleration is not None:
            check_eager(compile)
        made = replace(made, sampling=made.sampling.model_copy(update={"compile": compile}))
    return _of_bundle(made, recorded)


def _aoti(folder: Path, data: Mapping[str, Any]) -> Opened:
    from asesearch.deployment import aoti

    aoti.check_files_of(folder, data)
    opened = _of_bundle(*aoti.open_aoti(folder, data))
    return replace(opened, what=opened.what.replace("; ", ", its block compiled; ", 1))


def _of_bundle(made: bundle.Bundle, recorded: Mapping[str, torch.Tensor]) -> Opened:
    def run(schedule: ExitSchedule | None, num_steps: int, num_images: int) -> Sequence[float]:
        plain = replace(made, schedule=schedule or made.schedule, acceleration=None)
        chosen = made if schedule is None else plain
        samples = chosen.sample(range(num_images), None, num_steps)
        _check_finite(samples.images)
        return samples.timesteps

    def errors() -> Mapping[int, float]:
        with compiled(net, made.sampling.compile):
            return parity.parity_errors(net, recorded)

    net = made.backbone
    code = ", compiled blocks" * made.sampling.compile
    first = weight_sets(net)[0]
    count, whole = (sum(p.numel() for p in own.parameters()) for own in (net, first))
    own = f", {(count - whole) / 1e6:.3g} M of them weights of their own for early exits"
    return Opened(
        what=f"{type(first).__name__} of {net.depth} blocks, {count / 1e6:.3g} M parameters"
        f"{own * (first is not net)}; schedule {made.schedule}, {made.sampler}{code}",
        schedule=made.schedule,
        num_steps=made.sampling.num_steps,
        batch_size=made.sampling.batch_size,
        errors=errors,
        tolerance=parity.TOLERANCE,
        run=run,
        compiled=made.sampling.compile,
        acceleration=made.acceleration_name,
        fixed_blocks=net.fixed_blocks,
    )


def _diffusers(folder: Path, data: Mapping[str, Any]) -> Opened:
    from asesearch.deployment import diffusers_export, diffusers_hook

    pipeline = diffusers_export.open_diffusers(folder, data)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(default_device())
    how = parse_section(SamplingConfig, data["sampling"], "sampling")
    classes = pipeline.transformer.config.num_embeds_ada_norm

    @cache  # reading the weights of early exits is no part of a sampling's time
    def applied() -> diffusers_hook.ScheduleHandle:
        return diffusers_hook.apply_exit_schedule(pipeline, folder)

    def run(other: ExitSchedule | None, num_steps: int, num_images: int) -> Sequence[float]:
        applied().schedule = other or schedule
        labels = [i % classes for i in range(num_images)]
        generators = [torch.Generator().manual_seed(i) for i in range(num_images)]
        _check_finite(pipeline(labels, None, generators, num_steps, "latent").images)
        return [float(t) for t in pipeline.scheduler.timesteps]

    with diffusers_hook.apply_exit_schedule(pipeline, folder) as handle:
        what = f"{type(pipeline.transformer).__name__} of {handle.schedule.depth} blocks"
        schedule = handle.schedule
    return Opened(
        what=f"{what}, in a diffusers pipeline; schedule {schedule}, {how.sampler}",
        schedule=schedule,
        num_steps=how.num_steps,
        batch_size=how.batch_size,
        errors=lambda: diffusers_export.parity_errors(pipeline, folder, data, schedule),
        tolerance=diffusers_export.TOLERANCE,
        run=run,
    )


def _onnx(folder: Path, data: Mapping[str, Any]) -> Opened:
    onnx_runtime.check_files_of(folder, data)
    made = onnx_runtime.open_onnx(folder, data, threads=torch.get_num_threads())

    def run(schedule: ExitSchedule | None, num_steps: int, num_images: int) -> Sequence[float]:
        chosen = schedule or made.schedule
        samples = made.sample(range(num_images), None, num_steps, schedule=chosen)
        _check_finite(torch.from_numpy(samples.images))
        return samples.timesteps

    net = made.network
    return Opened(
        what=f"{net.name} of {net.depth} blocks, {net.parameters / 1e6:.3g} M parameters, on "
        f"onnxruntime; schedule {made.schedule}, {made.sampling.sampler}",
        schedule=made.schedule,
        num_steps=made.sampling.num_steps,
        batch_size=made.sampling.batch_size,
        errors=made.parity_errors,
        tolerance=onnx_runtime.TOLERANCE,
        run=run,
        fixed_blocks=net.fixed_blocks,
    )


def _check_finite(images: torch.Tensor) -> None:
    """Refuse what are no images.

    Raises:
        CheckpointError: not all of it is finite.
    """
    wrong = sum(not image.isfinite().all() for image in images)
    if wrong:
        raise CheckpointError(
            f"all images must be finite; got {wrong} of {len(images)} with NaN or infinite values; "
            "export it again, or check versions and device"
        )


#: Format of a manifest -> what opens such a folder, whose files are those on record.
FORMATS: dict[str, Callable[[Path, Mapping[str, Any]], Opened]] = {
    bundle.FORMAT: _bundle,
    onnx_runtime.FORMAT: _onnx,
    # by name, for their modules import much
    "asesearch.diffusers": _diffusers,
    "asesearch.aoti": _aoti,
}


@plain_torch()
def verify(
    folder: str | os.PathLike[str], *, speed: bool = True, compile: bool | None = None
) -> list[Check]:
    """Look at an exported folder: the hashes of its files, its network, its outputs against those
    on record, whether the images that it makes are finite, and its measured speed on this machine
    beside what its blocks promise.

    What fails ends the list, since the rest could not be relied on.

    Args:
        folder: that `asesearch export` wrote, in any format.
        speed: time it, which takes about 20 s more.
        compile: of the format bundle, run the network's blocks as compiled code, or not; None as it
            says.
    """
    folder = Path(folder)
    checks: list[Check] = []
    name = "files"
    try:
        data = read_manifest(folder)
        checks.append(_files(folder, data))
        name = "network"
        opened = _open(folder, data, compile)
        checks.append(Check(name, True, opened.what, {"schedule": str(opened.schedule)}))
        name = "parity"
        checks.append(_parity(opened))
        if checks[-1].passed and opened.run is not None:
            name = "images"
            checks.append(_images(opened, opened.run))
            name = "speed"
            if speed:
                checks.append(_speed(opened, opened.run))
    except AseSearchError as error:
        checks.append(Check(name, False, str(error), {}))
    return checks


def _open(folder: Path, data: Mapping[str, Any], compile: bool | None) -> Opened:
    if data["format"] not in FORMATS:
        raise CheckpointError(
            f"{folder} must be of the format {' or '.join(FORMATS)}; got {data['format'][:40]!r}; "
            "update asesearch"
        )
    if compile is None:
        return FORMATS[data["format"]](folder, data)
    if data["format"] != bundle.FORMAT:
        raise ConfigError(
            f"a choice of compiled blocks is for the format {bundle.FORMAT}; got {data['format']}; "
            "leave it out"
        )
    return _bundle(folder, data, compile)


def _files(folder: Path, data: Mapping[str, Any]) -> Check:
    check_files(folder, data)
    sizes = {name: entry["bytes"] for name, entry in data["files"].items()}
    found = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, hashes as recorded"
    return Check("files", True, found, {"bytes": sizes})


def _parity(opened: Opened) -> Check:
    errors = opened.errors()
    worst = max(errors, key=lambda depth: errors[depth] if errors[depth] >= 0 else math.inf)
    passed = all(error <= opened.tolerance for error in errors.values())  # not so for NaN
    found = (
        f"{len(errors)} exit depths, off by at most {errors[worst]:.2g} of the largest output "
        f"(depth {worst}; tolerance {opened.tolerance:g})"
    )
    numbers = {"errors": {str(d): e for d, e in errors.items()}, "tolerance": opened.tolerance}
    return Check("parity", passed, found, numbers)


def _images(opened: Opened, run: Run) -> Check:
    """A few steps of a sampling, in its own arithmetic, which the outputs on record are not of."""
    steps = min(opened.num_steps, FEWEST_STEPS)
    run(opened.schedule, steps, IMAGES)
    found = f"{IMAGES} images in {steps} of {opened.num_steps} steps, finite"
    return Check("images", True, found, {"images": IMAGES, "steps": steps})


def _speed(opened: Opened, run: Run) -> Check:
    """Whole samplings under the schedule and by the full network in turn."""
    schedule = opened.schedule
    full = ExitSchedule.full(schedule.depth, schedule.num_train_timesteps)
    images, steps, pairs = _size(opened, lambda count: run(full, 1, count))
    timesteps: list[float] = []

    def early() -> None:
        timesteps[:] = run(None, steps, images)

    # a slow network has run a step, which is all the warming it needs
    warm = pairs == 1 and not opened.compiled
    time_ = compare_sampling_time(early, lambda: run(full, steps, images), pairs, warm=warm)
    bound = schedule.block_frac(timesteps, opened.fixed_blocks)
    found = (
        f"{time_.median:.3f} ± {time_.spread:.3f} of the full network's time, blocks alone "
        f"{bound:.3f} ({images} images, {steps} of {opened.num_steps} steps, {pairs} pairs)"
    )
    numbers = {
        "time_frac": time_.median,
        "spread": time_.spread,
        "block_frac": bound,
        "images": images,
        "steps": steps,
        "full_s": min(b for _, b in time_.pairs),
    }
    if opened.acceleration:
        found = f"{found}; {opened.acceleration} is to save beside the blocks that exit"
        faster = time_.median - NOISE * time_.spread < 1.0
        return Check("speed", faster, found, numbers)
    if bound == 1.0:
        return Check("speed", True, f"{found}; all blocks run, so no saving is promised", numbers)
    kept = 1 - time_.median + NOISE * time_.spread >= KEPT * (1 - bound)
    return Check("speed", kept, found, numbers)


def _size(opened: Opened, one_step: Callable[[int], object]) -> tuple[int, int, int]:
    """Images, steps and pairs that take about `SPEED_S` together: images first as many as are
    sampled together, then all steps, then pairs.

    Args:
        opened: what is timed.
        one_step: samples so many images in one step by the full network.
    """

    target = SPEED_S / (2 * PAIRS + 2)  # for one sampling

    def seconds(count: int) -> float:
        start = time.perf_counter()
        one_step(count)
        first = time.perf_counter()
        if not opened.compiled and first - start > target:
            return first - start  # a slow one: what comes once is little of it
        one_step(count)
        return time.perf_counter() - first

    images = 1
    step_s = seconds(images)
    while images < opened.batch_size and 4 * step_s * opened.num_steps < target:
        more = min(4 * images, opened.batch_size)
        try:
            step_s = seconds(more)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break  # a smaller machine than the one that exported it
        images = more
    steps = min(opened.num_steps, max(FEWEST_STEPS, int(target / step_s)))
    if opened.acceleration:
        steps = opened.num_steps
    pairs = max(1, min(PAIRS, int(SPEED_S / (2 * steps * step_s)) - 1))
    return images, steps, pairs
