"""What README and `docs/` say, and the checks that it is true. Each check raises on a fault."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from asesearch.cli import app
from asesearch.config import StudyConfig, load_study, parse_study
from asesearch.study.picking import MODES, parse_budget

ROOT = Path(__file__).parent.parent
QUICK = "reports/fashion-mnist-quick"  # where `make search` writes what this machine found
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"(?:<!-- given: (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: First words of shell lines that are no command of this project.
OTHERS = {".", "export", "optuna-dashboard", "pip", "pre-commit", "wait"}
#: The longest value that an example of a message has, in characters.
LONGEST_VALUE = 70
FILE_SUFFIXES = {"json", "safetensors"}
#: Study files that exist only as examples.
EXAMPLES = {"studies/my-dit.toml", "studies/NAME.toml", "studies/X.toml"}
#: The shortest study, which fragments of study files are put into.
BASE = {"name": "base", "backbone": {}, "data": {"kind": "fashion-mnist"}}


def need_committed_report() -> None:
    """Skip what compares pages with the quick study's committed report where `make search` has put
    this machine's in its place."""
    try:
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", QUICK],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return  # no git, or no checkout: what is there is what was released
    if changed.strip():
        pytest.skip(f"{QUICK} is this machine's; `git checkout {QUICK}` brings the committed back")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, language and text, and the name that its test must give it."""

    page: str
    kind: str
    text: str
    given: str = ""

    def __str__(self) -> str:
        first = next((line for line in self.text.splitlines() if line.strip()), "")
        return f"{self.page}: {first[:60]}"


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(kind):
    """All blocks of a language, in all pages."""
    return [
        Block(page.name, match[2], match[3], match[1] or "")
        for page in PAGES
        for match in FENCE.finditer(text_of(page))
        if match[2] == kind
    ]


def inline_code():
    """(page, text) of code in running text and tables."""
    for page in PAGES:
        prose = FENCE.sub("", text_of(page))
        yield from ((page.name, code) for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose))


# -- the command line ----------------------------------------------------------------------------


def lines_of(block):
    """Command lines of a shell block, without comments."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


@functools.cache
def commands():
    """The program's commands by name."""
    return typer.main.get_command(app).commands


def check_line(line):
    """A line of a shell block is a command that this project has, with options that it takes."""
    words = shlex.split(line, comments=True)
    words = words[:-1] if words[-1] == "&" else words
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "srun":
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        at = words.index("-m")
        assert words[at + 1] == "asesearch", line
        words = words[at + 1 :]
    if words[0] == "asesearch":
        check_command(words[1:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[0] == "python":
        check_script(words[1:])
    else:
        assert words[0] in OTHERS, f"unknown command {words[0]!r} in {line!r}"


def check_command(words):
    """Arguments of `asesearch` that the program accepts, values of options included."""
    command = commands()[words[0]]
    # the program's own parser: unknown options and missing arguments are refused
    given = command.make_context(words[0], list(words[1:])).params
    if words[0] == "export":
        assert given["pick"] is None or given["pick"] in MODES, given["pick"]
        assert given["quality"] is None or parse_budget(given["quality"])
        assert (given["quality"] is not None) == (given["pick"] == "fastest-within"), words
        assert (given["time"] is not None) == (given["pick"] == "best-within"), words
    if given.get("budget") is not None:
        parse_study({**BASE, "search": {"budget": given["budget"]}}, "budget")
    study = given.get("study")
    if study is not None and str(study) not in EXAMPLES:
        load_study(ROOT / study)


@functools.cache
def options_of(name):
    """All options of one command, and those of the program."""
    own = [o for p in commands()[name].params for o in (*p.opts, *p.secondary_opts)]
    return {*own, "--help", "--debug", "--version"}


def check_make(words):
    """A target of the Makefile; a study that is there."""
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    for word in words:
        name, is_setting, value = word.partition("=")
        if is_setting:
            assert name in ("STUDY", "WORKERS", "PYTHON"), word
            assert name != "STUDY" or value in EXAMPLES or (ROOT / value).is_file(), word
        else:
            assert name in targets, f"no target {name!r}"


def check_script(words):
    """A script of the repository with options that it (or what it shares) adds to its parser."""
    if words[0] == "-m":
        return
    path = ROOT / words[0]
    known = {
        node.args[0].value
        for source in (
            path,
            path.with_name("measuring.py"),
            path.with_name(f"{path.stem}_options.py"),
        )
        if source.is_file()
        for node in ast.walk(ast.parse(text_of(source)))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("add_argument", "add")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert path.is_file(), f"no script {words[0]}"
    unknown = [word for word in words if word.startswith("--") and word not in known]
    assert not unknown, f"{words[0]} has no {unknown}"


def check_inline(code):
    """What running text calls a command, an option, a key or a section is one."""
    words = code.split()
    if words[0] in ("make", "python"):
        (check_make if words[0] == "make" else check_script)(words[1:])
    elif words[0] == "asesearch" and words[1:2] not in ([], ["COMMAND"], ["--version"]):
        known = options_of(words[1])
        unknown = [word for word in words[2:] if word.startswith("--") and word not in known]
        assert not unknown, f"{words[1]} has no {unknown}"
    elif code.startswith("--"):
        known = set().union(*map(options_of, commands()))
        assert words[0] in known, f"no command has {words[0]}"
    elif key := re.fullmatch(r"(\w+)\.(\w+)(?: = (.+))?", code):
        section, name, value = key.groups()
        if section in StudyConfig.model_fields and name not in FILE_SUFFIXES:
            check_key(section, name, value)
    elif (section := re.fullmatch(r"\[(\w+)\]", code)) is not None:
        assert section[1] in StudyConfig.model_fields, f"no section {code}"


def check_key(section, name, value):
    """A key of a study file; with a value, one that it takes."""
    field = StudyConfig.model_fields[section].annotation
    models = [m for m in (field, *getattr(field, "__args__", ())) if hasattr(m, "model_fields")]
    assert any(name in model.model_fields for model in models), f"no key {section}.{name}"
    if value is not None:
        check_toml(f"[{section}]\n{name} = {value}\n")


def check_toml(text):
    """A study file, or a part of one."""
    data = tomllib.loads(text)
    for section, values in BASE.items():
        if isinstance(values, dict):
            data[section] = {**values, **data.get(section, {})}
    return parse_study({**BASE, **data}, "the page")


# -- messages ------------------------------------------------------------------------------------


@functools.cache
def texts_of_the_package():
    """All texts in the package, each as its own pieces, between which values stand."""
    found = set()
    for path in (ROOT / "asesearch").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                found.add(tuple(v.value for v in node.values if isinstance(v, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add((node.value,))
    return [pieces for pieces in found if sum(map(len, pieces)) >= 12]


def places_of(pieces, message):
    """Where the pieces of a text stand in a message, one after the other; empty if they don't."""
    places = []
    end = 0
    for piece in pieces:
        begin = message.find(piece, end)
        if begin < 0:
            return []
        end = begin + len(piece)
        places.append((begin, end))
    return places


def check_message(message):
    """A message that the program can give.

    It may be put together from several of the program's texts. What none of them says must be
    values: what stands in a gap of a text, in quotes or brackets, names and numbers.
    """
    message = message.strip()
    assert "\n" not in message, "a message is one line"
    left = list(message)
    for pieces in texts_of_the_package():
        places = places_of(pieces, message)
        gaps = [(a, b) for (_, a), (b, _) in pairwise(places) if b - a <= LONGEST_VALUE]
        for begin, end in places + (gaps if sum(map(len, pieces)) >= 40 else []):
            left[begin:end] = "\0" * (end - begin)
    words = "".join(left).replace("\0", " \0 ")
    words = re.sub(r"\([^)\0]*\)|'[^'\0]*'|\S*[\d_./:@]\S*", " ", words)
    wrong = [word for word in words.split() if re.fullmatch("[a-z]{4,}", word)]
    assert not wrong, f"the program's texts have no {wrong} in {message!r}"


# -- links and tables ----------------------------------------------------------------------------


@functools.cache
def script(name):
    """A Python file of `docs/` as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page):
    """Anchors of a page's headings, as mkdocs makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", head.lower()) for head in heads]
    return {re.sub(r"[\s-]+", "-", head.strip()) for head in plain}


def check_link(page, link):
    """A file that is there, and a heading in it."""
    path, _, anchor = link.partition("#")
    target = page if not path else (page.parent / path).resolve()
    assert target.exists(), f"{page.name}: no {path}"
    assert not anchor or anchor in anchors(target), f"{page.name}: no heading #{anchor} in {path}"
