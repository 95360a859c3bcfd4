"""Scores know their protocol, and refuse to be compared under another."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from asesearch.errors import EvaluationError
from asesearch.score import EvaluationResult, Protocol, TrainedScore, trained_again_difference

PROTOCOL = Protocol(
    "frechet", "fashion-cnn", "e" * 64, 100, "ref", 60_000, "r" * 64, (0, 100, 200), "ddim", 50, 1.0
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Protocol)])
def test_a_difference_in_any_field_is_refused_by_name(field):
    value = getattr(PROTOCOL, field)
    other = dataclasses.replace(PROTOCOL, **{field: (7, 8, 9) if field == "seeds" else f"{value}1"})
    with pytest.raises(EvaluationError, match=rf"{field}: .*evaluate both alike"):
        PROTOCOL.require_same(other)
    PROTOCOL.require_same(dataclasses.replace(PROTOCOL))


def test_only_inception_is_called_fid():
    inception = dataclasses.replace(PROTOCOL, extractor="inception-v3-compat")
    assert inception.metric_name == "FID"
    assert dataclasses.replace(inception, metric="kid").metric_name == "KID"
    assert PROTOCOL.metric_name == "Fréchet distance (fashion-cnn)"
    assert (
        dataclasses.replace(PROTOCOL, metric="kid").metric_name == "Kernel distance (fashion-cnn)"
    )


def test_value_and_standard_error():
    result = EvaluationResult(PROTOCOL, (1.0, 2.0, 6.0))
    assert result.value == 3.0 and result.std_error == pytest.approx(math.sqrt(7 / 3))
    one = EvaluationResult(dataclasses.replace(PROTOCOL, seeds=(0,)), (1.0,))
    assert one.std_error is None


def test_the_standard_error_shrinks_with_the_repeats():
    def spread(n):
        protocol = dataclasses.replace(PROTOCOL, seeds=tuple(range(0, 100 * n, 100)))
        return EvaluationResult(protocol, tuple(float(i % 2) for i in range(n))).std_error

    assert spread(16) < spread(4) / 1.8


def test_a_result_survives_json():
    result = EvaluationResult(PROTOCOL, (1.0, 2.0, 6.0))
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_guidance_on_other_channels_is_another_protocol():
    guided = dataclasses.replace(PROTOCOL, cfg_scale=1.5, guided_channels=3)
    with pytest.raises(EvaluationError, match="guided_channels: 3 and 4"):
        guided.require_same(dataclasses.replace(guided, guided_channels=4))
    # of a release that did not record them
    unknown = dataclasses.replace(guided, guided_channels=None)
    unknown.require_same(dataclasses.replace(unknown))
    with pytest.raises(EvaluationError, match="guided_channels: None and 3"):
        unknown.require_same(guided)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_records_of_releases_without_guided_channels_are_read_and_written_as_they_were(cfg_scale):
    result = EvaluationResult(dataclasses.replace(PROTOCOL, cfg_scale=cfg_scale), (1.0, 2.0, 6.0))
    data = json.loads(json.dumps(result.to_dict()))
    assert "guided_channels" not in data["protocol"] and data["protocol"]["cfg_scale"] == cfg_scale
    assert EvaluationResult.from_dict(data) == result
    known = dataclasses.replace(
        result, protocol=dataclasses.replace(result.protocol, guided_channels=3)
    )
    assert (
        EvaluationResult.from_dict(json.loads(json.dumps(known.to_dict()))).protocol.guided_channels
        == 3
    )


def test_scores_over_training_seeds_are_compared_seed_by_seed():
    early = TrainedScore((6.0, 7.0, 8.0))
    full = TrainedScore((5.0, 6.1, 6.9))
    assert early.value == 7.0 and early.std_error == pytest.approx(1 / math.sqrt(3))
    difference, margin = early.minus(full)
    reference = scipy.stats.ttest_rel(early.values, full.values).confidence_interval(0.95)
    assert difference == pytest.approx(1.0)
    assert (difference - margin, difference + margin) == pytest.approx(tuple(reference))
    # unpaired it would not be told from 0: the seeds that both share move both
    assert margin < difference < 2 * early.std_error
    assert TrainedScore((6.0,)).std_error is None
    assert TrainedScore((6.0,)).minus(full) == (1.0, None)


@pytest.mark.parametrize(("sampling", "training"), [(0.11, 0.0013), (0.2, 0.09), (0.001, 0.3)])
def test_points_as_good_are_told_apart_after_training_again_in_one_case_of_twenty(
    sampling, training
):
    """Sampling errors that all training seeds share, as they are scored on the same images, and
    training errors that all repeats share."""
    rng = np.random.default_rng(0)
    level = EvaluationResult(PROTOCOL, (5.0, 5.0, 5.0))
    told_apart = 0
    for _ in range(400):
        shared = rng.normal(0, sampling, 3)
        pairs = []
        for moved in rng.normal(0, training, 3):
            pairs.append((EvaluationResult(PROTOCOL, tuple(5 + moved + shared)), level))
        difference, margin = trained_again_difference(pairs)
        told_apart += abs(difference) > margin
    assert told_apart <= 0.08 * 400
    with_itself = trained_again_difference(pairs[:1])
    assert with_itself[1] is None  # one training seed


@pytest.mark.parametrize("values", [(1.0,), (1.0, 2.0, math.nan), (1.0, 2.0, math.inf)])
def test_missing_or_infinite_figures_are_refused(values):
    with pytest.raises(EvaluationError, match="one finite value per repeat"):
        EvaluationResult(PROTOCOL, values)
