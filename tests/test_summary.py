"""The summary page says what the committed data say: every number comes from its source, and a
claim that cannot be traced is refused."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from asesearch.errors import ConfigError
from asesearch.report.grids import Grid
from tests.documents import ROOT, check_line, need_committed_report

sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import summary  # noqa: E402

CLAIM = {
    "kind": "new",
    "title": "A claim",
    "result": "{score:.2f} ± {error:.2f}",
    "sentence": "Saves {saved:.0%}, changes by {change:.1f}.",
    "command": "make search",
    "machine": "{cores} cores",
    "images": "3 × 400",
    "seeds": "3",
    "resampling": "standard error",
    "retraining": "not measured",
    "date": "2026-01-02",
    "goal": {"text": "at most 0.5", "number": "time", "at_most": 0.5},
    "numbers": {
        "score": ["reports/a.csv", {"label": "full, 6 steps"}, "score"],
        "times": ["reports/b.json", "runs", "*", "time"],
        "time": "mean(times)",
        "error": "half_range(times)",
        "saved": "1 - time",
        "change": "0 - score",
        "cores": ["reports/b.json", "cores"],
    },
}


def place(folder: Path, **changes) -> Path:
    """A checkout with two sources and one claim; a change of None removes a field."""
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports/a.csv").write_text('label,score\n"full, 6 steps",12.719\nfull,14.0\n')
    runs = '{"runs": [{"time": 0.25}, {"time": 0.35}], "cores": 2, "none": null, "one": [1]}'
    (folder / "reports/b.json").write_text(runs)
    claim = {k: v for k, v in (CLAIM | changes).items() if v is not None}
    (folder / claims.CLAIMS).write_text(tomli_w.dumps({"claim": [claim]}))
    return folder


@pytest.fixture(scope="module")
def committed():
    need_committed_report()
    return claims.read_claims(ROOT)


def test_the_committed_page_is_what_its_claims_and_data_make(committed):
    page = summary.page(committed)
    assert (ROOT / summary.PAGE).read_text(encoding="utf-8") == page
    for claim in committed:
        assert f'id="{claim.anchor}"' in page
    links = set(re.findall(r'href="([^"#:]+)"', page))
    assert links and all((ROOT / "reports" / link).is_file() for link in links)
    assert {c.kind for c in committed} == set(claims.KINDS)


def test_every_command_of_a_claim_is_one_of_the_project(committed):
    for claim in committed:
        if claim.command != claims.NONE_YET:
            check_line(claim.command)


def test_what_a_claim_says_is_its_sources_numbers(tmp_path):
    (claim,) = claims.read_claims(place(tmp_path))
    assert claim.result == "12.72 ± 0.05" and claim.machine == "2 cores"
    assert claim.sentence == "Saves 70\N{NO-BREAK SPACE}%, changes by −12.7."
    assert claim.met is True and claim.outcome == "new, goal met"
    assert claim.sources == ("reports/a.csv", "reports/b.json")
    assert claim.error_bars == "measured again"
    table = tmp_path / "reports/a.csv"
    table.write_text(table.read_text().replace("12.719", "13.1"))
    (claim,) = claims.read_claims(tmp_path)
    assert claim.result == "13.10 ± 0.05"


def test_an_element_is_picked_once_and_its_fields_are_named(tmp_path):
    numbers = {
        "six": ["reports/a.csv", {"label": "full, 6 steps"}],
        "full": ["reports/a.csv", {"label": "full"}],
        "runs": ["reports/b.json", "runs", "*", "time"],
        "ratio": "six.score / full.score",
        "spread": "margin(runs - runs)",
    }
    text = {"sentence": "{six.score:.2f}, {ratio:.3f}, {spread:.1f}.", "result": "{full.score}"}
    table = {"head": ["", "score"], "rows": [["six steps", "{six.score:.1f}"]]}
    goal = {"text": "low", "number": "full.score", "at_most": 13}
    changes = {**text, "numbers": numbers, "machine": "any", "table": table, "goal": goal}
    (claim,) = claims.read_claims(place(tmp_path, **changes))
    assert (claim.sentence, claim.result, claim.met) == ("12.72, 0.908, 0.0.", "14.0", False)
    assert claim.table == Grid(("", "score"), [("six steps", "12.7")])
    assert '<th scope="row">six steps</th><td>12.7</td>' in summary.page([claim])
    for wrong, reason in (
        ({"result": "{full.quality}"}, "full.quality is none"),
        ({"result": "{full}"}, "full is none"),
        ({"table": {"head": ["", "score"], "rows": [["six steps"]]}}, "rows of as many texts"),
        ({"table": {"head": ["", "score"], "rows": [["six steps", "12.7"]]}}, "'12.7' typed"),
        (
            {"numbers": {"odd": ["reports/b.json", "one"], **numbers, "spread": "runs - odd"}},
            "as long",
        ),
    ):
        with pytest.raises(ConfigError, match=reason):
            claims.read_claims(place(tmp_path, **{**changes, **wrong}))


def test_the_committed_page_follows_its_data(tmp_path, committed):
    """One cell of a study's table is another: the page no longer says what it said."""
    for source in {str(claims.CLAIMS), *(s for c in committed for s in c.sources)}:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / source)
    assert claims.read_claims(tmp_path) == committed
    table = tmp_path / "reports/fashion-mnist/tables/confirmation.csv"
    text = table.read_text(encoding="utf-8")
    assert "12.971329009476145" in text
    table.write_text(text.replace("12.971329009476145", "11.5"), encoding="utf-8")
    before, after = summary.page(committed), summary.page(claims.read_claims(tmp_path))
    assert "12.97 ± 0.11" in before and "12.97 ± 0.11" not in after and "11.50 ± 0.11" in after


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": None}, "missing .'seeds'."),
        ({"colour": "red"}, "unknown .'colour'."),
        ({"kind": "true"}, "kind is one of reproduced"),
        ({"sentence": "Saves 30 % of {time}{error}{saved}{change}."}, "got '30 %' typed"),
        ({"result": "12.72 ± {error:.2f}"}, "got '12.72' typed"),
        ({"result": "{quality:.2f}"}, "got .'quality'.; add them"),
        ({"sentence": "Nothing."}, "'change'"),
        ({"result": "{times}"}, "a placeholder is one number"),
        ({"goal": {"text": "fast", "number": "time"}}, "at_most or at_least"),
        ({"goal": {"text": "fast", "number": "speed", "at_most": 1}}, "got 'speed'"),
    ],
)
def test_a_claim_that_is_not_whole_is_refused(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=f"claim 'A claim': .*{reason}"):
        claims.read_claims(place(tmp_path, **changes))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (["reports/c.csv", "score"], "there is no reports/c.csv"),
        (["reports/a.csv", {"label": "full, 7 steps"}, "score"], "0 elements with"),
        (["reports/a.csv", {}, "score"], "2 elements with"),
        (["reports/a.csv", {"label": "full"}, "quality"], "KeyError"),
        (["reports/b.json", "runs", 5, "time"], "IndexError"),
        (["reports/b.json", "runs", 0], "no number"),
        (["reports/b.json", "none"], "no number"),
        ("__import__('os')", "a derived number is"),
        ("later + 1", "a derived number is"),
    ],
)
def test_a_wrong_source_is_refused(tmp_path, source, reason):
    numbers = {**CLAIM["numbers"], "score": source}
    with pytest.raises(ConfigError, match=reason):
        claims.read_claims(place(tmp_path, numbers=numbers))


def test_two_claims_of_one_title_are_refused(tmp_path):
    path = place(tmp_path) / claims.CLAIMS
    one = tomllib.loads(path.read_text())["claim"]
    path.write_text(tomli_w.dumps({"claim": one * 2}))
    with pytest.raises(ConfigError, match="titles of their own"):
        claims.read_claims(tmp_path)


def test_constants_of_tests_are_found_by_name():
    assert claims.looked_up(ROOT, "tests/backbones/test_dit.py", ["TOLERANCE"]) == 1e-4
    floats = ["test_ddim_is_the_official_trajectory", "floats"]
    assert claims.looked_up(ROOT, "tests/test_solvers.py", floats) == [1e-3]
