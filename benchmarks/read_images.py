"""Images per second that `read_ahead` gives, for several numbers of worker processes.

    python benchmarks/read_images.py [--folder DIR] [--image-size 256] [--workers 0 1 2]

Without a folder, JPEGs of 500 by 375 pixels are made. Numbers of workers take turns, and the best
of all turns counts, as other programs can only slow it down; the first batch, before which workers
start, is left out and given apart.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from asesearch.data import ImageFolder, read_ahead


def make_folder(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        image = small.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05d}.jpg", quality=90)


def read(data: ImageFolder, num_workers: int, batch_size: int) -> tuple[float, float]:
    """(seconds to the first batch, images per second after it)."""
    parts = [range(i, i + batch_size) for i in range(0, len(data) - batch_size + 1, batch_size)]
    start = time.perf_counter()
    with closing(read_ahead(data.batch, parts, num_workers)) as found:
        next(found)
        begun = time.perf_counter()
        count = sum(len(x_start) for x_start, _ in found)
    return begun - start, count / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=512, help="JPEGs that are made")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            make_folder(Path(made), args.count)
        data = ImageFolder(args.folder or made, args.image_size)
        times = {n: [] for n in args.workers}
        for _ in range(args.turns):
            for n in args.workers:
                times[n].append(read(data, n, args.batch_size))
    print(f"{len(data)} images, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for n, found in times.items():
        first = [seconds for seconds, _ in found]
        rates = ", ".join(f"{rate:.0f}" for _, rate in found)
        print(
            f"{n} workers: {max(rate for _, rate in found):.0f} images/s (turns: {rates}); first "
            f"batch after {first[0]:.1f} s, later {min(first[1:], default=first[0]):.1f} s"
        )


if __name__ == "__main__":
    main()
