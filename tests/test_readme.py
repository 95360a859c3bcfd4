"""The README's study file, commands and Python do what it says, as far as that can be checked
without running hours."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from asesearch.cli import app
from asesearch.config import parse_study

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for kind, block in BLOCKS
        if kind == "sh"
        for line in block.splitlines()
        if line.startswith("asesearch ")
    }
)


def parse(line):
    """Parse a command line as the program would, without running it."""
    args = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    command = group.commands[args[0]]
    return command.make_context(args[0], args[1:]).params


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_accepted(line):
    assert parse(line)


def test_the_check_sees_a_wrong_option():
    with pytest.raises(Exception, match="No such option"):
        parse("asesearch export runs/x --best --out y")
    assert len(COMMANDS) >= 8


def test_study_file_is_valid():
    (block,) = [b for kind, b in BLOCKS if kind == "toml"]
    assert parse_study(tomllib.loads(block), "README").search.num_trials == 40


def test_python_imports_exist():
    names = 0
    for block in (b for kind, b in BLOCKS if kind == "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
                names += len(node.names)
    assert names >= 8


def test_make_targets_and_linked_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        f"\n{target}:" in makefile
        for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE)
    )
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
