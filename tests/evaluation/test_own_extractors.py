"""Extractors of one's own that break the contract are refused where they are made or first used, in
one line."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorBase

from asesearch.data import ImageArray
from asesearch.errors import EvaluationError
from asesearch.evaluation.extractors import make_extractor
from asesearch.evaluation.references import reference_statistics


class Sums(FeatureExtractorBase):
    """Features of four rows of an image, and what follows is wrong in one way each."""

    channels = 1

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    def features(self, images):
        return images.float().flatten(1).unflatten(1, (4, -1)).mean(2)

    def forward(self, images):
        return (self.features(images),)

    @staticmethod
    def get_provided_features_list():
        return ("sums",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "sums"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.ones(2, 1, 8, 8, dtype=torch.uint8)


class WithoutDummy(Sums):
    """Without what torch-fidelity asks for where it compiles."""

    get_dummy_input_for_compile = staticmethod(FeatureExtractorBase.get_dummy_input_for_compile)

    def features(self, images):
        return images.float().mean((2, 3))


class Integers(Sums):
    def forward(self, images):
        return (self.features(images).long(),)


class Flat(Sums):
    def forward(self, images):
        return (self.features(images)[:, 0],)


class Deep(Sums):
    def forward(self, images):
        return (self.features(images)[..., None],)


class Bare(Sums):
    def forward(self, images):
        return self.features(images)


class Two(Sums):
    def forward(self, images):
        return (self.features(images), self.features(images))


class OneForAll(Sums):
    def forward(self, images):
        return (self.features(images).mean(0, keepdim=True),)


class Arrays(Sums):
    def forward(self, images):
        return (self.features(images).numpy(),)


class Nothing(Sums):
    def forward(self, images):
        return (self.features(images)[:, :0],)


class Drawn(Sums):
    def forward(self, images):
        return (torch.randn(len(images), 4),)


class NotANumber(Sums):
    def forward(self, images):
        return (self.features(images) * torch.nan,)


class Raises(Sums):
    def forward(self, images):
        raise ZeroDivisionError("division by zero")


class Leaves(Sums):
    def forward(self, images):
        raise SystemExit(0)


class Unmade(Sums):
    def __init__(self, name, features_list, **_):
        raise AttributeError("no weights given")


class Layerless(Sums):
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        raise KeyError(metric)


class NoChannels(Sums):
    channels = 0


# of what only real images show


class Narrow(Sums):
    def forward(self, images):
        return (self.features(images)[:, : 4 if len(images) == 2 else 3],)


class Sometimes(Sums):
    def forward(self, images):
        found = self.features(images)
        found[found.mean(1) > 100] = torch.nan
        return (found,)


class Constant(Sums):
    def forward(self, images):
        return (self.features(images) * 0,)


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """Their module under a name that is free, for a registered name is taken for good."""
    name = f"own_extractors_{len(sys.modules)}_{np.random.default_rng().integers(2**40)}"
    made = ModuleType(name)
    vars(made).update(globals())
    monkeypatch.setitem(sys.modules, name, made)
    return name


def test_images_to_try_it_with_are_made_where_it_gives_none(module):
    with pytest.raises(NotImplementedError):
        WithoutDummy.get_dummy_input_for_compile()
    found = make_extractor(f"{module}:WithoutDummy")
    assert (found.channels, found.dim) == (1, 1)


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Flat, r"\(2, D\) for 2 images, in a tuple; got a tuple of float32 \(2,\) from"),
        (Deep, r"got a tuple of float32 \(2, 4, 1\) from .*correct its class"),
        (Bare, r"got float32 \(2, 4\) from"),
        (Two, r"got a tuple of float32 \(2, 4\), float32 \(2, 4\) from"),
        (OneForAll, r"got a tuple of float32 \(1, 4\) from"),
        (Arrays, "got a tuple of a ndarray from"),
        (Nothing, r"got a tuple of float32 \(2, 0\) from"),
        (Drawn, "the same features of the same images; got others from"),
        (NotANumber, "features must be finite; got NaN or infinity .* for 2 of 2 images"),
        (Raises, r"fails on uint8 \(2, 1, 8, 8\): ZeroDivisionError: division by zero; correct"),
        (Leaves, "fails on .*: SystemExit: 0; correct its class"),
        (Unmade, r"can't load the extractor \S+: AttributeError: no weights given; correct its"),
        (Layerless, r"can't load the extractor \S+: KeyError: 'fid'; correct its class"),
        (NoChannels, "1 channel or more; got 0 from"),
    ],
)
def test_what_breaks_the_contract_is_refused_when_it_is_made(module, cls, said):
    with pytest.raises(EvaluationError, match=said) as caught:
        make_extractor(f"{module}:{cls.__name__}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Narrow, r"\(24, 4\) for 24 images, in a tuple; got a tuple of float32 \(24, 3\)"),
        (Sometimes, "got NaN or infinity from the extractor .* for 13 of 24 images"),
        (Constant, "must differ; .* gives the same for all 24 images of few"),
    ],
)
def test_what_real_images_show_is_refused_with_them(module, cls, said, own_cache):
    values = np.repeat(np.arange(24, dtype=np.uint8) * 10, 64).reshape(24, 1, 8, 8)
    extractor = make_extractor(f"{module}:{cls.__name__}")
    few = ImageArray(values, None, "few")
    for _ in range(2):  # nothing of it was kept
        with pytest.raises(EvaluationError, match=said):
            reference_statistics(few, extractor)


@pytest.mark.parametrize("cls", [Sums, Integers])
def test_what_keeps_it_works(module, cls):
    extractor = make_extractor(f"{module}:{cls.__name__}")
    images = torch.arange(3 * 64).reshape(3, 1, 8, 8).to(torch.uint8)
    found = extractor(images)
    assert found.shape == (3, 4) and found.dtype == torch.float64
    assert torch.equal(found, cls("x", ["sums"]).forward(images)[0].double())


def test_a_module_that_ends_the_program_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ends_the_program.py").write_text("raise SystemExit(2)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaluationError, match="can't import .*: SystemExit: 2; correct its module"):
        make_extractor("ends_the_program:Any")
