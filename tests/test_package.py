"""What the package says of itself: one version, its public names, its files and licences."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import asesearch
from asesearch.config import BackboneConfig, DataConfig, StudyConfig
from asesearch.deployment import formats
from asesearch.errors import ConfigError

ROOT = Path(__file__).parent.parent
NO_BUNDLE = SimpleNamespace(kind="dit", acceleration_name="")
STUDY_CONFIG = StudyConfig(
    name="tiny", backbone=BackboneConfig(kind="dit"), data=DataConfig(kind="fashion-mnist")
)


def test_every_public_name_is_there_and_listed():
    assert sorted(asesearch._HOMES) == [n for n in asesearch.__all__ if n != "__version__"]
    for name in asesearch.__all__:
        assert getattr(asesearch, name), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = asesearch.nothing


def test_no_function_has_the_name_of_a_module_beside_it():
    def beside(home, name):
        folder = Path(importlib.util.find_spec(home).origin).parent
        return (folder / f"{name}.py").is_file() or (folder / name).is_dir()

    homes = {(home, name) for home, name in asesearch._HOMES.values()}
    packages = {(h, n) for h, n in homes if importlib.util.find_spec(h).submodule_search_locations}
    assert packages and not [home for home in packages if beside(*home)]
    assert beside("asesearch.report", "page")  # negative control


def ambient():
    """What a caller may have set, in this thread."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device().type,
    )


@pytest.mark.parametrize(
    ("home", "inner", "call"),
    [
        ("search.whole", "SearchRun", lambda: asesearch.run_search(STUDY_CONFIG, "run")),
        ("deployment.verify", "read_manifest", lambda: asesearch.verify("bundle")),
        ("deployment.reading", "read_manifest", lambda: asesearch.load_bundle("bundle")),
        ("deployment.formats", "check_format", lambda: formats.write(NO_BUNDLE, "out")),
    ],
)
def test_what_the_caller_has_set_reaches_no_network(monkeypatch, home, inner, call):
    seen = []

    def look(*args, **kwargs):
        seen.append(ambient())
        raise ConfigError("seen")

    monkeypatch.setattr(f"asesearch.{home}.{inner}", look)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            before = ambient()
            with suppress(ConfigError):  # which `verify` puts on its list
                call()
            assert ambient() == before == (True, False, True, "meta")
    finally:
        torch.set_default_device(None)
    assert seen == [(False, True, False, "cpu")]


def test_near_misses_of_a_search_and_an_export_say_what_to_give():
    with pytest.raises(ConfigError, match="config must be a study file that is read; got str"):
        asesearch.run_search("study.toml", "run")
    with pytest.raises(ConfigError, match="got str and tuple; open it by Study.open, and take wh"):
        asesearch.export("run", (None, ""), "out")


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "asesearch.__version__"
    assert metadata.version("asesearch") == asesearch.__version__


def test_the_program_tells_its_version():
    command = [sys.executable, "-m", "asesearch", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = (0, f"asesearch {metadata.version('asesearch')}\n", "")
    assert (said.returncode, said.stdout, said.stderr) == expected


def test_what_is_imported_is_declared():
    """Every third-party library that a module names stands in the dependencies or in an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {d.split("[")[0].split(">")[0].strip().lower().replace("-", "_") for d in declared}
    modules = {"pil": "pillow"}
    for path in (ROOT / "asesearch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for name in found:
                top = name.split(".")[0]
                if top == "asesearch" or top in sys.stdlib_module_names:
                    continue
                key = modules.get(top.lower(), top.lower())
                assert key in names, (
                    f"{path.name} imports {top}, which pyproject.toml does not declare"
                )


def test_the_assets_stay_small():
    files = [p for p in (ROOT / "asesearch/assets").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 16 * 2**20


@pytest.mark.slow
def test_a_wheel_holds_the_assets_and_the_licences(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "py.typed",
        "assets/fashion-cnn.safetensors",
        "assets/fashion-vit.safetensors",
        "assets/fashion-mnist/LICENSE",
        "report/vendor/plotly-basic.min.js",
        "report/vendor/plotly.LICENSE",
        "report/templates/report.js",
    ):
        assert f"asesearch/{wanted}" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("[bs]*s/*.py")), ids=lambda p: p.name)
def test_scripts_name_only_what_the_package_has(path):
    """Benchmarks and studies are run seldom: a name that moved is seen here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("asesearch"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = hasattr(module, alias.name) or importlib.util.find_spec(inner)
                assert found, f"{path.name}: no {alias.name} in {node.module}"
