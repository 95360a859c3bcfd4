"""Where networks run."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first visible GPU, or the CPU. Choose another GPU with CUDA_VISIBLE_DEVICES."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
