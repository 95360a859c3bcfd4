"""Tiny networks and data that every room's tests share."""

import signal

import numpy as np
import optuna
import pytest
import sqlalchemy
import torch

from asesearch.backbones import DiT, compiled
from asesearch.data import ImageArray
from asesearch.files import warn_once
from tests.processes import poll_often

# files that take longest; first, so that two processes that share the files out end together
LONG = ("test_study.py", "test_cli.py", "test_workers.py", "test_studies.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


# A shell that starts the tests in the background lets them and their children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_DIT = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
    "learn_sigma": True,
}


@pytest.fixture
def tiny_dit():
    """A DiT of 4 blocks for 8x8 grey images whose every parameter is random (adaLN-Zero would hide
    the blocks)."""
    generator = torch.Generator().manual_seed(0)
    net = DiT(**TINY_DIT)
    for p in net.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return net.eval()


@pytest.fixture
def tiny_images():
    """96 grey 8x8 images of 3 classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = np.clip(
        rng.normal(60 + 60 * labels[:, None, None, None], 20, (96, 1, 8, 8)), 0, 255
    ).astype(np.uint8)
    return ImageArray(images, labels, "tiny")


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """An empty cache folder, and warnings that come once a process not given yet."""
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    warn_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _no_sync():
    """Studies of tests need not survive a power cut: they would wait for the disk most of the
    time."""

    def relax(connection, _record):
        if "sqlite3" in type(connection).__module__:
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", relax)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", relax)


@pytest.fixture(autouse=True, scope="session")
def _latency_in_one_repeat():
    """Tests of the latency table say themselves how often it is to be measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asesearch.search.costs.LATENCY_REPEATS", 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_polls():
    """Workers look at each other often: what they wait for takes a moment here."""
    with pytest.MonkeyPatch.context() as patch:
        poll_often(patch.setattr)
        yield


@pytest.fixture(autouse=True, scope="session")
def _migrations_read_once():
    """Optuna reads all its migrations whenever a storage is opened: most of the time that takes."""
    manager = optuna.storages._rdb.storage._VersionManager
    read = manager._create_alembic_script
    found = []

    def once(self):
        if not found:
            found.append(read(self))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "_create_alembic_script", once)
        yield


@pytest.fixture
def num_graphs():
    """How many graphs were compiled in this test; none is left from others."""
    from torch._dynamo.utils import counters

    def forget():
        torch._dynamo.reset()
        compiled._code.cache_clear()
        counters.clear()

    forget()
    yield lambda: counters["stats"]["unique_graphs"]
    forget()


@pytest.fixture
def only_traced(monkeypatch, num_graphs):
    """As `num_graphs`; blocks are traced as for any compiler, and their graphs run as they are,
    which is quick."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    return num_graphs
