"""Data sources: what training reads and what references are made from.

A source gives batches by index, so a training step's data follow from its seed and number alone.
"""

from asesearch.data.cache import cache_dir
from asesearch.data.fashion import FASHION_MNIST_CLASSES, fashion_mnist, read_idx
from asesearch.data.images import ImageFolder
from asesearch.data.loading import read_ahead, workers_of
from asesearch.data.open import check_readable, open_data
from asesearch.data.outputs import check_not_read, check_output, refuse_among_data
from asesearch.data.pixels import centre_crop, save_images
from asesearch.data.sources import DataSource, ImageArray

__all__ = [
    "FASHION_MNIST_CLASSES",
    "DataSource",
    "ImageArray",
    "ImageFolder",
    "cache_dir",
    "centre_crop",
    "check_not_read",
    "check_output",
    "check_readable",
    "fashion_mnist",
    "open_data",
    "read_ahead",
    "read_idx",
    "refuse_among_data",
    "save_images",
    "workers_of",
]
