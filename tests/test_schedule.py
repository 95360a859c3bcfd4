"""ExitSchedule: rules, queries, text forms."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asesearch.errors import ScheduleError
from asesearch.schedule import (
    PUBLISHED,
    ElasticDepths,
    ExitSchedule,
    read_schedule,
    schedule_from_text,
)


@st.composite
def schedules(draw):
    depth = draw(st.integers(1, 30))
    chain = draw(st.integers(10, 1000))
    inner = draw(st.lists(st.integers(1, chain - 1), max_size=8, unique=True))
    bounds = (0, *sorted(inner), chain)
    depths = draw(
        st.lists(st.integers(1, depth), min_size=len(bounds) - 1, max_size=len(bounds) - 1)
    )
    return ExitSchedule(depth, chain, bounds, tuple(depths))


@given(schedules())
def test_json_round_trip_and_hash(schedule):
    again = ExitSchedule.from_json(schedule.to_json())
    assert again == schedule and hash(again) == hash(schedule)


@given(schedules(), st.data())
def test_exit_depth_at_agrees_with_the_definition(schedule, data):
    t = data.draw(st.integers(0, schedule.num_train_timesteps - 1))
    expected = next(
        d for d, end in zip(schedule.exit_depths, schedule.boundaries[1:], strict=True) if t < end
    )
    assert schedule.exit_depth_at(t) == expected
    assert schedule.exit_depth_at(np.full((2, 3), t)).tolist() == [[expected] * 3] * 2


@given(schedules())
def test_merged_is_the_same_function_and_canonical(schedule):
    merged = schedule.merged()
    t = np.arange(schedule.num_train_timesteps)
    assert (merged.exit_depth_at(t) == schedule.exit_depth_at(t)).all()
    assert merged.merged() == merged
    assert all(a != b for a, b in zip(merged.exit_depths, merged.exit_depths[1:], strict=False))


@given(schedules(), st.integers(1, 40))
def test_rescaling_keeps_order_and_range(schedule, depth):
    rescaled = schedule.rescaled(depth)
    assert (
        rescaled.depth == depth
        and min(rescaled.exit_depths) >= 1
        and max(rescaled.exit_depths) <= depth
    )
    assert not schedule.is_noise_easy or rescaled.is_noise_easy
    assert schedule.rescaled(schedule.depth) == schedule


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_are_noise_easy_and_of_ten_intervals(name):
    schedule = ExitSchedule.published(name)
    assert (
        schedule.is_noise_easy
        and len(schedule.exit_depths) == 10
        and schedule.num_train_timesteps == 1000
    )
    assert ExitSchedule.from_string(name) == schedule


@pytest.mark.parametrize(
    ("name", "frac"),
    [("D2-DiT", 220 / 280), ("D3-DiT", 200 / 280), ("D4-DiT", 182 / 280), ("D7-DiT", 170 / 280)],
)
def test_block_frac_of_the_paper_schedules(name, frac):
    """The bound behind the paper's speed-ups: D3 1.40x, D4 1.54x."""
    schedule = ExitSchedule.published(name)
    assert schedule.block_frac() == pytest.approx(frac, abs=1e-12)
    assert schedule.block_calls([0, 999]) == schedule.exit_depths[0] + schedule.exit_depths[-1]


def test_d3_rescaled_to_twelve_blocks():
    assert str(ExitSchedule.published("D3-DiT", depth=12)) == "12 12 10 10 9 9 7 7 5 5"


def test_full_is_the_whole_network():
    full = ExitSchedule.full(12)
    assert full.is_full and full.is_noise_easy and full.block_frac() == 1.0
    assert not ExitSchedule.from_string("12 11", 12).is_full
    assert ExitSchedule.from_string(" full ", 12) == full


def test_data_easy_is_not_noise_easy():
    assert not ExitSchedule.from_string("4 8 12", 12).is_noise_easy


def test_string_forms():
    schedule = ExitSchedule.from_string("12, 9 6 3", depth=28)
    assert (
        schedule.exit_depths == (12, 9, 6, 3)
        and schedule.depth == 28
        and schedule.boundaries == (0, 250, 500, 750, 1000)
    )
    assert str(schedule) == "12 9 6 3"
    assert str(ExitSchedule(4, 10, (0, 3, 10), (4, 2))) == "4 2 @ 0 3 10"
    unequal = ExitSchedule(12, 1000, (0, 300, 1000), (12, 9))
    for text in ("12 9 @ 0 300 1000", "12,9@0,300,1000", "  12 9 @\t0 300 1000\n"):
        assert ExitSchedule.from_string(text, 12) == unequal


@given(schedules())
def test_what_is_printed_reads_back(schedule):
    again = ExitSchedule.from_string(str(schedule), schedule.depth, schedule.num_train_timesteps)
    assert again == schedule


@pytest.mark.parametrize("text", ["5 4 4", "12 9 @ 0 300 1000", "full"])
def test_a_depth_that_is_not_known_is_not_guessed(text):
    with pytest.raises(ScheduleError, match=rf"needs the depth .*; got '{text}' alone; give depth"):
        ExitSchedule.from_string(text)
    assert ExitSchedule.from_string(text, depth=12).depth == 12


BAD = [
    (
        lambda: ExitSchedule(4, 1000, (0, 1000), (5,)),
        "must lie in 1…4 (the depth of the network); got 5; lower it",
    ),
    (
        lambda: ExitSchedule(4, 1000, (0, 1000), (0,)),
        "must lie in 1…4 (the depth of the network); got 0; raise it",
    ),
    (lambda: ExitSchedule.from_string("0", 4), "got 0; raise it"),
    (lambda: ExitSchedule.uniform_intervals([-1], 4), "got -1; raise it"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (4, 4)), "one entry more"),
    (lambda: ExitSchedule(4, 1000, (0, 500, 500, 1000), (4, 3, 2)), "strictly increase"),
    (lambda: ExitSchedule(4, 1000, (0, 999), (4,)), "from 0 to num_train_timesteps = 1000"),
    (lambda: ExitSchedule(4, 1000, (1, 1000), (4,)), "from 0"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), ()), "must not be empty"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (3.5,)), "integers"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (True,)), "integers"),
    (lambda: ExitSchedule(0, 1000, (0, 1000), (1,)), "depth must be at least 1"),
    (lambda: ExitSchedule.from_string("D9-DiT"), "published names are D2-DiT"),
    (lambda: ExitSchedule.from_string("", 4), "integers"),
    (lambda: ExitSchedule.from_string("12 -3"), "integers"),
    (lambda: ExitSchedule.from_string("１２", 12), "integers"),
    (lambda: ExitSchedule.from_string("@", 12), "integers"),
    (lambda: ExitSchedule.from_string("12 9 @ 0 300 1000 @", 12), "integers"),
    (lambda: ExitSchedule.from_string("12 9 @ 0 300", 12), "2 boundaries for 2 exit_depths"),
    (
        lambda: ExitSchedule.from_string("12 9 @ 0 300 500", 12),
        "from 0 to num_train_timesteps = 1000",
    ),
    (lambda: ExitSchedule.from_string("12 9 6 @ 0 300 300 1000", 12), "300 before 300"),
    (lambda: ExitSchedule.from_string("12 " * 1001, 12), "got 1001 intervals"),
    (lambda: ExitSchedule.from_string("1" * 5000, 12), "(5000 characters)"),
    (lambda: ExitSchedule(10**5000, 1000, (0, 1000), (1,)), "below 10^9"),
    (lambda: ExitSchedule.uniform_intervals([1], 1, 10**5000), "below 10^9"),
    (lambda: ExitSchedule.from_string("28 28", depth=12), "rescale the schedule"),
    (lambda: ExitSchedule.published("D9"), "unknown published schedule"),
    (lambda: ExitSchedule.full(4).exit_depth_at(1000), "timesteps must lie in [0, 1000)"),
    (lambda: ExitSchedule.full(4).exit_depth_at(float("nan")), "timesteps must lie in"),
    (lambda: ExitSchedule.full(4).block_frac([]), "must not be empty"),
    (lambda: ExitSchedule.from_json("{"), "must be JSON"),
    (lambda: ExitSchedule.from_json("[]"), "JSON object"),
    (lambda: ExitSchedule.from_json('{"format": "x"}'), "format must be"),
]


@pytest.mark.parametrize(("make", "rule"), BAD, ids=range(len(BAD)))
def test_broken_rules_are_named(make, rule):
    with pytest.raises(ScheduleError) as caught:
        make()
    assert rule in str(caught.value) and "got" in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"version": 1.0},
        {"depth": 4.0},
        {"depth": "4"},
        {"extra": 1},
        {"depth": None},
        {"exit_depths": "4"},
        {"boundaries": [0, "x"]},
        {"depth": 3},
    ],
)
def test_a_changed_file_is_refused(change):
    data = {**ExitSchedule.full(4).to_dict(), **change}
    with pytest.raises(ScheduleError):
        ExitSchedule.from_json(json.dumps(data))


def test_is_frozen():
    with pytest.raises(AttributeError):
        ExitSchedule.full(4).depth = 3


@pytest.mark.parametrize("law", ["uniform", "noise-easy"])
def test_elastic_depths_cover_their_range_by_their_law(law):
    depths = ElasticDepths(12, 1000, 3, law, full_frac=0.25)
    u = (np.arange(4000) + 0.5) / 4000
    near_data = depths.draw(np.full(4000, 10), u)
    near_noise = depths.draw(np.full(4000, 990), u)
    assert set(near_data) == set(near_noise) == set(range(3, 13))
    for drawn in (near_data, near_noise):
        assert (drawn == 12).mean() == pytest.approx(
            0.25 + 0.75 * (drawn[u < 0.75] == 12).mean(), abs=1e-3
        )
    if law == "uniform":
        counts = np.bincount(near_noise[u < 0.75], minlength=13)[3:]
        assert np.array_equal(near_data, near_noise) and counts.max() - counts.min() <= 1
    else:
        assert near_data.mean() > near_noise.mean() + 2


def test_elastic_depths_know_their_limits():
    for depth, fix in ((13, "lower it"), (0, "raise it")):
        rule = f"min_exit_depth must lie in 1…12; got {depth}; {fix}"
        with pytest.raises(ScheduleError, match=rule):
            ElasticDepths(12, 1000, depth)
    assert ElasticDepths(12, 1000, full_frac=1.0).is_full and not ElasticDepths(12, 1000).is_full
    assert (ElasticDepths(12, 1000, full_frac=1.0).draw([0, 999], [0.0, 0.999]) == 12).all()


# -- files -----------------------------------------------------------------------------------------

UNEQUAL = ExitSchedule(12, 1000, (0, 300, 1000), (12, 9))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_schedule_file_is_read_in_any_marked_encoding(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_text(UNEQUAL.to_json(), encoding=encoding)
    assert read_schedule(path, 12) == UNEQUAL


def test_plain_depths_in_a_file(tmp_path):
    path = tmp_path / "x.json"
    for content in ("[12, 9]", '"12 9"', '"12 9 @ 0 500 1000"'):
        path.write_text(content)
        assert read_schedule(path, 12) == ExitSchedule(12, 1000, (0, 500, 1000), (12, 9))


JSON = UNEQUAL.to_json()
BAD_FILES = [
    (JSON.encode("utf-16-be"), "UTF-16 without a byte order mark"),
    (b"[12, \xe9]", "line 1 is not in UTF-8"),
    (b"\x00\x80\xff", "is not text"),
    (b"", "must be JSON; got ''"),
    (b"12", "plain depths"),
    (b"{}", "plain depths"),
    (b"null", "plain depths"),
    (b"[12.0]", "must be integers; got 12.0"),
    (b"[true]", "must be integers; got True"),
    (b"[NaN]", "must be integers; got nan"),
    (b'["12"]', "must be integers; got '12'"),
    (b"[]", "must not be empty"),
    (b"[" + b"12," * 1000 + b"12]", "1001 intervals"),
    (b"[" * 100_000, "nested too deep"),
    (b"[" * 500 + b"]" * 500, "must be integers"),
    (b"[" + b"9" * 5000 + b"]", "an integer is too long"),
    (b"[" + b"9" * 4000 + b"]", "below 10^9"),
    (JSON.replace("12", "28").encode(), "got a schedule for 28 and 1000"),
    (JSON.replace("1000", "500").encode(), "12 and 500"),
    (b'{"format": "asesearch.bundle", "version": 1}', "got 'asesearch.bundle'"),
    (
        JSON.replace('"version": 1', '"version": "1"').encode(),
        "version must be an integer; got '1'",
    ),
    (
        JSON.replace('"version": 1', '"version": 2').encode(),
        "reads version 1 of the schedule format",
    ),
    (JSON.replace('"depth"', '"depth": 28, "depth"').encode(), "it has the key 'depth' twice"),
]


@pytest.mark.parametrize(("content", "reason"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_holds_no_schedule_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as caught:
        read_schedule(path, 12)
    said = str(caught.value)
    assert reason in said and said.count("x.json") == 1 and "\n" not in said and len(said) < 500


def test_a_file_for_another_network_is_told_what_to_change(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(UNEQUAL.to_json())
    ends, depth = r"write its boundaries for 4 timesteps", r"rescale it: .*\.rescaled\(9\)"
    for network, fix in (((12, 4), ends), ((9, 1000), depth), ((9, 4), f"{depth}, and {ends}")):
        with pytest.raises(ScheduleError, match=rf"for 12 and 1000'?; {fix}$"):
            read_schedule(path, *network)


def test_a_path_that_is_no_file(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no.json", "No such file")):
        with pytest.raises(ScheduleError, match=reason):
            read_schedule(path, 12)


# -- file names ------------------------------------------------------------------------------------


@st.composite
def long_schedules(draw):
    """Schedules of 12 blocks and 1,000 timesteps with up to 1,000 intervals."""
    seed = draw(st.integers(0, 2**32))
    count = draw(st.integers(1, 1000))
    rng = np.random.default_rng(seed)
    inner = np.sort(rng.choice(np.arange(1, 1000), count - 1, replace=False)).tolist()
    return ExitSchedule(12, 1000, (0, *inner, 1000), tuple(rng.integers(1, 13, count).tolist()))


@given(long_schedules())
def test_a_slug_fits_every_file_system(schedule):
    slug = schedule.slug
    assert 0 < len(slug.encode()) <= 100 and re.fullmatch(r"[0-9a-z_-]+", slug)
    assert slug == schedule.merged().slug and slug.startswith(f"{schedule.exit_depths[0]}")


@given(long_schedules(), st.data())
def test_another_schedule_has_another_slug(schedule, data):
    """Also where only the last interval differs, which the readable part of a long name leaves
    out."""
    count = len(schedule.exit_depths)
    place = data.draw(st.sampled_from([0, count // 2, count - 1]))
    depths = list(schedule.exit_depths)
    depths[place] = depths[place] % 12 + 1
    other = ExitSchedule(12, 1000, schedule.boundaries, tuple(depths))
    assert other.slug != schedule.slug


def test_slugs_of_studies_on_disk_are_what_they_were():
    assert ExitSchedule.from_string("12 12 9 6", 12).slug == "12-9-6_at_500-750"
    assert ExitSchedule.full(12).slug == "12"
    lengths = {len(ExitSchedule.uniform_intervals([2, 1] * n, 2).slug) for n in range(1, 60)}
    assert max(lengths) == 100


def test_a_text_is_a_file_by_its_suffix(tmp_path):
    path = tmp_path / "SCHEDULE.JSON"
    path.write_text("[3, 2, 1]")
    assert schedule_from_text(str(path), 3) == schedule_from_text("3 2 1", 3)
    with pytest.raises(ScheduleError, match="can't read"):
        schedule_from_text("nowhere.json", 3)
