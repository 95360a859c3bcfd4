"""Scores of fewer images than features: what they are, what they are called, and when they are
taken."""

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorBase

from asesearch.config import PromotionConfig, SamplingConfig, parse_study
from asesearch.errors import EvaluationError
from asesearch.evaluation.distances import projected_distance
from asesearch.evaluation.extractors import make_extractor, register_extractor
from asesearch.evaluation.fidelity import (
    build_protocol,
    check_sample_counts,
    evaluate,
    low_fidelity_metric,
)
from asesearch.evaluation.references import ReferenceStats

DIM = 48


class Pixels(FeatureExtractorBase):
    """The 48 numbers of a 4 x 4 colour image."""

    def __init__(
        self, name="pixels-48", features_list=("48",), feature_extractor_weights_path=None, **_
    ):
        super().__init__(name, list(features_list))

    def forward(self, images):
        return (images.float().flatten(1) / 255,)

    @staticmethod
    def get_provided_features_list():
        return ("48",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "48"

    @staticmethod
    def can_be_compiled():
        return True

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


register_extractor("pixels-48", Pixels)


def reference_of(mean, cov, extractor=None):
    name, digest = ("x", "y") if extractor is None else (extractor.name, extractor.digest)
    rows = np.random.default_rng(0).multivariate_normal(mean, cov, 100).astype(np.float32)
    return ReferenceStats("data", 1000, "d", name, digest, np.asarray(mean), np.asarray(cov), rows)


def study(**sections):
    base = {"name": "s", "backbone": {"checkpoint": "c"}, "data": {"kind": "fashion-mnist"}}
    return parse_study({**base, **sections}, "s")


def test_the_distance_is_taken_where_the_reference_varies_most():
    # axis 4 is the widest, axis 2 the next; all others hold nonsense that must not count
    reference = reference_of([0.0, 0, 0, 0, 0], np.diag([1.0, 4, 9, 0.25, 16]))
    # on axis 4: mean 2, variance 2; so on axis 2
    features = np.array([[50.0, 7, 1, -80, 1], [90, 8, 3, 70, 3]])
    one = 2**2 + (np.sqrt(2) - 4) ** 2
    assert projected_distance(features, reference, 1) == pytest.approx(one)
    # both vary together: covariance [[2, 2], [2, 2]], whose product with diag(16, 9) has the one
    # eigenvalue 50
    two = 2 * 2**2 + 4 + 25 - 2 * np.sqrt(50)
    assert projected_distance(features, reference, 2) == pytest.approx(two, rel=1e-3)


def test_the_distance_does_not_depend_on_the_basis_of_the_features():
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    cov = np.diag([9.0, 5, 3, 1, 0.5, 0.1])
    features = rng.normal(size=(40, 6)) + 0.5
    turned = reference_of(np.zeros(6), rotation @ cov @ rotation.T)
    expected = projected_distance(features, reference_of(np.zeros(6), cov), 3)
    assert projected_distance(features @ rotation.T, turned, 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "own", "images", "expected"),
    [
        ("auto", "frechet", 49, "frechet"),
        ("auto", "frechet", 48, "frechet-pca"),
        ("auto", "frechet", 4, "frechet-pca"),
        ("auto", "kid", 4, "kid"),
        ("kid", "frechet", 4, "kid"),
        ("frechet-pca", "frechet", 1000, "frechet-pca"),
    ],
)
def test_which_metric_is_taken(asked, own, images, expected):
    config = study(evaluation={"metric": own})
    promotion = PromotionConfig(metric=asked, num_samples=images)
    assert low_fidelity_metric(promotion, config.evaluation, DIM) == expected


def test_a_protocol_of_few_images_names_its_components_and_gives_a_score():
    extractor = make_extractor("pixels-48")
    reference = reference_of(
        np.full(DIM, 0.5), np.eye(DIM) * np.linspace(0.09, 0.05, DIM), extractor
    )
    evaluation = study(
        evaluation={"extractor": "pixels-48", "num_samples": 20, "repeats": 2}
    ).evaluation
    parts = (evaluation, SamplingConfig(), extractor, reference)
    with pytest.raises(EvaluationError, match="must exceed the extractor's 48 features"):
        build_protocol(*parts)
    protocol = build_protocol(*parts, metric="frechet-pca")
    assert (protocol.metric, protocol.num_components) == ("frechet-pca-5", 5)
    assert protocol.metric_name == "Fréchet distance in 5 principal components (pixels-48)"

    def images(level):
        def make(seeds):
            rng = np.random.default_rng(seeds.start)
            return torch.from_numpy(
                np.clip(rng.normal(level, 60, (len(seeds), 3, 4, 4)), 0, 255).astype(np.uint8)
            )

        return make

    near = evaluate(images(128), protocol, extractor, reference)
    far = evaluate(images(190), protocol, extractor, reference)
    # five components: the mean is off by 62 / 255 in every pixel
    assert len(near.values) == 2 and far.value - near.value == pytest.approx(
        5 * (62 / 255) ** 2, rel=0.4
    )
    with pytest.raises(EvaluationError, match="metric: 'frechet-pca-5' and 'kid'"):
        near.minus(
            evaluate(images(128), build_protocol(*parts, metric="kid"), extractor, reference)
        )


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"evaluation": {"num_samples": 48}},
            r"evaluation.num_samples must exceed the 48 .*got 48; set at least 49",
        ),
        (
            {"confirm": {"num_samples": 10}},
            r"confirm.num_samples must exceed .*got 10; .*evaluation.metric = 'kid'",
        ),
        (
            {"evaluation": {"num_samples": 5}, "confirm": {"num_samples": 6}},
            r"evaluation.num_samples and confirm.num_samples must .*got 5 and 6;",
        ),
        (
            {"promotion": {"metric": "frechet", "num_samples": 7}},
            r"promotion.num_samples must .*got 7; .*promotion.metric = 'auto'",
        ),
        (
            {
                "evaluation": {"metric": "kid", "num_samples": 9},
                "promotion": {"metric": "frechet", "num_samples": 7},
            },
            r"^promotion.num_samples must",
        ),
    ],
)
def test_scores_that_can_not_exist_are_named_all_at_once(sections, text):
    with pytest.raises(EvaluationError, match=text):
        check_sample_counts(study(**sections), DIM)


@pytest.mark.parametrize(
    ("sections", "frechet"),
    [
        (
            {
                "evaluation": {"num_samples": 49},
                "confirm": {"num_samples": 49},
                "promotion": {"num_samples": 2},
            },
            "evaluation.num_samples and confirm.num_samples",
        ),
        ({"evaluation": {"metric": "kid", "num_samples": 5}, "confirm": {"num_samples": 5}}, None),
        ({"promotion": {"metric": "kid", "num_samples": 5}}, "evaluation.num_samples"),
    ],
)
def test_scores_that_exist_are_not_refused(sections, frechet):
    """Nor are kernel distances and low-fidelity scores of any number of features."""
    config = study(**sections)
    assert check_sample_counts(config, DIM) is None
    if frechet is None:
        assert check_sample_counts(config, 10**6) is None
        return
    with pytest.raises(EvaluationError, match=f"^{frechet}") as caught:
        check_sample_counts(config, 10**6)
    assert "promotion" not in str(caught.value).partition("must")[0]
