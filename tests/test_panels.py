from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from mri_posterior.errors import UserError
from mri_posterior.panels import PanelImages, panel_title, write_panel


@pytest.fixture
def panel():
    random = np.random.default_rng(0)
    mean, samples = random.uniform(0, 1e-5, (30, 20)), random.uniform(0, 1e-5, (3, 30, 20))
    std = samples.std(axis=0)
    return PanelImages(mean, mean, std, 4 * std, list(samples), panel_title("a.h5", 3, 3, 4.0), level=0.9)


def test_a_panel_is_one_whole_png(panel, tmp_path):
    write_panel(tmp_path / "new" / "a.png", panel)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    picture = imread(tmp_path / "new" / "a.png")
    assert picture.shape[1] > 6 * 200  # six columns
    assert picture[..., :3].max() == 1


def test_the_same_panel_gives_the_same_bytes(panel, tmp_path):
    write_panel(tmp_path / "a.png", panel)
    write_panel(tmp_path / "b.png", panel)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_target_adds_two_columns(panel, tmp_path):
    write_panel(tmp_path / "a.png", panel)
    write_panel(tmp_path / "b.png", replace(panel, target=panel.mean * 1.1))
    without, with_target = (imread(tmp_path / f"{name}.png").shape[1] for name in "ab")
    assert with_target / without == pytest.approx(8 / 6, abs=0.01)


@pytest.mark.parametrize("simulated", [False, True])
def test_simulated_data_are_marked_in_colour(panel, tmp_path, simulated):
    write_panel(tmp_path / "a.png", replace(panel, simulated=simulated))
    title = imread(tmp_path / "a.png")[:60, :, :3]
    coloured = np.ptp(title, axis=-1) > 0.5  # the title itself is white on black
    assert coloured.any() == simulated


def test_magnitudes_share_one_window(panel, tmp_path):
    """Equal values are equally bright in every magnitude image."""
    ramp = np.tile(np.linspace(0, 1, 20), (30, 1))
    drawn = replace(panel, zero_filled=ramp / 2, mean=ramp, samples=[ramp, ramp / 2])
    write_panel(tmp_path / "a.png", drawn)
    picture = imread(tmp_path / "a.png")[..., 0]
    middle = picture[picture.shape[0] // 2]
    columns = np.array_split(middle, 6)
    zero_filled, mean, sample_1, sample_2 = (columns[i].max() for i in (0, 1, 4, 5))
    assert mean == sample_1 == pytest.approx(1, abs=0.02)
    assert zero_filled == sample_2 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("value", [0.0, 3e4, 1e-30])
def test_flat_images_draw(panel, tmp_path, value):
    flat = np.full((30, 20), value, dtype=np.float32)
    write_panel(tmp_path / "a.png", replace(panel, zero_filled=flat, mean=flat, std=flat, width=flat, target=flat))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_place_that_cannot_be_written_is_the_users_mistake(panel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_panel(tmp_path / "file" / "a.png", panel)


def test_titles_name_what_is_shown_and_stay_short():
    assert panel_title("a.h5", 3, 8, 4) == "a.h5, slice 3 · 8 samples · acceleration 4.0"
    assert len(panel_title("x" * 200 + ".h5", 3, 8, 4)) < 100
