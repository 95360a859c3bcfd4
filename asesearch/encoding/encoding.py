"""Encoding: images, and captions if there are any, into a folder that `LatentShards` reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asesearch.data import DataSource, check_readable
from asesearch.data.latents import Array, Index, pad_prompts, write_array
from asesearch.encoding.networks import MAX_LENGTH, PathLike, TextEncoder, Vae
from asesearch.encoding.resuming import LOCK, fresh_index, is_intact, resumed
from asesearch.errors import ConfigError, DataError
from asesearch.locks import alone

READERS = 16  # threads that read images, at most


@dataclass(frozen=True)
class EncodingPlan:
    """What an encoding will cost.

    Attributes:
        images: number of images.
        shape: (C, h, w) of a latent.
        image_s: seconds an image, measured on one batch.
        total_s: of all images.
        total_bytes: on disk, about.
    """

    images: int
    shape: tuple[int, ...]
    image_s: float
    total_s: float
    total_bytes: int


@dataclass
class _Job:
    """An encoding that has passed its checks."""

    source: DataSource
    vae: Vae
    text: TextEncoder | None
    captions: Sequence[str]
    batch_size: int
    flips: bool
    dtype: torch.dtype
    on_batch: Callable[[int], None]

    def shard(self, indices: range) -> dict[str, Array]:
        """The arrays of one shard, by part."""
        latents: list[Tensor] = []
        labels: list[Tensor] = []
        prompts: list[Tensor] = []
        for chunk, x_start, y in self._batches(indices):
            where = f"images {chunk.start}…{chunk.stop - 1} of {self.source.name}"
            views = (x_start, x_start.flip(-1)) if self.flips else (x_start,)
            # (n, V, 2, C, h, w)
            moments = torch.stack([self.vae.moments(view) for view in views], dim=1)
            latents.append(self._stored(moments, where))
            if self.text is not None:
                prompts += [
                    self._stored(p, where)
                    for p in self.text.encode([self.captions[i] for i in chunk])
                ]
            elif y is not None:
                labels.append(y)
            self.on_batch(len(chunk))
        parts = {"latents": torch.cat(latents)}
        if labels:
            parts["labels"] = torch.cat(labels)
        if prompts:
            parts["tokens"] = torch.cat(prompts)
            parts["offsets"] = torch.tensor([0, *map(len, prompts)]).cumsum(0)
        return {name: tensor.numpy() for name, tensor in parts.items()}

    def plan(self, shape: Sequence[int]) -> EncodingPlan:
        """Encode one batch twice, and time the second."""
        count = len(self.source)
        indices = range(min(self.batch_size, len(self.source)))
        self.shard(indices)
        start = time.perf_counter()
        parts = self.shard(indices)
        image_s = (time.perf_counter() - start) / len(indices)
        size = sum(array.nbytes for array in parts.values())
        return EncodingPlan(
            count, tuple(shape), image_s, image_s * count, size * count // len(indices)
        )

    def null_prompt(self) -> Array | None:
        """The empty prompt's embedding: (tokens, D)."""
        return (
            None
            if self.text is None
            else self._stored(self.text.encode([""])[0], "the empty prompt").numpy()
        )

    def _stored(self, values: Tensor, where: str) -> Tensor:
        stored = values.to("cpu", self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise DataError(
                f"latents and embeddings must be finite in {self.dtype}; got others in {where}; "
                "use float32, or other weights"
            )
        return stored

    def _batches(self, indices: range) -> Iterator[tuple[range, Tensor, Tensor | None]]:
        """Indices, images and labels, read by several threads, one batch ahead.

        Not by a DataLoader's processes: two threads read 399 images per second where two processes
        read 346 (JPEGs of 500 x 375 pixels, two processors).
        """
        chunks = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, READERS)) as pool:

            def submit(chunk: range) -> list[Future[tuple[Tensor, Any]]]:
                return [pool.submit(self.source.batch, [i]) for i in chunk]

            ahead = submit(chunks[0])
            for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
                current = ahead
                ahead = submit(following)
                images, labels = zip(*(future.result() for future in current), strict=True)
                yield chunk, torch.cat(images), None if labels[0] is None else torch.cat(labels)


@torch.inference_mode()
def encode_latents(
    source: DataSource,
    vae_path: PathLike,
    out_dir: PathLike,
    *,
    batch_size: int = 32,
    flips: bool = True,
    shard_size: int = 1024,
    device: str | torch.device = "cpu",
    captions: Sequence[str] | None = None,
    text_encoder_path: PathLike | None = None,
    max_length: int = MAX_LENGTH,
    dtype: str = "float16",
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
) -> EncodingPlan | None:
    """Encode images, and captions if there are any, into a folder that `LatentShards` reads.

    A run that was killed goes on when it is called again with the same arguments, and leaves the
    same bytes as one that was not; a shard that is missing or damaged is made again. `batch_size`
    and `device` may change, which changes numbers by rounding only (with captions, from GPU to CPU
    or back is refused, as the text encoder's precision differs).

    Args:
        source: images (N, 3, H, W) in [-1, 1]; it is read without augmentation.
        vae_path: local folder of a diffusers AutoencoderKL, or of a pipeline with one in `vae/`.
        out_dir: a new or an empty folder, or one to go on with.
        batch_size: images a pass.
        flips: encode the mirror images too.
        shard_size: images a file.
        device: where the networks run.
        captions: one per image, in the source's order; labels are then left out.
        text_encoder_path: local folder of a transformers text encoder with its tokenizer, or of a
            pipeline with these in `text_encoder/` and `tokenizer/`.
        max_length: tokens a caption, the rest is cut off; PixArt-α's is 120.
        dtype: of the stored numbers; float16 keeps three digits in half the space.
        progress: called as (images done, images in all) after every batch, and for every shard that
            was done before.
        dry_run: check everything, time a batch, write nothing, and return the plan.

    Raises:
        ConfigError: arguments out of range, or captions without a text encoder.
        CheckpointError: VAE or text encoder missing or unreadable.
        DataError: images that can't be read, images or captions that don't fit, `out_dir` holds
            another encoding (the message says what changed), or another process encodes into it.
    """
    _check_arguments(source, batch_size, shard_size, dtype, captions, text_encoder_path)
    vae = Vae(vae_path, device)
    _check_images(source, vae)
    text = None if text_encoder_path is None else TextEncoder(text_encoder_path, device, max_length)
    folder = Path(out_dir)
    index = fresh_index(
        source, vae, text, captions, flips=flips, dtype=dtype, shard_size=shard_size
    )
    if folder.is_dir() or not dry_run:
        index = resumed(folder, index, {"vae": vae, "text_encoder": text})
    check_readable(source)

    advance = _counted(progress, len(source))
    job = _Job(source, vae, text, captions or (), batch_size, flips, getattr(torch, dtype), advance)
    if dry_run:
        return job.plan(index.shape)
    _run(job, index, folder)
    return None


def _counted(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Takes the images of each batch, and tells `progress` of all so far."""
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    return advance


def _run(job: _Job, index: Index, folder: Path) -> None:
    """Encode what `index` does not have yet, or what is no longer intact; the index follows each
    shard.

    Raises:
        DataError: another process encodes into the folder; see `_Job.shard`.
    """
    refusal = DataError(
        f"one encoding at a time writes into a folder; another is at {folder}; wait for it, or "
        "give another folder"
    )
    with alone(folder / LOCK, refusal):
        null = job.null_prompt()
        size = index.identity["shard_size"]
        index.null_prompt = None if null is None else write_array(folder / "null-prompt.npy", null)
        index.write(folder)
        for number, start in enumerate(range(0, index.count, size)):
            indices = range(start, min(start + size, index.count))
            if number < len(index.shards) and all(
                is_intact(folder, entry) for entry in index.shards[number].values()
            ):
                job.on_batch(len(indices))
                continue
            entries = {
                part: write_array(folder / f"{part}-{number:05d}.npy", array)
                for part, array in job.shard(indices).items()
            }
            index.shards[number : number + 1] = [entries]
            index.write(folder)


def _check_arguments(
    source: DataSource,
    batch_size: int,
    shard_size: int,
    dtype: str,
    captions: Sequence[str] | None,
    text: PathLike | None,
) -> None:
    if batch_size < 1 or shard_size < 1:
        raise ConfigError(
            f"batch_size and shard_size must be at least 1; got {batch_size} and {shard_size}; "
            "raise them"
        )
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype must be float16 or float32; got {dtype!r}; choose one of them")
    if (captions is None) != (text is None):
        raise ConfigError(
            "captions and a text encoder are needed together; got one of them; give both or none"
        )
    if captions is not None and len(captions) != len(source):
        raise DataError(
            f"one caption per image is needed; got {len(captions)} for {len(source)} images; add "
            "captions"
        )


def _check_images(source: DataSource, vae: Vae) -> None:
    channels, height, width = source.shape
    if channels != vae.channels or height % vae.factor or width % vae.factor:
        raise DataError(
            f"this VAE encodes images of {vae.channels} channels whose sides are multiples of "
            f"{vae.factor} pixels; got {source.shape} from {source.name}; change data.channels or "
            "data.image_size"
        )


@torch.inference_mode()
def encode_prompts(
    prompts: Sequence[str],
    text_encoder: PathLike,
    max_length: int,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Prompts as the y of a network that takes them, on the CPU: as `LatentShards` gives captions.

    Raises:
        ConfigError, CheckpointError: as `TextEncoder`.
    """
    embeddings = TextEncoder(text_encoder, device, max_length).encode(prompts)
    return pad_prompts([e.float().cpu().numpy() for e in embeddings], max_length)
