"""A DiT of ours in diffusers' `DiTPipeline`: what that pipeline does differently, made as the
exported network does it.

diffusers' DiT spaces the timestep frequencies over one step more than the official code
(`downscale_freq_shift`, which is in no config), makes its positions anew where weights in half
precision hold rounded ones, and its pipeline knows ImageNet's 1000 classes
alone, guides every channel, spaces timesteps its own way and always has a VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from asesearch.config import DiffusionConfig, SamplingConfig, parse_section
from asesearch.deployment.manifest import has_scaling
from asesearch.errors import CheckpointError, ConfigError, in_one_line
from asesearch.sampler import grid_of
from asesearch.solvers import DiscreteLevels, find_solver, make_betas

FORMAT = "asesearch.diffusers"
VERSION = 1
#: Solver without its grid -> diffusers' scheduler that makes the same steps, and its options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    # the first-order solver is DDIM on any grid; diffusers' DDIMScheduler knows even strides only
    "ddim": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "dpm++2m-order2": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
}
#: Precisions that the fixed positions of exported weights may have been rounded to.
POSITIONS = ("float32", "float16", "bfloat16")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Restored = Callable[[], None]


def scheduler_for(solver: str) -> tuple[str, dict[str, Any]]:
    """Class and options of diffusers' scheduler that makes a solver's steps."""
    return SCHEDULERS[grid_of(solver)[0]]


def make_scheduler(how: SamplingConfig, diffusion: DiffusionConfig, learn_sigma: bool) -> Any:
    """diffusers' scheduler that makes the steps of a bundle's solver."""
    name, options = scheduler_for(how.solver)
    if name == "DDPMScheduler":
        options = options | {"variance_type": "learned_range" if learn_sigma else "fixed_small"}
    betas = make_betas(diffusion.beta_schedule, diffusion.num_train_timesteps)
    return getattr(diffusers, name)(
        num_train_timesteps=len(betas),
        beta_schedule=diffusion.beta_schedule,
        beta_start=float(betas[0]),
        beta_end=float(betas[-1]),
        prediction_type="epsilon",
        timestep_spacing="linspace",
        **options,
    )


class ExportedDiTPipeline(DiTPipeline):
    """`DiTPipeline` under the sampler of the exported folder; a pipeline becomes one by
    `apply_exit_schedule(pipeline, folder)`."""

    exported: dict[str, Any]
    # of the base classes, whose types are not known
    transformer: Any
    scheduler: Any
    vae: Any
    progress_bar: Any
    numpy_to_pil: Any
    maybe_free_model_hooks: Any
    _execution_device: Any

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DiTPipeline`, but guidance and steps are by default the exported ones, guidance is
        off at 1 only, and output_type "latent" gives what the network made, (N, C, H, W) float32,
        which is the default without a VAE.

        With one CPU generator per image, `[torch.Generator().manual_seed(s) for s in seeds]`, the
        images are those of `Bundle.sample(seeds, class_labels)`.
        """
        how = parse_section(SamplingConfig, self.exported["sampling"], "sampling")
        scale = how.cfg_scale if guidance_scale is None else guidance_scale
        output_type = output_type or ("latent" if self.vae is None else "pil")
        config = self.transformer.config
        device = self._execution_device
        labels = _labels(class_labels, config.num_embeds_ada_norm).to(device)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        # the solver's arithmetic is float32, whatever the network's
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        steps = how.num_steps if num_inference_steps is None else num_inference_steps
        exported = self._has_exported_scheduler(how)
        timesteps = self._set_timesteps(how, steps, exported)
        drop_order = exported and grid_of(how.solver)[0] == "dpm++2m"
        options = {"generator": generator} if how.solver == "ddpm" else {}
        for i, t in enumerate(self.progress_bar(timesteps)):
            if i == len(timesteps) - 2 and drop_order:
                self.scheduler.lower_order_nums = 0  # as ours: first order into the last timestep
            output = self._predict(x, t, labels, scale).float()
            if getattr(self.scheduler.config, "variance_type", None) != "learned_range":
                output = output[:, : config.in_channels]
            step = self.scheduler.step(output, t, x, **options)
            # DDPMScheduler adds noise at the end of a step that begins above t = 0, as a single one
            ends = exported and how.solver == "ddpm" and i == len(timesteps) - 1
            x = step.pred_original_sample if ends else step.prev_sample
        images = self._output(x, output_type)
        self.maybe_free_model_hooks()
        output_class: Any = ImagePipelineOutput
        return output_class(images=images) if return_dict else (images,)

    def _set_timesteps(self, how: SamplingConfig, num_steps: int, exported: bool) -> Any:
        """The exported sampler's timesteps, where the scheduler is the exported one; else those of
        the scheduler."""
        name, _ = scheduler_for(how.solver)
        device = self._execution_device
        if not exported:
            self.scheduler.set_timesteps(num_steps, device=device)
            return self.scheduler.timesteps
        levels = DiscreteLevels(num_train_timesteps=self.scheduler.config.num_train_timesteps)
        power = find_solver(how.solver, levels).power
        timesteps = list(map(int, levels.timesteps(num_steps, power)))
        if name != "UniPCMultistepScheduler":
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            return self.scheduler.timesteps
        # it takes no timesteps
        self.scheduler.set_timesteps(num_steps, device=device)
        self.scheduler.timesteps = torch.tensor(timesteps, device=device)
        kept = self.scheduler.alphas_cumprod[timesteps]
        self.scheduler.sigmas = torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1)])
        return self.scheduler.timesteps

    def _has_exported_scheduler(self, how: SamplingConfig) -> bool:
        """Whether the scheduler is the exported one, in class and config."""
        diffusion = parse_section(DiffusionConfig, self.exported["diffusion"], "diffusion")
        config = self.transformer.config
        own = make_scheduler(how, diffusion, config.out_channels == 2 * config.in_channels)
        return type(self.scheduler) is type(own) and all(
            self.scheduler.config.get(key) == value
            for key, value in own.config.items()
            if not key.startswith("_")
        )

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The transformer's output under guidance, (N, C or 2·C, H, W)."""
        x = self.scheduler.scale_model_input(x, t).to(self.transformer.dtype)
        times = t.to(x.device).expand(len(x))
        if scale == 1:
            return self._call_transformer(x, times, labels)
        null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        cond, none = self._call_transformer(
            x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, null])
        ).chunk(2)
        channels = self.exported["guided_channels"]
        eps = none[:, :channels] + scale * (cond[:, :channels] - none[:, :channels])
        return torch.cat([eps, cond[:, channels:]], dim=1)

    def _call_transformer(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.transformer(x, timestep=t, class_labels=labels, return_dict=False)[0]
        return out

    def _output(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = x
        latents = self.exported["latents"]
        if latents is not None:
            if self.vae is None:
                raise ConfigError(
                    f"this pipeline makes latents and has no VAE; got output_type {output_type!r}; "
                    'use "latent", or set pipeline.vae'
                )
            shift, scale = (
                torch.tensor(latents[k], dtype=torch.float32, device=x.device).view(-1, 1, 1)
                for k in ("shift", "scale")
            )
            z = x / scale + shift
            images = self.vae.decode(z.to(self.vae.dtype)).sample
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _labels(class_labels: Any, num_classes: int) -> Tensor:
    """(N,) class labels.

    Raises:
        ConfigError: none, or others than the network's.
    """
    try:
        labels = torch.as_tensor(list(class_labels)).reshape(-1)
        fit = labels.dtype in INTEGERS and bool(((labels >= 0) & (labels < num_classes)).all())
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises each of them
        fit = False
    if not fit or not len(labels):
        raise ConfigError(
            f"class_labels must be integers in 0…{num_classes - 1}, one per image; got "
            f"{' '.join(repr(class_labels).split())[:80]}"
        )
    return labels.long()


# what save_pretrained writes, and from_pretrained of diffusers alone looks for
ExportedDiTPipeline.__name__ = DiTPipeline.__name__


def as_exported(pipeline: Any, data: Mapping[str, Any]) -> Restored | None:
    """Make a pipeline, or its transformer, sample as the exported network; what undoes it.

    Args:
        pipeline: a `DiTPipeline` or its transformer.
        data: of the exported folder's manifest; of another format, nothing is done.

    Raises:
        ConfigError: another pipeline.
        CheckpointError: settings that no exported folder has.
    """
    if data.get("format") != FORMAT:
        return None
    transformer: Any = getattr(pipeline, "transformer", pipeline)
    plain_class = type(pipeline)
    own_class: Any = DiTTransformer2DModel
    if not isinstance(transformer, own_class) or (
        pipeline is not transformer and plain_class is not DiTPipeline
    ):
        raise ConfigError(
            f"this folder is of a DiTPipeline; got a {plain_class.__name__}; load it by "
            "DiffusionPipeline.from_pretrained"
        )
    _check_settings(data, transformer)
    positions = transformer.pos_embed.pos_embed
    if pipeline is not transformer:
        pipeline.__class__ = ExportedDiTPipeline
        pipeline.exported = dict(data)
    undo = with_settings(transformer, data["frequency_shift"])
    transformer.pos_embed.pos_embed = rounded(positions, data.get("positions", POSITIONS[0]))

    def restore() -> None:
        transformer.pos_embed.pos_embed = positions.to(transformer.pos_embed.pos_embed)
        undo()
        if pipeline is not transformer:
            pipeline.__class__ = plain_class
            del pipeline.exported

    return restore


def with_settings(
    transformer: Any, frequency_shift: float, norm_eps: float | None = None
) -> Restored:
    """Let a diffusers DiT space its timestep frequencies, and compute its norms, as a DiT of ours;
    what undoes it.

    Args:
        transformer: a `DiTTransformer2DModel`.
        frequency_shift, norm_eps: as in `asesearch.backbones.DiT`; None leaves the norms.
    """
    changed = []
    for block in transformer.transformer_blocks:
        changed.append((block.norm1.emb.time_proj, "downscale_freq_shift", frequency_shift))
        if norm_eps is not None:
            changed.append((block.norm3, "eps", norm_eps))
    before = [getattr(module, name) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)

    def restore() -> None:
        for (module, name, _), value in zip(changed, before, strict=True):
            setattr(module, name, value)

    return restore


def rounded(positions: Tensor, precision: str) -> Tensor:
    """Positions as weights of such a precision hold them."""
    return positions.to(getattr(torch, precision)).to(positions.dtype)


def _check_settings(data: Mapping[str, Any], transformer: Any) -> None:
    """Refuse a manifest whose settings were not exported with such a transformer."""
    channels = transformer.config.in_channels
    try:
        parse_section(SamplingConfig, data["sampling"], "sampling")
        diffusion = parse_section(DiffusionConfig, data["diffusion"], "diffusion")
        steps = data["schedule"]["num_train_timesteps"]
        wrong = [
            name
            for name, right in (
                ("diffusion.num_train_timesteps", diffusion.num_train_timesteps == steps),
                ("frequency_shift", data["frequency_shift"] in (0, 1)),
                ("positions", data.get("positions", POSITIONS[0]) in POSITIONS),
                ("guided_channels", data["guided_channels"] in range(1, channels + 1)),
                ("latents", has_scaling(data.get("latents"), channels)),
            )
            if not right
        ]
    except (ConfigError, KeyError, TypeError) as error:
        wrong = [in_one_line(error, 200)]
    if wrong:
        raise CheckpointError(
            f"the manifest must hold the settings of the exported DiT; got wrong {wrong[0]}; "
            "export it again"
        )
