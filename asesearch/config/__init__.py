"""The study file: one TOML, checked in full before anything expensive. No torch in here."""

from asesearch.config.changes import MAY_CHANGE, changed_fields
from asesearch.config.reading import load_study, parse_section, parse_study, read_toml
from asesearch.config.sections import (
    KINDS,
    BackboneConfig,
    ConfirmConfig,
    DataConfig,
    DiffusionConfig,
    ElasticConfig,
    EvaluationConfig,
    LossWeight,
    MapConfig,
    PromotionConfig,
    SamplingConfig,
    SearchConfig,
    StudyConfig,
    TrainConfig,
)

__all__ = [
    "BackboneConfig",
    "ConfirmConfig",
    "KINDS",
    "DataConfig",
    "DiffusionConfig",
    "ElasticConfig",
    "EvaluationConfig",
    "LossWeight",
    "MAY_CHANGE",
    "MapConfig",
    "PromotionConfig",
    "SamplingConfig",
    "SearchConfig",
    "StudyConfig",
    "TrainConfig",
    "changed_fields",
    "load_study",
    "parse_section",
    "parse_study",
    "read_toml",
]
