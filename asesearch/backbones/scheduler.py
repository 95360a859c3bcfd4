"""What the scheduler beside a diffusers transformer, or the options in a checkpoint, say of the
training: noise or something else is predicted, under which betas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asesearch.backbones.files import resolve
from asesearch.backbones.folders import CONFIG, class_name, find_folder, read_config
from asesearch.backbones.wrappers import NOISE_SCHEDULE, TIMESTEPS
from asesearch.config import BackboneConfig, DiffusionConfig
from asesearch.errors import CheckpointError, ConfigError, in_one_line
from asesearch.solvers import make_betas
from asesearch.solvers.noise import BETA_SCHEDULES

SCHEDULER = "scheduler"
SCHEDULER_CONFIG = "scheduler_config.json"
#: Networks that predict noise, whatever their pipeline's scheduler does.
_OF_NOISE = ("DiTTransformer2DModel", "PixArtTransformer2DModel")
_BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
#: Names of noise schedules in training options: which of ours each may be. Not among them:
#: `linear`, which latent diffusion calls what others call scaled_linear.
_SCHEDULES: dict[str, tuple[str, ...]] = {
    "scaled_linear": ("scaled_linear",),
    **dict.fromkeys(("cosine", "squaredcos_cap_v2", "sqrt", "sigmoid"), ()),
    **dict.fromkeys(("quadratic", "quad", "const", "jsd", "warmup10", "warmup50"), ()),
}
_TOLERANCE = 1e-3  # of the signal's fraction, from 0 to 1


def refuse_prediction(folder: Path) -> None:
    """Refuse a DiT or PixArt transformer whose pipeline's scheduler takes its output for something
    else than noise.

    Args:
        folder: of a transformer; a pipeline's has its scheduler beside.

    Raises:
        CheckpointError: as said, or a scheduler's config that can't be read.
    """
    path, config = _read(folder)
    predicts = config.get("prediction_type", "epsilon")
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        predicts = "flow_prediction"
    if predicts != "epsilon":
        raise CheckpointError(
            f"{path} says that the network predicts {predicts!r}; asesearch's solvers need one "
            "of noise ('epsilon'); give such a network, or sample this one under a schedule in its "
            "own pipeline"
        )


def check_betas(backbone: BackboneConfig, diffusion: DiffusionConfig) -> None:
    """Refuse a study whose [diffusion] is not that of the scheduler beside its network; where there
    is none, nothing is known.

    Raises:
        ConfigError: as said.
        CheckpointError: a scheduler's config that can't be read.
    """
    if backbone.checkpoint is None:
        return
    place = resolve(backbone.checkpoint)
    if not ((place / CONFIG).is_file() or (place / "transformer" / CONFIG).is_file()):
        return
    path, config = _read(find_folder(place, "transformer"))
    found = _signal(path, config)
    given = (diffusion.beta_schedule, diffusion.num_train_timesteps)
    if found is None or _same(found, *given):
        return
    right = [name for name in BETA_SCHEDULES if _same(found, name, len(found))]
    fix = (
        f'set beta_schedule = "{right[0]}" and num_train_timesteps = {len(found)}'
        if right
        else "asesearch has no such betas: give a network trained with those of study files"
    )
    said = {key: config[key] for key in _BETAS if config.get(key) is not None}
    said |= {
        key: "…" if key == "trained_betas" else True
        for key in ("trained_betas", "rescale_betas_zero_snr")
        if config.get(key)
    }
    raise ConfigError(
        "[diffusion] must be as the network was trained; got beta_schedule = "
        f'"{given[0]}" and num_train_timesteps = {given[1]}, and {path} has '
        f"{', '.join(f'{key} {value}' for key, value in said.items())}; {fix}"
    )


def check_options(checkpoint: str, options: Mapping[str, Any], diffusion: DiffusionConfig) -> None:
    """Refuse a study whose [diffusion] is not that of the options beside its network's weights.

    Args:
        checkpoint: its path, for the message.
        options: of the training, see `training_options`.
        diffusion: of the study.

    Raises:
        ConfigError: as said.
    """
    if diffusion.process != "discrete":
        return
    other = {key: options[key] for key in TIMESTEPS if key in options}
    if diffusion.num_train_timesteps in other.values():  # another may be of a sampler
        other = {}
    schedule = options.get(NOISE_SCHEDULE, "").lower()
    if schedule in _SCHEDULES and diffusion.beta_schedule not in _SCHEDULES[schedule]:
        other[NOISE_SCHEDULE] = options[NOISE_SCHEDULE]
    if other:
        raise ConfigError(
            "[diffusion] must be as the network was trained; got beta_schedule = "
            f'"{diffusion.beta_schedule}" and num_train_timesteps = '
            f"{diffusion.num_train_timesteps}, and {checkpoint} says "
            f"{', '.join(f'{k} = {v!r}' for k, v in other.items())}; change it, give another "
            "network, or the weights alone where these options are not theirs"
        )


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Path and content of the config of the scheduler beside a DiT or PixArt transformer; nothing
    where there is none."""
    place = folder.absolute().parent / SCHEDULER
    path = place / SCHEDULER_CONFIG
    if folder.absolute().name != "transformer" or not path.is_file():
        return path, {}
    if class_name(read_config(folder)) not in _OF_NOISE:
        return path, {}
    return path, read_config(place, SCHEDULER_CONFIG)


def _signal(path: Path, config: dict[str, Any]) -> npt.NDArray[np.float64] | None:
    """What is left of the image at each timestep, (num_train_timesteps,), as diffusers' class has
    it; None for a class without."""
    import diffusers  # slow to import

    cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None or not hasattr(cls, "from_config"):
        return None
    try:
        left = getattr(cls.from_config(config), "alphas_cumprod", None)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = in_one_line(error, 200)
        raise CheckpointError(
            f"{path} must describe a scheduler of diffusers; got {reason}; fetch it again"
        ) from error
    return None if left is None else np.sqrt(np.asarray(left.double().numpy()))


def _same(signal: npt.NDArray[np.float64], beta_schedule: str, num_timesteps: int) -> bool:
    if len(signal) != num_timesteps:
        return False
    try:
        betas = make_betas(beta_schedule, num_timesteps)
    except ConfigError:  # too few timesteps
        return False
    own = np.sqrt(np.cumprod(1 - betas))
    return bool(np.allclose(signal, own, rtol=0, atol=_TOLERANCE))
