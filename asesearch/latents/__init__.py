"""Cached latents: an image folder goes through a VAE once (its captions through a text encoder),
training reads the result."""

from asesearch.latents.encoding import (
    EncodingPlan,
    encode_folder,
    encode_latents,
    encode_prompts,
    read_captions,
)
from asesearch.latents.networks import LatentDecoder
from asesearch.latents.shards import LatentShards

__all__ = [
    "EncodingPlan",
    "LatentDecoder",
    "LatentShards",
    "encode_folder",
    "encode_latents",
    "encode_prompts",
    "read_captions",
]
