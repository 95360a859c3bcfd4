"""Opening what a study file names: data, reference, decoder, device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from asesearch.backbones.base import Backbone
from asesearch.backbones.conditioning import Conditioning
from asesearch.config import StudyConfig
from asesearch.data import DataSource, open_data
from asesearch.data.latents import LatentShards
from asesearch.encoding import LatentDecoder
from asesearch.errors import ConfigError, EvaluationError
from asesearch.evaluation.extractors import Extractor
from asesearch.evaluation.references import SHIPPED, ReferenceStats, reference_statistics
from asesearch.study import directory


def conditioning_for(
    backbone: Backbone, data: DataSource, seeds: Sequence[int]
) -> Conditioning | None:
    """What images are made of: class = seed modulo the number of classes, so that every class
    occurs equally often where there are a multiple of them (of fewer images than classes, those of
    the first classes); for a network that takes prompts, that of the data's image seed modulo their
    number; None for an unconditional network.
    """
    if backbone.num_classes:
        return torch.tensor([s % backbone.num_classes for s in seeds])
    if not backbone.takes_prompt:
        return None
    assert isinstance(data, LatentShards)  # nothing else has prompts, see `check_fit`
    return data.conditions([s % len(data) for s in seeds])


def reference_data(config: StudyConfig, data: DataSource) -> DataSource:
    """What the study's samples are compared with: its own data as they are, or others."""
    wanted = config.evaluation.reference
    if wanted is None and config.data.flip:
        wanted = config.data.model_copy(update={"flip": False})
    return data if wanted is None else open_data(wanted, "evaluation.reference")


def open_reference(
    config: StudyConfig, source_of: Callable[[], DataSource], extractor: Extractor
) -> ReferenceStats:
    """Statistics of the study's reference data, from the package where it ships them, so the data
    need not be here; else of what `source_of` gives, see `reference_data`.

    Raises:
        DataError: the reference data are needed and not here.
    """
    wanted = config.evaluation.reference
    if (
        wanted is not None
        and wanted.path is None
        and (name := f"{wanted.kind}/{wanted.split}") in SHIPPED
    ):
        try:
            return reference_statistics(name, extractor)
        except EvaluationError:
            pass  # none for this extractor: made from the data
    source = source_of()
    # known before features of all are made
    if config.evaluation.metric == "frechet" and len(source) <= extractor.dim:
        raise EvaluationError(
            f"the reference must have more images than the {extractor.dim} features of "
            f"{extractor.name} for the Fréchet distance (their covariance is singular otherwise); "
            f"got {len(source)} in {source.name}; give more, or use evaluation.metric = 'kid'"
        )
    return reference_statistics(source, extractor)


def check_evaluation(config: StudyConfig) -> None:
    """Refuse a study whose samples can't be compared with its reference.

    Raises:
        ConfigError: latents as the reference, or a study of latents without VAE or images to
            compare with.
    """
    reference = config.evaluation.reference
    kind = None if reference is None else reference.kind
    if kind == "latents" or (config.data.kind == "latents" and kind != "image-folder"):
        raise ConfigError(
            "samples are compared as images, decoded where the network makes latents; got a "
            f"reference of kind {kind or config.data.kind!r}; set evaluation.reference to the "
            "image folder: kind 'image-folder', path, image_size"
        )
    if config.data.kind == "latents" and config.data.vae is None:
        raise ConfigError(
            "generated latents are decoded for evaluation; got no data.vae; give the folder of the "
            "AutoencoderKL"
        )


def known_digest(decoder: LatentDecoder, run_dir: Path | None) -> str:
    """The decoder's digest; of a study begun when releases took it otherwise, the one on record, if
    it is the same decoder's."""
    path = None if run_dir is None else run_dir / directory.INPUTS
    if path is None or not path.exists():
        return decoder.digest
    lost = "its decoder is taken to be of this release"
    return decoder.known_as(
        directory.read_state(path, lambda data: str(data["decoder"]["digest"]), lost)
    )


def open_decoder(
    config: StudyConfig, backbone: Backbone, data: DataSource, device: torch.device
) -> LatentDecoder | None:
    """What turns a study's samples into images; None where they are images.

    Raises:
        CheckpointError: no AutoencoderKL at data.vae.
        DataError: one that scales latents otherwise, or has another encoder than theirs.
        ConfigError: reference images of another size than the decoded ones.
    """
    reference = config.evaluation.reference
    if not isinstance(data, LatentShards):
        return None
    assert config.data.vae is not None and reference is not None  # see `check_evaluation`
    decoder = LatentDecoder(config.data.vae, device)
    decoder.check_scaling(data.shift, data.scale)
    decoder.check_encoder(data.vae, data.encoder)
    decoded = (decoder.channels, decoder.factor * backbone.input_size)
    wanted = (reference.channels, reference.image_size)
    if decoded != wanted:
        raise ConfigError(
            f"the reference must have the decoded images' channels and size, {decoded[0]} and "
            f"{decoded[1]}; got {wanted[0]} and {wanted[1]}; change channels and image_size in "
            "evaluation.reference"
        )
    return decoder
