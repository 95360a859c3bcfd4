"""The networks around the latents: the VAE, both ways, and the text encoder. Local folders only,
and never a pickle."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asesearch.backbones.device import tf32
from asesearch.backbones.digests import weights_digest
from asesearch.backbones.finite import refuse_not_finite
from asesearch.backbones.folders import find_folder, load_pretrained, read_config
from asesearch.errors import CheckpointError, ConfigError, DataError, in_one_line

PathLike = str | os.PathLike[str]
_log = logging.getLogger(__name__)
MAX_LENGTH = 120  # tokens a caption, as PixArt-α's
# say how a network was saved, not what it is
VERSION_KEYS = {"transformers_version", "architectures", "dtype", "torch_dtype"}


def read_own_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, without what varies with the libraries' versions.

    Raises:
        CheckpointError: unreadable.
    """
    return {
        k: v
        for k, v in read_config(folder).items()
        if k == "_class_name" or (k[:1] != "_" and k not in VERSION_KEYS)
    }


def load_whole(cls: Any, folder: Path, what: str) -> Any:
    """A network from a local folder, every weight from its file.

    Raises:
        CheckpointError: unreadable, not safetensors, or some weights are missing, of another shape
            or not finite.
    """
    net, unfit = load_pretrained(cls, folder, what)
    lost = sorted(
        name
        for key in ("missing_keys", "mismatched_keys")
        for name in unfit.get(key, [])
        if "pooler" not in name
    )
    if lost:
        raise CheckpointError(
            f"{folder} must hold all weights; got none that fit for {', '.join(lost[:3])}; fetch "
            "it again"
        )
    refuse_not_finite(net.state_dict(), f"{folder} ({what})")
    return net.eval().requires_grad_(False)


class Network:
    """A pretrained network that tells whether it is the one on record.

    Args:
        net: with its weights.
        config: what else makes it what it is.

    Attributes:
        net: the network.
    """

    def __init__(self, net: Any, config: dict[str, Any]) -> None:
        self.net = net
        self._config = config

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration and weights as used; takes as long as reading them."""
        return weights_digest(self.net, self._config)

    def known_as(self, recorded: object) -> str:
        """The digest, or the one on record where that is this network's as releases before took
        it."""
        if recorded not in (None, self.digest):
            earlier = weights_digest(self.net, self._config, earlier=True)
            if recorded == earlier:
                return earlier
        return self.digest


class Vae(Network):
    """diffusers' AutoencoderKL in float32.

    Attributes:
        shift, scale: of each latent channel, from its config; the network sees (z - shift) · scale.
        factor: pixels a latent, each way.
        channels: of the images.
    """

    def __init__(self, path: PathLike, device: str | torch.device) -> None:
        from diffusers import AutoencoderKL  # here, because it takes seconds

        folder = find_folder(Path(path), "vae")
        saved = read_own_config(folder)
        if saved.get("_class_name") != "AutoencoderKL":
            raise CheckpointError(
                f"the VAE must be an AutoencoderKL; got {saved.get('_class_name')} in {folder}; "
                "give another"
            )
        super().__init__(load_whole(AutoencoderKL, folder, "AutoencoderKL").float(), saved)
        self.device = torch.device(device)
        config = self.net.config
        try:
            stds = config.latents_std or [1.0] * config.latent_channels
            self.scale = [float(config.scaling_factor / std) for std in stds]
            means = config.latents_mean or [config.shift_factor or 0.0] * config.latent_channels
            self.shift = [float(mean) for mean in means]
        except (TypeError, ValueError, ZeroDivisionError):
            self.scale = self.shift = []
        lengths = {len(self.scale), len(self.shift)}
        if lengths != {config.latent_channels} or not np.isfinite(self.scale + self.shift).all():
            raise CheckpointError(
                f"the config.json of {folder} must scale each latent channel by numbers "
                "(scaling_factor, shift_factor, latents_mean, latents_std); got others; fetch it "
                "again"
            )
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.channels: int = config.in_channels
        self.net.to(self.device)

    def moments(self, x_start: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior: (N, 3, H, W) -> (N, 2, C, h, w), not
        scaled."""
        with tf32(False):
            posterior = self.net.encode(x_start.to(self.device)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    @torch.inference_mode()
    def probe(self) -> list[float]:
        """What the encoder makes of a small fixed image, to four digits, which tells it from
        others whatever the decoder and the precision of the file."""
        side = 4 * self.factor
        waves = torch.arange(self.channels * side**2).mul(0.7).sin()
        mean = self.moments(waves.view(1, self.channels, side, side))[0, 0]  # (C, 4, 4)
        return [float(f"{value:.4g}") for value in mean.flatten().tolist()]


class LatentDecoder:
    """Turns latents back into images, for evaluation.

    Args:
        path: local folder of a diffusers AutoencoderKL, or of a pipeline with one in `vae/`.
        device: where it runs.

    Attributes:
        digest: SHA-256 over configuration and weights.
        factor: pixels a latent, each way.
        channels: of the images.
        shift, scale: of each latent channel: z = latent / scale + shift.

    Raises:
        CheckpointError: no AutoencoderKL there, or unreadable.
    """

    def __init__(self, path: PathLike, device: str | torch.device = "cpu") -> None:
        self._path = path
        self._vae = vae = Vae(path, device)
        self.digest = vae.digest
        self.factor = vae.factor
        self.shift = vae.shift
        self.scale = vae.scale
        self.channels: int = vae.net.config.out_channels
        self.known_as = vae.known_as

    def check_scaling(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        """Refuse latents that another kind of VAE made (one that differs in its decoder only is
        welcome).

        Args:
            shift: of each channel, as the latents were made.
            scale: of each channel, as the latents were made.

        Raises:
            DataError: this VAE's are others.
        """
        own = np.array([self.shift, self.scale])
        others = np.array([shift, scale])
        if own.shape != others.shape or not np.allclose(own, others):
            raise DataError(
                f"the VAE must scale latents as the one that encoded them, by {list(scale)} after "
                f"a shift of {list(shift)}; got {self.scale} and {self.shift}; use the latents' "
                "own VAE"
            )

    def check_encoder(self, digest: object, probe: Sequence[float] | None) -> None:
        """Refuse latents that another encoder made, whose pictures would be of wrong colours and
        texture; where the encoder is not known, another VAE is named in a warning.

        Args:
            digest: of the VAE that made the latents; None where it is not known.
            probe: its `Vae.probe`; None where it was not recorded.

        Raises:
            DataError: this VAE's encoder is another.
        """
        if digest is None or self.known_as(digest) == digest:
            return
        shown = f"{self._path} (SHA-256 {self.digest[:12]}…)"
        theirs = f"that of SHA-256 {str(digest)[:12]}…"
        if probe is None:
            _log.warning(
                "the VAE %s is not the one that encoded the latents, %s; if it differs in more "
                "than its decoder, use that one",
                shown,
                theirs,
            )
        elif not _alike(self._vae.probe(), probe):
            raise DataError(
                "the VAE must be the one that encoded the latents, or differ from it in its "
                f"decoder only; got {shown}, whose encoder is not {theirs}, which encoded them; "
                "use that VAE, or encode the images again with this one"
            )

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int = 32) -> Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W) float32 in [-1, 1], on the latents'
        device.

        Raises:
            DataError: latents of another number of channels.
        """
        vae = self._vae
        if latents.ndim != 4 or latents.shape[1] != len(vae.scale):
            wanted = f"(N, {len(vae.scale)}, h, w)"
            raise DataError(
                f"this VAE decodes latents of shape {wanted}; got {tuple(latents.shape)}; use the "
                "latents' own VAE"
            )
        # (C, 1, 1)
        shift, scale = (
            torch.tensor(v, dtype=torch.float32, device=vae.device).view(-1, 1, 1)
            for v in (vae.shift, vae.scale)
        )
        parts = (
            part.to(vae.device).float() / scale + shift for part in torch.split(latents, batch_size)
        )
        with tf32(False):
            made = [vae.net.decode(z).sample.clamp(-1, 1).to(latents.device) for z in parts]
        return torch.cat(made)


def _alike(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two encoders are the same but for the rounding of half precision."""
    a = np.array(probe)
    b = np.array(other)
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 0.05 * float(np.abs(b).max())


class TextEncoder(Network):
    """A transformers text encoder with its tokenizer; in bfloat16 on a GPU, as PixArt-α's, else in
    float32.

    Its digest is over configuration, weights as used, and vocabulary.

    Raises:
        CheckpointError: network or tokenizer missing or unreadable, or not made for each other.
        ConfigError: transformers is not installed, or max_length is more than the network takes.
    """

    def __init__(self, path: PathLike, device: str | torch.device, max_length: int) -> None:
        try:
            from transformers import AutoModelForTextEncoding
        except ImportError as error:
            raise ConfigError(
                f"captions need transformers; got {error}; pip install 'asesearch[text]'"
            ) from error
        folder = find_folder(Path(path), "text_encoder")
        self.tokenizer = _load_tokenizer(folder)
        self.max_length = max_length
        self.device = torch.device(device)
        limit = self.tokenizer.model_max_length
        if not 0 < max_length <= limit:
            raise ConfigError(
                f"max_length must lie in 1…{limit} for the text encoder {folder}; got "
                f"{max_length}; change it"
            )
        net = load_whole(AutoModelForTextEncoding, folder, "text encoder")
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        _refuse_other_tokens(net, vocabulary, folder)
        super().__init__(
            net.to(torch.float32 if self.device.type == "cpu" else torch.bfloat16),
            {**read_own_config(folder), "vocabulary": vocabulary},
        )
        self.net.to(self.device)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """The embedding of each caption without its padding: (tokens, D).

        Source: PixArt-α's pipeline in diffusers: lower case, stripped, padded and cut to
        max_length, with an attention mask.
        """
        texts = [caption.lower().strip() for caption in captions]
        how = {
            "padding": "max_length",
            "max_length": self.max_length,
            "truncation": True,
            "return_tensors": "pt",
        }
        tokens = self.tokenizer(texts, **how).to(self.device)
        mask = tokens.attention_mask
        hidden = self.net(tokens.input_ids, attention_mask=mask).last_hidden_state  # (N, L, D)
        return [h[m.bool()] for h, m in zip(hidden, mask, strict=True)]


def _refuse_other_tokens(net: Any, vocabulary: Sequence[tuple[str, int]], folder: Path) -> None:
    """Refuse a tokenizer that gives tokens which the network has no embedding of.

    Raises:
        CheckpointError: naming the last of them.
    """
    rows = net.get_input_embeddings().weight.shape[0]
    token, last = max(vocabulary, key=lambda item: item[1])
    if last >= rows:
        raise CheckpointError(
            f"the text encoder in {folder} must embed every token of its tokenizer; got {rows} "
            f"embeddings and token {last} ({token[:40]!r}); put both of one model there"
        )


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a text encoder's folder, or in `tokenizer/` in or beside it."""
    from transformers import AutoTokenizer

    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    place = next((p for p in places if (p / "tokenizer_config.json").is_file()), None)
    if place is None:
        raise CheckpointError(
            f"a tokenizer_config.json is needed; got none in {', '.join(map(str, places))}; put it "
            "there"
        )
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of damaged files it raises anything
        reason = in_one_line(error)
        raise CheckpointError(
            f"can't load the tokenizer {place}: {reason}; fetch it again; is sentencepiece there?"
        ) from error
