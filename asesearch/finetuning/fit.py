"""Parts that do not belong together are refused before anything is trained."""

from __future__ import annotations

from asesearch.backbones.base import Backbone, check_network, check_schedule
from asesearch.config import TrainConfig
from asesearch.data import DataSource
from asesearch.diffusion import Process, check_process
from asesearch.errors import ConfigError, DataError
from asesearch.finetuning.annealing import Depths


def check_fit(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    schedule: Depths,
    config: TrainConfig | None = None,
) -> None:
    """Refuse parts that do not belong together.

    Raises:
        ConfigError: no network, or one whose weights are not float32; no data source, process or
            config.
        DataError: images of another shape, labels out of the network's range, or not the prompts it
            takes.
        ScheduleError: a schedule of another depth or other diffusion timesteps, or shallower than
            the network allows.
    """
    check_network(backbone, "mixed_precision = 'bf16'")
    check_process(diffusion)
    if not hasattr(data, "batch"):
        raise ConfigError(
            f"data must be a data source; got {type(data).__name__}; open a folder by ImageFolder, "
            "or put images held in memory into ImageArray"
        )
    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config must be a TrainConfig; got {type(config).__name__}; make one, such as "
            "TrainConfig(num_steps=200, batch_size=64)"
        )
    if backbone.prediction_type != "epsilon":
        raise ConfigError(
            "fine-tuning is for networks that predict noise; got one that predicts "
            f"{backbone.prediction_type!r} (rectified flow); its schedules can be attached to a "
            "pipeline, not trained"
        )
    expected = (backbone.in_channels, backbone.input_size, backbone.input_size)
    if data.shape != expected:
        raise DataError(
            f"the network takes images of shape {expected}; got {data.shape} from {data.name}; "
            "resize them"
        )
    if backbone.num_classes:
        _check_classes(backbone, data)
    if backbone.takes_prompt:
        try:
            backbone.check_conditioning(data.batch([0])[1], 1)
        except ConfigError as error:
            raise DataError(
                f"{data.name} must give the prompts that the network takes: {error}"
            ) from error
    check_schedule(backbone, diffusion.num_train_timesteps, schedule, elastic=True)


def _check_classes(backbone: Backbone, data: DataSource) -> None:
    """Refuse labels that are not, or may not be, those of a network with several classes."""
    wanted = backbone.num_classes
    got = data.num_classes
    if wanted == 1:
        return  # see `own_labels`
    hint = ""
    if got == wanted + 1 and backbone.has_null_label:
        hint = (
            f"; or, if the network was trained on {got} classes without label dropout, set "
            f"args.num_classes = {got} in [backbone] (for a U-ViT args.has_null_label = false)"
        )
    if got == 0:
        raise DataError(
            f"the network has {wanted} classes; got images without labels from {data.name}; use "
            "class folders"
        )
    if getattr(data, "labels_by_order", False) and got != wanted:
        raise DataError(
            f"the network has {wanted} classes; got {got} class folders from {data.name}, and "
            "nothing says which classes they "
            'are; name them in a classes.json beside the class folders, such as {"cat": 281, '
            '"dog": 207}, or under classes in '
            f"the data section (latents: encode them again with that){hint}"
        )
    if got > wanted:
        raise DataError(
            f"the network has {wanted} classes, 0…{wanted - 1}; got labels up to {got - 1} from "
            f"{data.name}; correct the labels, or the class indices of its folders{hint}"
        )
