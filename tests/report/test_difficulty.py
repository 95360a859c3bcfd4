"""The map's table, figure and files: what is drawn is what was measured."""

import json
from dataclasses import replace
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from asesearch.config import DiffusionConfig
from asesearch.diffusion import make_diffusion
from asesearch.errors import WriteError
from asesearch.report import plots
from asesearch.report.difficulty import (
    draw,
    drawing,
    image_drawing,
    table,
    thresholds,
    too_shallow,
    write_map,
)
from asesearch.report.page import render_page
from asesearch.report.style import SMALL, STYLE
from asesearch.study.difficulty import TABLES, DifficultyMap

DEPTH = 6
BINS = 5


def make(full=None, weights="cd"):
    """Errors that fall towards noise and with depth, to 0 at full depth."""
    depths = np.arange(1, DEPTH + 1)
    bins = np.arange(BINS)[:, None]
    full = (
        10.0 ** (-0.4 * bins - 0.5 * depths) * (depths < DEPTH)
        if full is None
        else np.asarray(full)
    )
    edges = tuple(i * 1000 // len(full) for i in range(len(full) + 1))
    tables = [
        tuple(map(tuple, values.tolist())) for values in (full, 0.1 * full, full + 0.01, 0.2 * full)
    ]
    return DifficultyMap(1000, edges, *tables, 8, "dark", "ab", weights, "cd")


def test_the_table_is_the_map_in_long_form():
    found = make()
    data = table(found)
    assert (
        list(data.columns) == ["t_from", "t_to", "exit_depth", *TABLES]
        and len(data) == DEPTH * BINS
    )
    row = data.iloc[2 * DEPTH + 3]
    assert (row["t_from"], row["t_to"], row["exit_depth"]) == (400, 600, 4)
    assert [row[name] for name in TABLES] == [getattr(found, name)[2][3] for name in TABLES]


@pytest.mark.parametrize("process", ["discrete", "vp-sde"])
def test_the_same_as_an_error_of_the_image(process):
    """What the loss of the noise hides near noise: the same prediction, in two units."""
    config = DiffusionConfig(process=process)
    shown = image_drawing(make(), config.model_dump())
    diffusion = make_diffusion(config)
    data = shown.data.set_index(["t_from", "exit_depth"])["error_image"]
    noise = table(make()).set_index(["t_from", "exit_depth"])["error_full"]
    for t_from in (0, 400, 800):
        t = torch.tensor([t_from + 99], dtype=diffusion.time_dtype)
        t = t if process == "discrete" else t + 0.5
        eps = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        wrong = eps + float(noise[t_from, 2]) ** 0.5
        x_t = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        images = [
            (x_t - diffusion.sigma(t).item() * e) / diffusion.alpha(t).item() for e in (eps, wrong)
        ]
        expected = float((images[0] - images[1]).square())
        assert data[t_from, 2] == pytest.approx(expected, rel=1e-6)
    assert data[800, 2] > data[400, 2] > noise[400, 2] and "near noise" in shown.caption
    (mesh,) = shown.draw().axes[0].collections
    assert mesh.get_array().max() == pytest.approx(data.max())
    assert image_drawing(None, config.model_dump()) is None and image_drawing(make(), None) is None


def test_the_figure_shows_the_errors_and_its_lines_bound_them():
    data = table(make())
    errors = data.pivot(index="exit_depth", columns="t_from", values="error_full").to_numpy()
    ax, bar = draw(data).axes
    (mesh,) = ax.collections
    assert np.array_equal(mesh.get_array().filled(0.0), errors)
    assert mesh.norm.vmin == errors[errors > 0].min() and mesh.norm.vmax == errors.max()
    assert (
        "0 = data" in ax.get_xlabel()
        and "exit depth" in ax.get_ylabel()
        and "log scale" in bar.get_ylabel()
    )
    numbers = [text for text in ax.texts if text.get_text() != "no error"]
    lines = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    assert len(numbers) == len(lines) == len(thresholds(errors)) == 3
    for text, line in zip(numbers, lines, strict=True):
        threshold = float(text.get_text())
        heights, edges, _ = line.get_data()
        assert list(edges) == [0, 200, 400, 600, 800, 1000]
        for column, height in zip(errors.T, heights, strict=True):
            above = [d for d in range(1, DEPTH + 1) if column[d - 1] > threshold]
            assert (height < 0.5) if not above else (height == max(above) + 0.5)
        x, y = text.get_position()
        assert y == heights[int(x // 200)]  # the number lies on its line
    (exact,) = [text for text in ax.texts if text.get_text() == "no error"]
    assert exact.get_position() == (500, DEPTH)


def test_thresholds_are_round_and_within_the_errors():
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1e-3, 1.0, 300.0):
        errors = scale * np.exp(rng.normal(0, 2, (12, 20)))
        found = thresholds(errors)
        assert (
            1 <= len(found) <= 3
            and found == sorted(found)
            and errors.min() < found[0] <= found[-1] < errors.max()
        )
        assert all(f"{v:e}"[:8] in ("1.000000", "2.000000", "5.000000") for v in found)
    assert thresholds(np.zeros((3, 4))) == [] and thresholds(np.full((3, 4), 0.3)) == []


def test_the_deepest_exit_above_a_threshold():
    # (depth, bins); not monotone
    errors = np.array([[0.9, 0.1, 0.9], [0.1, 0.1, 0.9], [0.3, 0.1, 0.9]])
    assert too_shallow(errors, 0.2).tolist() == [3, 0, 3]
    assert too_shallow(errors, 0.5).tolist() == [1, 0, 3]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "full",
    [
        np.zeros((4, 3)),
        [[0.3]],
        [[0.0]],
        np.full((2, 3), 1e-5),
        [[1.0, 0.0], [0.0, 0.0]],
        np.eye(40, 28) * 7e3,
    ],
)
def test_odd_maps_can_be_drawn(full, tmp_path):
    """An untrained DiT gives the same at every exit."""
    found = make(full)
    write_map(found, tmp_path)
    assert DifficultyMap.from_dict(json.loads((tmp_path / "map.json").read_text())) == found


def test_an_error_is_told_from_none_by_more_than_its_colour():
    ax = draw(table(make(np.zeros((4, 3))))).axes[0]
    assert [text.get_text() for text in ax.texts] == ["no error"] and ax.get_facecolor() == to_rgba(
        "0.85"
    )


@pytest.mark.thorough
def test_files_are_whole_equal_and_readable(tmp_path):
    files = write_map(make(), tmp_path / "new/map")
    assert [f.name for f in files] == ["map.csv", "map.png", "map.svg", "map.json"]
    assert sorted(files) == sorted((tmp_path / "new/map").iterdir())  # nothing temporary is left
    assert files[1].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[2].read_bytes()[:1000]
    assert np.allclose(pd.read_csv(files[0]).to_numpy(), table(make()).to_numpy(), rtol=1e-12)
    again = write_map(make(), tmp_path / "again")
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]
    other = write_map(make(np.full((2, 3), 0.1)), tmp_path / "again")
    assert other[0].read_bytes() != files[0].read_bytes()


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WriteError, match="can't write to .*choose a folder"):
        write_map(make(), tmp_path / "file")


def test_the_caption_says_what_the_error_is_counted_from():
    own = drawing(make())
    tuned = drawing(make(weights="other"))
    assert (
        "against its own full-depth" in own.caption
        and "against the pretrained network's full-depth" in tuned.caption
    )
    assert own.name == "difficulty" and drawing(None) is None


ODD = {
    "usual": np.exp(-6 * np.linspace(0, 1, 10)[:, None] - np.arange(28) / 7),
    "one bin": np.exp(-np.arange(4.0))[None],
    "two by two": [[0.14, 0.0], [3e-4, 0.0]],
    "far apart": [[1e-9, 1e3]],
    "close together": np.tile(10.0 ** (-0.1 * np.arange(12) - 3 * (np.arange(12) > 5)), (20, 1)),
}


@pytest.mark.parametrize("name", ODD)
def test_numbers_are_readable_and_apart(name):
    with matplotlib.rc_context(STYLE):
        figure = draw(table(make(ODD[name])))
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        ax = figure.axes[0]
        numbers = [text for text in ax.texts if text.get_text() != "no error"]
        boxes = [text.get_window_extent(renderer) for text in numbers]
    # no line without its number
    assert numbers and len(numbers) == sum(isinstance(patch, StepPatch) for patch in ax.patches)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= SMALL
    low, high = figure.axes[1].get_ylim()
    # the colour bar can be read
    assert any(low <= tick <= high for tick in figure.axes[1].get_yticks())


def test_a_report_shows_the_map_where_there_is_one(study, tmp_path):
    results = study(3, confirm=False)
    assert "difficulty" not in {d.name for d in plots.drawings(results)}
    assert "difficulty" not in render_page(results, [])
    (shown,) = [
        d for d in plots.drawings(replace(results, difficulty_map=make())) if d.name == "difficulty"
    ]
    pd.testing.assert_frame_equal(shown.data, table(make()))
    page = render_page(results, [(shown, shown.save(tmp_path))])
    assert page.count('href="#difficulty"') == page.count('<section id="difficulty">') == 1
    assert shown.caption in page and 'href="figures/difficulty.csv"' in page
