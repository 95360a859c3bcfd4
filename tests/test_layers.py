"""The house rules that a reader can't keep in mind: who imports whom, and which libraries load
when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "asesearch"
LEVELS = {
    "errors": 0,
    "files": 1,
    "schedule": 2,
    "config": 2,
    "diffusion": 3,
    "backbones": 3,
    "data": 3,
    "latents": 3,
    "sampling": 4,
    "finetuning": 4,
    "evaluation": 4,
    "search": 5,
    "report": 6,
    "deployment": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 9,
}
# the only rooms that may import these at module level
OWNERS = {
    "pydantic": {"config"},
    "torch_fidelity": {"evaluation"},
    "torchvision": {"data", "evaluation"},
    "PIL": {"data"},
    "accelerate": {"finetuning"},
    "optuna": {"search"},
    "pandas": {"report"},
    "matplotlib": {"report"},
    "seaborn": {"report"},
    "jinja2": {"report"},
    "typer": {"cli"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree, everywhere):
    """Modules imported, at module level or anywhere; `if TYPE_CHECKING:` counts as nowhere."""
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield node.module or ""


def breaches(path, tree):
    own = room_of(path)
    for name in imports(tree, everywhere=True):
        parts = name.split(".")
        if (
            parts[0] == "asesearch"
            and len(parts) > 1
            and parts[1] != own
            and LEVELS[parts[1]] > LEVELS[own]
        ):
            yield f"{path.name} (level {LEVELS[own]}) imports {name} (level {LEVELS[parts[1]]})"
        same_level = (
            parts[0] == "asesearch"
            and len(parts) > 1
            and parts[1] != own
            and LEVELS[parts[1]] == LEVELS[own]
        )
        if same_level and (own, parts[1]) not in SIBLINGS:
            yield f"{path.name} imports its sibling room {name}"
    for name in imports(tree, everywhere=False):
        library = name.split(".")[0]
        if library in OWNERS and own not in OWNERS[library]:
            yield f"{path.name} imports {library}, which {sorted(OWNERS[library])} owns"
    if own in ("errors", "schedule", "config"):
        yield from (
            f"{path.name} imports torch"
            for name in imports(tree, True)
            if name.split(".")[0] == "torch"
        )


SIBLINGS = {("latents", "data"), ("data", "latents")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_below(path):
    assert list(breaches(path, ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_check_sees_a_breach():
    tree = ast.parse(
        "import pandas\nfrom asesearch.search import study\nfrom asesearch.report import page\n"
    )
    assert len(list(breaches(ROOT / "sampling.py", tree))) == 3


def test_import_asesearch_is_light():
    code = (
        "import sys, asesearch, asesearch.schedule\n"
        "heavy = {'torch', 'optuna', 'matplotlib', 'typer', 'torch_fidelity', 'pandas', "
        "'diffusers'} & set(sys.modules)\nassert not heavy, heavy\n"
        "assert asesearch.ExitSchedule is asesearch.schedule.ExitSchedule\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
