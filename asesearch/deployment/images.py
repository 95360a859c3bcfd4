"""Images of a bundle, from its folder to a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asesearch.backbones.conditioning import Conditioning, repeat
from asesearch.backbones.device import check_memory, default_device
from asesearch.data import save_images
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.reading import load_bundle
from asesearch.encoding import LatentDecoder, encode_prompts
from asesearch.errors import ConfigError
from asesearch.evaluation.features import to_uint8
from asesearch.files import check_writable
from asesearch.sampler import passes_per_call
from asesearch.sampling import SampleResult

DECODED = 32  # images that a VAE decodes together, at most

_log = logging.getLogger(__name__)


class BundleImages:
    """Images that are to be sampled; everything is checked when it is made.

    Args:
        bundle: its folder.
        out: a picture grid (.png), or all images as an array (.npz); without a VAE, the latents of
            a bundle that makes some, float32.
        num: of images.
        seed: of the first image; the others count up.
        label: class of all; None for all classes in turn.
        prompt: text of all; None for the bundle's examples in turn.
        text_encoder: folder of the text encoder that a prompt needs.
        vae: folder of the VAE that turns latents into images.
        num_steps: solver steps, in place of the bundle's.
        compile: run the network's blocks as compiled code; None as the bundle says.
        batch_size: images that go through the network together; None as the bundle says.

    Attributes:
        plan: how they will be sampled, as plain data.

    Raises:
        ConfigError: options that do not go together, or that the bundle does not take.
        CheckpointError, WriteError: no bundle there, or a file that can't be written.
    """

    def __init__(
        self,
        bundle: Path,
        out: Path,
        num: int = 64,
        *,
        seed: int = 0,
        label: int | None = None,
        prompt: str | None = None,
        text_encoder: Path | None = None,
        vae: Path | None = None,
        num_steps: int | None = None,
        compile: bool | None = None,
        batch_size: int | None = None,
    ) -> None:
        _check_options(out, label, prompt, text_encoder)
        self.out = out
        self.seeds = range(seed, seed + num)
        self.bundle = load_bundle(bundle, default_device())
        net = self.bundle.backbone
        if self.bundle.latents is not None and vae is None and out.suffix == ".png":
            raise ConfigError(
                "this bundle makes latents, and a picture needs --vae; got none; give it, or write "
                ".npz"
            )
        self.decoder = None if vae is None else decoder_of(self.bundle, vae)
        each = 4 * net.in_channels * net.input_size**2
        if self.decoder is not None:
            each += self.decoder.channels * (net.input_size * self.decoder.factor) ** 2
        check_memory(num, each, "all images", "lower --num")
        self.y: Conditioning | None = None if label is None else self.bundle.labels(label, num)
        if prompt is not None and text_encoder is not None:
            self.y = repeat(prompts_for(self.bundle, [prompt], text_encoder), num)
        how, calls = self.bundle.plan(self.seeds, self.y, num_steps)
        chosen = {"compile": compile, "batch_size": batch_size}
        self.how = how.model_copy(update={k: v for k, v in chosen.items() if v is not None})
        self.plan: dict[str, Any] = {
            "schedule": str(self.bundle.schedule),
            "sampling": self.how.model_dump(mode="json"),
            "acceleration": self.bundle.acceleration_name or None,
            "num": num,
            "blocks_run_frac": None  # an acceleration may save some, which is seen when it has run
            if self.bundle.acceleration_name
            else self.bundle.schedule.block_frac(calls, net.fixed_blocks),
        }

    def sample(self) -> SampleResult:
        """The images or latents; see `Bundle.sample`."""
        how = self.how
        return self.bundle.sample(
            self.seeds, self.y, how.num_steps, compile=how.compile, batch_size=how.batch_size
        )

    def blocks_run_frac(self, result: SampleResult) -> float:
        """Blocks that really ran, over the full network's in as many steps.

        Not `block_frac` of the study and of bundle.json, which is over the full network's under the
        study's own sampler, and counts what an acceleration saves of a block.
        """
        net = self.bundle.backbone
        passes = passes_per_call(self.bundle.sampling.cfg_scale)
        full = passes * len(result.timesteps) * (net.fixed_blocks + net.depth)
        return result.block_calls / full

    def told(self, result: SampleResult) -> dict[str, Any]:
        """The plan, and what `sample` took, as plain data."""
        return {
            **self.plan,
            "out": str(self.out),
            "nfe": result.nfe,
            "blocks_run": result.block_calls,
            "blocks_run_frac": self.blocks_run_frac(result),
            "seconds": round(result.seconds, 3),
        }

    def write(self, result: SampleResult) -> None:
        """Write what `sample` gave, decoded where there is a VAE.

        Raises:
            WriteError: the file can't be written.
        """
        if self.bundle.latents is not None and self.decoder is None:
            save_images(result.images.numpy(), self.out, "latents")
            return
        images = to_uint8(result.images) if self.decoder is None else self._decoded(result.images)
        save_images(images.numpy(), self.out)

    def _decoded(self, latents: Tensor) -> Tensor:
        """As bytes at once, a fourth of what the floats would take."""
        assert self.decoder is not None
        parts = torch.split(latents, min(DECODED, self.how.batch_size))
        first = to_uint8(self.decoder.decode(parts[0]))
        made = torch.empty(len(latents), *first.shape[1:], dtype=torch.uint8)
        for ours, part in zip(torch.split(made, len(parts[0])), parts, strict=True):
            ours.copy_(first if part is parts[0] else to_uint8(self.decoder.decode(part)))
        return made


def _check_options(
    out: Path, label: int | None, prompt: str | None, text_encoder: Path | None
) -> None:
    """Refuse what can be refused before the bundle is read."""
    if out.suffix not in (".png", ".npz"):
        raise ConfigError(f"images are written as .png or .npz; got {out}; change --out")
    if (prompt is None) != (text_encoder is None) or (prompt is not None and label is not None):
        raise ConfigError(
            "--prompt goes with --text-encoder and without --label; got another combination; "
            "correct it"
        )
    check_writable(out)


def decoder_of(bundle: Bundle, vae: Path) -> LatentDecoder:
    """What turns a bundle's latents into images, from the folder of their AutoencoderKL, on the
    network's device.

    Raises:
        ConfigError: this bundle makes images.
        CheckpointError, DataError: no AutoencoderKL there, or one that scales latents otherwise.
    """
    if bundle.latents is None:
        raise ConfigError(
            f"a VAE is for bundles that make latents; got {vae} for one that makes images; "
            "leave it out"
        )
    decoder = LatentDecoder(vae, next(bundle.backbone.parameters()).device)
    decoder.check_scaling(bundle.latents["shift"], bundle.latents["scale"])
    digest = bundle.latents.get("digest")
    if digest is not None and decoder.known_as(digest) != digest:
        _log.warning(
            "the VAE %s (SHA-256 %s…) is not the one that decoded the study's images, that of "
            "SHA-256 %s…; if it differs in more than its decoder, use that one",
            vae,
            decoder.digest[:12],
            str(digest)[:12],
        )
    return decoder


def prompts_for(bundle: Bundle, texts: Sequence[str], text_encoder: Path) -> dict[str, Tensor]:
    """Texts as `y` of `Bundle.sample`, by the folder of the text encoder that the network was
    trained with.

    Raises:
        ConfigError: this bundle takes no prompts, or those of another text encoder.
        CheckpointError: no text encoder there.
    """
    if bundle.prompts is None:
        raise ConfigError(
            f"prompts are for networks that take them; got {texts[0]!r} for another; leave them out"
        )
    length = bundle.prompts["encoder_hidden_states"].shape[1]
    device = next(bundle.backbone.parameters()).device
    return encode_prompts(texts, text_encoder, length, device)
