"""The scripts of benchmarks/ run, each as `benchmarks/README.md` writes it, with a tiny network."""

import json
import re
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


@pytest.mark.parametrize("name", ["search-efficiency", "search-efficiency-18"])
def test_the_first_sentence_of_a_search_efficiency_page_tells_its_own_figures(name):
    folder = ROOT / "reports" / name
    page = (folder / "index.html").read_text(encoding="utf-8")
    told = re.search(r"reached with ([\d.]+) of .* on fresh seeds (\d+) %", page)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["figures"]
    values = {figure["name"]: figure["value"] for figure in found}
    ratio = next(v for k, v in values.items() if k.endswith("hypervolume / all of its"))
    share = next(v for k, v in values.items() if "fresh front that ours dominates" in k)
    assert told.groups() == (f"{ratio:.2f}", f"{100 * share:.0f}")
    words = re.sub(r"<[^>]*>", " ", page)  # in the table methods are called as in the figures
    for what in ("hypervolume, fresh seeds", "compute"):
        for method in ("asesearch", "random", "TPE", "NSGA-II", "GP"):
            assert f" {what}: {method} " in words
    assert "log figure" not in words and not re.search(r"\d x\b", words)
