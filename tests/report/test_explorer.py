"""What the interactive front is made of: compact, closed, and true to the tables."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from asesearch.report import evidence, explorer, grids, page, tables
from asesearch.score import student_factor
from asesearch.study.importance import Importance


def with_samples(results, images):
    """The full network's samples, and another's that are one grey level brighter."""
    numbers = [r.number for r in results.complete]
    return replace(results, samples={n: images + (n != results.full.number) for n in numbers})


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (10, 3, 12, 9)).astype(np.uint8)


def test_the_data_hold_every_point_and_cannot_end_their_element(study, images):
    results = with_samples(study(10, failed=(7,)), images)
    text = explorer.embedded(replace(results, name="</script><b>"), None)
    assert "<" not in text
    data = json.loads(text)
    assert list(data["kinds"]) == ["confirmed", "search"]
    for kind, found in data["kinds"].items():
        table = tables.points(results, kind)
        assert [p["number"] for p in found["points"]] == table["number"].tolist()
        np.testing.assert_allclose([p["quality"] for p in found["points"]], table["quality"], 1e-5)
        assert found["factor"] == student_factor(3)
        assert set(found["attained"]) == {"best", "median", "worst"}
    assert set(data["trials"]) == {str(r.number) for r in results.complete}
    assert data["full"] == 0 and data["chosen"] == tables.front(results)["number"].iloc[0]
    assert data["trials"]["3"]["command"].endswith("--trial 3")
    assert explorer.embedded(results, 3) == explorer.embedded(results, 3)


def test_weights_off_the_front_are_said_to_be_gone(study):
    results = study(24, failed=())
    front = {r.number for r in results.front()} | {0}
    kept = {number for number, trial in explorer._trials(results).items() if trial["kept"]}
    assert results.config["search"]["keep_weights"] == "front" and kept == front
    search = {**results.config["search"], "keep_weights": "all"}
    everything = replace(results, config={**results.config, "search": search})
    assert all(trial["kept"] for trial in explorer._trials(everything).values())
    assert len(results.complete) == 24 > len(front)


def test_samples_lie_side_by_side_and_differ_as_told(study, images):
    results = with_samples(study(6, failed=()), images)
    strips = json.loads(explorer.embedded(results, None))["images"]
    assert strips["count"] == 8 and len(strips["strips"]) == 6
    one = strips["strips"]["2"]
    assert one["difference"] == pytest.approx(1 / 255, rel=0.01)
    assert strips["strips"]["0"]["difference"] is None
    kind, data = one["src"].split(",")
    assert kind == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    for i in range(8):
        np.testing.assert_array_equal(
            shown[:, 9 * i : 9 * i + 9], results.samples[2][i].transpose(1, 2, 0)
        )


def test_samples_are_made_smaller_until_they_fit(study, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (8, 1, 128, 128)).astype(np.uint8)
    results = with_samples(study(6, failed=()), images)
    monkeypatch.setattr(explorer, "IMAGE_BYTES", 100_000)
    strips = json.loads(explorer.embedded(results, None))["images"]["strips"]
    assert 0 in map(int, strips) and len(strips) >= 2
    (width,) = {
        Image.open(io.BytesIO(base64.b64decode(s["src"].split(",")[1]))).width
        for s in strips.values()
    }
    assert width in (8 * 64, 8 * 32)
    halved = explorer.side_by_side(images[:1], 2)
    assert halved.shape == (64, 64, 1)
    assert halved[0, 0, 0] == round(float(images[0, 0, :2, :2].mean()))


def test_attainment_of_one_repeat_is_none_and_of_three_lies_in_order(study):
    assert evidence.attained(study(8, repeats=1), "search").empty
    table = evidence.attained(study(12), "confirmed")
    ends = table.groupby("level")["quality"].min()
    assert ends["best"] < ends["median"] < ends["worst"]


def test_importance_in_per_cent_with_its_interval(study):
    results = study(4)
    assert evidence.importance(results).empty and grids.importance_grid(results).rows == []
    assert "What each interval is worth" not in page.render_page(results, [])
    worth = Importance(
        "ddim-50", (0, 500, 1000), 14, 28, (np.log(1.1), 0.0), (0.1, 0.1), (0.2, 0.3), 7
    )
    shown = replace(results, importance=worth)
    table = evidence.importance(shown)
    assert table["rise_percent"].tolist() == pytest.approx([10, 0])
    assert table["rise_high"].tolist()[1] == pytest.approx(100 * np.expm1(0.196), rel=1e-3)
    first = grids.importance_grid(shown).rows[0]
    assert first[:2] == ("0 … 500", "+10.0\N{NO-BREAK SPACE}%") and first[3].startswith("20.0")


def test_front_tells_what_each_point_is_not_told_apart_from(study):
    grid = grids.front_grid(study(24), None)
    column = grid.head.index("not told apart from")
    said = {row[0]: row[column] for row in grid.rows}
    for name, others in said.items():  # it holds both ways
        for other in others.split("; "):
            if other in said:
                assert name in said[other].split("; ")
    assert any(text != "none" for text in said.values())
    one = grids.front_grid(study(8, repeats=1), None)
    assert {row[column] for row in one.rows} == {"unknown"}
