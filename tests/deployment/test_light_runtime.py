"""A bundle is loaded, verified and sampled where only torch, numpy, safetensors and pydantic are
installed."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement

from asesearch.backbones import DiT, UViT
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.writing import write_bundle
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT

NEEDED = ("torch", "numpy", "safetensors", "pydantic")
UVIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 8, "num_heads": 2}
CODE = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
try:
    import pandas
except ModuleNotFoundError:
    print("pandas is blocked")
import asesearch
for folder in sys.argv[2:]:
    assert Path(folder).is_absolute()
    images = asesearch.load_bundle(Path(folder)).sample([0, 1, 2]).images
    assert images.equal(asesearch.load_bundle(folder).sample([0, 1, 2]).images)
    assert all(check.passed for check in asesearch.verify(folder, speed=False))
    print(*images.shape, repr(float(images.double().sum())))
"""


def closure(names):
    """Distributions that these need, themselves among them; extras left out."""
    found, left = set(), list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        wanted = map(Requirement, needs)
        left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def blocked():
    """Top-level modules of all other distributions."""
    allowed = closure(NEEDED) | {"asesearch"}
    owners = metadata.packages_distributions()
    return sorted(
        module
        for module, names in owners.items()
        if not {name.lower().replace("_", "-") for name in names} & allowed
    )


@pytest.mark.thorough
def test_bundles_sample_with_four_libraries(tmp_path):
    torch.manual_seed(0)
    schedule = ExitSchedule.from_string("4 4 2 1", 4)
    how = SamplingConfig(solver="ddim", num_steps=4)
    made = [
        Bundle(cls(**args).eval(), schedule, kind, DiffusionConfig(), how, {}, {})
        for kind, cls, args in (("dit", DiT, TINY_DIT), ("uvit", UViT, UVIT))
    ]
    folders = [str(write_bundle(bundle, tmp_path / bundle.kind)) for bundle in made]
    modules = blocked()
    must = {"diffusers", "accelerate", "optuna", "pandas", "torchvision", "PIL", "scipy", "typer"}
    assert must | {"sqlalchemy", "matplotlib", "seaborn", "tqdm", "torch_fidelity"} <= {*modules}
    assert not {"torch", "numpy", "safetensors", "pydantic", "sympy"} & {*modules}
    result = subprocess.run(
        [sys.executable, "-c", CODE, ",".join(modules), *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    blocks, *lines = result.stdout.splitlines()
    assert blocks == "pandas is blocked" and len(lines) == 2
    for bundle, line in zip(made, lines, strict=True):
        total = float(bundle.sample([0, 1, 2]).images.double().sum())
        assert line.startswith("3 1 8 8 ")
        assert float(line.split()[-1]) == pytest.approx(total, rel=1e-4)
