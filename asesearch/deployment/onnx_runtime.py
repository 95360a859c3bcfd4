"""Sampling an exported ONNX folder by onnxruntime and numpy alone. No torch.

The folder has `bundle.json`, `model.onnx` with the graph, `weights.bin` with its weights, and
`parity.safetensors` with inputs and outputs. The graph's inputs are

- `x_t` (N, C, H, W) float32, the noisy images;
- `timestep` (N,) int64, or float32 where the process is in continuous time (vp-sde);
- `y` (N,) int64, class labels; not for an unconditional network;
- `exit_depth` () int64, the number of blocks to run, one for the batch;

and its output is `output` (N, C or 2·C, H, W) float32. N is free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from asesearch.config import DiffusionConfig, SamplingConfig, parse_section
from asesearch.deployment.manifest import (
    check_files,
    check_format,
    check_names,
    has_scaling,
    read_manifest,
)
from asesearch.deployment.recorded import OUTPUT as RECORDED
from asesearch.deployment.recorded import check_tensors
from asesearch.deployment.torch_noise import image_noise
from asesearch.errors import AseSearchError, CheckpointError, ConfigError, in_one_line
from asesearch.sampler import passes_per_call
from asesearch.schedule import ExitSchedule
from asesearch.solvers import find_solver, make_levels, seeds_of

FORMAT = "asesearch.onnx"
VERSION = 1
GRAPH = "model.onnx"
WEIGHTS = "weights.bin"
PARITY = "parity.safetensors"
FILES = (GRAPH, WEIGHTS, PARITY)
EXIT_DEPTH = "exit_depth"
OUTPUT = "output"
TOLERANCE = 1e-3  # of the largest output

_Count = Annotated[int, Field(ge=0, lt=2**40)]
_Size = Annotated[int, Field(ge=1, lt=2**40)]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Network(BaseModel):
    """What a sampler must know of the network in a graph; see `Backbone` for the words."""

    model_config = SamplingConfig.model_config  # as strictly typed

    name: str
    parameters: _Size
    depth: _Size
    min_exit_depth: _Count
    in_channels: _Size
    input_size: _Size
    num_classes: _Count
    has_null_label: bool
    guided_channels: _Size
    learn_sigma: bool
    fixed_blocks: _Count = 0  # graphs of earlier releases do not tell

    @property
    def takes_prompt(self) -> bool:
        """No graph is made of a network that takes prompts."""
        return False


@dataclass(frozen=True, eq=False)
class OnnxSamples:
    """Images and what they cost, as `asesearch.sampling.SampleResult`, in numpy.

    Attributes:
        images: (N, C, H, W) float32, not clamped, in the order of the seeds.
        timesteps: where the network was called, descending.
        nfe: network calls per image; guidance makes two of each.
        block_calls: transformer blocks run per image, also those that run in every call (which
            graphs of earlier releases do not tell).
        seconds: time spent making all the images, noise included.
    """

    images: Floats
    timesteps: tuple[float, ...]
    nfe: int
    block_calls: int
    seconds: float


@dataclass(frozen=True, eq=False)
class OnnxBundle:
    """A loaded folder.

    Attributes:
        session: the onnxruntime session.
        network: what is in it.
        schedule: its exit schedule.
        diffusion, sampling: the process, and the sampler the schedule was evaluated with; the
            precision is float32, whatever `sampling` says.
        evaluation, provenance: as in the bundle it was made of, as plain data.
        latents: how the latents that it makes were scaled; None where it makes images.
        parity: the tensors on record.
    """

    session: Any
    network: Network
    schedule: ExitSchedule
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    evaluation: Mapping[str, Any]
    provenance: Mapping[str, Any]
    latents: Mapping[str, Any] | None
    parity: Mapping[str, npt.NDArray[Any]]

    def run(
        self, x_t: Floats, timestep: Labels, y: Labels | None = None, exit_depth: int | None = None
    ) -> Floats:
        """The network's output (N, C or 2·C, H, W) after `exit_depth` blocks, by default all."""
        depth = self.network.depth if exit_depth is None else exit_depth
        if not self.network.min_exit_depth <= depth <= self.network.depth:
            raise ConfigError(
                f"exit_depth must lie in {self.network.min_exit_depth}…{self.network.depth} for "
                f"this network; got {depth}"
            )
        given = {"x_t": x_t, "timestep": timestep, EXIT_DEPTH: np.array(depth, dtype=np.int64)}
        if y is not None:
            given["y"] = y
        output: Floats = self.session.run([OUTPUT], given)[0]
        return output

    def sample(
        self,
        seeds: Sequence[int],
        y: Labels | Sequence[int] | None = None,
        num_steps: int | None = None,
        *,
        schedule: ExitSchedule | None = None,
        noise: Callable[[], Floats] | None = None,
        batch_size: int | None = None,
    ) -> OnnxSamples:
        """Images (or latents) by the bundle's solver, guidance and (unless given) steps and
        schedule.

        Args:
            seeds: one per image; image i follows from seeds[i] alone, and is that of
                `Bundle.sample` up to rounding.
            y: (N,) class labels; by default seed modulo the number of classes.
            num_steps: solver steps, in place of the bundle's.
            schedule: another one of this network.
            noise: each call gives (N, C, H, W) float32 standard normal noise; in place of that of
                the seeds, and then all images are one batch.
            batch_size: images that go through the network together, by default as many as in the
                study.

        Raises:
            ConfigError: seeds, labels, steps, a batch or a schedule that do not fit.
        """
        levels = make_levels(self.diffusion)
        schedule = schedule or self.schedule
        seeds = self._check(seeds, schedule)
        batch = self._batch(len(seeds), noise is not None, batch_size)
        labels = self._labels(seeds, y)
        num_steps = self.sampling.num_steps if num_steps is None else num_steps
        solver = find_solver(self.sampling.solver, levels)
        timesteps = levels.timesteps(num_steps, solver.power)
        pairs = list(pairwise((*timesteps, levels.t_clean)))
        shape = (self.network.in_channels, self.network.input_size, self.network.input_size)
        parts: list[Floats] = []
        start = time.perf_counter()
        for first in range(0, len(seeds), batch):
            own = slice(first, first + batch)
            draw = noise or image_noise(seeds[own], shape)
            model = self._model(schedule, None if labels is None else labels[own])
            parts.append(solver.integrate(model, draw(), pairs, levels, draw))
        seconds = time.perf_counter() - start
        passes = passes_per_call(self.sampling.cfg_scale)
        images = np.concatenate(parts)
        nfe = passes * len(timesteps)
        blocks = nfe * self.network.fixed_blocks + passes * schedule.block_calls(timesteps)
        return OnnxSamples(images, timesteps, nfe, blocks, seconds)

    def _model(self, schedule: ExitSchedule, y: Labels | None) -> Callable[[Floats, float], Floats]:
        """The network as a solver sees it."""
        scale = self.sampling.cfg_scale
        both = y
        if scale != 1.0 and y is not None:
            both = np.concatenate([y, np.full_like(y, self.network.num_classes)])

        def model(x: Floats, t_cur: float) -> Floats:
            exit_depth = int(schedule.exit_depth_at(t_cur))
            twice = x if scale == 1.0 else np.concatenate([x, x])
            t = np.full(len(twice), t_cur, dtype=self._time_type)
            output = self.run(twice, t, both, exit_depth)
            if scale == 1.0:
                return output
            return _guided(output, scale, self.network.guided_channels)

        return model

    @property
    def _time_type(self) -> type[np.generic]:
        return np.int64 if self.diffusion.process == "discrete" else np.float32

    def _batch(self, count: int, as_one: bool, batch_size: int | None) -> int:
        """How many of the images go through the network together."""
        if batch_size is None:
            return count if as_one else self.sampling.batch_size
        if as_one or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            wanted = "be left out with noise of your own" if as_one else "be at least 1, an integer"
            raise ConfigError(f"batch_size must {wanted}; got {batch_size}; correct it")
        return batch_size

    def _labels(self, seeds: Sequence[int], y: Labels | Sequence[int] | None) -> Labels | None:
        """`y` of `sample`, its default filled in and checked."""
        count = self.network.num_classes
        if not count:
            if y is not None:
                raise ConfigError("this network is unconditional and takes no labels; leave y out")
            return None
        try:
            labels = np.asarray([s % count for s in seeds] if y is None else y)
        except ValueError:  # lists of several lengths
            labels = np.asarray(y, dtype=object)
        if (
            labels.shape != (len(seeds),)
            or labels.dtype.kind not in "iu"
            or (len(labels) and not 0 <= labels.min() <= labels.max() < count)
        ):
            raise ConfigError(
                f"y must be one class in 0…{count - 1} per image, {len(seeds)} integers; got "
                f"{labels.dtype} {labels.reshape(-1)[:5].tolist()}"
            )
        return labels.astype(np.int64)

    def _check(self, seeds: Iterable[int], schedule: ExitSchedule) -> Sequence[int]:
        """The seeds, each one fit, as is the schedule."""
        given = seeds_of(seeds)
        own = (self.network.depth, self.diffusion.num_train_timesteps)
        if (schedule.depth, schedule.num_train_timesteps) != own:
            raise ConfigError(
                f"the schedule must be for {own[0]} blocks and {own[1]} timesteps; got one for "
                f"{schedule.depth} and {schedule.num_train_timesteps}"
            )
        return given

    def parity_errors(self) -> dict[int, float]:
        """Exit depth -> the largest difference from the outputs on record over the largest of
        them."""
        errors = {}
        for name, want in self.parity.items():
            if name.startswith(RECORDED):
                depth = int(name.removeprefix(RECORDED))
                t = self.parity["t"].astype(self._time_type)
                made = self.run(self.parity["x_t"], t, self.parity.get("y"), depth)
                errors[depth] = float(np.abs(made - want).max() / max(np.abs(want).max(), 1e-6))
        return errors


def _guided(output: Floats, scale: float, channels: int) -> Floats:
    """Classifier-free guidance, as `asesearch.sampling.guided`: (2·N, …) -> (N, …)."""
    cond, null = np.split(output, 2)
    eps = null[:, :channels] + scale * (cond[:, :channels] - null[:, :channels])
    return np.concatenate([eps, cond[:, channels:]], axis=1)


def load_onnx(
    folder: str | os.PathLike[str],
    *,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    check_parity: bool = True,
) -> OnnxBundle:
    """Read a folder that `asesearch export --format onnx` or `convert` wrote: hashes are verified
    before the graph is read, and its outputs are compared with those on record.

    Args:
        folder: where.
        threads: of onnxruntime within an operation; by default one for each core.
        providers: of onnxruntime.
        check_parity: compare.

    Raises:
        CheckpointError: missing, of another version, damaged, a graph that this onnxruntime can't
            run, or computing something else here than where it was made.
        ConfigError: no onnxruntime.
    """
    folder = Path(folder)
    data = read_manifest(folder)
    check_files_of(folder, data)
    check_files(folder, data)
    bundle = open_onnx(folder, data, threads=threads, providers=providers)
    if check_parity:
        for depth, error in bundle.parity_errors().items():
            if not error <= TOLERANCE:
                raise CheckpointError(
                    f"the graph of {folder} computes something else here than where it was "
                    f"exported: at exit depth {depth} it is off by {error:.2g} of the largest "
                    f"output (tolerance {TOLERANCE:g}); check the version of onnxruntime"
                )
    return bundle


def check_files_of(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse a manifest of another format, or one that names other files.

    Raises:
        CheckpointError: naming what differs.
    """
    check_format(folder, data, FORMAT, VERSION)
    check_names(folder, data, FILES)


def open_onnx(
    folder: Path,
    data: Mapping[str, Any],
    *,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> OnnxBundle:
    """A folder whose files are those on record.

    Raises:
        CheckpointError: parts that do not fit each other, or a graph that can't be run here.
        ConfigError: no onnxruntime.
    """
    try:
        bundle = OnnxBundle(
            session=None,
            network=parse_section(Network, data["network"], "network"),
            schedule=ExitSchedule.from_dict(data["schedule"]),
            diffusion=parse_section(DiffusionConfig, data["diffusion"], "diffusion"),
            sampling=parse_section(SamplingConfig, data["sampling"], "sampling"),
            evaluation=data["evaluation"],
            provenance=data["provenance"],
            latents=data["latents"],
            parity=load_file(folder / PARITY),
        )
        find_solver(bundle.sampling.solver, make_levels(bundle.diffusion))
        bundle._check([0], bundle.schedule)
        _check_network(bundle.network, bundle.sampling)
        _check_latents(bundle.latents, bundle.network.in_channels)
        steps = bundle.diffusion.num_train_timesteps
    except (AseSearchError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = in_one_line(error)
        raise CheckpointError(
            f"{folder} holds an ONNX export that does not fit together: {reason}; export it again"
        ) from error
    check_tensors(folder / PARITY, bundle.parity, bundle.network, bundle.schedule, steps)
    session = _session(folder / GRAPH, threads, providers)
    _check_inputs(folder / GRAPH, session, bundle)
    return OnnxBundle(**{**vars(bundle), "session": session})


def _check_network(net: Network, how: SamplingConfig) -> None:
    """Refuse numbers that no network has together, and guidance of one that can't be guided.

    Raises:
        ConfigError: naming what does not fit.
    """
    for name, top in (("min_exit_depth", "depth"), ("guided_channels", "in_channels")):
        if getattr(net, name) > getattr(net, top):
            raise ConfigError(
                f"network: {name} should be at most {top}, {getattr(net, top)} "
                f"(got {getattr(net, name)})"
            )
    if how.cfg_scale != 1.0 and not net.has_null_label:
        raise ConfigError(f"network: cfg_scale {how.cfg_scale} needs a null label (got none)")


def _check_latents(latents: object, channels: int) -> None:
    """Refuse a scaling of latents other than the network's.

    Raises:
        ConfigError: see `has_scaling`.
    """
    if not has_scaling(latents, channels):
        raise ConfigError(
            f"latents must give shift and scale of {channels} channels, or be null (got "
            f"{str(latents)[:80]})"
        )


def _session(graph: Path, threads: int | None, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"an ONNX export runs on onnxruntime; got none ({error}); pip install 'asesearch[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=list(providers))
    except Exception as error:  # onnxruntime has no base class of its own
        reason = in_one_line(error)
        raise CheckpointError(
            f"onnxruntime {onnxruntime.__version__} can't run {graph}: {reason}; export it again, "
            "or use another version of onnxruntime"
        ) from error


def _check_inputs(graph: Path, session: Any, bundle: OnnxBundle) -> None:
    """Refuse a graph with other inputs than the network has."""
    net = bundle.network
    image = [net.in_channels, net.input_size, net.input_size]
    discrete = bundle.diffusion.process == "discrete"
    time_type = "tensor(int64)" if discrete else "tensor(float)"
    wanted = {"x_t": ("tensor(float)", image), "timestep": (time_type, [])}
    if net.num_classes:
        wanted["y"] = ("tensor(int64)", [])
    found = {i.name: (i.type, list(i.shape[1:])) for i in session.get_inputs()}
    if found != wanted | {EXIT_DEPTH: ("tensor(int64)", [])}:
        raise CheckpointError(
            f"{graph} must have the inputs {', '.join(wanted)} and {EXIT_DEPTH} of the network on "
            f"record; got {found}; export it again"
        )
