"""Studies compared: areas by hand, attainment by counting, winners only where it is no noise, and
nothing that was measured in different ways."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import asesearch
from asesearch.errors import ConfigError, EvaluationError, StudyError
from asesearch.report import attainment, compare, comparison, tables
from asesearch.report.comparing import drawings
from asesearch.report.comparison import compare_results
from asesearch.score import EvaluationResult
from tests.report.conftest import build, by_flops, no_more


def shifted(results, by, name="other"):
    """The same study with every score moved."""

    def moved(quality):
        return EvaluationResult(quality.protocol, tuple(v + by for v in quality.values))

    return replace(
        results,
        name=name,
        records=tuple(
            replace(r, quality=moved(r.quality)) if r.quality else r for r in results.records
        ),
        confirmations=tuple(replace(c, quality=moved(c.quality)) for c in results.confirmations),
    )


@pytest.fixture(scope="module")
def three():
    """Three repeats of one study."""
    return [build(16, seed=s, failed=()) for s in range(3)]


def test_attainment_by_counting():
    """A place is attained by as many repeats as have a point that is no slower and no worse."""
    rng = np.random.default_rng(0)
    fronts = [rng.uniform(size=(6, 2)) for _ in range(5)]
    table = attainment.surfaces(fronts)
    assert list(dict.fromkeys(table["level"])) == ["best", "median", "worst"]
    assert list(dict.fromkeys(table["attained_by"])) == [1, 3, 5]
    for _, row in table.iterrows():
        corner = np.array([row["time_frac"], row["quality"]])
        by = sum((f <= corner + 1e-12).all(axis=1).any() for f in fronts)
        assert by >= row["attained_by"]
        for axis in range(2):  # and a corner is where that ends
            less = corner.copy()
            less[axis] -= 1e-6
            assert sum((f <= less).all(axis=1).any() for f in fronts) < row["attained_by"]
    assert attainment.surfaces(fronts[:1]).empty


def test_volume_by_hand():
    points = np.array([[0.25, 3.0], [0.5, 1.0], [0.75, 2.0]])
    assert attainment.volume(points, (1.0, 4.0)) == pytest.approx(0.25 * 1 + 0.5 * 3)
    assert attainment.volume(points, (0.1, 4.0)) == 0


def test_the_better_of_two_studies_wins_wherever_it_is_no_noise(three):
    other = shifted(three[0], 0.5)
    found = compare_results([three[0], other])
    assert found.kind == "confirmed" and found.scale == "log"
    assert set(found.wins["winner"]) == {"demo"}
    assert set(found.wins["verdict"]) == {"told apart"}
    np.testing.assert_allclose(found.wins["lead_min"], 0.5)
    groups = found.groups.set_index("group")
    assert groups.loc["demo", "wins"] == pytest.approx(1) and groups.loc["other", "wins"] == 0
    assert groups.loc["demo", "hypervolume"] > groups.loc["other", "hypervolume"]
    full = found.studies.set_index("study")["full_quality"]
    assert found.reference == (1.1, pytest.approx(2 * full.max()))
    assert found.studies["share"].tolist() == [
        1.0,
        pytest.approx(groups["hypervolume"].min() / groups["hypervolume"].max()),
    ]
    # negative control: equal studies have no winner
    equal = compare_results([three[0], replace(three[0], name="other")])
    assert set(equal.wins["winner"]) == {""} and set(equal.groups["wins"]) == {0}


def test_a_time_that_block_calls_cannot_explain_wins_nothing(three):
    """The same scores, and a machine that held up the full network's runs of one study."""
    sound = three[0]
    full = sound.full.number
    disturbed = replace(
        sound,
        name="disturbed",
        confirmations=tuple(
            c if c.number == full else replace(c, measured_time_frac=0.3 * c.measured_time_frac)
            for c in sound.confirmations
        ),
    )
    found = compare_results([sound, disturbed])
    points = found.points[found.points["study"] == "disturbed"].set_index("number")
    others = points.drop(full)
    assert len(others) and (others["time_frac"] == others["block_frac"]).all()
    assert (others["measured_frac"] < 0.5 * others["block_frac"]).all()
    assert points.loc[full, "time_frac"] == points.loc[full, "measured_frac"] == 1
    own = found.points[found.points["study"] == "demo"].set_index("number")
    assert (own["time_frac"] == own["measured_frac"]).all()  # the control
    fronts = [d for d in drawings(found) if d.name == "fronts"]
    assert "stands at the bound of those calls" in fronts[0].caption
    again = compare_results([sound, replace(sound, name="again")])
    assert "stands at the bound" not in drawings(again)[0].caption


def timed(results, name, number, time, spread):
    """The study with only the full network and this confirmed point of that time."""
    full = results.full.number
    kept = tuple(
        c if c.number == full else replace(c, measured_time_frac=time, measured_time_spread=spread)
        for c in results.confirmations
        if c.number in (full, number)
    )
    records = tuple(replace(r, block_frac=None) for r in results.records)
    return no_more(replace(results, name=name, records=records), kept)


@pytest.mark.parametrize(("first", "second"), [(0.211, 0.001), (0.001, 0.211), (0.06, 0.06)])
def test_a_time_that_cannot_be_told_apart_wins_nothing(three, first, second):
    """The same point in two studies, to the last digit of its score, at times that fluctuate."""
    number = three[0].confirmations[1].number
    slow = timed(three[0], "slow", number, 0.755, first)
    fast = timed(three[0], "fast", number, 0.660, second)
    found = compare_results([slow, fast])
    assert set(found.wins["winner"]) == {""} and set(found.groups["wins"]) == {0}
    early = found.wins.iloc[0]
    assert (early["time_from"], early["verdict"]) == (0.660, comparison.TIMES)
    groups = compare_results([slow] * 4 + [fast] * 4, ["slow"] * 4 + ["fast"] * 4)
    assert set(groups.wins["winner"]) == {""}
    assert groups.wins.iloc[0]["verdict"] == comparison.TIMES


def test_the_best_within_a_time_counts_points_that_may_be_as_fast(three):
    (member, _) = compare_results([three[0], replace(three[0], name="other")]).members
    fast, *_, full = (row for _, row in member.points.iterrows())
    assert member.best_within(fast["time_frac"] - 1e-9) is None
    assert member.best_within(fast["time_frac"])["number"] == fast["number"]
    assert member.best_within(2.0)["quality"] == member.points["quality"].min()
    least = fast["time_frac"] - fast["time_spread"]
    assert member.best_within(0.0, least)["number"] == fast["number"]
    assert member.best_within(0.0, least - 1e-9) is None


def test_a_time_that_can_be_told_apart_wins(three):
    number = three[0].confirmations[1].number
    slow = timed(three[0], "slow", number, 0.755, 0.01)
    fast = timed(three[0], "fast", number, 0.660, 0.01)
    early = compare_results([slow, fast]).wins.iloc[0]
    assert (early["winner"], early["verdict"]) == ("fast", comparison.ALONE)
    assert early["time_to"] == 0.755
    # also where the other has a point as fast, of a worse score, and the better one is a little
    # slower than the budget
    worse = shifted(fast, 5.0)
    both = replace(
        slow,
        records=(*slow.records, replace(worse.records[number], number=99)),
        confirmations=(
            *slow.confirmations,
            replace(worse.confirmations[1], number=99, measured_time_frac=0.5),
        ),
    )
    assert "fast" in set(compare_results([both, fast]).wins["winner"])
    near = replace(
        both,
        confirmations=tuple(
            replace(c, measured_time_spread=0.2) if c.number == number else c
            for c in both.confirmations
        ),
    )
    found = compare_results([near, fast]).wins
    assert set(found["winner"]) == {"slow", ""}
    assert comparison.TIMES in set(found["verdict"])


def test_a_group_that_no_file_can_name_is_refused_before_anything_is_written(three, tmp_path):
    with pytest.raises(ConfigError, match=r"group's name must be UTF-8; got 'x\\udce9'; give"):
        compare(three[:2], tmp_path / "page", ["x\udce9", "b"])
    assert not any(tmp_path.iterdir())


def test_one_repeat_of_the_evaluation_names_no_winner(study):
    one = study(8, repeats=1, failed=())
    found = compare_results([one, shifted(one, 0.5)])
    assert set(found.wins["verdict"]) == {"spread unknown (one repeat)"}
    assert set(found.wins["winner"]) == {""}


@pytest.mark.parametrize(
    ("sizes", "few"),
    [
        ([3, 3], "3 and 3"),
        ([1, 2], "2 and 1"),
        ([4, 4, 1], "4 and 1"),  # the two of four can tell
        ([2, 1, 8], "8 and 1 or 2 and 1"),
        ([1, 2, 1], "2 and 1"),  # two of one are told apart by their scores
    ],
)
def test_only_groups_that_are_too_few_are_said_to_be(sizes, few):
    found = SimpleNamespace(
        groups=pd.DataFrame({"studies": sizes}),
        wins=pd.DataFrame({"verdict": [comparison.FEW_STUDIES]}),
    )
    told = comparison.Comparison.caveat.fget(found)
    assert f" of groups of {few} studies that happens too often by chance to be a win; " in told
    assert told.endswith("; four of each are enough, three and five, or two and eight")


@pytest.mark.parametrize(("first", "second"), [(4, 4), (3, 5), (2, 8)])
def test_one_study_fewer_than_are_said_to_be_enough_is_too_few(first, second):
    assert comparison.chance_of_separation(first, second) < 0.05
    assert comparison.chance_of_separation(first, second - 1) > 0.05


@pytest.mark.thorough
def test_seeds_of_one_study_are_repeats(three):
    four = [*three, build(16, seed=3, failed=())]
    others = [shifted(one, 5.0) for one in four]
    found = compare_results([*four, *others])
    assert found.studies["study"].tolist()[:3] == ["demo (1)", "demo (2)", "demo (3)"]
    assert found.groups["studies"].tolist() == [4, 4]
    assert set(found.attained["group"]) == {"demo", "other"}
    far = found.wins[found.wins["verdict"] == comparison.APART]
    assert set(far["winner"]) == {"demo"} and len(far)
    assert "demo (4 studies): hypervolume" in str(found) and "clearly the lowest" in str(found)
    assert not found.caveat
    few = compare_results([*three, *others[:3]])  # negative control: too few to tell from chance
    assert set(few.wins["winner"]) == {""} and comparison.FEW_STUDIES in set(few.wins["verdict"])
    assert "of groups of 3 and 3 studies that happens too often by chance" in str(few)
    overlap = compare_results([*three, *(shifted(one, 0.001) for one in three)])
    assert comparison.OVERLAP in set(overlap.wins["verdict"])
    grouped = compare_results([*three, others[0]], ["a", "a", "b", "b"])
    assert grouped.groups["group"].tolist() == ["a", "b"]
    assert "a (2 studies): hypervolume" in str(grouped)
    alone = compare_results(three)  # nothing to win over
    assert alone.wins.empty and "lowest" not in str(alone) and len(alone.attained)


def test_what_was_measured_otherwise_is_refused(three, study):
    other = study(8, num_samples=500, failed=())
    with pytest.raises(
        EvaluationError, match=r"demo \(1\) and demo \(2\).*num_samples: 1000 and 500"
    ):
        compare_results([three[0], other])
    config = three[0].config
    slow = {**config, "sampling": {**config["sampling"], "num_steps": 100}}
    with pytest.raises(EvaluationError, match="own sampler: 'ddim-50' and 'ddim-100'"):
        compare_results([three[0], replace(three[1], config=slow)])
    with pytest.raises(StudyError, match="needs scores"):
        compare_results([three[0], replace(three[1], records=(), confirmations=())])
    with pytest.raises(ConfigError, match="two studies or more"):
        compare_results(three[:1])
    with pytest.raises(ConfigError, match="got 1 for 3 studies"):
        compare_results(three, ["a"])


def test_without_confirmation_everywhere_the_search_is_compared(three):
    found = compare_results([three[0], replace(three[1], confirmations=())])
    assert found.kind == "search" and set(found.points["kind"]) == {"search"}


def test_studies_of_flops_are_compared_by_them(three, tmp_path):
    bare = [replace(r, confirmations=()) for r in three]
    found = compare([by_flops(r) for r in bare], tmp_path, groups=["a", "b", "b"])
    assert found.unit == "FLOPs" and "of the FLOPs budgets" in str(found)
    plain = [r.number for r in by_flops(bare[0]).front()]
    front = found.points[(found.points["study"] == found.members[0].name) & found.points.on_front]
    assert list(front["number"]) == plain
    assert set(found.to_dict()["wins"][0]) >= {"flops_from", "flops_to"}
    for name in ("points", "wins", "attained"):
        head = (tmp_path / "tables" / f"{name}.csv").read_text().splitlines()[0]
        assert "flops_" in head and "time" not in head and "measured" not in head
    html = (tmp_path / "index.html").read_text()
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.S)
    assert "predicted" not in text and "sampling time" not in text
    with pytest.raises(EvaluationError, match="got FLOPs and predicted time; search both with one"):
        compare_results([by_flops(bare[0]), bare[1]])
    compare_results([by_flops(three[0]), three[1]])  # confirmed: their times are measured


def test_page_figures_and_csv(three, tmp_path):
    found = asesearch.compare([*three[:2], shifted(three[2], 0.4)], tmp_path / "out")
    assert asesearch.compare is compare
    folder = tmp_path / "out"
    assert {p.name for p in (folder / "figures").iterdir()} == {
        f"{n}.{e}" for n in ("fronts", "hypervolume") for e in ("svg", "png", "csv")
    }
    assert {p.stem for p in (folder / "tables").iterdir()} == {
        "studies",
        "groups",
        "points",
        "attained",
        "wins",
    }
    html = (folder / "index.html").read_text()
    assert (
        "demo (2)" in html
        and "no clear winner" in html
        and "nan" not in re.sub(r'src="[^"]*"', "", html)
    )
    assert json.dumps(found.to_dict(), allow_nan=False)
    compare([three[0], three[1]], folder)  # over an earlier one
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("precious")
    with pytest.raises(StudyError, match="a comparison goes into an empty folder"):
        compare([three[0], three[1]], tmp_path / "thesis")


def one_point(results, name, value, time, spread=0.001, gain=0.0):
    """The study with only the full network and one point, none where `value` is None."""
    full, point = results.confirmations[:2]
    values = () if value is None else tuple(value + d for d in (-0.01 + gain, gain, 0.01 + gain))
    other = (
        ()
        if value is None
        else (
            replace(
                point,
                quality=replace(point.quality, values=values),
                measured_time_frac=time,
                measured_time_spread=spread,
            ),
        )
    )
    records = tuple(replace(r, block_frac=None) for r in results.records)
    return no_more(replace(results, name=name, records=records), (full, *other))


@pytest.mark.parametrize("values", [(8.1, None), (None, 8.1, None)])
def test_a_group_of_which_one_has_a_better_point_has_not_lost(three, values):
    mine = [one_point(three[0], "a", v, 0.5) for v in (9.6, 9.7)]
    theirs = [one_point(three[0], "b", v, 0.5) for v in values]
    early = compare_results([*mine, *theirs]).wins.iloc[0]
    assert (early["winner"], early["verdict"]) == ("", comparison.OVERLAP)
    none = [one_point(three[0], "b", None, 0.5)] * len(values)
    early = compare_results([*mine, *none]).wins.iloc[0]
    assert (early["winner"], early["verdict"]) == ("", comparison.FEW_STUDIES)
    early = compare_results([*mine * 2, *none * 4]).wins.iloc[0]
    assert (early["winner"], early["verdict"]) == ("a", comparison.ALONE)
    some = [*mine * 2, one_point(three[0], "a", None, 0.5)]  # of which one has none either
    early = compare_results([*some, *none * 4]).wins.iloc[0]
    assert (early["winner"], early["verdict"]) == ("", comparison.OVERLAP)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 2), (2, 2), (3, 3), (3, 4), (3, 5), (4, 4)])
def test_ranges_of_noise_are_apart_as_often_as_is_said(m, n):
    draws = np.random.default_rng(m * 10 + n).standard_normal((20_000, m + n))
    a, b = draws[:, :m], draws[:, m:]
    apart = (a.max(axis=1) < b.min(axis=1)) | (b.max(axis=1) < a.min(axis=1))
    chance = comparison.chance_of_separation(m, n)
    assert apart.mean() == pytest.approx(chance, abs=0.015)
    assert (chance < 0.05) == ((m, n) in [(3, 5), (4, 4)])


@pytest.mark.parametrize("n", [3, 4])
def test_studies_that_differ_by_noise_alone_hardly_ever_win(n):
    """Of small groups none does; of four and four fewer than one comparison of twenty has one."""

    def member(score):
        row = {"label": "#1", "cost": tables.MEASURED, "time_frac": 0.5, "time_spread": 0.001}
        return comparison.Member("", "", None, pd.DataFrame([row | {"quality": score}]))

    rng = np.random.default_rng(n)
    found = []
    for _ in range(80):
        a, b = ([member(score) for score in rng.standard_normal(n)] for _ in range(2))
        found.append(comparison._verdict(a, b, 1.0))
        found.append(comparison._verdict(b, a, 1.0))
    won = found.count(comparison.APART)
    assert won == 0 if n < 4 else won < 0.08 * 80
    assert (comparison.FEW_STUDIES in found) == (n < 4)


def test_single_studies_are_said_to_be_judged_budget_by_budget(three):
    told = str(compare_results([three[0], shifted(three[0], 0.5)]))
    assert "clearly" not in told and "told apart as the lowest score on 100" in told
    assert "over many budgets some are won by chance" in told


def test_a_winner_is_ahead_of_every_other(three):
    """c is third by its median, and can't be told apart from a."""
    a, b = one_point(three[0], "a", 9.51, 0.5), one_point(three[0], "b", 9.61, 0.5)
    c = one_point(three[0], "c", 9.7, 0.5)
    point = c.confirmations[1]
    noisy = replace(point, quality=replace(point.quality, values=(9.0, 9.6, 10.5)))
    c = replace(c, confirmations=(c.confirmations[0], noisy))
    assert compare_results([a, b]).wins.iloc[0]["winner"] == "a"
    assert compare_results([a, b, c]).wins.iloc[0]["winner"] == ""


@pytest.mark.parametrize(("slower", "winner"), [(0.525, "fast"), (0.515, "")])
def test_times_of_unknown_spread_are_told_apart_beyond_two_percent_of_each(three, slower, winner):
    def once(name, time):
        study = one_point(three[0], name, 8.0, time)
        return replace(study, config={**study.config, "confirm": {"time_repeats": 1}})

    found = compare_results([once("fast", 0.5), once("slow", slower)])
    assert found.points["time_spread"].isna().sum() == 2  # of the full networks it is 0
    assert found.wins.iloc[0]["winner"] == winner
    # and a predicted one, of the search
    fast, slow = (replace(three[0], name=name, confirmations=()) for name in ("fast", "slow"))
    factor = slower / 0.5
    late = tuple(
        replace(r, time_frac=r.time_frac * factor) if r.time_frac and r.origin != "full" else r
        for r in slow.records
    )
    wins = compare_results([fast, replace(slow, records=late)]).wins
    assert ("fast" in set(wins["winner"])) == bool(winner)
