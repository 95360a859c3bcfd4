"""Cached latents: an image folder goes through a VAE once (its captions through a text encoder), training reads the result."""

from asesearch.latents.encoding import encode_folder, encode_latents, read_captions
from asesearch.latents.networks import LatentDecoder
from asesearch.latents.shards import LatentShards

__all__ = ["LatentDecoder", "LatentShards", "encode_folder", "encode_latents", "read_captions"]
