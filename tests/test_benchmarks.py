"""The scripts of benchmarks/ run, each as `benchmarks/README.md` writes it, with a tiny network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXITS = ["--full-depth", "pretrained", "--network", "shipped:fashion-mnist-dit-18"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("search_efficiency", ["--work", "work"]),
        ("search_efficiency", [*EXITS, "--work", "work", "--report", "page"]),
        ("finetune_step", []),
        ("deployment", []),
        ("low_fidelity", []),
        ("true_size", ["--model", "U-ViT-S/4-CelebA64"]),
    ],
)
def test_a_benchmark_runs_and_writes_its_figures(script, options, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--tiny", *options]
    subprocess.run([*command, "--out", "out.json"], cwd=tmp_path, check=True, timeout=900)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["benchmark"] == script and found["figures"]
    assert ("--report" in options) == (tmp_path / "page" / "index.html").is_file()
