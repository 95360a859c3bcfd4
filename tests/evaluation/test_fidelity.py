"""Distances against closed forms, references against recomputation, the protocol against abuse."""

import dataclasses
import errno
import fcntl
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asesearch import calibration
from asesearch.config import EvaluationConfig, SamplingConfig
from asesearch.data import ImageArray, ImageFolder, fashion_mnist
from asesearch.errors import DataError, EvaluationError
from asesearch.evaluation import distances, features, references
from asesearch.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from asesearch.evaluation.features import extract_features, to_uint8
from asesearch.evaluation.fidelity import build_protocol, evaluate
from asesearch.evaluation.references import (
    SHIPPED,
    SHIPPED_DIR,
    reference_path,
    reference_statistics,
)

# -- bytes ---------------------------------------------------------------------------------------


def test_every_byte_comes_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(images.float() / 127.5 - 1), images)


def test_rounding_is_the_official_one():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, 7)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(bad):
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = bad
    with pytest.raises(EvaluationError, match="1 of 3"):
        to_uint8(images)


def test_many_images_are_made_bytes_of_in_parts(monkeypatch):
    images = torch.linspace(-1, 1, 7 * 4).view(7, 1, 2, 2)
    whole = to_uint8(images)
    monkeypatch.setattr(features, "CONVERTED", 3)
    assert torch.equal(to_uint8(images), whole)
    images[1], images[5] = torch.inf, torch.nan
    with pytest.raises(EvaluationError, match="2 of 7"):
        to_uint8(images)


# -- Fréchet -------------------------------------------------------------------------------------


def random_moments(seed, dim=5):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), root @ root.T + 0.1 * np.eye(dim)


def check_closed_form(distance):
    """Diagonal covariances: |Δmean|² + Σ (√a - √b)²."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 3, (2, 6))
    mean1, mean2 = rng.normal(size=(2, 6))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert distance(mean1, np.diag(a), mean2, np.diag(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_has_the_closed_form():
    check_closed_form(frechet_distance)


@pytest.mark.parametrize(
    "broken",
    [
        lambda m1, c1, m2, c2: float(np.sum((m1 - m2) ** 2)),
        lambda m1, c1, m2, c2: float(np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2)),
    ],
    ids=["forgets the covariance", "forgets the mixed term"],
)
def test_the_closed_form_catches_a_broken_distance(broken):
    with pytest.raises(AssertionError):
        check_closed_form(broken)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_frechet_agrees_with_scipys_matrix_root(seed):
    mean1, cov1 = random_moments(seed)
    mean2, cov2 = random_moments(seed + 1)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    found = frechet_distance(mean1, cov1, mean2, cov2)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(frechet_distance(mean2, cov2, mean1, cov1), rel=1e-9)
    assert frechet_distance(mean1, cov1, mean1, cov1) == pytest.approx(0, abs=1e-6)


def test_its_noise_and_bias_shrink_with_the_number_of_images():
    rng = np.random.default_rng(0)

    def draws(n):
        out = []
        for _ in range(40):
            x = rng.normal(size=(n, 4))
            out.append(frechet_distance(x.mean(0), np.cov(x, rowvar=False), np.zeros(4), np.eye(4)))
        return np.mean(out), np.std(out)

    bias_few, noise_few = draws(50)
    bias_many, noise_many = draws(1600)
    assert bias_many < bias_few / 8 and noise_many < noise_few / 4


def test_moments_that_do_not_fit_are_refused():
    mean, cov = random_moments(0)
    with pytest.raises(EvaluationError, match="one D"):
        frechet_distance(mean, cov, *random_moments(1, dim=4))
    with pytest.raises(EvaluationError, match="finite"):
        frechet_distance(mean, cov * np.nan, mean, cov)


# -- kernel distance -----------------------------------------------------------------------------


def test_kernel_distance_is_unbiased_near_zero(monkeypatch):
    monkeypatch.setattr(distances, "KID_SUBSETS", 5)
    rng = np.random.default_rng(0)
    same = [
        kernel_distance(rng.normal(size=(40, 4)), rng.normal(size=(40, 4)))[0] for _ in range(30)
    ]
    standard_error = np.std(same) / np.sqrt(30)
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * standard_error
    assert (
        kernel_distance(rng.normal(size=(40, 4)), rng.normal(1, 1, size=(40, 4)))[0]
        > 10 * standard_error
    )


def balls(points):
    """Squared radii about each point: to its third nearest neighbour but itself."""
    return np.sort(((points[:, None] - points[None]) ** 2).sum(-1), axis=1)[:, 3]


def test_precision_and_recall_are_shares_of_images_in_the_others_balls():
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(0, 1, (60, 3)), rng.normal(0.7, 1.3, (60, 3))
    away = ((ours[:, None] - theirs[None]) ** 2).sum(-1)  # (ours, theirs)
    precision = (away <= balls(theirs)[None]).any(1).mean()
    recall = (away <= balls(ours)[:, None]).any(0).mean()
    assert 0.2 < precision < 1 and 0.2 < recall < 1 and abs(precision - recall) > 0.1
    assert precision_recall(ours, theirs) == pytest.approx((precision, recall))
    assert precision_recall(theirs, ours) == pytest.approx((recall, precision))


def test_a_lost_mode_costs_recall_and_bad_images_cost_precision():
    rng = np.random.default_rng(6)
    near, far = rng.normal(0, 1, (200, 4)), rng.normal(30, 1, (200, 4))
    reference = rng.permutation(np.concatenate([near, far]))
    again = rng.permutation(np.concatenate([near, far]) + rng.normal(0, 0.1, (400, 4)))
    lost = np.concatenate([near, near + rng.normal(0, 0.1, (200, 4))])
    bad = rng.permutation(np.concatenate([again[:200], rng.normal(-90, 1, (200, 4))]))
    whole, one, mixed = (precision_recall(f, reference) for f in (again, lost, bad))
    assert min(whole) > 0.95
    assert one[0] > 0.95 and one[1] == pytest.approx(0.5, abs=0.05)
    assert mixed[0] == pytest.approx(0.5, abs=0.05) and mixed[1] > 0.9


def test_precision_and_recall_take_equally_many_of_both():
    rng = np.random.default_rng(7)
    ours, theirs = rng.normal(size=(40, 3)), rng.normal(size=(900, 3))
    rows = np.random.default_rng(references.KID_SEED).permutation(900)[:40]
    assert precision_recall(ours, theirs) == precision_recall(ours, theirs[np.sort(rows)])
    assert precision_recall(theirs, ours) == precision_recall(theirs[:40], ours)
    for few in (ours[:3], ours * np.nan):
        with pytest.raises(EvaluationError, match="more than 3 finite features"):
            precision_recall(few, theirs)


def test_a_biased_kernel_distance_would_be_caught():
    rng = np.random.default_rng(0)

    def biased(x, y):
        def kernel(a, b):
            return (a @ b.T / 4 + 1) ** 3

        return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()

    same = [biased(rng.normal(size=(40, 4)), rng.normal(size=(40, 4))) for _ in range(30)]
    assert abs(np.mean(same)) > 3 * np.std(same) / np.sqrt(30)


def test_kernel_distance_repeats_and_gives_its_spread():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(30, 3))
    many = rng.normal(0.5, 1, size=(90, 3))
    value, std = kernel_distance(few, many)
    assert (value, std) == kernel_distance(few, many) and std > 0
    with pytest.raises(EvaluationError, match="at least 2"):
        kernel_distance(few[:1], many)
    with pytest.raises(EvaluationError, match="finite"):
        kernel_distance(few * np.inf, many)


# -- references ----------------------------------------------------------------------------------


@pytest.fixture
def source(shipped_images):
    return ImageArray(shipped_images.images[:300].numpy(), None, "first-300")


def test_a_reference_holds_the_moments_of_all_and_the_features_of_some(
    extractor, source, own_cache, monkeypatch
):
    monkeypatch.setattr(references, "KID_REFERENCE_SIZE", 50)
    found = reference_statistics(source, extractor, cache=False)
    features = extract_features(extractor, source)
    assert np.allclose(found.mean, features.mean(0)) and np.allclose(
        found.cov, np.cov(features, rowvar=False)
    )
    assert found.features.shape == (50, 64) and found.features.dtype == np.float32
    rows = {tuple(r) for r in features.astype(np.float32)}
    assert len({tuple(r) for r in found.features} & rows) == 50
    assert (found.name, found.size, found.digest) == ("first-300", 300, source.digest)
    assert not own_cache.exists()


def test_the_features_a_reference_keeps_are_spread_over_the_data(extractor, source, monkeypatch):
    """Data sets lie in the order of their classes: the first images stand for one class only."""
    monkeypatch.setattr(references, "KID_REFERENCE_SIZE", 50)
    kept = reference_statistics(source, extractor, cache=False).features
    features = extract_features(extractor, source).astype(np.float32)
    rows = [int(np.abs(features - row).sum(axis=1).argmin()) for row in kept]
    assert len(set(rows)) == 50 and rows == sorted(rows)
    for third in range(3):  # 50 of 300 at random: 16.7 in each third, give or take 3
        assert 6 <= sum(third * 100 <= r < (third + 1) * 100 for r in rows) <= 28


def test_kernel_distance_looks_at_all_features(monkeypatch):
    """Half the images are the reference's own, the others far away: whichever half comes first."""
    monkeypatch.setattr(distances, "KID_SUBSETS", 20)
    monkeypatch.setattr(distances, "KID_SUBSET_SIZE", 40)
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(200, 4))
    near = rng.normal(size=(200, 4))
    far = rng.normal(2, 1, size=(200, 4))
    alone = [kernel_distance(part, reference)[0] for part in (near, far)]
    mixed = [
        kernel_distance(np.concatenate(parts), reference)[0] for parts in ((near, far), (far, near))
    ]
    for value in mixed:
        assert alone[0] + 0.1 * alone[1] < value < 0.7 * alone[1]


def test_a_reference_is_made_once(extractor, source, own_cache, monkeypatch):
    first = reference_statistics(source, extractor)
    monkeypatch.setattr(ImageArray, "batch", lambda *_: pytest.fail("read again"))
    again = reference_statistics(source, extractor)
    assert np.array_equal(first.mean, again.mean) and np.array_equal(first.cov, again.cov)
    assert np.array_equal(first.features, again.features)
    assert {p.suffix for p in (own_cache / "references").iterdir()} <= {".npz", ".lock"}


def test_who_comes_while_a_reference_is_made_waits_for_it(
    extractor, source, own_cache, monkeypatch
):
    make, made = references._make_reference, []

    def slowly(*args):
        made.append(args)
        time.sleep(0.3)
        return make(*args)

    monkeypatch.setattr(references, "_make_reference", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: reference_statistics(source, extractor), range(3)))
    assert len(made) == 1
    assert all(np.array_equal(one.cov, found[0].cov) for one in found)


def test_without_locks_each_makes_its_own(extractor, source, own_cache, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    first = reference_statistics(source, extractor)
    assert reference_path(own_cache / "references", extractor, source.digest).is_file()
    assert np.array_equal(reference_statistics(source, extractor).mean, first.mean)


def test_its_name_covers_all_it_depends_on(extractor, tmp_path, monkeypatch):
    names = {reference_path(tmp_path, extractor, "a")}
    names.add(reference_path(tmp_path, extractor, "b"))
    names.add(reference_path(tmp_path, dataclasses.replace(extractor, name="other"), "a"))
    names.add(reference_path(tmp_path, dataclasses.replace(extractor, digest="0" * 64), "a"))
    for key in references.RECIPE:
        with monkeypatch.context() as changed:
            changed.setitem(references.RECIPE, key, "changed")
            names.add(reference_path(tmp_path, extractor, "a"))
    assert len(names) == 4 + len(references.RECIPE)
    assert reference_path(tmp_path, extractor, "a") in names


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def of_another_data_set(path):
    with np.load(path) as file:
        content = dict(file)
    content["facts"] = np.array(
        str(content["facts"]).replace("first-300", "x").replace('digest": "', 'digest": "0')
    )
    np.savez(path, **content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        of_another_data_set,
        lambda p: p.write_bytes(p.read_bytes()[:-100]),
        lambda p: p.write_bytes(b""),
    ],
    ids=["a byte", "other data", "truncated", "empty"],
)
def test_a_damaged_cache_is_made_anew(extractor, source, own_cache, caplog, damage):
    first = reference_statistics(source, extractor)
    path = reference_path(own_cache / "references", extractor, source.digest)
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = reference_statistics(source, extractor)
    assert "damaged" in caplog.text and np.array_equal(first.cov, again.cov)
    assert len(path.read_bytes()) == len(whole)
    caplog.clear()
    assert (
        np.array_equal(reference_statistics(source, extractor).mean, first.mean) and not caplog.text
    )


def test_a_reference_that_can_not_be_kept_is_used_all_the_same(
    extractor, source, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        made = reference_statistics(source, extractor)
    assert np.array_equal(made.mean, reference_statistics(source, extractor, cache=False).mean)
    assert (
        "the next run will make the reference again" in caplog.text
        and "ASESEARCH_CACHE" in caplog.text
    )


def test_a_reference_of_damaged_images_names_them_all_before_any_is_used(
    extractor, own_cache, tmp_path, monkeypatch
):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "9.png")
    monkeypatch.setattr(ImageFolder, "batch", None)
    with pytest.raises(DataError, match=r"5 of 6 images.*0\.png.*1\.png.*2\.png.*2 more"):
        reference_statistics(ImageFolder(tmp_path, 28, 1), extractor)


def test_the_shipped_reference_needs_no_data(extractor, own_cache, monkeypatch, shipped_images):
    monkeypatch.setattr("asesearch.data.fashion.DEBIAN_FASHION_MNIST", own_cache)
    with pytest.raises(DataError):
        fashion_mnist("train")
    reference = reference_statistics("fashion-mnist/train", extractor)
    assert (reference.size, reference.name) == (60_000, "fashion-mnist/train")
    assert reference.digest == SHIPPED["fashion-mnist/train"]
    features = extract_features(extractor, shipped_images.images[:2000])
    near = frechet_distance(
        features.mean(0), np.cov(features, rowvar=False), reference.mean, reference.cov
    )
    worse = extract_features(extractor, 255 - shipped_images.images[:2000])
    far = frechet_distance(
        worse.mean(0), np.cov(worse, rowvar=False), reference.mean, reference.cov
    )
    assert near < 2 < 20 < far
    assert sum(p.stat().st_size for p in SHIPPED_DIR.iterdir()) < 3_000_000


def test_a_name_without_a_stored_reference_is_refused(extractor, own_cache):
    with pytest.raises(EvaluationError, match="by name"):
        reference_statistics("cifar10", extractor)
    with pytest.raises(EvaluationError, match="give the data set itself"):
        reference_statistics("fashion-mnist/train", dataclasses.replace(extractor, digest="0" * 64))


@pytest.mark.slow
def test_the_shipped_reference_is_that_of_the_sixty_thousand(extractor):
    try:
        data = fashion_mnist("train")
    except DataError as error:
        pytest.skip(str(error))
    assert data.digest == SHIPPED["fashion-mnist/train"]
    stored = reference_statistics("fashion-mnist/train", extractor)
    made = references._make_reference(data, extractor)
    assert np.allclose(stored.mean, made.mean, atol=1e-4) and np.allclose(
        stored.cov, made.cov, atol=1e-3
    )
    assert np.allclose(stored.features, made.features, atol=1e-2)


def test_a_reference_of_latents_is_refused_before_it_is_read(extractor, own_cache):
    latents = ImageArray(np.zeros((5, 4, 28, 28), np.uint8), None, "latents")
    with pytest.raises(EvaluationError, match="4 in latents"):
        reference_statistics(latents, extractor)


# -- protocol and evaluation ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference(extractor):
    return reference_statistics("fashion-mnist/train", extractor)


@pytest.mark.parametrize(("cfg_scale", "kept"), [(1.0, None), (1.5, 3), (0.0, 3)])
def test_guided_channels_are_part_of_a_protocol_under_guidance_alone(
    extractor, reference, cfg_scale, kept
):
    config = EvaluationConfig(metric="kid", extractor="fashion-cnn", num_samples=10)
    how = SamplingConfig(cfg_scale=cfg_scale)
    assert (
        build_protocol(config, how, extractor, reference, guided_channels=3).guided_channels == kept
    )


def protocol_of(extractor, reference, **fields):
    settings_ = {"metric": "frechet", "extractor": "fashion-cnn", "num_samples": 100, **fields}
    return build_protocol(
        EvaluationConfig(**settings_), SamplingConfig(num_steps=7), extractor, reference
    )


def test_the_protocol_says_all_of_it(extractor, reference):
    protocol = protocol_of(extractor, reference, repeats=3, seed=10)
    assert protocol.seeds == (10, 110, 210)
    assert (protocol.extractor_digest, protocol.reference_digest) == (
        extractor.digest,
        reference.digest,
    )
    assert (protocol.solver, protocol.num_steps, protocol.reference_size) == ("ddim", 7, 60_000)
    assert protocol.metric_name == "Fréchet distance (fashion-cnn)"


def test_too_few_images_for_the_covariance_are_refused(extractor, reference):
    with pytest.raises(EvaluationError, match="64 features.*got 64.*65"):
        protocol_of(extractor, reference, num_samples=64)
    assert protocol_of(extractor, reference, num_samples=65).num_samples == 65
    assert protocol_of(extractor, reference, num_samples=64, metric="kid").num_samples == 64
    with pytest.raises(EvaluationError, match="reference images"):
        protocol_of(extractor, dataclasses.replace(reference, size=60))


def test_repeats_that_share_seeds_are_refused(extractor, reference):
    config = EvaluationConfig(num_samples=100, extractor="fashion-cnn")
    sampling = SamplingConfig()
    assert build_protocol(config, sampling, extractor, reference, seeds=[500, 0]).seeds == (500, 0)
    for seeds in ([0, 99], [5, 5], []):
        with pytest.raises(EvaluationError, match="share seeds"):
            build_protocol(config, sampling, extractor, reference, seeds=seeds)


def test_seeds_that_no_image_can_have_are_refused(extractor, reference):
    """Those above are for calibrating accelerations."""
    last = calibration.SEEDS.start - 2 * 100
    kept = protocol_of(extractor, reference, num_samples=100, repeats=2, seed=last)
    assert kept.seeds == (last, last + 100)
    for seed in (last + 1, 2**32, 2**52):
        with pytest.raises(EvaluationError, match=f"let the last begin at {last + 100} at most"):
            protocol_of(extractor, reference, num_samples=100, repeats=2, seed=seed)


def test_a_reference_of_another_extractor_is_refused(extractor, reference):
    with pytest.raises(EvaluationError, match="same extractor"):
        protocol_of(dataclasses.replace(extractor, digest="0" * 64), reference)


class FromDisk:
    """A generator that draws shipped images by seed, and notes what it was asked for."""

    def __init__(self, images):
        self.images = images
        self.asked = []

    def __call__(self, seeds):
        self.asked.append(seeds)
        return self.images[[s % len(self.images) for s in seeds]]


def test_each_repeat_has_its_own_images(extractor, reference, shipped_images):
    make_images = FromDisk(shipped_images.images)
    protocol = protocol_of(extractor, reference, num_samples=150, repeats=2, seed=1000)
    result = evaluate(make_images, protocol, extractor, reference, chunk=100)
    assert make_images.asked == [
        range(1000, 1100),
        range(1100, 1150),
        range(1150, 1250),
        range(1250, 1300),
    ]
    for value, first in zip(result.values, (1000, 1150), strict=True):
        features = extract_features(extractor, shipped_images.images[first : first + 150])
        expected = frechet_distance(
            features.mean(0), np.cov(features, rowvar=False), reference.mean, reference.cov
        )
        assert value == pytest.approx(expected, rel=1e-6)
    assert result.protocol == protocol and result.std_error > 0
    whole = evaluate(make_images, protocol, extractor, reference)
    assert whole.values == pytest.approx(result.values, rel=1e-5)


def test_kid_of_the_real_thing_is_near_zero(extractor, reference, shipped_images, monkeypatch):
    monkeypatch.setattr(distances, "KID_SUBSETS", 10)
    protocol = protocol_of(extractor, reference, metric="kid", num_samples=300)
    real = evaluate(FromDisk(shipped_images.images), protocol, extractor, reference).value
    noise = evaluate(
        lambda seeds: torch.full((len(seeds), 1, 28, 28), 99, dtype=torch.uint8),
        protocol,
        extractor,
        reference,
    )
    assert abs(real) < 1 < 10 < noise.value


@pytest.mark.parametrize(
    ("make_images", "said"),
    [
        (
            lambda seeds: torch.zeros(len(seeds) - 1, 1, 28, 28, dtype=torch.uint8),
            "one image a seed",
        ),
        (lambda seeds: torch.zeros(len(seeds), 1, 28, 28), "to_uint8"),
        (lambda seeds: torch.zeros(len(seeds), 3, 28, 28, dtype=torch.uint8), "channel"),
        (lambda seeds: to_uint8(torch.full((len(seeds), 1, 28, 28), torch.nan)), "finite"),
    ],
)
def test_images_that_can_not_be_evaluated_are_refused(extractor, reference, make_images, said):
    with pytest.raises(EvaluationError, match=said):
        evaluate(make_images, protocol_of(extractor, reference), extractor, reference)


def test_parts_that_are_not_the_protocols_are_refused(extractor, reference):
    protocol = protocol_of(extractor, reference)
    unused = FromDisk(None)
    for other in (
        dataclasses.replace(reference, digest="0"),
        dataclasses.replace(reference, extractor_digest="0"),
    ):
        with pytest.raises(EvaluationError, match="must be the protocol's"):
            evaluate(unused, protocol, extractor, other)
    with pytest.raises(EvaluationError, match="must be the protocol's"):
        evaluate(unused, protocol, dataclasses.replace(extractor, digest="0"), reference)
    assert unused.asked == []


def test_no_images_give_no_features(extractor):
    with pytest.raises(EvaluationError, match="at least one"):
        extract_features(extractor, torch.zeros(0, 1, 28, 28, dtype=torch.uint8))
