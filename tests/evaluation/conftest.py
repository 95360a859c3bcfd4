"""The shipped classifier and images, and a cache of one's own."""

import pytest

from asesearch.data import fashion_mnist
from asesearch.evaluation.extractors import make_extractor


@pytest.fixture(scope="session")
def extractor():
    return make_extractor("fashion-cnn")


@pytest.fixture(scope="session")
def shipped_images():
    """The 10,000 Fashion-MNIST test images."""
    return fashion_mnist("test")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
