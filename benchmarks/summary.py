"""The summary page, `reports/index.html`: what of the paper was reproduced, what was not, what is
new, and what is open, from `reports/claims.toml` and the committed data that it names.

    python benchmarks/summary.py            # write the page
    python benchmarks/summary.py --check    # only say whether the committed page is of today's data
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from claims import KINDS, NONE_YET, Claim, read_claims
from markupsafe import Markup

from asesearch.errors import AseSearchError
from asesearch.files import replacing
from asesearch.report.explorer import scripts
from asesearch.report.folder import MARK, environment
from asesearch.report.grids import Grid

ROOT = Path(__file__).parent.parent
PAGE = Path("reports/index.html")


def page(claims: Sequence[Claim]) -> str:
    """The page as text."""
    own = jinja2.FileSystemLoader(Path(__file__).parent)
    shared = environment()
    loader = jinja2.ChoiceLoader([own, shared.loader or own])
    sections = {heading: [c for c in claims if c.kind == kind] for kind, heading in KINDS.items()}
    return (
        shared.overlay(loader=loader)
        .get_template("summary.html.j2")
        .render(
            mark=MARK.format(what="summary"),
            counts=_counts(claims),
            overview=_overview([c for c in claims if c.kind != "open"]),
            sections={heading: found for heading, found in sections.items() if found},
            newest=max(c.date for c in claims),
            linked=_linked,
            reports=sorted({c.report for c in claims if c.report}),
            none_yet=NONE_YET,
            script=scripts()["script"],
        )
    )


def _counts(claims: Sequence[Claim]) -> dict[str, int]:
    """How many claims there are of each kind, and how many goals are missed."""
    counts = {kind: sum(c.kind == kind for c in claims) for kind in KINDS}
    return {
        **{kind.replace("-", "_"): number for kind, number in counts.items()},
        "goals": sum(c.met is not None for c in claims),
        "missed": sum(c.met is False for c in claims),
    }


def _overview(claims: Sequence[Claim]) -> Grid:
    """The main table: a line for each claim that was measured."""
    head = ("claim", "outcome", "result", "± over", "images", "seeds", "date")
    rows = [
        (_link(c), c.outcome, c.result, c.error_bars, c.images, c.seeds, c.date) for c in claims
    ]
    return Grid(head, rows)


def _link(claim: Claim) -> str:
    """Its title, which leads to its details."""
    return Markup('<a href="#{}">{}</a>').format(claim.anchor, claim.title)


def _linked(source: str) -> str:
    """Where a file lies as seen from the page; empty for what the site has not."""
    folder, _, name = source.partition("/")
    if folder == "reports":
        return name
    return f"../{source}" if folder == "studies" else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare the committed page")
    args = parser.parse_args()
    try:
        text = page(read_claims(ROOT))
    except AseSearchError as error:
        print(error, file=sys.stderr)
        return 1
    path = ROOT / PAGE
    if args.check:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        print(f"{PAGE} is {'' if same else 'not '}what its claims and their data make")
        return 0 if same else 1
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
