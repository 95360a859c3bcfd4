"""The difficulty map of a study file's network, from the file to the map's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asesearch.backbones.checkpoints import load_backbone, load_trained
from asesearch.backbones.device import default_device
from asesearch.config import StudyConfig
from asesearch.data import check_output, open_data
from asesearch.diffusion import make_diffusion
from asesearch.files import check_writable
from asesearch.search.mapping import map_seconds, measure_map
from asesearch.study.difficulty import DifficultyMap


class StudyMap:
    """A map that is to be measured; its network and images are opened when it is made.

    Args:
        config: the study file; its images are those of [map.data], or else the study's.
        folder: to write.
        weights: measured against the study's own network, in place of that network itself; against
            themselves, where the study names no checkpoint.

    Attributes:
        facts: what is measured, as plain data.

    Raises:
        AseSearchError: the folder can't be written or is something else, or network or images can't
            be opened.
    """

    def __init__(self, config: StudyConfig, folder: Path, weights: Path | None = None) -> None:
        check_output(config, folder, "--out")
        check_writable(folder, "map.json")
        device = default_device()
        section = "data" if config.map.data is None else "map.data"
        data = open_data(config.map.data or config.data, section)
        null = getattr(data, "null_condition", None)
        seed = config.train.seed
        backbone = load_trained(config.backbone, config.diffusion, seed, null).to(device)
        reference = None
        own = config.backbone.checkpoint
        if weights is not None:
            reference = None if own is None else backbone
            given = config.backbone.model_copy(update={"checkpoint": str(weights)})
            backbone = load_backbone(given, null_condition=null).to(device)
        self.config = config
        self.folder = folder
        self.parts = (backbone, data, make_diffusion(config.diffusion), config.map, reference)
        self.facts: dict[str, Any] = {
            "weights": str(weights or own or f"random, seed {config.train.seed}"),
            "reference": "itself" if reference is None else own,
            "data": data.name,
            "num_images": config.map.num_images,
            "num_bins": config.map.num_bins,
        }

    def seconds(self) -> float:
        """Estimate of what `measure` takes; see `map_seconds`."""
        return map_seconds(*self.parts)

    def measure(self, on_bin: Callable[[int, int], object] | None = None) -> DifficultyMap:
        """The map.

        Args:
            on_bin: called as (bins done, of all) after each.

        Raises:
            AseSearchError: see `measure_map`.
        """
        return measure_map(*self.parts, self.config.sampling.batch_size, on_bin)

    def write(self, found: DifficultyMap) -> list[Path]:
        """Write a map's table, drawing and data; returns their paths.

        Raises:
            WriteError: the folder can't be written.
        """
        from asesearch.report.difficulty import write_map  # which draws: not for every search

        return write_map(found, self.folder)
