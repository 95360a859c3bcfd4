"""Small classifiers of Fashion-MNIST whose features measure grey images, and how they are trained.

Their weights travel in the package.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

from asesearch.data import ImageArray
from asesearch.errors import DataError, EvaluationError
from asesearch.files import replacing

_ASSETS = Path(str(resources.files("asesearch"))) / "assets"


class FashionClassifier(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """Classifier of Fashion-MNIST whose layer before the last gives 64 features.

    A subclass is an architecture and the recipe of its training.

    Args:
        name: as torch-fidelity passes it.
        features_list: as torch-fidelity passes it.
        feature_extractor_weights_path: as torch-fidelity passes it.
        trained: load the weights (by default the shipped ones); False = random ones, to train.

    Attributes:
        extractor: the name it is registered by.
        epochs, lr, weight_decay: of its training.
    """

    channels = 1
    extractor: ClassVar[str]
    epochs: ClassVar[int]
    lr: ClassVar[float]
    weight_decay: ClassVar[float] = 0.0

    def __init__(
        self,
        name: str | None = None,
        features_list: tuple[str, ...] | list[str] = ("64",),
        feature_extractor_weights_path: str | None = None,
        trained: bool = True,
        **_: Any,  # torch-fidelity passes all of its options to every extractor
    ) -> None:
        super().__init__(name or self.extractor, list(features_list))
        self.build()
        self.head = nn.Linear(64, 10)
        if trained:
            self.load_state_dict(load_file(feature_extractor_weights_path or self.shipped()))

    @classmethod
    def shipped(cls) -> Path:
        """Where its weights are in the package."""
        return _ASSETS / f"{cls.extractor}.safetensors"

    @abstractmethod
    def build(self) -> None:
        """Make the layers below the head."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) in [-1, 1] -> (N, 64)."""

    @staticmethod
    @abstractmethod
    def augmented(images: Tensor) -> Tensor:
        """What it is trained on in place of these: (N, 1, 28, 28) uint8 -> the same."""

    def features(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) uint8, or float in [-1, 1] -> (N, 64)."""
        return self.embed(images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, as torch-fidelity wants them."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise EvaluationError(
                f"the extractor {self.extractor} takes images of shape (N, 1, 28, 28); got "
                f"{tuple(images.shape)}; use inception-v3-compat for others"
            )
        features = self.features(images)
        return tuple(features if f == "64" else self.head(features) for f in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 1, 28, 28, dtype=torch.uint8)


def train_extractor(
    cls: type[FashionClassifier],
    data: ImageArray,
    out: str | os.PathLike[str],
    *,
    test: ImageArray,
    epochs: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> float:
    """Train a classifier and write its weights: Adam, one cycle of the learning rate.

    The file's metadata record accuracy, seed, data and command.

    Args:
        cls: the classifier; its class says how many epochs, and how images are augmented.
        data: (N, 1, 28, 28) images with labels 0…9, to train on.
        test: the same, to measure the accuracy on.
        out: safetensors file, written atomically.
        epochs: in place of the class's own.

    Returns:
        Accuracy on `test`, 0 to 1.

    Raises:
        DataError: images of another shape, or without labels.
        EvaluationError: no epochs.
    """
    epochs = cls.epochs if epochs is None else epochs
    for source in (data, test):
        if source.shape != (1, 28, 28) or not 0 < source.num_classes <= 10:
            raise DataError(
                f"{cls.extractor} is trained on 28×28 grey images of at most ten classes; got "
                f"{source.shape} with {source.num_classes} classes in {source.name}; use "
                "Fashion-MNIST"
            )
    if epochs < 1:
        raise EvaluationError(f"epochs must be at least 1; got {epochs}; {cls.epochs} are usual")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = cls(trained=False)
        _fit(net, data, epochs, batch_size)
    accuracy = classifier_accuracy(net, test)
    metadata = {
        "extractor": cls.extractor,
        "accuracy": f"{accuracy:.4f}",
        "test": f"{test.name} {test.digest}",
        "data": f"{data.name} {data.digest}",
        "epochs": str(epochs),
        "seed": str(seed),
        "command": f"asesearch train-extractor --name {cls.extractor} --out {Path(out).name} "
        f"--seed {seed}",
        "torch": torch.__version__,
    }
    with replacing(out, shared=True) as part:
        save_file(net.state_dict(), part, metadata)
    return accuracy


def _fit(net: FashionClassifier, data: ImageArray, epochs: int, batch_size: int) -> None:
    """Train in place with torch's global generator, and leave the network in eval mode."""
    assert data.labels is not None
    steps = epochs * -(-len(data) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), net.lr, weight_decay=net.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, net.lr, total_steps=steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(data))
        for start in range(0, len(data), batch_size):
            index = order[start : start + batch_size]
            images = net.augmented(data.images[index])
            loss = F.cross_entropy(
                net.head(net.features(images)), data.labels[index], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
    net.eval()


def classifier_accuracy(net: FashionClassifier, test: ImageArray) -> float:
    """Share of images whose label the classifier gets right, 0 to 1."""
    assert test.labels is not None
    with torch.no_grad():
        batches = [test.images[i : i + 1000] for i in range(0, len(test), 1000)]
        guesses = [net.head(net.features(images)).argmax(1) for images in batches]
    return float((torch.cat(guesses) == test.labels).double().mean())
