"""Networks that take `exit_depth`."""

from asesearch.backbones.base import Backbone
from asesearch.backbones.dit import DiT

__all__ = ["Backbone", "DiT"]
