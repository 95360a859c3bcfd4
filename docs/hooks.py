"""What the site has besides the pages in `docs/`: the API reference, and files of the repository.

The API pages follow from the package's modules, so that none is forgotten when one moves. Files
that pages link to as `../reports/…` or `../studies/…` are copied into the site.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asesearch"
NO_API = {"__init__", "__main__", "assets", "cli", "__pycache__"}
#: Folders and files of the repository that pages may link to.
COPIED = (
    "reports/index.html",
    "reports/*/index.html",
    "reports/*/*.json",
    "reports/*/figures/*.svg",
    "reports/*/figures/*.csv",
    "reports/*/tables/*.csv",
    "studies/*.toml",
)
#: The page's own title stands in place of the module's.
NO_HEADING = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")


def rooms() -> list[str]:
    """Top-level modules and packages of asesearch that have a public interface."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    return sorted(names - NO_API)


def modules(package: str) -> list[str]:
    """The dotted names of a package's public modules."""
    found = sorted(f for f in (PACKAGE / package).rglob("*.py") if not f.stem.startswith("_"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in found]


def package_page(room: str) -> str:
    """The part of a package's page on what is imported from the package itself."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    own = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asesearch.")
        for alias in node.names
    }
    public = [n for n in own if not n.startswith("_")]
    within = {
        name: home
        for name, home in sorted(homes.items())
        if home.startswith(f"asesearch.{room}.") and not name.isupper()
    }
    parts = [f"::: asesearch.{room}\n{NO_HEADING}      members: {public or 'false'}\n"]
    if within:
        links = ", ".join(f"[`{name}`][{home}]" for name, home in within.items())
        parts.append(f"Also importable from `asesearch.{room}`: {links}.\n")
    return "\n".join(parts)


def public_names() -> list[str]:
    """What `asesearch.__all__` lists, the version left out."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [name for name in found if name != "__version__"]


def api_pages() -> dict[str, str]:
    """Markdown of the API pages by their path in the site."""
    top = f"# asesearch\n\n::: asesearch\n{NO_HEADING}      members: {public_names()}\n"
    pages = {"api/index.md": top}
    for room in rooms():
        parts = [f"# asesearch.{room}\n"]
        if (PACKAGE / room).is_dir():
            parts.append(package_page(room))
            parts += [f"::: {name}\n" for name in modules(room)]
        else:
            parts.append(f"::: asesearch.{room}\n{NO_HEADING}")
        pages[f"api/{room}.md"] = "\n".join(parts)
    return pages


def on_config(config: Any) -> Any:
    """Append the API pages to the navigation."""
    pages = [{Path(path).stem: path} for path in api_pages() if path != "api/index.md"]
    config.nav.append({"API": [{"Top-level names": "api/index.md"}, *pages]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the API pages and the repository's files."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    for pattern in COPIED + PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave `docs/` for the repository stay in the site, those to a module's source lead
    to its page of the API."""
    top = markdown.replace("](../asesearch/__init__.py)", "](api/index.md)")
    markdown = re.sub(r"\]\(\.\./asesearch/(\w+)(?:/__init__)?\.py\)", r"](api/\1.md)", top)
    return re.sub(r"(\]\(|src=\"|href=\")\.\./", r"\1", markdown)
