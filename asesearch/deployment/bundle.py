"""`Bundle`: a network, its exit schedule and how it is sampled, as a value; read by `reading`,
written by `writing`. Sampling one needs torch, numpy, safetensors and pydantic alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asesearch.backbones.acceleration import Acceleration
from asesearch.backbones.base import Backbone
from asesearch.backbones.conditioning import (
    Conditioning,
    Given,
    conditioning_of,
    labels_of,
    take,
)
from asesearch.backbones.device import cpu_by_default
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.diffusion import make_diffusion
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler
from asesearch.sampling import (
    SampleResult,
    check_acceleration,
    check_images,
    check_sampling,
    sample,
)
from asesearch.schedule import ExitSchedule
from asesearch.solvers import seeds_of

FORMAT = "asesearch.bundle"
VERSION = 1
FILES = ("model.safetensors", "parity.safetensors")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded bundle.

    Attributes:
        backbone: the fine-tuned network, in eval mode.
        schedule: its exit schedule.
        kind: of the network, as in `BackboneConfig`.
        diffusion, sampling: the process, and the solver the schedule was evaluated with.
        evaluation: the recorded scores, as plain data.
        provenance: where it came from, as plain data.
        prompts: a few examples of what a network that takes prompts is given, N first; None for
            other networks.
        latents: how the latents that it makes were scaled, `shift` and `scale` of each channel, and
            the `digest` of the VAE that decoded them; None where it makes images.
        acceleration: what makes the sampler's calls cheaper beside the schedule, for the sampler's
            own number of steps; None for nothing.
        acceleration_name: its name, as in `Sampler`.
    """

    backbone: Backbone
    schedule: ExitSchedule
    kind: str
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    evaluation: dict[str, Any]
    provenance: dict[str, Any]
    prompts: dict[str, Tensor] | None = None
    latents: dict[str, Any] | None = None
    acceleration: Acceleration | None = None
    acceleration_name: str = ""

    @property
    def sampler(self) -> Sampler:
        """Solver, number of steps, and acceleration."""
        return Sampler(self.sampling.solver, self.sampling.num_steps, self.acceleration_name)

    @cpu_by_default()
    def sample(
        self,
        seeds: Iterable[int],
        y: Given | None = None,
        num_steps: int | None = None,
        *,
        compile: bool | None = None,
        batch_size: int | None = None,
    ) -> SampleResult:
        """Images (or latents) for these seeds, (N, C, H, W) float32, by the bundle's solver,
        guidance and (unless given) steps.

        `y` is (N,) class labels, as a tensor, list or array, or a prompt's tensors; by default
        seed modulo the number of classes, or of `prompts`. `compile` runs the blocks as compiled
        code, by default where the bundle's `sampling` says so; the first call takes seconds more.
        `batch_size` is how many images go through the network together, by default as many as in
        the study: fewer take less memory and give the same images, up to rounding.

        Raises:
            ConfigError: labels that are no classes of the network (the null label is none),
                another number of steps than an acceleration was made for, or as `sampling.sample`.
        """
        seeds = seeds_of(seeds)
        return sample(
            self.backbone,
            self.sampling.solver,
            self.schedule,
            diffusion=make_diffusion(self.diffusion),
            num_steps=self.sampling.num_steps if num_steps is None else num_steps,
            seeds=seeds,
            y=self._conditioning(seeds, y),
            cfg_scale=self.sampling.cfg_scale,
            batch_size=self.sampling.batch_size if batch_size is None else batch_size,
            precision=self.sampling.precision,
            compile=self.sampling.compile if compile is None else compile,
            acceleration=self.acceleration,
        )

    def _conditioning(self, seeds: Sequence[int], y: Given | None) -> Conditioning | None:
        """`y` of `sample`, its default filled in; labels are classes.

        Raises:
            ConfigError: labels that are no classes.
        """
        y = conditioning_of(y)
        labels = labels_of(y)
        if labels is not None and labels.dtype in (torch.int32, torch.int64) and labels.numel():
            self._check_classes(labels.flatten().tolist())
        if y is None and self.backbone.num_classes:
            return torch.tensor([s % self.backbone.num_classes for s in seeds])
        if y is None and self.prompts is not None:
            count = len(next(iter(self.prompts.values())))
            return take(self.prompts, [s % count for s in seeds])
        return y

    @cpu_by_default()
    def plan(
        self, seeds: Iterable[int], y: Given | None = None, num_steps: int | None = None
    ) -> tuple[SamplingConfig, tuple[float, ...]]:
        """How `sample` would sample with these arguments, and the timesteps of its network calls.

        Raises:
            ConfigError: what `sample` would refuse.
        """
        steps = self.sampling.num_steps if num_steps is None else num_steps
        how = self.sampling.model_copy(update={"num_steps": steps})
        seeds = seeds_of(seeds)
        check_images(self.backbone, seeds, self._conditioning(seeds, y), how.batch_size)
        diffusion = make_diffusion(self.diffusion)
        _, timesteps = check_sampling(
            self.backbone, how.solver, diffusion, how.num_steps, how.cfg_scale, how.precision
        )
        check_acceleration(self.acceleration, len(timesteps), how.compile, how.cfg_scale)
        return how, timesteps

    def labels(self, label: int, count: int) -> Tensor:
        """(count,) times one class, as `y` of `sample`.

        Raises:
            ConfigError: not a class of the network.
        """
        self._check_classes([label])
        return torch.full((count,), label)

    def _check_classes(self, labels: Sequence[int]) -> None:
        """Refuse what is no class; `sampling.sample` takes the null label too, which makes
        unconditional images."""
        net = self.backbone
        last = self.backbone.num_classes - 1
        if net.num_classes == 0:
            what = (
                "takes prompts, not labels"
                if net.takes_prompt
                else "is unconditional and takes no labels"
            )
            raise ConfigError(
                f"the bundle's network {what}; got the label {labels[0]}; leave it out"
            )
        wrong = [label for label in labels if not 0 <= label <= last]
        if wrong:
            null = ", the null label, which stands for no class" * (
                net.has_null_label and wrong[0] == net.num_classes
            )
            fix = f"choose from 0…{last}" if last else "choose 0, its only class"
            raise ConfigError(
                f"labels must be classes of the bundle's network, 0…{last}; got {wrong[0]}{null}; "
                f"{fix}"
            )
