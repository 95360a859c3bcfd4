"""Extractors: what they take, what their digest covers, and what happens without their weights."""

import email.message
import importlib
import io
import sys
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from asesearch.backbones.digests import weights_digest
from asesearch.data import ImageArray
from asesearch.errors import AseSearchError, DataError, EvaluationError
from asesearch.evaluation import extractors
from asesearch.evaluation.classifiers import classifier_accuracy, train_extractor
from asesearch.evaluation.distances import frechet_distance
from asesearch.evaluation.extractors import (
    SHIPPED_CLASSIFIERS,
    make_extractor,
    register_extractor,
)
from asesearch.evaluation.fashion_cnn import FashionCNN
from asesearch.evaluation.fashion_vit import FashionViT
from asesearch.evaluation.features import extract_features
from asesearch.evaluation.references import reference_statistics


def subset(data: ImageArray, count: int) -> ImageArray:
    return ImageArray(
        data.images[:count].numpy(),
        data.labels[:count].numpy(),
        f"{data.name}[:{count}]",
        num_classes=10,
    )


def metadata_of(path):
    """What `train_extractor` recorded in a weights file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(params=SHIPPED_CLASSIFIERS.values(), ids=lambda cls: cls.extractor)
def cls(request):
    return request.param


LEAST = {FashionCNN: 0.9, FashionViT: 0.86}  # accuracy as shipped
LEARNT = {FashionCNN: 0.6, FashionViT: 0.3}  # after 2 epochs of 1,000 images; 0.1 is chance


# -- the shipped classifiers ---------------------------------------------------------------------


def test_a_shipped_classifier_reaches_its_accuracy_on_a_subset(cls, shipped_images):
    measured = float(metadata_of(cls.shipped())["accuracy"])
    found = classifier_accuracy(cls().eval(), subset(shipped_images, 2000))
    assert found > measured - 0.02  # three standard errors of 2,000 images are 0.019
    assert found > LEAST[cls]


def test_random_weights_fail_the_accuracy_test(cls, shipped_images):
    assert classifier_accuracy(cls(trained=False).eval(), subset(shipped_images, 500)) < 0.5


@pytest.mark.slow
def test_a_shipped_classifier_reaches_its_recorded_accuracy(cls, shipped_images):
    found = classifier_accuracy(cls().eval(), shipped_images)
    assert found > LEAST[cls]
    assert found == pytest.approx(float(metadata_of(cls.shipped())["accuracy"]), abs=5e-4)


def test_the_shipped_weights_say_where_they_come_from(cls, shipped_images):
    metadata = metadata_of(cls.shipped())
    assert metadata["test"] == f"{shipped_images.name} {shipped_images.digest}"
    assert metadata["data"].startswith("fashion-mnist/train ")
    assert metadata["extractor"] == cls.extractor and metadata["epochs"] == str(cls.epochs)
    assert f"--seed {metadata['seed']}" in metadata["command"]
    assert "train-extractor" in metadata["command"]
    assert cls.shipped().stat().st_size < 1_000_000


def test_the_shipped_classifiers_err_on_other_images(shipped_images):
    """A second opinion that shared its mistakes with the first would be none."""
    images = subset(shipped_images, 2000)
    with torch.no_grad():
        nets = [cls(features_list=["logits"]).eval() for cls in SHIPPED_CLASSIFIERS.values()]
        wrong = [net(images.images)[0].argmax(1) != images.labels for net in nets]
    both = (wrong[0] & wrong[1]).sum()
    either = (wrong[0] | wrong[1]).sum()
    assert both / either < 0.7  # one and the same classifier: 1


def test_the_features_are_64_float64_and_do_not_depend_on_the_batch(cls, shipped_images):
    extractor = make_extractor(cls.extractor)
    images = shipped_images.images[:12]
    features = extractor(images)
    assert (features.shape, features.dtype, extractor.dim, extractor.channels) == (
        (12, 64),
        torch.float64,
        64,
        1,
    )
    alone = torch.cat([extractor(images[i : i + 1]) for i in range(12)])
    assert torch.allclose(features, alone, atol=1e-4)


def test_bytes_and_floats_in_minus_one_to_one_give_the_same_features(cls, shipped_images):
    images = shipped_images.images[:8]
    net = cls().eval()
    with torch.no_grad():
        assert torch.equal(net.features(images), net.features(images.float() / 127.5 - 1))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 1, 28, 28), "uint8"),
        (torch.zeros(1, 28, 28, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), "channel"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "28, 28"),
    ],
)
def test_images_of_another_kind_are_refused(cls, images, said):
    with pytest.raises(EvaluationError, match=said):
        make_extractor(cls.extractor)(images)


# -- training ------------------------------------------------------------------------------------


def test_training_repeats_and_records(cls, tmp_path, shipped_images):
    data = subset(shipped_images, 256)
    test = subset(shipped_images, 100)
    before = torch.random.get_rng_state()
    accuracy = train_extractor(cls, data, tmp_path / "a.safetensors", test=test, epochs=1, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (
        train_extractor(cls, data, tmp_path / "b.safetensors", test=test, epochs=1, seed=3)
        == accuracy
    )
    train_extractor(cls, data, tmp_path / "c.safetensors", test=test, epochs=1, seed=4)
    a, b, c = (make_extractor(cls.extractor, tmp_path / f"{n}.safetensors").digest for n in "abc")
    assert a == b != c
    metadata = metadata_of(tmp_path / "a.safetensors")
    assert (
        metadata["accuracy"] == f"{accuracy:.4f}"
        and metadata["data"] == f"{data.name} {data.digest}"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]


def test_training_learns(cls, tmp_path, shipped_images):
    data = subset(shipped_images, 1000)
    test = ImageArray(
        shipped_images.images[1000:1300].numpy(),
        shipped_images.labels[1000:1300].numpy(),
        "rest",
        10,
    )
    accuracy = train_extractor(
        cls, data, tmp_path / "x.safetensors", test=test, epochs=2, batch_size=32
    )
    assert accuracy > LEARNT[cls]


def test_training_refuses_other_data(tmp_path, tiny_images, shipped_images):
    with pytest.raises(DataError, match="28×28"):
        train_extractor(FashionCNN, tiny_images, tmp_path / "x", test=shipped_images)
    with pytest.raises(DataError, match="0 classes"):
        train_extractor(
            FashionCNN,
            ImageArray(shipped_images.images[:9].numpy(), None, "bare"),
            tmp_path / "x",
            test=shipped_images,
        )
    with pytest.raises(EvaluationError, match="epochs"):
        train_extractor(FashionCNN, shipped_images, tmp_path / "x", test=shipped_images, epochs=0)
    assert list(tmp_path.iterdir()) == []


def test_each_is_trained_on_images_of_its_own(shipped_images):
    images = shipped_images.images[:200]
    made = [cls.augmented(images) for cls in SHIPPED_CLASSIFIERS.values()]
    assert all(m.shape == images.shape and m.dtype == torch.uint8 for m in made)
    mirrored, shifted = made
    kept = (mirrored == images).flatten(1).all(1)
    assert 60 < kept.sum() < 140
    assert torch.equal(mirrored[~kept], images[~kept].flip(-1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = [padded[..., i : i + 28, j : j + 28] for i in range(5) for j in range(5)]
    found = torch.stack([(shifted == w).flatten(1).all(1) for w in windows])  # (25, N)
    assert bool(found.any(0).all()) and bool(found.any(1).all())


# -- registry, digest, weights -------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(EvaluationError, match="inception-v3-compat.*register_extractor"):
        make_extractor("nothing")


class TinyExtractor(torch_fidelity.FeatureExtractorBase):
    """Mean of each channel."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)

    def forward(self, images):
        return (images.float().mean((2, 3)),)

    @staticmethod
    def get_provided_features_list():
        return ("mean",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "mean"

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


def test_an_extractor_of_ones_own_takes_grey_images_as_three_channels():
    register_extractor("tiny-mean", TinyExtractor)
    mine = make_extractor("tiny-mean")
    assert (mine.channels, mine.dim) == (3, 3)
    grey = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    assert mine(grey).tolist() == [[7.5] * 3, [23.5] * 3]
    with pytest.raises(EvaluationError, match="already registered"):
        register_extractor("tiny-mean", TinyExtractor)
    with pytest.raises(EvaluationError, match="FeatureExtractorBase"):
        register_extractor("no-class", lambda: None)
    with pytest.raises(EvaluationError, match="4 in latents"):
        mine.check_shape(4, "latents")


def test_the_digest_covers_values_and_names_but_not_the_file(extractor, tmp_path):
    state = load_file(FashionCNN.shipped())
    save_file(state, tmp_path / "same.safetensors", {"another": "header"})
    assert make_extractor("fashion-cnn", tmp_path / "same.safetensors").digest == extractor.digest
    state["head.bias"] = state["head.bias"] + 1e-3
    save_file(state, tmp_path / "other.safetensors")
    assert make_extractor("fashion-cnn", tmp_path / "other.safetensors").digest != extractor.digest


def test_weights_that_are_missing_or_of_another_network_give_one_line(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing of use")
    for name in ("absent", "other", "damaged"):
        with pytest.raises(EvaluationError, match=name) as caught:
            make_extractor("fashion-cnn", tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


OWN_MODULE = """
import torch
from asesearch.evaluation.fashion_cnn import FashionCNN

class Pooled(FashionCNN):
    \"\"\"Half of the features.\"\"\"
    def forward(self, images):
        return (super().forward(images)[0].unflatten(1, (-1, 2)).mean(2),)

class NoExtractor:
    pass
"""


def test_a_class_of_the_users_own_is_an_extractor_by_its_name(
    tmp_path, monkeypatch, shipped_images
):
    (tmp_path / "own_features.py").write_text(OWN_MODULE)
    with pytest.raises(EvaluationError, match="can't import.*own_features.*PYTHONPATH"):
        make_extractor("own_features:Pooled")
    monkeypatch.syspath_prepend(tmp_path)
    made = make_extractor("own_features:Pooled", FashionCNN.shipped())
    again = make_extractor("own_features:Pooled")  # registered once
    assert (made.name, made.dim) == ("own_features:Pooled", 32) and again.digest == made.digest
    images = shipped_images.images[:3]
    halves = make_extractor("fashion-cnn")(images).unflatten(1, (-1, 2)).mean(2)
    assert torch.allclose(made(images), halves)


def loaded_anew(module: str, name: str):
    """An extractor as a new process loads it."""
    sys.modules.pop(module, None)
    FEATURE_EXTRACTORS_REGISTRY.pop(f"{module}:{name}", None)
    importlib.invalidate_caches()
    return make_extractor(f"{module}:{name}", FashionCNN.shipped())


def test_an_edited_extractor_is_another(tmp_path, monkeypatch) -> None:
    """With the same weights; a line of comment or an empty one makes no other."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "edited_features.py"
    file.write_text(OWN_MODULE)
    first = loaded_anew("edited_features", "Pooled").digest
    file.write_text("# a comment\n\n" + OWN_MODULE + "\n\n")
    assert loaded_anew("edited_features", "Pooled").digest == first
    file.write_text(OWN_MODULE + "\nSCALE = 3.0\n")
    assert loaded_anew("edited_features", "Pooled").digest != first
    assert make_extractor("fashion-cnn").digest == weights_digest(make_extractor("fashion-cnn").net)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("own_features:Missing", "module:Class; got own_features:Missing"),
        ("own_features:NoExtractor", "subclass of torch_fidelity.FeatureExtractorBase"),
        ("broken_features:Any", "RuntimeError: no GPU here; correct its module"),
        ("fashion-vgg", "unknown extractor 'fashion-vgg'.*module:Class"),
    ],
)
def test_what_is_no_extractor_of_ones_own_is_told_in_one_line(tmp_path, monkeypatch, name, rule):
    (tmp_path / "own_features.py").write_text(OWN_MODULE)
    (tmp_path / "broken_features.py").write_text('raise RuntimeError("no GPU here\\nat all")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaluationError, match=rule) as caught:
        make_extractor(name)
    assert "\n" not in str(caught.value)


def test_torch_fidelity_itself_can_use_the_extractor(extractor, shipped_images):
    first = shipped_images.images[:150]
    second = 255 - shipped_images.images[150:300]
    found = torch_fidelity.calculate_metrics(
        input1=Bytes(first),
        input2=Bytes(second),
        feature_extractor="fashion-cnn",
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )[torch_fidelity.KEY_METRIC_FID]
    a, b = (extract_features(extractor, x) for x in (first, second))
    ours = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert found == pytest.approx(ours, rel=1e-3)


class Bytes(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


# -- Inception without and with its weights ------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


class Truncated(io.BytesIO):
    def info(self):
        headers = email.message.Message()
        headers["Content-Length"] = "1000"
        return headers


def no_network(*_, **__):
    raise urllib.error.URLError("Name or service not known")


@pytest.mark.parametrize(
    "answer", [no_network, lambda *_, **__: Truncated(b"half a file")], ids=["none", "truncated"]
)
def test_without_weights_inception_says_which_file_to_put_where(hub, monkeypatch, answer):
    monkeypatch.setattr(torch.hub, "urlopen", answer)
    with pytest.raises(
        EvaluationError, match=r"weights-inception-2015-12-05-6726825d\.pth.*extractor_weights"
    ) as caught:
        make_extractor("inception-v3-compat")
    assert str(hub / "checkpoints") in str(caught.value) and "\n" not in str(caught.value)
    assert [p for p in hub.rglob("*") if p.is_file()] == []


def test_weights_that_are_not_inceptions_are_refused_before_they_are_unpickled(
    tmp_path, hub, monkeypatch
):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    other = tmp_path / "other.pth"
    other.write_bytes(b"not the weights")
    with pytest.raises(EvaluationError, match=r"6726825d.*other\.pth"):
        make_extractor("inception-v3-compat", other)
    damaged = hub / "checkpoints" / extractors.INCEPTION_FILE
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a file")
    with pytest.raises(EvaluationError, match="damaged"):
        make_extractor("inception-v3-compat")
    with pytest.raises(AseSearchError, match="must be a file"):
        make_extractor("inception-v3-compat", tmp_path / "absent.pth")


def test_weights_that_are_something_else_are_told_what_they_are(tmp_path):
    pointer, pickled = tmp_path / "lfs.safetensors", tmp_path / "net.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2700\n")
    torch.save({}, pickled)
    for name, path, why in (
        ("fashion-cnn", pointer, r"which is a Git LFS pointer .*; run `git lfs pull` in its"),
        ("fashion-cnn", pickled, r"net\.pt: .*; give the file of this .* weights, in safetensors"),
        ("inception-v3-compat", pointer, r"which is a Git LFS pointer .*; fetch it again from"),
    ):
        with pytest.raises(EvaluationError, match=why) as caught:
            make_extractor(name, path)
        assert "extractor_weights" not in str(caught.value)


def test_a_pickle_that_carries_code_is_refused(tmp_path):
    register_extractor("my-inception", torch_fidelity.FeatureExtractorInceptionV3)
    torch.save({"fc.bias": Truncated}, tmp_path / "code.pth")
    with pytest.raises(EvaluationError, match="can't load the extractor my-inception") as caught:
        make_extractor("my-inception", tmp_path / "code.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_inception_in_torch_fidelitys_format(tmp_path, monkeypatch, own_cache, shipped_images):
    cls = torch_fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched, torch.random.fork_rng():
        torch.manual_seed(0)
        patched.setattr(
            torch_fidelity.feature_extractor_inceptionv3,
            "load_state_dict_from_url",
            lambda *_, **__: {},
        )
        patched.setattr(cls, "load_state_dict", lambda *_: None)
        torch.save(cls("random", ["2048"]).state_dict(), tmp_path / "random.pth")
    with pytest.raises(EvaluationError, match="under another name"):
        make_extractor("inception-v3-compat", tmp_path / "random.pth")
    register_extractor("random-inception", cls)
    net = make_extractor("random-inception", tmp_path / "random.pth")
    assert (net.channels, net.dim) == (3, 2048)
    grey = shipped_images.images[:3]
    assert torch.equal(net(grey), net(grey.expand(-1, 3, -1, -1)))
    reference = reference_statistics(subset(shipped_images, 6), net)
    assert (
        reference.cov.shape == (2048, 2048)
        and np.isfinite(reference.cov).all()
        and reference.cov.any()
    )


HUBCONF = """
import torch

dependencies = ["torch"]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(3, 384, 14, 14)

    def forward(self, x):
        return self.patches(x).mean(dim=(2, 3))


def dinov2_vits14(pretrained=True):
    return Net()
"""


def no_internet(*_, **__):
    raise urllib.error.URLError("no internet")


def test_dinov2_comes_from_torch_hubs_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.urlopen", no_internet)
    with pytest.raises(EvaluationError, match=r"run torch\.hub\.load\(.*dinov2_vits14.*copy the"):
        make_extractor("dinov2-vit-s-14")
    (tmp_path / "w.pth").touch()
    with pytest.raises(EvaluationError, match="from torch hub and from no file"):
        make_extractor("dinov2-vit-s-14", tmp_path / "w.pth")
    repo = hub / "facebookresearch_dinov2_main"
    repo.mkdir(parents=True)
    (repo / "hubconf.py").write_text(HUBCONF)
    found = make_extractor("dinov2-vit-s-14")
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert found.dim == 384 and found(images).shape == (3, 384)


def test_clip_comes_from_openais_file(tmp_path):
    """As OpenAI publishes it, a TorchScript archive with the text model's weights beside."""

    class Node(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Node()
    weights = CLIPVisual(512, 64, 1, 64, 32).state_dict()
    more = {"text_projection": (4, 512), "transformer.x": (1,), "logit_scale": ()}
    values = {k: torch.randn(v.shape) / 20 for k, v in weights.items()}
    for name, value in {**values, **{k: torch.zeros(v) for k, v in more.items()}}.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, Node())
            at = getattr(at, part)
        setattr(at, last, torch.nn.Parameter(value.half(), requires_grad=False))
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        torch.jit.script(root).save(tmp_path / "clip.pt")
        found = make_extractor("clip-vit-b-32", tmp_path / "clip.pt")
    images = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    assert found.dim == 512 and found(images).isfinite().all()
