"""Cached latents: an image folder goes through a VAE once (its captions through a text encoder),
training reads the result."""

from asesearch.data.latents import LatentShards
from asesearch.encoding.encoding import EncodingPlan, encode_latents, encode_prompts
from asesearch.encoding.folder import encode_folder, read_captions
from asesearch.encoding.networks import LatentDecoder

__all__ = [
    "EncodingPlan",
    "LatentDecoder",
    "LatentShards",
    "encode_folder",
    "encode_latents",
    "encode_prompts",
    "read_captions",
]
