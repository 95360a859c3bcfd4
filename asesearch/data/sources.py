"""What training reads and references are made from: the contract, and images held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asesearch.errors import DataError


class DataSource(Protocol):
    """What the trainer and the evaluator need of a data set.

    Attributes:
        name: for records, such as "fashion-mnist/train".
        shape: (C, H, W) of x_start.
        num_classes: number of labels, 0 if there are none.
        digest: SHA-256 over everything the batches depend on.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    digest: str

    def __len__(self) -> int: ...

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        """x_start (N, C, H, W) float32 in [-1, 1] (or scaled latents), and y: (N,) int64, a
        prompt's tensors, or None.

        `generator` feeds random augmentation; None means none is applied.
        """
        ...


class ImageArray:
    """Images held in memory as bytes.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers 0 … num_classes - 1, or None.
        name: for records.
        num_classes: number of labels; by default the largest label plus one.
        flip: mirror half of the images left to right, where a generator is passed.

    Raises:
        DataError: arrays of another shape or type, labels out of range, or no images.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer] | None,
        name: str,
        num_classes: int | None = None,
        flip: bool = False,
    ) -> None:
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
            raise DataError(
                f"images must be uint8 of shape (N, C, H, W), N > 0; got {images.dtype} "
                f"{images.shape} in {name}"
            )
        if labels is not None and labels.shape != (len(images),):
            raise DataError(
                f"one label per image is needed; got {labels.shape} labels for {len(images)} "
                f"images in {name}"
            )
        self.images = torch.tensor(images)
        self.name = name
        self.flip = flip
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes = 0 if self.labels is None else num_classes or int(self.labels.max()) + 1
        if (
            self.labels is not None
            and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes
        ):
            raise DataError(
                f"labels must lie in 0…{self.num_classes - 1}; got "
                f"{int(self.labels.min())}…{int(self.labels.max())} in {name}"
            )
        self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        sha = hashlib.sha256(repr((images.shape, flip)).encode())
        sha.update(self.images.numpy().data)
        if self.labels is not None:
            sha.update(self.labels.numpy().data)
        self.digest = sha.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        x_start = self.images[index].float().div_(127.5).sub_(1.0)  # (N, C, H, W)
        return mirrored(
            x_start, self.flip, generator
        ), None if self.labels is None else self.labels[index]


def mirrored(x_start: Tensor, flip: bool, generator: torch.Generator | None) -> Tensor:
    if not flip or generator is None:
        return x_start
    mirrored = torch.rand(len(x_start), generator=generator, dtype=torch.float32) < 0.5
    return torch.where(mirrored[:, None, None, None], x_start.flip(-1), x_start)
