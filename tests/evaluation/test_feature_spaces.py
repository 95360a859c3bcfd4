"""Each shipped feature space tells real images from others, and good samples from bad ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from asesearch.backbones import load_backbone
from asesearch.config import BackboneConfig
from asesearch.diffusion import Diffusion
from asesearch.evaluation.distances import frechet_distance
from asesearch.evaluation.extractors import SHIPPED_CLASSIFIERS, make_extractor
from asesearch.evaluation.features import extract_features, to_uint8
from asesearch.evaluation.references import reference_statistics
from asesearch.sampling import sample
from asesearch.schedule import ExitSchedule

HALF = 1000


@pytest.fixture(scope="module", params=list(SHIPPED_CLASSIFIERS))
def space(request, shipped_images):
    """An extractor, and its features of real images."""
    extractor = make_extractor(request.param)
    return extractor, extract_features(extractor, shipped_images.images[:HALF])


def distance(a, b):
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def blurred(images):
    """Each pixel the mean of 3 x 3."""
    return F.avg_pool2d(images.float(), 3, stride=1, padding=1).to(torch.uint8)


def noise(images):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)


def test_real_images_are_near_each_other_and_others_far(space, shipped_images):
    extractor, real = space
    others = shipped_images.images[HALF : 2 * HALF]
    labels = shipped_images.labels[HALF : 2 * HALF]
    near = distance(real, extract_features(extractor, others))
    far = {
        "noise": noise(others),
        "blurred": blurred(others),
        "without trousers": others[labels != 1],
        "upside down": others.flip(-2),
    }
    found = {
        name: distance(real, extract_features(extractor, images)) / near
        for name, images in far.items()
    }
    assert min(found.values()) > 3, found
    assert found["noise"] > 20, found


def test_the_reference_is_of_these_features(space):
    extractor, real = space
    reference = reference_statistics("fashion-mnist/train", extractor)
    near = frechet_distance(real.mean(0), np.cov(real, rowvar=False), reference.mean, reference.cov)
    spread = np.trace(reference.cov)
    assert near < 0.05 * spread  # of another space: more than its spread


@pytest.fixture(scope="module")
def samples():
    """300 samples each of: 18 blocks, 12 blocks, and 6 of the 18, untuned."""
    made = []
    for name, blocks in (("dit-18", 18), ("dit", 12), ("dit-18", 6)):
        net = load_backbone(BackboneConfig(kind="dit", checkpoint=f"shipped:fashion-mnist-{name}"))
        images = sample(
            net,
            "unipc-quadratic",
            ExitSchedule.uniform_intervals((blocks,), net.depth),
            diffusion=Diffusion(),
            num_steps=6,
            seeds=range(300),
            y=torch.arange(300) % 10,
        ).images
        made.append(to_uint8(images))
    return made


@pytest.mark.slow
def test_samples_are_ranked_as_their_networks(space, samples):
    """The deeper network is the better trained one; few of its blocks are worst."""
    extractor, _ = space
    reference = reference_statistics("fashion-mnist/train", extractor)
    scores = []
    for images in samples:
        features = extract_features(extractor, images)
        moments = features.mean(0), np.cov(features, rowvar=False)
        scores.append(frechet_distance(*moments, reference.mean, reference.cov))
    best, middle, worst = scores
    assert best < 0.9 * middle and middle < 0.5 * worst, scores
