"""What test_loading.py has workers read: here, so that a worker imports nothing else."""

import os

import numpy as np
import torch

from asesearch.errors import DataError


def square(key):
    return key * key


def process_of(key):
    return os.getpid()


def refuse_the_third(key):
    if key == 2:
        raise DataError("can't read the image 2; replace it")
    return key


def break_at_the_third(key):
    if key == 2:
        raise ZeroDivisionError("2")
    return key


def without_shared_memory(key):
    """What a batch may hold; a worker that would share memory ends, so that nobody waits for it."""

    def end(*args, **options):
        os._exit(1)

    torch.UntypedStorage._share_fd_cpu_ = torch.UntypedStorage._share_filename_cpu_ = end
    images = torch.arange(24.0).view(2, 3, 4) + key
    prompt = {"embeds": images.half(), "mask": torch.tensor([[True, False]])}
    slices = [images[:, 1:].transpose(0, 1), torch.tensor(key), torch.empty(0, 3)]
    return images, {"label": torch.tensor([key]), "prompt": prompt, "none": None}, slices, np.eye(2)
