"""The three protocols of a study: what is measured at low fidelity, in the search, and when the
front is confirmed. Scores of different protocols are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from asesearch.config import EvaluationConfig, StudyConfig
from asesearch.errors import EvaluationError
from asesearch.evaluation.extractors import Extractor
from asesearch.evaluation.fidelity import build_protocol, low_fidelity_metric
from asesearch.evaluation.references import ReferenceStats
from asesearch.score import Protocol
from asesearch.study import directory

FRESH_SEEDS = 1_000_000_000  # confirmation seeds begin here, out of reach of the search's


@dataclass(frozen=True)
class Protocols:
    """What a study's scores are measured by.

    Attributes:
        search: of the trials.
        confirmation: of the front, on fresh seeds, with its own number of images and repeats.
        low_fidelity: the search's with fewer images, and a metric that exists for so few; None
            without promotion.

    Raises:
        EvaluationError: image seeds of the confirmation that another protocol uses.
    """

    search: Protocol
    confirmation: Protocol
    low_fidelity: Protocol | None = None

    def __post_init__(self) -> None:
        fresh = _image_seeds(self.confirmation)
        for name, protocol in self.named.items():
            for ours in _image_seeds(protocol) if name != "confirmation" else ():
                for theirs in fresh:
                    if ours.start < theirs.stop and theirs.start < ours.stop:
                        most = FRESH_SEEDS - protocol.num_samples * len(protocol.seeds)
                        fix = f"evaluation.seed to at most {most}"
                        raise EvaluationError(
                            f"the confirmation has image seeds of its own, from {theirs.start} on; "
                            f"got the {name} protocol's {ours.start} to {ours.stop - 1}; lower "
                            f"{fix if most >= 0 else 'its num_samples or repeats'}"
                        )

    @property
    def named(self) -> dict[str, Protocol]:
        """Those the study has, by name, in the order they are used."""
        low = {} if self.low_fidelity is None else {"low-fidelity": self.low_fidelity}
        return {**low, "search": self.search, "confirmation": self.confirmation}


def _image_seeds(protocol: Protocol) -> list[range]:
    """Of each repeat."""
    return [range(first, first + protocol.num_samples) for first in protocol.seeds]


def make_protocols(
    config: StudyConfig,
    extractor: Extractor,
    reference: ReferenceStats,
    guided_channels: int | None,
) -> Protocols:
    """The protocols of a study file.

    Where samplers compete, they are no part of a protocol but of what is measured.

    Args:
        config: the study file.
        extractor: what makes the features.
        reference: what samples are compared with.
        guided_channels: see `known_channels`.

    Raises:
        EvaluationError: see `Protocols`.
    """

    def make(evaluation: EvaluationConfig, metric: str | None = None) -> Protocol:
        built = build_protocol(
            evaluation,
            config.sampling,
            extractor,
            reference,
            metric=metric,
            guided_channels=guided_channels,
        )
        several = len(config.samplers) > 1
        return replace(built, solver=None, num_steps=None) if several else built

    def changed(**fields: int) -> EvaluationConfig:
        return config.evaluation.model_copy(update=fields)

    low = None
    if (how := config.promotion) is not None:
        few = changed(num_samples=how.num_samples, repeats=how.repeats)
        low = make(few, low_fidelity_metric(how, few, extractor.dim))
    return Protocols(make(config.evaluation), make(confirming(config)), low)


def confirming(config: StudyConfig) -> EvaluationConfig:
    """The evaluation of a study's confirmation."""
    how = config.confirm
    fresh = {"num_samples": how.num_samples, "repeats": how.repeats, "seed": FRESH_SEEDS}
    return config.evaluation.model_copy(update=fresh)


def known_channels(config: StudyConfig, channels: int, run_dir: Path | None) -> int | None:
    """Channels that guidance acts on; None in a study whose protocol was recorded without them.

    That study goes on without: its network is on record, and with it the channels.
    """
    if run_dir is None:
        return channels
    lost = "its protocol is taken to be of this release"
    path = run_dir / directory.INPUTS
    known = directory.read_state(path, lambda data: dict(data["protocol"]), lost)
    if known is None or "guided_channels" in known:
        return channels
    return None if known.get("cfg_scale") == config.sampling.cfg_scale else channels
