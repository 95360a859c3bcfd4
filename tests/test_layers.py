"""The house rules that a reader can't keep in mind: who imports whom, and which libraries load
when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "asesearch"
# a module imports from rooms of lower levels, and from its own
LEVELS = {
    "errors": 0,
    "files": 1,
    "locks": 2,
    "foreign": 2,
    "schedule": 2,
    "sampler": 2,
    "score": 2,
    "config": 3,
    "point": 3,
    "solvers": 4,
    "data": 5,
    "diffusion": 5,
    "backbones": 5,
    "encoding": 6,
    "sampling": 6,
    "finetuning": 6,
    "evaluation": 6,
    "study": 6,
    "calibration": 6,
    "proposer": 7,
    "report": 7,
    "search": 8,
    "deployment": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,
}
NO_TORCH = [
    "errors",
    "files",
    "locks",
    "foreign",
    "schedule",
    "sampler",
    "score",
    "config",
    "point",
    "solvers",
    "study",
    "proposer",
    "report",
]
# the only rooms that may import these at module level
OWNERS = {
    "pydantic": {"config", "deployment"},
    "torch_fidelity": {"evaluation"},
    "torchvision": {"data", "evaluation"},
    "PIL": {"data", "report"},
    "accelerate": {"finetuning"},
    "onnx": {"deployment"},
    "onnxruntime": {"deployment"},
    "optuna": {"study", "proposer", "search"},
    "pandas": {"report"},
    "matplotlib": {"report"},
    "seaborn": {"report"},
    "jinja2": {"report"},
    "moocore": {"report"},
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
        if parts[0] != "asesearch" or len(parts) < 2 or parts[1] == own:
            continue
        if LEVELS[parts[1]] >= LEVELS[own]:
            yield f"{path.name} (level {LEVELS[own]}) imports {name} (level {LEVELS[parts[1]]})"
    for name in imports(tree, everywhere=False):
        library = name.split(".")[0]
        if library in OWNERS and own not in OWNERS[library]:
            yield f"{path.name} imports {library}, which {sorted(OWNERS[library])} owns"


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(graph):
    """Modules that import each other in a circle; empty if there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done or node not in graph:
            return []
        path.append(node)
        found = next((c for other in sorted(graph[node]) if (c := visit(other))), [])
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node))), [])


def import_graph():
    """Module -> modules it imports at module level, packages' `from x import module` resolved."""
    modules = {module_of(p): p for p in FILES}
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] |= set(imports(tree, everywhere=True)) & set(modules)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                if inner := full & set(modules):
                    graph[name] |= inner
                    if len(inner) == len(node.names):  # the package itself gives nothing here
                        graph[name].discard(node.module)
        graph[name].discard(name)
    return graph


@pytest.mark.thorough
def test_no_modules_import_each_other_in_a_circle():
    assert circle(import_graph()) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


BLOCK = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "accelerate", "diffusers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.thorough
def test_what_needs_no_torch_imports_none():
    """Reports, picks and proposals work where torch can't be imported."""
    names = [module_of(p) for p in FILES if room_of(p) in NO_TORCH]
    assert len(names) > 20
    subprocess.run([sys.executable, "-c", BLOCK, *names], check=True)
    refused = subprocess.run(
        [sys.executable, "-c", BLOCK, "asesearch.sampling"], capture_output=True
    )
    assert b"torch is blocked" in refused.stderr


def test_modules_import_only_from_below():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(trees) > 150
    assert [breach for path, tree in trees.items() for breach in breaches(path, tree)] == []


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
