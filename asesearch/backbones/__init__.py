"""Networks that take `exit_depth`, and the files they are read from."""

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import CheckpointInfo, inspect_checkpoint, load_backbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.files import read_state_dict
from asesearch.backbones.saving import save_backbone
from asesearch.backbones.uvit import UViT

__all__ = [
    "Backbone",
    "CheckpointInfo",
    "DiT",
    "UViT",
    "inspect_checkpoint",
    "load_backbone",
    "read_state_dict",
    "save_backbone",
]
