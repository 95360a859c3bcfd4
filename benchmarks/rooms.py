"""How often a reader changes rooms who follows a study file through a search.

`python benchmarks/rooms.py` imports the package, reads a small study and runs it to its confirmed
front, and walks every function of the package once: at its first call the reader goes into its
room, and at its end back into the caller's. A stay is a run of steps within one room (a top-level
module or package), a return a stay in a room that was entered before. `--tree FOLDER` walks another
checkout of the package; `--former` counts by the rooms of before the package was divided anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

STUDY = """
name = "walk"
[backbone]
kind = "dit"
checkpoint = "net.safetensors"
[data]
kind = "fashion-mnist"
split = "test"
[elastic]
num_steps = 2
batch_size = 4
[map]
num_bins = 2
num_images = 4
[train]
num_steps = 2
batch_size = 4
[sampling]
num_steps = 2
batch_size = 40
[evaluation]
extractor = "fashion-cnn"
num_samples = 70
repeats = 1
reference = { kind = "fashion-mnist", split = "train" }
[search]
proposer = "difficulty"
num_trials = 4
num_intervals = 4
warm_start = ["full"]
[promotion]
num_samples = 66
[confirm]
num_samples = 70
repeats = 1
time_images = 2
time_repeats = 1
"""
NETWORK = {
    "input_size": 28,
    "patch_size": 14,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
ENTRY = "(you)"
FORMER = {
    "study": "search",
    "proposer": "search",
    "score": "evaluation",
    "point": "schedule",
    "sampler": "sampling",
    "solvers": "sampling",
    "encoding": "latents",
}


class Walk:
    """The rooms a reader goes through.

    Args:
        package: folder whose functions are read.
        called: other names of rooms.

    Attributes:
        rooms: of each step.
    """

    def __init__(self, package: Path, called: dict[str, str]) -> None:
        self.package = f"{package}{os.sep}"
        self.called = called
        self.rooms: list[str] = []
        self._read: set[CodeType] = set()
        self._open: dict[FrameType, str] = {}

    def room(self, code: CodeType) -> str | None:
        """The room of a function of the package; None of any other."""
        if not code.co_filename.startswith(self.package):
            return None
        name = code.co_filename[len(self.package) :].split(os.sep)[0].removesuffix(".py")
        return self.called.get(name, name)

    def caller(self, frame: FrameType) -> str:
        """The room of the function that called, over those of other libraries."""
        back = frame.f_back
        while back is not None:
            if (found := self.room(back.f_code)) is not None:
                return found
            back = back.f_back
        return ENTRY

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """For `sys.setprofile`."""
        if event == "return" and self._open.pop(frame, None) is not None:
            self.rooms.append(self.caller(frame))
        if event != "call" or frame.f_code in self._read:
            return
        if (found := self.room(frame.f_code)) is not None:
            self._read.add(frame.f_code)
            self._open[frame] = found
            self.rooms.append(found)

    def stays(self) -> list[str]:
        """The rooms in turn, each once for a run of steps in it."""
        rooms = [room for room in self.rooms if room != ENTRY]
        return [room for before, room in zip(["", *rooms], rooms, strict=False) if room != before]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--former", action="store_true", help="count by the rooms of before")
    parser.add_argument("--stays", action="store_true", help="print every stay")
    args = parser.parse_args()
    tree = args.tree.resolve()
    sys.path.insert(0, str(tree))
    walk = Walk(tree / "asesearch", FORMER if args.former else {})
    os.chdir(tempfile.mkdtemp())
    os.environ.setdefault("ASESEARCH_CACHE", tempfile.mkdtemp())
    sys.setprofile(walk)
    from asesearch.config import load_study
    from asesearch.search import search

    sys.setprofile(None)
    from asesearch.backbones import DiT, save_backbone

    save_backbone(DiT(**NETWORK), "net.safetensors")
    Path("walk.toml").write_text(STUDY)
    sys.setprofile(walk)
    search(load_study("walk.toml"), Path("run"))
    sys.setprofile(None)
    stays = walk.stays()
    counts = Counter(stays)
    found = {
        "tree": tree.name,
        "functions": len(walk._read),
        "rooms": len(counts),
        "stays": len(stays),
        "returns": len(stays) - len(counts),
    }
    print(json.dumps(found))
    if args.stays:
        print(" ".join(stays))


if __name__ == "__main__":
    main()
