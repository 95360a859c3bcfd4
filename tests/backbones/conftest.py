"""Reading the parity fixtures."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def parity():
    """`parity(name)`: constructor arguments, official state dict, and the other tensors of
    tests/data/name.safetensors."""

    def read(name: str):
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        return (
            json.loads(metadata["config"]),
            state,
            {k: v for k, v in tensors.items() if not k.startswith("state.")},
        )

    return read
